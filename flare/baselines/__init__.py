"""The paper's comparisons, on the same kernels, collators and trainer as FLARE, so that a comparison is fair.

- Plain LoRA (:func:`plain_lora`): no source at all.
- Input-level fusion (:func:`input_fusion` with :class:`InputFusionCollator`): source and target as one text of up to 2m
  tokens, read by plain LoRA.
"""

from .input_level import InputFusionCollator, input_fusion, max_positions
from .lora import plain_lora

__all__ = ["InputFusionCollator", "input_fusion", "max_positions", "plain_lora"]
