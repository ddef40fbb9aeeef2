"""How long does each primitive (step of an adapter) take, compared with its memory floor and with plain PyTorch (BLAS)?

The dtype is bf16 and the fusion add_relu. The floor is the number of bytes that the primitive must move
(bytes_moved.step_bytes), divided by the copy bandwidth that is measured in the same run. On a CPU, only plain PyTorch
is timed, and the launches of the kernels are counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import shapes
import torch
from bytes_moved import step_bytes
from cases import Skipped, Variant, Variants
from gate import exact, poisoned, require_correct
from primitives import DTYPE, flops, module, operands, oracle, recorded_launches, run
from timing import Ceilings, Rotation, device_launches

from flare.experiments.measure import count_ops, transient_bytes
from flare_kernels import torch_ops

VARIANTS = ("flare", "triton", "peer")
CONDITIONS = "bf16, add_relu, one projection, both streams, dropout 0, inputs rotated through twice the L2 cache"


def variants(shape: shapes.KernelShape, device: torch.device, ceilings: Ceilings) -> Variants:
    """Return the variants: what the package chooses at this size, the Triton kernel, and plain PyTorch."""
    rotation = Rotation(lambda: operands(shape, device), device)
    floor_bytes = step_bytes(shape, accumulate_dx=False)[shape.primitive]
    floor = {
        "floor_bytes": floor_bytes,
        "flops": flops(shape),
        "floor_s": floor_bytes / ceilings.copy_bytes_per_s,
    }

    def variant(name: str) -> Variant | Skipped:
        ops = module(name, device)
        if isinstance(ops, str):
            return Skipped(ops, {"launches": recorded_launches(shape)})

        def check() -> None:
            t = operands(shape, device)
            truth = oracle(shape.primitive, exact(t))
            plain = run(shape.primitive, torch_ops, {k: v.clone() for k, v in t.items()})
            with poisoned():
                out = run(shape.primitive, ops, t)
            require_correct(out, truth, plain, dtype=DTYPE)

        def call() -> None:
            run(shape.primitive, ops, rotation.next())

        def count() -> dict[str, Any]:
            with count_ops() as counted:
                call()
            return {
                "launches": device_launches(call, device) or counted.total,
                "transient_bytes": transient_bytes(lambda: run(shape.primitive, ops, rotation.next()), device=device),
            }

        return Variant(call, check, count, facts=floor)

    return {name: variant(name) for name in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", shapes.kernels(shapes.grid()), ids=lambda s: s.case)
def test_kernel(compare: Any, shape: shapes.KernelShape, variant: str, device: Any, ceilings: Ceilings) -> None:
    compare(shape, variant, lambda: variants(shape, device, ceilings), CONDITIONS)
