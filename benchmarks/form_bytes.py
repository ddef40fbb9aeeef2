"""Bytes that a form of a step moves through memory at least, told from the launches that it would make.

A launch reads or writes each of its tensors once; the partial sums of a split sum are written and read again, whether
a second launch adds them or the last program of the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flare_kernels.launch_mode import forcing, recording
from flare_kernels.tuning.problem import Problem

_SHARED_BYTES = 227 * 1024


def launches(problem: Problem, form: str, **tiles: Any) -> list[Any]:
    """Return what a step launches in a form, with the general rule's tiles of a large card or those given."""
    from flare_kernels.triton_ops.primitives import tuned

    inputs = problem.make(torch.device("cpu"), real=False)
    with forcing(form=form, **tiles), recording(_SHARED_BYTES) as recorded:
        problem.run(tuned, inputs)
    return recorded


def moved(recorded: Iterable[Any]) -> int:
    """Return the bytes that launches move."""
    total = 0
    for launch in recorded:
        tensors = {id(one): one for one in launch.args.values() if isinstance(one, Tensor)}
        counters = launch.args.get("counters")
        if counters is not None:  # a zero per tile; the partial sums in ``out`` are read again
            del tensors[id(counters)]
            total += launch.args["out"].nbytes
        total += sum(one.nbytes for one in tensors.values())
    return total
