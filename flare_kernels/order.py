"""The order of the frozen products and the adapters, if the autograd node computes both.

The letters have the meaning that :mod:`flare_kernels.node` gives them. W and b are the frozen weight and bias.

``frozen_first``: in forward, the frozen product writes y = x W^T + b, then the adapter reads y and adds its share. In
backward, the first frozen product writes dx, then the other frozen products and dT A add to it.

``adapter_first``: in forward, the adapter writes y = s H B^T + b without reading y, then the frozen product adds to it.
In backward, dT A writes dx, then every frozen product adds to it. The reads of y and dx move into the frozen products,
where they overlap with the computation. The orders differ in when the intermediate y and dx are rounded. In both
orders, the results are as close to float64 results as PEFT's are.

The general rule is ``adapter_first``. An entry of the launch table for the step "order" overrides it. Such an entry is
looked up by the operand class (:mod:`flare_kernels.forms`), the number of tokens M, the width of the widest adapted
output, and the largest rank of an adapter. The frozen products always run first in layers that compute them outside the
node (quantised or with hooks), in the operators for ``torch.compile``, in passes that adapt only some rows of a batch,
and in calls for which :func:`can_run_first` is false. The order is cached, so this module runs only in the first call
with given shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Call
from .forms import class_of, select_form
from .launch_mode import Mode

#: Sizes (M, n_i) of the outputs that the adapters write, in stacking order (:mod:`flare_kernels.call`); None if the
#: frozen products run first.
Order = tuple[tuple[int, int], ...] | None


def choose_order(
    mode: Mode,
    call: Call,
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    autocast: torch.dtype | None,
) -> Order:
    """Return the order of a call of the node that computes the products of x (M, d) and the frozen W_i (n_i, d).

    ``autocast``: the dtype of the active autocast, or None.
    """
    M = x.shape[0]
    if not can_run_first(call, x, Ws, biases, autocast):
        return None
    widths = [Ws[output].shape[0] for output in call.adapted]
    # the adapters' dtype does not matter: float32 adapters are rounded to the compute dtype beforehand
    operands = class_of(max(call.ranks), call.dtype, wide=(x, *Ws), thin=())
    # only backend="auto" follows the table; a backend chosen by name follows the general rule
    device = x.device if getattr(call.ops, "FOLLOWS_TABLE", False) else torch.device("cpu")
    form, _ = select_form(mode, "order", operands, max(call.ranks), M, max(widths), device)
    return tuple((M, width) for width in widths) if form == "adapter_first" else None


def can_run_first(
    call: Call, x: Tensor, Ws: Sequence[Tensor], biases: Sequence[Tensor | None], autocast: torch.dtype | None
) -> bool:
    """Return whether the adapters can run first.

    This requires that there is an adapter, that x, W_i, biases and the computation have one dtype, that no output has
    two adapters, and that x has more rows than the decoding kernels take.
    """
    if not call.projections or len(set(call.adapted)) < call.count or x.shape[0] <= call.decode_rows:
        return False
    if autocast not in (None, call.dtype):
        return False  # autocast casts the operands of F.linear, but not those of addmm_
    return all(tensor is None or tensor.dtype == call.dtype for tensor in (x, *Ws, *biases))
