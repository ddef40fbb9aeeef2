"""The autograd function that wraps :mod:`flare_kernels.node`, and the public function for one projection.

x, T, S, H, A and B are named as in :mod:`flare_kernels.node`. Saved for backward:

* x and x_source as passed, if some A requires grad; never a cast or dropped-out copy of them,
* T and S in the compute dtype if backward reads them, or only H if every phi is linear (plain LoRA or "add"),
* A_i, B_i and the frozen weights W_i as passed,
* the stacked A and B, if they were stacked or cast and are small compared with x,
* the seeds of the dropout masks, which backward regenerates.

The public function for projections that share their input is in :mod:`flare_kernels.joint`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dropout as _dropout
from . import launch_mode, library, node, reference, validation
from ._compat import functorch_is_active, is_view, plain_apply
from .call import AdapterSpec, Call
from .fusion import EAGER_FUSIONS
from .library import call_of
from .node import rows, without_autocast
from .order import Order, choose_order
from .reference import compute_dtype

# Getter for `map`: the attributes of a frozen weight that are part of the key of a cached `choose_order` result.
_LAYOUT = operator.attrgetter("shape", "dtype")

#: Stacked or cast adapter weights are saved for the backward pass if x has at least this many times their bytes.
_SAVE_RATIO = 16


def needs_plain_operators() -> bool:
    """Return whether a torch.func transform, torch.jit.trace or torch.export is active: they need plain operators."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return functorch_is_active() or torch.jit.is_tracing()


def writable(base_output: Tensor, *others: Tensor | None) -> Tensor:
    """Return base_output itself if the result may overwrite it, otherwise a copy.

    A tensor is copied if it is a leaf that requires grad, a view, a part of a larger storage, an inference
    tensor outside of inference mode, or shares memory with one of ``others``. A non-contiguous tensor is copied too,
    because it cannot be accumulated into as (M, n). A ``detach()`` of a whole tensor is indistinguishable from an
    independent tensor and is overwritten.
    """
    storage = base_output.untyped_storage()
    addresses = (other.untyped_storage().data_ptr() for other in others if other is not None and other.numel())
    is_shared = (
        (base_output.is_leaf and base_output.requires_grad)
        or is_view(base_output)
        or storage.nbytes() > base_output.numel() * base_output.element_size()  # inference mode does not mark views
        or (base_output.is_inference() and not torch.is_inference_mode_enabled())
        or (base_output.numel() > 0 and storage.data_ptr() in addresses)
    )
    return base_output.clone(memory_format=torch.contiguous_format) if is_shared else base_output.contiguous()


