"""Text that tells which form (implementation) and tiles each step (operation) of a call takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import launch_mode
from ..forms import select_form
from .config import operand_class
from .decode import MAX_RANK, MAX_ROWS
from .launch import form_of_class


def launch_plan(
    M: int, d: int, widths: Sequence[int], r: int, *, dtype: torch.dtype, device: torch.device
) -> dict[str, str]:
    """Return the result of :func:`flare_kernels.launch_plan` for a device that can run the kernels.

    It maps each step to its form, the tiles, and whether the general rule or the tuned table decided them.
    """
    R = len(widths) * r
    decodes = 0 < M <= MAX_ROWS and r <= MAX_RANK
    forward = {"decode": (r, d)} if decodes else {"shrink": (R, d), "expand": (r, max(widths))}
    if not decodes:
        forward["order"] = (r, max(widths))
    backward = {"grad_bottleneck": (r, max(widths)), "grad_weight": (R, d), "grad_input": (R, d)}
    operands = operand_class(dtype.itemsize, dtype.itemsize, True)
    plan = {}
    for step, (rank, width) in (forward | backward).items():
        sizes = (step, operands, rank, M, width, device)
        form, tiles = form_of_class(launch_mode.current, *sizes)
        _, entry = select_form(launch_mode.current, *sizes)
        origin = "general rule" if entry is None else "tuned table"
        configs = "; ".join(map(str, tiles.values()))
        plan[step] = f"{form}, {configs} ({origin})" if tiles else f"{form} ({origin})"
    return plan
