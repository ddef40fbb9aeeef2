"""The public function for projections that share their input (q, k, v): one autograd node for all of them.

Each stream is read once for all adapters, and adapters with the same fusion and rank share a launch. If the frozen
weights are passed, the node also computes dx of the frozen products, accumulated in the same buffer as the adapters'
share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import call, reference, validation
from . import dropout as _dropout
from .function import apply, apply_with_products, needs_plain_operators
from .library import call_of
from .reference import compute_dtype

#: A (r, d), B (n, r), scaling.
AdapterWeights = tuple[Tensor, Tensor, float]


def fused_lora_qkv(
    x: Tensor,
    x_source: Tensor | None,
    base_outputs: Mapping[str, Tensor] | None,
    adapters: Mapping[str, AdapterWeights],
    *,
    fusion: str | Mapping[str, str | None] | None = "add_relu",
    source_bottleneck: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor | None] | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Return the outputs of :func:`flare_kernels.fused_lora` for projections that share their input.

    Each stream is read once for all projections.

    Args:
        x: (..., m, d) input of all projections.
        x_source: (..., m, d) source stream, or None.
        base_outputs: name -> (..., m, n) output of the frozen linear, which the result may overwrite, as in
            ``fused_lora``. None: the node computes the frozen products from ``weights``, before or after the adapters
            (:mod:`flare_kernels.order`).
        adapters: name -> (A (r, d), B (n, r), scaling) for any subset of the names. Outputs of the other names are
            returned unchanged.
        fusion: one fusion for all adapters, or name -> fusion. None and missing names mean plain LoRA.
        source_bottleneck: name -> S (..., m, r) instead of x_source; differentiable. A missing name is plain LoRA.
        weights: name -> frozen weight W (n, d). If passed, the node also computes dx of the frozen products, in one
            buffer. ``base_outputs`` must then be None or have no graph (compute them under ``torch.no_grad()``).
        biases: name -> frozen bias (n,) or None, for products that the node computes.
        dropout_p: probability of dropping an element of x and of x_source. Each stream has one mask, shared by the
            projections (PEFT draws one per projection; the distribution of each projection's gradient is the same).
        training: whether dropout is applied.
        backend: as in ``fused_lora``.

    Returns:
        name -> (..., m, n), in the order of base_outputs, or of weights if base_outputs is None.

    Raises:
        TypeError, ValueError: as in ``fused_lora``. ValueError also for

            * a name in another argument that base_outputs (or weights, if base_outputs is None) does not have,
            * ``weights`` in which a name of base_outputs is missing,
            * ``biases`` together with base_outputs, which include them,
            * base_outputs with a graph together with ``weights`` (dx of the frozen products would be counted twice),
            * base_outputs=None without ``weights``, or with weights or biases that require grad.
    """
    if base_outputs is None:
        p = dropout_p if training else 0.0
        options = (fusion, source_bottleneck, weights, biases, p, backend)
        return _with_products(x, x_source, adapters, *options)
    if biases is not None:
        raise ValueError("biases were given with base_outputs, which already include them: pass one of the two")
    fusions = _check(x, x_source, base_outputs, adapters, fusion, source_bottleneck, weights, dropout_p, backend)
    p = dropout_p if training else 0.0
    if backend == "reference" or (backend == "auto" and needs_plain_operators()):
        return _reference(x, x_source, base_outputs, adapters, fusions, source_bottleneck, weights, p)
    # a projection without an adapter enters the node only if the node computes its share of dx
    owns_dx = weights is not None and x.requires_grad and torch.is_grad_enabled()
    names = tuple(base_outputs) if owns_dx else tuple(name for name in base_outputs if name in adapters)
    if not names:
        return dict(base_outputs)
    dtype = compute_dtype(x, next(iter(base_outputs.values())))
    ordered, fusing, constants = _stacked(names, adapters, fusions)
    outputs = apply(
        backend,
        dtype,
        constants,
        p,
        x,
        x_source if fusing else None,
        [source_bottleneck[name] for name in fusing] if source_bottleneck is not None else [],
        [base_outputs[name] for name in names],
        [adapters[name][0] for name in ordered],
        [adapters[name][1] for name in ordered],
        [weights[name] for name in names] if owns_dx and weights is not None else [],
    )
    results = dict(zip(names, outputs, strict=True))
    return {name: results.get(name, y) for name, y in base_outputs.items()}