class FusedLoRA(torch.autograd.Function):
    """Autograd function that adds s_i phi_i(S_i, T_i) B_i^T to y_i (..., n_i), in place, for every adapted output.

    Arguments of ``apply``:
        call: the constants.
        sizes: the numbers of y_i, of S, and of W_i among ``tensors``.
        x, x_source: (..., d); x_source may be None.
        seed: dropout seed, an int64 scalar tensor; None: no dropout.
        source_seed: dropout seed of the source stream; None: the source stream uses ``seed``.
        A: the stacked A (R, d), where R is the sum of the ranks r_i, or None.
        tensors: in this order: y_i (..., n_i); one or more S (..., sum of the ranks that it covers) if S is passed
            instead of x_source; A_i (r_i, d) in stacking order; B_i (n_i, r_i) in stacking order; the frozen weights
            W_i (n_i, d) if the node computes dx of their products. If no y_i are passed, the node computes the products
            too, before or after the adapters (:mod:`flare_kernels.order`). The W_i are then followed by their biases,
            each (n_i,) or None, and the outputs have shape (M, n_i).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        call: Call,
        sizes: tuple[int, int, int],
        x: Tensor,
        x_source: Tensor | None,
        seed: Tensor | None,
        source_seed: Tensor | None,
        A: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        count_y, count_S, count_W = sizes
        count = call.count
        at_A, at_B = count_y + count_S, count_y + count_S + count
        at_W = at_B + count
        Ss, As, Bs, Ws = tensors[count_y:at_A], tensors[at_A:at_B], tensors[at_B:at_W], tensors[at_W : at_W + count_W]
        flags = ctx.needs_input_grad
        needs = call.needs[flags[2:4] + flags[7 + count_y : 7 + at_W], count_S]
        x_MK = x.flatten(0, -2) if x.ndim > 2 else rows(x)
        autocast = None
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            autocast = torch.get_autocast_dtype(x.device.type)
        biases: Sequence[Tensor | None] = tensors[at_W + count_W :]
        order: Order = None
        if count_y:
            ys = tensors[:count_y]
            matrices: Sequence[Tensor] = [rows(y) for y in ys]
            ctx.mark_dirty(*ys)
        else:
            mode = launch_mode.current
            key = ("order", call, x.device, x.dtype, x_MK.shape, autocast, *map(_LAYOUT, Ws), *map(type, biases))
            try:
                order = mode.plans[key]
            except KeyError:
                order = mode.plans.add(key, choose_order(mode, call, x_MK, Ws, biases, autocast))
            if order is None:
                # autocast, if it is enabled, casts these operands as it does in the unmodified layer
                ys = matrices = tuple(map(F.linear, (x_MK,) * count_W, Ws, biases))
            else:
                outputs: list[Any] = [None] * count_W
                empty = functools.partial(torch.empty, dtype=call.dtype, device=x.device)
                for output, y in zip(call.adapted, map(empty, order), strict=True):
                    outputs[output] = y
                for output in call.others:
                    outputs[output] = F.linear(x_MK, Ws[output], biases[output])
                ys = matrices = tuple(outputs)
            if call.others and not needs.x:  # these outputs depend on nothing that requires grad
                ctx.mark_non_differentiable(*[ys[index] for index in call.others])
        xs_MK = None if x_source is None else x_source.flatten(0, -2) if x_source.ndim > 2 else rows(x_source)
        S_matrices = [rows(S) for S in Ss] if Ss else ()
        seeds = None if seed is None else (seed, seed if source_seed is None else source_seed)
        adapter_biases = None if order is None else biases
        args = (call, x_MK, xs_MK, S_matrices, seeds, matrices, As, Bs, needs.anything, None, A, adapter_biases)
        T, S, A, B = node.forward(*args) if autocast is None else without_autocast(node.forward, x.device, *args)
        if order is not None:
            for output in call.adapted:
                ys[output].addmm_(x_MK, Ws[output].T)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.sizes, ctx.needs, ctx.adapter_first = call, sizes, needs, order is not None
        # number of the last inputs, which get no gradient: the frozen weights, then their biases if they were passed
        ctx.frozen_inputs = count_W if count_y else 2 * count_W
        # dB needs H: T holds it if every phi is linear, otherwise it is computed again from T and S
        save_hidden = needs.any_B or (needs.hidden and call.nonlinear)
        ctx.save_for_backward(
            x if needs.any_A else None,
            x_source if needs.any_A else None,
            T if save_hidden else None,
            S if save_hidden else None,
            A if A is not None and (needs.x or needs.x_source) and _worth_saving(A, As, x) else None,
            B if B is not None and needs.hidden and _worth_saving(B, Bs, x) else None,
            seed,
            source_seed,
            *tensors[at_A : at_W + count_W],
        )
        ctx.x_like = (x.shape, x.dtype, x.ndim == 2)
        ctx.source_like = None if x_source is None else (x_source.shape, x_source.dtype)
        ctx.S_likes = [(S.shape, S.dtype) for S in Ss] if Ss else ()
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True
            saved = ctx.saved_tensors  # unpacked once: a non-reentrant checkpoint allows no second time
            unpacked = SimpleNamespace(**vars(ctx), saved_tensors=saved, needs_input_grad=ctx.needs_input_grad)
            with torch.no_grad():
                return differentiable_once(FusedLoRA.backward(unpacked, *grads), (*grads, *saved))
        call: Call = ctx.call
        count_y, count_S, _ = ctx.sizes
        count = call.count
        flags = ctx.needs_input_grad
        device = None
        for G in grads:
            if G is not None:
                device = G.device
        if device is None:
            return (None,) * len(flags)
        x, x_source, T, S, A, B, seed, source_seed, *weights = ctx.saved_tensors
        As, Bs, Ws = weights[:count], weights[count : 2 * count], weights[2 * count :]
        (x_shape, x_dtype, is_matrix), source_like = ctx.x_like, ctx.source_like
        if A is None and count == 1 and As[0].dtype == call.dtype:
            A = As[0]
        dx, dx_source, dSs, dAs, dBs = without_autocast(
            node.backward,
            device,
            call,
            ctx.needs,
            None if x is None else x.flatten(0, -2) if x.ndim > 2 else rows(x),
            None if x_source is None else x_source.flatten(0, -2) if x_source.ndim > 2 else rows(x_source),
            (T, S, A, B),
            As,
            Bs,
            Ws,
            None if seed is None else (seed, seed if source_seed is None else source_seed),
            grads if not count_y else [None if G is None else rows(G) for G in grads],
            x_shape[-1],
            x_dtype,
            None if source_like is None else source_like[1],
            [shape[-1] for shape, _ in ctx.S_likes] if count_S else (),
            ctx.adapter_first,
        )
        dys: Sequence[Tensor | None] = ()
        if count_y:
            dys = [G if need else None for G, need in zip(grads, flags[7 : 7 + count_y], strict=True)]
        S_grads: Sequence[Tensor | None] = ()
        if count_S:
            S_grads = [
                None if dS is None else dS.to(dtype).view(shape) if dS.is_contiguous() else dS.to(dtype).reshape(shape)
                for dS, (shape, dtype) in zip(dSs, ctx.S_likes, strict=True)
            ]
        return (
            None,
            None,
            dx if dx is None or is_matrix else dx.view(x_shape),
            None if dx_source is None or source_like is None else dx_source.view(source_like[0]),
            None,
            None,
            None,
            *dys,
            *S_grads,
            *dAs,
            *dBs,
            *(None,) * ctx.frozen_inputs,
        )


_apply_in_cpp = plain_apply(FusedLoRA)


class _DifferentiableOnce(torch.autograd.Function):
    """Autograd function that returns its last ``count`` tensors and raises an error in backward."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(grad.view_as(grad) for grad in tensors[-count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        raise RuntimeError(
            "the gradient of a FLARE adapter was differentiated again (create_graph=True), which its fused backward "
            "pass does not support: use the transforms of torch.func (grad, jvp, hessian over functional_call). Under "
            "them, adapters run on plain PyTorch operators"
        )


