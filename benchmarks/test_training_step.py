"""What does a whole training step cost: plain LoRA, input-level fusion, FLARE as its authors run it, this package?

A step is forward, backward and AdamW on random weights. Eager methods are described in models.py, methods on Liger's
kernels in liger.py, captured and compiled methods in fast_steps.py. The grid ``main`` has all blocks of XLM-R Large and
8 of the 32 blocks of Llama. The grid ``full`` has more models, each with as many blocks as every method can run in the
device's memory. The grid ``tiny`` has small models. Each row of the results states the depth. Texts are full, without
a mask, or padded (batches.py). The dtype is bf16 on a GPU and float32 on a CPU. The adapters have the model's dtype,
which favours PEFT's layers: PEFT's default of float32 adapters is slower (see test_projection.py).

Every row has wall time and host time, and on a GPU also device-busy time and the number of kernels and copies. "theory"
is the expected time divided by the expected time of plain LoRA (models.UNITS). It counts the arithmetic of the frozen
blocks; adapters, head and the quadratic part of attention are not counted. A row is marked as wrong if its gradients
are wrong, or if an eager method runs another number of blocks than expected. The method ``frozen`` has no optimizer
step; its row also has the seconds of one frozen block. Input-level fusion computes the logits of all 2m positions, as
transformers does if labels are given. In all methods for mT5, the encoder reads the texts, and the decoder has m / 4
tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import shapes
from steps import build, effort, methods_of

CONDITIONS = (
    "forward + backward + AdamW (frozen: no AdamW), LoRA on query and value (except in frozen), random weights, no "
    "checkpointing, full rows without a mask (padded: 3/8 pads, masks given), source pass in every step of FLARE "
    "(flare-warm: source states from a cache on the device)"
)
_CASES = [(shape, variant) for shape in shapes.steps(shapes.grid()) for variant in methods_of(shape)]


@pytest.mark.parametrize(("shape", "variant"), _CASES, ids=[f"{shape.case}-{variant}" for shape, variant in _CASES])
def test_training_step(compare: Any, shape: shapes.StepShape, variant: str, device: Any) -> None:
    compare(shape, variant, lambda: build(shape, device), CONDITIONS, queue_ahead=False, how=effort(device))
