"""What does the host do in a training step, and does the device wait for it?

On a CPU, the benchmark counts Python and C calls per block (host_calls.py) and measures the time of forward and
backward. Both are compared with PEFT in the same run. The code path of the kernels runs without launching kernels, on
models of width 64, so that nearly all of a step is host work. For mT5, an encoder block and a decoder block count as
one block. On a GPU, the benchmark counts launches and measures wall time divided by device-busy time, on models of
real width. The variant "frozen" is a forward pass; all other variants are forward and backward.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import pytest
import shapes
import torch
from cases import Variant, Variants
from gate import WrongResult
from host_calls import VARIANTS, HostStep, per_block, steps_of
from models import quiet
from timing import Effort, device_work

from flare_kernels.testing import launches_left_out

CONDITIONS = (
    "forward + backward (frozen: forward only), LoRA on query and value (except in frozen), random weights, full rows; "
    "on a CPU no kernels are launched and the width is 64; dropout: lora_dropout 0.1; checkpointing: every block, "
    "use_reentrant=False; the ratio to PEFT's time is the median of the ratios of all rounds"
)
#: Variant whose backward pass runs on the calling thread instead of autograd's thread -> the variant that is otherwise
#: equal. The variants on the left run on a GPU only.
_ONE_THREAD = {"lora-one-thread": "lora", "flare-one-thread": "flare"}
_OURS = ("lora", "flare", "flare-recompute", "flare-warm", *_ONE_THREAD)


def effort(device: torch.device) -> Effort:
    """Return how long to measure. Few rounds suffice, because the ratio to PEFT is taken within each round."""
    return Effort(5.0, 5, 20, 1) if device.type == "cuda" else Effort(0.5, 5, 15, 1)


@pytest.fixture
def left_out(device: torch.device) -> Iterator[list[str] | None]:
    """Return the list that gets the name of every kernel that is skipped on a CPU; None on a GPU or without Triton."""
    with contextlib.ExitStack() as stack:
        skip_launches = device.type != "cuda" and importlib.util.find_spec("triton") is not None
        yield stack.enter_context(launches_left_out()) if skip_launches else None


def build(shape: shapes.HostShape, device: torch.device, left_out: list[str] | None) -> Variants:
    """Return all variants, on one set of weights."""
    if device.type != "cuda" and left_out is None:
        return dict.fromkeys(VARIANTS, "Triton is not installed, so the code path of the kernels cannot run on a CPU")
    with quiet():
        steps = steps_of(shape, device)
    if device.type == "cuda":
        steps |= {name: OneThread(**vars(steps[like])) for name, like in _ONE_THREAD.items()}
    return {name: _variant(name, step, shape, device, left_out) for name, step in steps.items()}


class OneThread(HostStep):
    """A step whose backward pass runs on the calling thread."""

    def run(self) -> None:
        with torch.autograd.set_multithreading_enabled(False):
            super().run()


def _variant(
    name: str, step: HostStep, shape: shapes.HostShape, device: torch.device, left_out: list[str] | None
) -> Variant:
    def call() -> None:
        with quiet():
            step.run()
        step.clear()

    def check() -> None:
        before = 0 if left_out is None else len(left_out)
        with quiet():
            step.run()
        if left_out is not None:
            ran = left_out[before:].count("grad_weight_kernel")
            if (ran >= shape.depth) != (name in _OURS):
                raise WrongResult(f"{ran} launches of grad_weight_kernel in {shape.depth} blocks")
        elif step.graded:
            norms = {n: float(p.grad.norm()) for n, p in step.model.named_parameters() if p.grad is not None}
            if not norms or not all(map(math.isfinite, norms.values())):
                raise WrongResult("the step computed no gradients, or gradients that are not finite")
        step.clear()

    def count() -> dict[str, Any]:
        with quiet():
            if left_out is not None:
                counted = per_block(name, shape, left_out, step)
                return {"calls_per_block": counted.calls, "kernels_per_block": sum(counted.kernels.values())}
            work = device_work(call, device, warmed=True)
            assert work is not None
            return {"launches": work.launches, "device_busy_s": work.busy_s}

    return Variant(call, check, count, {"depth": shape.depth})


@pytest.mark.parametrize("variant", (*VARIANTS, *_ONE_THREAD))
@pytest.mark.parametrize("shape", shapes.host(shapes.grid()), ids=lambda s: s.case)
def test_host_time(
    compare: Any, shape: shapes.HostShape, variant: str, device: Any, left_out: list[str] | None
) -> None:
    if variant in _ONE_THREAD and device.type != "cuda":
        pytest.skip("on a CPU the backward pass always runs on the calling thread")
    compare(shape, variant, lambda: build(shape, device, left_out), CONDITIONS, queue_ahead=False, how=effort(device))