def _stacked(
    names: Sequence[str], adapters: Mapping[str, AdapterWeights], fusions: Mapping[str, str | None]
) -> tuple[list[str], list[str], list[call.AdapterSpec]]:
    """Return the adapters' names in stacking order, the names that fuse, and the constants of each adapter."""
    # fusing adapters first, and adapters of one fusion next to each other, so that they can share a launch
    ordered = sorted(adapters, key=lambda name: (fusions[name] is None, fusions[name] or ""))
    fusing = [name for name in ordered if fusions[name] is not None]
    constants = [
        (names.index(name), adapters[name][0].shape[0], float(adapters[name][2]), fusions[name]) for name in ordered
    ]
    return ordered, fusing, constants


def _with_products(
    x: Tensor,
    x_source: Tensor | None,
    adapters: Mapping[str, AdapterWeights],
    fusion: str | Mapping[str, str | None] | None,
    source_bottleneck: Mapping[str, Tensor] | None,
    weights: Mapping[str, Tensor] | None,
    biases: Mapping[str, Tensor | None] | None,
    p: float,
    backend: str,
) -> dict[str, Tensor]:
    """Return the outputs of :func:`fused_lora_qkv` if the node computes the frozen products too."""
    if weights is None:
        raise ValueError(
            "base_outputs and weights are both None: pass the frozen weights, or the outputs of the frozen linears"
        )
    biases = {} if biases is None else biases
    if unknown := sorted(set(biases) - set(weights)):
        raise ValueError(f"biases has the names {unknown}, but weights has only {sorted(weights)}")
    for kind, frozen in (("weights", weights), ("biases", biases)):
        if trained := sorted(name for name, tensor in frozen.items() if tensor is not None and tensor.requires_grad):
            raise ValueError(
                f"{kind} {trained} require grad, but the node computes no gradient for them: pass base_outputs"
            )
    validation.check_dtypes({"x": x} | {f"biases[{name!r}]": bias for name, bias in biases.items()})
    for name, bias in biases.items():
        if bias is not None and tuple(bias.shape) != weights[name].shape[:1]:
            raise ValueError(
                f"biases[{name!r}] has shape {tuple(bias.shape)}, expected {tuple(weights[name].shape[:1])}: the width "
                "of the output"
            )
    names = tuple(weights)
    bias_list = [biases.get(name) for name in names]
    # in these cases, the frozen products stay outside the node, as plain operators
    if backend == "reference" or torch.compiler.is_compiling() or (backend == "auto" and needs_plain_operators()):
        with torch.no_grad():
            products = {name: F.linear(x, weights[name], bias) for name, bias in zip(names, bias_list, strict=True)}
        options: dict[str, Any] = {"fusion": fusion, "source_bottleneck": source_bottleneck, "weights": weights}
        options |= {"dropout_p": p, "training": True, "backend": backend}
        return fused_lora_qkv(x, x_source, products, adapters, **options)
    like = {name: torch.empty((*x.shape[:-1], W.shape[0]), dtype=x.dtype, device="meta") for name, W in weights.items()}
    fusions = _check(x, x_source, like, adapters, fusion, source_bottleneck, weights, p, backend, "weights")
    dtype = x.dtype
    if dtype == torch.float32 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    ordered, fusing, constants = _stacked(names, adapters, fusions)
    Ss = [source_bottleneck[name] for name in fusing] if source_bottleneck is not None else []
    ys = apply_with_products(
        call_of(backend, x.device, dtype, tuple(constants), len(names), p if adapters else 0.0),
        (0, len(Ss), len(names)),
        x,
        x_source if fusing else None,
        None,
        Ss,
        None,
        [adapters[name][0] for name in ordered],
        [adapters[name][1] for name in ordered],
        [weights[name] for name in names],
        bias_list,
    )
    return {name: y.view((*x.shape[:-1], y.shape[1])) for name, y in zip(names, ys, strict=True)}


