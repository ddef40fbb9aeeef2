"""What does one transformer block cost, forward and backward, with and without a source?

The model has one block of the real transformers classes, random weights, and a vocabulary of at most 1,024, so that
embedding and head cost almost nothing. Gradients reach the block's input, as inside a deep model. FLARE first runs the
frozen block on the source text (flare-warm reads the source states from a cache). Input-level fusion reads source and
target as one text of 2m tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import shapes
from steps import build, effort, methods_of

CONDITIONS = (
    "forward + backward of a one-block model, LoRA on query and value (except in frozen), random weights, full rows, "
    "no checkpointing"
)
_CASES = [(shape, variant) for shape in shapes.blocks(shapes.grid()) for variant in methods_of(shape)]


@pytest.mark.parametrize(("shape", "variant"), _CASES, ids=[f"{shape.case}-{variant}" for shape, variant in _CASES])
def test_block(compare: Any, shape: shapes.StepShape, variant: str, device: Any) -> None:
    compare(shape, variant, lambda: build(shape, device), CONDITIONS, queue_ahead=False, how=effort(device))
