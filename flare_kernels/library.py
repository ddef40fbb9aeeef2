"""The autograd node as ``torch.library`` operators, for ``torch.compile``.

Compiled code calls these operators instead of the in-place autograd function. ``flare_kernels::lora`` takes the frozen
outputs and returns new tensors. The compiler frees the frozen outputs, and the kernels move as many bytes as if they
wrote in place. ``flare_kernels::lora_backward`` computes all gradients. Both operators are opaque to the compiler and
have fake implementations, so a compiled layer is one graph, which a CUDA graph can capture. The frozen products are
separate operators of the graph and always run first (:mod:`flare_kernels.order` describes the other order).

A result that is not computed is returned as an empty tensor, because an operator cannot return None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import node
from ._ops import add_op_namespace_prefix
from .call import AdapterSpec, Call
from .node import rows, without_autocast
from .selection import primitives


def call_of(
    backend: str, device: torch.device, dtype: torch.dtype, adapters: tuple[AdapterSpec, ...], outputs: int, p: float
) -> Call:
    """Return the node's constants for these adapters and a backend (a name or "auto"), cached by these arguments."""
    ops = primitives(backend, device, dtype)
    key = (id(ops), dtype, adapters, outputs, p)
    call = _calls.get(key)
    if call is None:
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        call = _calls[key] = Call(ops, dtype, adapters, outputs, p)
    return call


_MAX_CALLS = 4096
_calls: dict[tuple[Any, ...], Call] = {}


