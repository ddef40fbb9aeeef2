"""Models and comparisons for the tests of decoding steps that run source and target in one shared pass."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from generating import TOLERANCE, fused, generated

from flare.experiments.measure import count_calls

L = tiny.LAYERS


def zero_offset(family: str = "llama", **options: Any) -> Any:
    return fused(family, source_layer_offset=0, **options)


def both_ways(model: Any, inputs: dict, new: int = 6, seed: int = 0, **options: Any) -> dict[str, tuple]:
    """Generate with source_pass="separate" and "shared", and assert that sequences and logits are equal.

    Return source_pass -> (sequences, logits, number of block executions).
    """
    results = {}
    for way in ("separate", "shared"):
        torch.manual_seed(seed)
        with count_calls(tiny.block_list(model.get_base_model())) as calls:
            sequences, logits = generated(model, inputs, new, source_pass=way, **options)
        results[way] = (sequences, logits, calls.total)
    assert torch.equal(results["shared"][0], results["separate"][0])
    torch.testing.assert_close(results["shared"][1], results["separate"][1], **TOLERANCE)
    return results
