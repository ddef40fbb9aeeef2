"""What the kernels would do with a call, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .config import operand_class
from .decode import MAX_RANK, MAX_ROWS
from .launch import choose_config, tuned_entry


def launch_plan(
    M: int, d: int, widths: Sequence[int], r: int, *, dtype: torch.dtype, device: torch.device
) -> dict[str, str]:
    """Return :func:`flare_kernels.launch_plan` where the kernels run: step -> its form, tiles, and what decided."""
    R = len(widths) * r
    decodes = 0 < M <= MAX_ROWS and r <= MAX_RANK
    forward = {"decode": (r, d)} if decodes else {"shrink": (R, d), "expand": (r, max(widths))}
    backward = {"grad_bottleneck": (r, max(widths)), "grad_weight": (R, d), "grad_input": (R, d)}
    operands = operand_class(dtype.itemsize, dtype.itemsize, True)
    plan = {}
    for step, (rank, width) in (forward | backward).items():
        entry = tuned_entry(step, operands, rank, M, width, device)
        origin = "general rule" if entry is None else "tuned table"
        if entry is not None and entry.form == "torch" and step != "decode":
            plan[step] = f"torch ({origin})"
            continue
        kernels = ("shrink_decode", "expand_decode") if step == "decode" else (step,)
        tiles = "; ".join(str(choose_config(kernel, operands, rank, M, width, device)) for kernel in kernels)
        plan[step] = f"triton, {tiles} ({origin})"
    return plan