def apply(
    backend: str,
    dtype: torch.dtype,
    adapters: Sequence[AdapterSpec],
    p: float,
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    seed: Tensor | None,
    ys: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ws: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Return y_i + s_i phi_i(S_i, T_i) B_i^T for every output, as new tensors.

    The arguments are those of ``function.apply``, and ``seed``, the dropout seed (None: no dropout).
    """
    streams = [x] if x_source is None else [x, x_source]
    differentiable = [*streams, *Ss, *ys, *As, *Bs]
    save_for_backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    results = lora(
        x,
        x_source,
        list(Ss),
        seed,
        list(ys),
        list(As),
        list(Bs),
        list(Ws),
        [adapter[0] for adapter in adapters],
        [adapter[2] for adapter in adapters],
        ",".join(adapter[3] or "none" for adapter in adapters),
        p,
        save_for_backward,
        dtype,
        backend,
    )
    return tuple(results[: len(ys)])


def _adapter_specs(
    outputs: Sequence[int], scalings: Sequence[float], fusions: str, As: Sequence[Tensor]
) -> list[AdapterSpec]:
    names = [None if name == "none" else name for name in fusions.split(",")] if As else []
    ranks = [A.shape[0] for A in As]
    return list(zip(outputs, ranks, scalings, names, strict=True))


def _saved_sizes(
    x: Tensor, x_source: Tensor | None, As: Sequence[Tensor], fusions: str, save_for_backward: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of the T and S that the operator returns. A tensor that is not saved for backward has size (0,).

    S is not saved if it was an input or if no fusion needs it in backward.
    """
    names = fusions.split(",") if As else []
    M = math.prod(x.shape[:-1])  # Size.numel() would turn a traced length into a constant
    R = sum(A.shape[0] for A in As)
    fused = sum(A.shape[0] for A, name in zip(As, names, strict=True) if name != "none")
    needs_S = x_source is not None and any(name not in ("none", "add") for name in names)
    return (
        (M, R) if save_for_backward and As else (0,),
        (M, fused) if save_for_backward and needs_S else (0,),
    )


@torch.library.custom_op(add_op_namespace_prefix("lora"), mutates_args=())
def lora(
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    seed: Tensor | None,
    ys: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ws: Sequence[Tensor],
    outputs: Sequence[int],
    scalings: Sequence[float],
    fusions: str,
    p: float,
    save_for_backward: bool,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """Return [y_i + s_i phi_i(S_i, T_i) B_i^T ..., T, S].

    T (M, R) and S (M, sum of the ranks of the adapters that fuse) are empty if ``save_for_backward`` is false or there
    is no adapter. S is also empty if ``Ss`` were passed or if no fusion needs S in backward.
    """
    adapters = _adapter_specs(outputs, scalings, fusions, As)
    call = call_of(backend, x.device, dtype, tuple(adapters), len(ys), p)
    dense = [y.contiguous() for y in ys]
    outs = [torch.empty_like(y) if i in outputs else y.clone() for i, y in enumerate(dense)]
    T_node, S_node, _, _ = without_autocast(
        node.forward,
        x.device,
        call,
        rows(x),
        None if x_source is None else rows(x_source),
        [rows(S) for S in Ss],
        None if seed is None else (seed, seed),
        [rows(y) for y in dense],
        As,
        Bs,
        save_for_backward,
        [rows(out) for out in outs],
    )
    T_size, S_size = _saved_sizes(x, x_source, As, fusions, save_for_backward)
    absent = x.new_empty((0,), dtype=dtype)
    # T and S share a buffer, and results of an operator must not alias each other
    T = T_node.contiguous() if len(T_size) == 2 and T_node is not None else absent
    S = S_node.clone() if len(S_size) == 2 and S_node is not None else absent.clone()
    return [*outs, T, S]


@lora.register_fake
def _(
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    seed: Tensor | None,
    ys: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ws: Sequence[Tensor],
    outputs: Sequence[int],
    scalings: Sequence[float],
    fusions: str,
    p: float,
    save_for_backward: bool,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    sizes = _saved_sizes(x, x_source, As, fusions, save_for_backward)
    return [*(y.new_empty(y.shape) for y in ys), *(x.new_empty(size, dtype=dtype) for size in sizes)]


@torch.library.custom_op(add_op_namespace_prefix("lora_backward"), mutates_args=())
def lora_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    seed: Tensor | None,
    T: Tensor,
    S: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ws: Sequence[Tensor],
    outputs: Sequence[int],
    scalings: Sequence[float],
    fusions: str,
    p: float,
    needs: Sequence[bool],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """Return [dx, dx_source, dS_i ..., dA_i ..., dB_i ...].

    ``needs`` has one flag per gradient, in the same order. A gradient whose flag is false is an empty tensor.
    """
    adapters = _adapter_specs(outputs, scalings, fusions, As)
    call = call_of(backend, x.device, dtype, tuple(adapters), len(grads), p)
    S_node: Tensor | None = S if S.dim() == 2 else None
    if S_node is None and Ss and call.nonlinear:
        S_node = node.concat_columns([rows(S_i) for S_i in Ss]).to(dtype)
    dx, dx_source, dSs, dAs, dBs = without_autocast(
        node.backward,
        x.device,
        call,
        call.needs[tuple(needs), len(Ss)],
        rows(x),
        None if x_source is None else rows(x_source),
        (T if T.dim() == 2 else None, S_node, None, None),
        As,
        Bs,
        Ws,
        None if seed is None else (seed, seed),
        [rows(G) for G in grads],
        x.shape[-1],
        x.dtype,
        None if x_source is None else x_source.dtype,
        [S_i.shape[-1] for S_i in Ss],
    )
    likes = [x, x_source, *Ss, *As, *Bs]
    results: list[Tensor] = []
    for grad, like in zip([dx, dx_source, *dSs, *dAs, *dBs], likes, strict=True):
        if grad is None or like is None:
            results.append(x.new_empty((0,)))
        else:  # slices of a shared buffer are copied, because results must not alias each other
            size = grad.numel() * grad.element_size()
            is_whole = size > 0 and grad.untyped_storage().nbytes() == size and grad.is_contiguous()
            grad = grad if is_whole else grad.clone(memory_format=torch.contiguous_format)
            results.append(grad.to(like.dtype).view(like.shape))
    return results


@lora_backward.register_fake
def _(
    grads: Sequence[Tensor],
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    seed: Tensor | None,
    T: Tensor,
    S: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ws: Sequence[Tensor],
    outputs: Sequence[int],
    scalings: Sequence[float],
    fusions: str,
    p: float,
    needs: Sequence[bool],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    likes = [x, x_source, *Ss, *As, *Bs]
    return [
        x.new_empty((0,)) if like is None or not need else like.new_empty(like.shape)
        for like, need in zip(likes, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, x_source, Ss, seed, ys, As, Bs, Ws, *constants = inputs
    ctx.constants, ctx.sizes = constants, (len(Ss), len(ys), len(As), len(Ws))
    ctx.save_for_backward(x, x_source, seed, *output[len(ys) :], *Ss, *As, *Bs, *Ws)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    count_S, count_y, count_A, count_W = ctx.sizes
    x, x_source, seed, T, S, *rest = ctx.saved_tensors
    Ss, rest = rest[:count_S], rest[count_S:]
    As, Bs, Ws = rest[:count_A], rest[count_A : 2 * count_A], rest[2 * count_A :]
    outputs, scalings, fusions, p, _, dtype, backend = ctx.constants
    flags = ctx.needs_input_grad
    needs = [bool(flags[0]), bool(flags[1]), *map(bool, flags[2]), *map(bool, flags[5]), *map(bool, flags[6])]
    Gs = list(grads[:count_y])
    input_grads = lora_backward(
        Gs, x, x_source, Ss, seed, T, S, As, Bs, Ws, outputs, scalings, fusions, p, needs, dtype, backend
    )
    dx, dx_source, *rest = [grad if need else None for grad, need in zip(input_grads, needs, strict=True)]
    dSs, dAs, dBs = rest[:count_S], rest[count_S : count_S + count_A], rest[count_S + count_A :]
    dys = [G if need else None for G, need in zip(Gs, flags[4], strict=True)]
    # for an empty list, torch expects an empty list
    of_constants: list[Any] = [
        [] if isinstance(constant, list) and not constant else None for constant in ctx.constants
    ]
    return dx, dx_source, dSs, None, dys, dAs, dBs, [None] * count_W, *of_constants


lora.register_autograd(_backward, setup_context=_setup_context)
