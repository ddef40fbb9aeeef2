"""The baselines of the paper, on the same kernels and with the same trainer as FLARE.

- Plain LoRA (:func:`plain_lora`): no source.
- Input-level fusion (:func:`input_fusion` with :class:`InputFusionCollator`): plain LoRA on one text, the source
  followed by the target.
- X-Mixup (:func:`x_mixup`): both texts run through one model, which mixes their hidden states at one block. Further
  losses make the predictions and representations of the two texts agree.

    model = flare.baselines.plain_lora(model, r=64)
    flare.FlareTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
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
