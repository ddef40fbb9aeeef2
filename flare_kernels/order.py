"""Which runs first where the node makes the frozen products: they, or the adapters.

``frozen_first``: the frozen product writes y = x W^T + b, and the adapter reads and writes it again; in backward the
first of them writes dx, the others and the adapters' share dT A read and write it.
``adapter_first``: the adapter writes y = s H B^T + b and reads nothing wide, and the frozen product adds to it; in
backward dT A writes dx and every frozen product adds to it. The reads that move into the frozen products run while
these compute. y and dx are rounded once more than float32 sums: before the last product is added instead of before the
adapter's share is, which is as close to float64 as PEFT's eager form.

This is the step "order" of the launch table, whose rows are M, whose width is that of the widest adapted output, and
whose rank is r. Layers that own their products (quantised, hooked), the operators for ``torch.compile`` and passes over
some rows of a batch always run the frozen product first. Nothing here runs in a step that has been warmed up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Call
from .forms import class_of, form_in_force
from .launch_mode import Mode

#: Sizes (M, n_i) of the outputs that the adapters write, in stacking order; None where the frozen products run first.
Order = tuple[tuple[int, int], ...] | None


def order_of(
    mode: Mode,
    call: Call,
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    autocast: torch.dtype | None,
) -> Order:
    """Return the order of a call of the node that makes the products of x (M, d) and the frozen W_i (n_i, d).

    ``autocast``: the dtype of an autocast that is on.
    """
    M = x.shape[0]
    if not can_run_first(call, x, Ws, biases, autocast):
        return None
    widths = [Ws[output].shape[0] for output in call.adapted]
    # float32 adapters are rounded to the compute dtype beforehand: their dtype decides nothing
    operands = class_of(max(call.ranks), call.dtype, wide=(x, *Ws), thin=())
    # the table is for what "auto" runs; a backend that was asked for by name follows the general rule
    device = x.device if getattr(call.ops, "FOLLOWS_TABLE", False) else torch.device("cpu")
    form, _ = form_in_force(mode, "order", operands, max(call.ranks), M, max(widths), device)
    return tuple((M, width) for width in widths) if form == "adapter_first" else None


def can_run_first(
    call: Call, x: Tensor, Ws: Sequence[Tensor], biases: Sequence[Tensor | None], autocast: torch.dtype | None
) -> bool:
    """Return whether the adapters can run first: one dtype throughout, one adapter an output, no form for decoding."""
    if not call.projections or len(set(call.adapted)) < call.count or x.shape[0] <= call.decode_rows:
        return False
    if autocast not in (None, call.dtype):
        return False  # it casts the operands of a product, but not those of one in place
    return all(tensor is None or tensor.dtype == call.dtype for tensor in (x, *Ws, *biases))
