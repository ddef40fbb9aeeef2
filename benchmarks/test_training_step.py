"""What does a whole training step cost: plain LoRA, input-level fusion, FLARE as its authors run it, this package?

Forward, backward and AdamW on random weights; the methods are described in models.py, those over Liger's kernels in
liger.py, captured and compiled ones in fast_steps.py. XLM-R Large whole, Llama at 8 blocks of 32, in the full grid the
big models at the depth that fits the device's memory with every method (in the row). Full rows without a mask, and
padded ones as data have them (batches.py). bf16 on a GPU, float32 on a CPU; the adapters have the model's dtype, which
favours the eager rows: PEFT's default of float32 adapters costs them more (see test_projection.py).

Every row says how long a user waits (wall), how long the host is at it, how long the device is busy, and how many
kernels and copies it runs. "theory" is the frozen model's arithmetic over plain LoRA's (models.UNITS), without
adapters, head and attention's m^2; a row that runs more blocks than its method needs fails. The row frozen runs no
optimizer, and has the seconds of one frozen block. Input-level fusion computes the logits of all 2m positions, as
transformers does when it is given labels. mT5 reads both texts in its encoder, with m / 4 target tokens in its decoder.
"""

from __future__ import annotations

from typing import Any

import pytest
import shapes
from steps import build, effort, methods_of

CONDITIONS = (
    "forward + backward + AdamW, LoRA on query and value, random weights, no checkpointing, full rows without a mask "
    "(padded: 3/8 pads, masks given), source read anew in every step (flare-warm: from a cache on the device)"
)
_CASES = [(shape, variant) for shape in shapes.steps(shapes.grid()) for variant in methods_of(shape)]


@pytest.mark.parametrize(("shape", "variant"), _CASES, ids=[f"{shape.case}-{variant}" for shape, variant in _CASES])
def test_training_step(compare: Any, shape: shapes.StepShape, variant: str, device: Any) -> None:
    compare(shape, variant, lambda: build(shape, device), CONDITIONS, queue_ahead=False, how=effort(device))