def differentiable_once(
    grads: Sequence[Tensor | None], depend_on: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a backward pass with ``create_graph=True``. Differentiating them raises an error.

    torch's ``once_differentiable`` is not enough: it does not connect the gradients to the saved tensors, so
    ``autograd.grad`` would find no second derivative and raise no error.

    Args:
        grads: gradients without a graph.
        depend_on: all tensors that the gradients were computed from.
    """
    sources = [tensor for tensor in depend_on if tensor is not None and tensor.requires_grad]
    present = [grad for grad in grads if grad is not None]
    if not sources or not present:
        return tuple(grads)
    with torch.enable_grad():
        connected = iter(_DifferentiableOnce.apply(len(present), *sources, *present))
    return tuple(None if grad is None else next(connected) for grad in grads)


def _worth_saving(stacked: Tensor, weights: Sequence[Tensor], x: Tensor) -> bool:
    """Return whether stacked or cast weights are small compared with x; if not, backward stacks them again."""
    return stacked is not weights[0] and _SAVE_RATIO * stacked.nbytes <= x.nbytes


def apply(
    backend: str,
    dtype: torch.dtype,
    adapters: Sequence[AdapterSpec],
    p: float,
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    ys: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ws: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Call the node with autograd: in place, or as a ``torch.library`` operator while torch.compile traces.

    Args:
        backend: name of the backend.
        dtype: compute dtype.
        adapters: (output index, rank, scaling, fusion) of each adapter, in stacking order: adapters that fuse come
            first.
        p: probability of dropout; 0 outside training.
        x, x_source: (..., d); x_source may be None.
        Ss: S (..., r_i) of each fusing adapter instead of x_source; otherwise empty.
        ys: outputs (..., n_i) of the frozen linears. The results may overwrite them.
        As, Bs: (r_i, d) and (n_i, r_i), in stacking order.
        Ws: the frozen weights, if the node computes dx of the frozen products (ys then have no graph); otherwise empty.
    """
    p = p if adapters else 0.0
    seed = _dropout.draw_seed(x.device) if p > 0.0 else None
    if torch.compiler.is_compiling():
        return library.apply(backend, dtype, adapters, p, x, x_source, Ss, seed, ys, As, Bs, Ws)
    call = call_of(backend, x.device, dtype, tuple(adapters), len(ys), p)
    outputs: list[Tensor] = []
    for y in ys:  # no output may share memory with another output or with an input
        outputs.append(writable(y, x, x_source, *Ss, *outputs))
    sizes = (len(ys), len(Ss), len(Ws))
    tensors = (*outputs, *Ss, *As, *Bs, *Ws)
    return FusedLoRA.apply(call, sizes, x, x_source, seed, None, None, *tensors)  # type: ignore[no-any-return]


def apply_with_products(
    call: Call,
    sizes: tuple[int, int, int],
    x: Tensor,
    x_source: Tensor | None,
    source_seed: Tensor | None,
    Ss: Sequence[Tensor],
    A: Tensor | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Call the node with autograd for plain frozen linears, so that it also computes their products and dx.

    The arguments are not checked.

    Args:
        call: the constants; it has one output per W.
        sizes: (0, number of Ss, number of Ws).
        x, x_source: (..., d); x_source may be None.
        source_seed: seed of the dropout mask of x_source, if the caller has drawn one; otherwise None.
        Ss: S (..., columns) instead of x_source; otherwise empty.
        A: the stacked A (R, d) if the caller has it, otherwise None.
        As, Bs: (r_i, d) and (n_i, r_i), in stacking order.
        Ws: frozen weight (n_i, d) of every output.
        biases: frozen bias (n_i,) of every output, or None.

    Returns:
        y_i (M, n_i), as new tensors.
    """
    seed = _dropout.draw_seed(x.device) if call.p > 0.0 else None
    args = (call, sizes, x, x_source, seed, source_seed, A, *Ss, *As, *Bs, *Ws, *biases)
    if functorch_is_active():  # only the Python wrapper of apply checks for torch.func transforms and raises an error
        return FusedLoRA.apply(*args)  # type: ignore[no-any-return]
    return _apply_in_cpp(*args)  # type: ignore[no-any-return]


def add_adapters(
    call: Call, x: Tensor, Ss: Sequence[Tensor], ys: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor]
) -> None:
    """Add the adapters' shares to y_i (..., n_i) in place without a graph, from x (..., d) and S (..., columns)."""
    with torch.no_grad():
        Ss, ys = [*map(rows, Ss)], [*map(rows, ys)]
        without_autocast(node.forward, x.device, call, rows(x), None, Ss, None, ys, As, Bs, False)


def fused_lora(
    x: Tensor,
    x_source: Tensor | None,
    base_output: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    fusion: str | None = "add_relu",
    source_bottleneck: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return y = base_output + scaling * phi(x_source A^T, x A^T) B^T for one projection (FLARE, section 3).

    Args:
        x: (..., m, d) target stream.
        x_source: (..., m, d) source stream, or None.
        base_output: (..., m, n) output of the frozen linear, quantised or not. It is consumed: the result may overwrite
            it, as with ``addmm_``. It is copied first if it is a leaf that requires grad, a view, or shares memory with
            x or the source, and in the other cases of :func:`flare_kernels.function.writable`.
        lora_A: (r, d) as PEFT stores it, shared by both streams.
        lora_B: (n, r) as PEFT stores it.
        scaling: alpha / r.
        fusion: one of ``FUSIONS``. None, or a call without a source, is plain LoRA: phi(S, T) = T.
        source_bottleneck: (..., m, r) S, already projected, instead of x_source; differentiable.
        dropout_p: probability of zeroing an entry of x and x_source (independent masks) if ``training``.
        training: whether dropout is applied.
        backend: "triton", "torch", "reference", or "auto" (see :func:`flare_kernels.select_backend`).

    Returns:
        (..., m, n) in base_output's dtype. The compute dtype is x's, or base_output's if autocast left x in float32.
        Sums are float32 (float64 for float64 inputs). Each gradient has the dtype of its tensor. The result is
        differentiable once in x, base_output, lora_A, lora_B, source_bottleneck and x_source. dx is the adapter's
        share, dT A; autograd adds the share of the frozen linear.

    Raises:
        TypeError: a tensor is not floating-point, or float64 is mixed with another dtype.
        ValueError: shapes do not fit, both source arguments are given, the fusion or backend is unknown, or the backend
            cannot run here.
    """
    validation.check_fusion(fusion, backend)
    validation.check_numbers(scaling, dropout_p)
    validation.check_dtypes(
        {
            "x": x,
            "x_source": x_source,
            "base_output": base_output,
            "lora_A": lora_A,
            "lora_B": lora_B,
            "source_bottleneck": source_bottleneck,
        }
    )
    validation.check_streams(x, x_source, source_bottleneck)
    validation.check_adapter(x, base_output, lora_A, lora_B, source_bottleneck)
    if x_source is None and source_bottleneck is None:
        fusion = None
    if fusion is None:
        x_source = source_bottleneck = None
    if backend == "reference" or fusion in EAGER_FUSIONS or (backend == "auto" and needs_plain_operators()):
        return reference.fused_lora(
            x,
            x_source,
            base_output,
            lora_A,
            lora_B,
            scaling=scaling,
            fusion=fusion,
            source_bottleneck=source_bottleneck,
            dropout_p=dropout_p,
            training=training,
        )
    dtype = compute_dtype(x, base_output)
    Ss = [] if source_bottleneck is None else [source_bottleneck]
    adapters = [(0, lora_A.shape[0], float(scaling), fusion)]
    p = dropout_p if training else 0.0
    return apply(backend, dtype, adapters, p, x, x_source, Ss, [base_output], [lora_A], [lora_B], [])[0]
