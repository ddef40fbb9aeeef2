"""How does the cost of a step grow with the text's length m, the batch, the rank and the depth?

Each case changes one of these sizes of a base case. The methods are described in models.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import shapes
from steps import SCALED, build, effort
from test_training_step import CONDITIONS


@pytest.mark.parametrize("variant", SCALED)
@pytest.mark.parametrize("shape", shapes.scaling(shapes.grid()), ids=lambda s: s.case)
def test_scaling(compare: Any, shape: shapes.StepShape, variant: str, device: Any) -> None:
    compare(shape, variant, lambda: build(shape, device), CONDITIONS, queue_ahead=False, how=effort(device))
