"""What does a whole training step cost: plain LoRA, input-level fusion, FLARE as its authors run it, this package?

Forward, backward and AdamW on random weights; the methods are described in models.py. XLM-R Large whole; the big
models at the depth that fits the device's memory with every method (in the row). bf16 on a GPU, float32 on a CPU; the
adapters have the model's dtype, which favours the eager rows: PEFT's default of float32 adapters costs them more (see
test_projection.py). "theory" in a row is the frozen model's arithmetic over plain LoRA's (models.UNITS), without
adapters, head and attention's m^2; a row that runs more blocks than its method needs fails. Input-level fusion
computes the logits of all 2m positions, as transformers does when it is given labels. mT5 reads both texts in its
encoder, with m / 4 target tokens in its decoder. On a GPU captured and compiled steps stand beside these
(fast_steps.py), and every row has the time in which the device was busy.
"""

from __future__ import annotations

from typing import Any

import pytest
import shapes
from fast_steps import methods_of
from models import METHODS
from steps import build, effort

CONDITIONS = (
    "forward + backward + AdamW, LoRA on query and value, random weights, full rows, no checkpointing, "
    "source read anew in every step (flare-warm: from a cache on the device)"
)


@pytest.mark.parametrize("variant", (*METHODS, *methods_of("step")))
@pytest.mark.parametrize("shape", shapes.steps(shapes.grid()), ids=lambda s: s.case)
def test_training_step(compare: Any, shape: shapes.StepShape, variant: str, device: Any) -> None:
    compare(shape, variant, lambda: build(shape, device), CONDITIONS, queue_ahead=False, how=effort(device))