def _check(
    x: Tensor,
    x_source: Tensor | None,
    base_outputs: Mapping[str, Tensor],
    adapters: Mapping[str, AdapterWeights],
    fusion: str | Mapping[str, str | None] | None,
    source_bottleneck: Mapping[str, Tensor] | None,
    weights: Mapping[str, Tensor] | None,
    dropout_p: float,
    backend: str,
    outputs: str = "base_outputs",
) -> dict[str, str | None]:
    """Validate a joint call and return the fusion of every adapter (None: plain LoRA).

    `outputs`: name of the argument whose keys are the outputs, for messages.
    """
    validation.check_numbers(1.0, dropout_p)
    validation.check_dtypes({"x": x, "x_source": x_source})
    validation.check_streams(x, x_source, None)
    for argument, mapping in (("adapters", adapters), ("source_bottleneck", source_bottleneck or {})):
        unknown = sorted(set(mapping) - set(base_outputs))
        if unknown:
            raise ValueError(f"{argument} has the names {unknown}, but {outputs} has only {sorted(base_outputs)}")
    if weights is not None and set(weights) != set(base_outputs):
        raise ValueError(
            f"weights has the names {sorted(weights)}, but base_outputs has {sorted(base_outputs)}: pass all names "
            "or no weights at all"
        )
    if isinstance(fusion, Mapping) and set(fusion) - set(base_outputs):
        raise ValueError(
            f"fusion has the names {sorted(set(fusion) - set(base_outputs))}, but {outputs} has only "
            f"{sorted(base_outputs)}"
        )
    for adapter_fusion in fusion.values() if isinstance(fusion, Mapping) else (fusion,):
        validation.check_fusion(adapter_fusion, "torch" if backend == "auto" else backend)
    for name, W in (weights or {}).items():
        validation.check_weight(x, base_outputs[name], W, where=name)
    fusions: dict[str, str | None] = {}
    for name, (A, B, scaling) in adapters.items():
        validation.check_numbers(scaling, dropout_p)
        adapter_fusion = fusion.get(name) if isinstance(fusion, Mapping) else fusion
        S = None if source_bottleneck is None else source_bottleneck.get(name)
        tensors = {
            "x": x,
            "x_source": x_source,
            f"base_outputs[{name!r}]": base_outputs[name],
            "lora_A": A,
            "lora_B": B,
        }
        validation.check_dtypes({**tensors, "source_bottleneck": S})
        validation.check_streams(x, x_source, S)
        validation.check_adapter(x, base_outputs[name], A, B, S, where=name)
        fusions[name] = None if x_source is None and S is None else adapter_fusion
    if weights is not None:
        trained = sorted(name for name, y in base_outputs.items() if y.requires_grad)
        if trained:
            raise ValueError(
                f"base_outputs {trained} require grad while weights are given: the node computes their dx itself; "
                "compute base_outputs under torch.no_grad()"
            )
    return fusions


def _reference(
    x: Tensor,
    x_source: Tensor | None,
    base_outputs: Mapping[str, Tensor],
    adapters: Mapping[str, AdapterWeights],
    fusions: Mapping[str, str | None],
    source_bottleneck: Mapping[str, Tensor] | None,
    weights: Mapping[str, Tensor] | None,
    p: float,
) -> dict[str, Tensor]:
    """Return the outputs of the oracle, one projection after the other, with the same masks for all of them."""
    outputs = {}
    seed = _dropout.draw_seed(x.device) if p > 0.0 else torch.zeros((), dtype=torch.int64)
    dtype = compute_dtype(x, next(iter(base_outputs.values()))) if base_outputs else x.dtype
    x_target = reference.drop(x.to(dtype), p, seed, _dropout.TARGET_STREAM)
    x_other = None if x_source is None else reference.drop(x_source.to(dtype), p, seed, _dropout.SOURCE_STREAM)
    for name, y in base_outputs.items():
        if weights is not None:  # y keeps its value and gets the gradient of x W^T
            product = x.to(dtype) @ weights[name].to(dtype).T
            # y is detached, because no_grad does not remove tangents of forward-mode differentiation
            y = y.detach() + (product - product.detach()).to(y.dtype)
        if name in adapters:
            A, B, scaling = adapters[name]
            S = None if source_bottleneck is None else source_bottleneck.get(name)
            y = reference.fused_lora(
                x_target,
                x_other if S is None else None,
                y,
                A,
                B,
                scaling=scaling,
                fusion=fusions[name],
                source_bottleneck=S,
            )
        outputs[name] = y
    return outputs
