"""The paper's comparisons, on the same kernels, collators and trainer as FLARE, so that a comparison is fair.

- Plain LoRA (:func:`plain_lora`): no source at all.
- Input-level fusion (:func:`input_fusion` with :class:`InputFusionCollator`): source and target as one text of up to 2m
  tokens, read by plain LoRA.
- X-Mixup (:func:`x_mixup`): both texts through one model, mixed at one block, with consistency losses.
"""

from .input_level import InputFusionCollator, input_fusion, max_positions
from .lora import plain_lora
from .mixup import XMixupConfig, load_x_mixup, x_mixup

__all__ = [
    "InputFusionCollator",
    "XMixupConfig",
    "input_fusion",
    "load_x_mixup",
    "max_positions",
    "plain_lora",
    "x_mixup",
]
