"""Bytes through memory of each form of grad_bottleneck, partial sums included, from the launches that the form makes.

Shapes: G_i (M, n_i) with N the sum of the widths n_i; T, S, dT, dS (M, len(widths) r); B_i, dB_i (n_i, r).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_BYTES, _SUM_BYTES = 2, 4  # of bfloat16, and of the float32 in which dB and partial sums are written
#: What a form that reads G once may move, over the least that any form moves.
ONCE_LIMIT = 1.3


def least(M: int, widths: Sequence[int], r: int) -> int:
    """Return the bytes of every input read once and every output written once."""
    N, count = sum(widths), len(widths)
    return _BYTES * (M * N + 4 * M * count * r + N * r) + _SUM_BYTES * N * r


def of_form(form: str, M: int, widths: Sequence[int], r: int, *, shared_bytes: int = 227 * 1024) -> int:
    """Return the bytes of a form with the tiles that the general rule gives it.

    The forms with one order of chunks read G, T and S from memory once: their second read is a chunk that the L2 cache
    still holds. ``rows_first`` and ``two_launches`` read them twice. Partial sums of dB are written and read once more.
    """
    splits = splits_of(form, M, widths, r, shared_bytes=shared_bytes)
    N, count = sum(widths), len(widths)
    again = 0 if form == "triton" else _BYTES * (M * N + 2 * M * count * r)
    return least(M, widths, r) + again + (2 * splits * _SUM_BYTES * N * r if splits > 1 else 0)


def splits_of(form: str, M: int, widths: Sequence[int], r: int, *, shared_bytes: int) -> int:
    """Return how many partial sums of dB a form adds, told from recorded launches."""
    from flare_kernels.launch_mode import forcing, recording
    from flare_kernels.triton_ops import primitives

    def empty(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16)  # never touched: no memory is spent

    Gs, Bs = [empty(M, n) for n in widths], [empty(n, r) for n in widths]
    T, S, dT, dS = (empty(M, len(widths) * r) for _ in range(4))
    call = {"scalings": [1.0] * len(widths), "fusion": "add_relu", "dT": dT, "dS": dS}
    with forcing(form=form), recording(shared_bytes) as launches:
        primitives.grad_bottleneck(Gs, T, S, Bs, B_grad_dtype=torch.float32, **call)
    return next((launch.args["splits"] for launch in launches if "splits" in launch.args), 1)


def least_reading_once(M: int, widths: Sequence[int], r: int, programs: int) -> int:
    """Return the least bytes of a form whose programs compute both products from one read of G.

    Program (i, j) of ``row_groups`` x ``column_groups`` owns rows of group i and columns of group j. Its dH is one of
    ``column_groups`` partial sums and its dB one of ``row_groups``, each written and read once more; the count is the
    least over all such grids. A single group needs no partial sums.
    """
    N, count = sum(widths), len(widths)

    def partials(row_groups: int, column_groups: int) -> int:
        # of one projection's dH, for each group of its columns: with several projections a group lies in one of them
        dH = column_groups * M * r if column_groups > count else 0
        dB = row_groups * N * r if row_groups > 1 else 0
        return 2 * _SUM_BYTES * (dH + dB)

    grids = ((rows, -(-programs // rows)) for rows in range(1, programs + 1))
    return least(M, widths, r) + min(partials(*grid) for grid in grids)
