"""FLARE MT: the source is an MT encoder's last hidden state h, projected once for all blocks.

    x_S = latent_proj(h)        S_1 ... S_n = split(x_S A_cat^T)        h (B, m, latent_dim), x_S (B, m, d)

MT is machine translation. No source pass is needed. x_S is the same for all blocks, so one matrix product with A_cat,
the stacked A of all fusing layers, gives all S of an adapter. Autograd computes the gradients of every A and, through
dx_S, of the projection.

Shapes: B rows of a batch, m positions, hidden states of width d.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .._compat import execution_device, inside_ddp
from ..tuner.layer import FlareLayer, is_untouched, weight_of
from .context import SourceContext
from .fsdp import REENTRANT, full_parameter
from .runtime import Reads
from .source_pass import zero_pads

#: Source arguments that hold text for the base model; FLARE MT does not read them.
_TEXT = ("source_input_ids", "source_token_type_ids", "source_labels", "source_decoder_input_ids")


class LatentContext(SourceContext):
    """A context whose layers share one x_S per adapter.

    Args:
        with_grad: whether gradients were enabled when the source was read.
        latent: h (B, m, latent_dim), detached.
        mask: (B, m), or None if the caller passed none.
        dtype: the dtype of x_S, which is the model's dtype. None: the dtype of latent_proj's weight.
        projections: adapter -> its latent_proj.
    """

    def __init__(
        self,
        with_grad: bool,
        latent: Tensor,
        mask: Tensor | None,
        dtype: torch.dtype | None,
        projections: dict[str, nn.Linear],
    ) -> None:
        super().__init__(with_grad)
        self.latent, self.mask, self.dtype, self.projections = latent, mask, dtype, projections
        parameters = [p for projection in projections.values() for p in projection.parameters()]
        self.sharded = any(isinstance(parameter, DTensor) for parameter in parameters)

    def make_state(self, layer: str, adapter: str) -> Tensor:
        """Return x_S, computed again, because a block that reentrant checkpointing runs again has a separate graph.

        Raises:
            ValueError: under DDP or FSDP2, which reduce the projection's gradient after the first block's backward.
        """
        if self.sharded or inside_ddp():
            raise ValueError(REENTRANT.format(engine="FSDP2" if self.sharded else "DistributedDataParallel"))
        return self.project(adapter)

    def project(self, adapter: str) -> Tensor:
        """Return x_S (B, m, d) of an adapter."""
        projection = self.projections[adapter]
        if not is_untouched(projection):  # for example, an accelerate hook that loads an offloaded weight
            x_source = projection(self.latent.to(execution_device(projection), projection.weight.dtype))
            x_source = x_source if self.dtype is None else x_source.to(self.dtype)
            return x_source if self.mask is None else zero_pads(x_source, self.mask)
        weight, bias = (
            p.to(self.dtype) for p in (full_parameter(projection.weight), full_parameter(projection.bias, dims=1))
        )
        x_source = F.linear(self.latent.to(weight.device, weight.dtype), weight, bias)
        if self.mask is not None:
            x_source = zero_pads(x_source, self.mask)
        return x_source


def read_latent(
    model: nn.Module,
    source: dict[str, Any],
    target: tuple[int, ...] | None,
    reads: Reads,
    layers: Iterable[FlareLayer],
    latent_dim: int,
) -> LatentContext:
    """Return a context with S of every fusing layer, computed from ``source_states``.

    Args:
        model: the transformers model.
        source: the source arguments of the call.
        target: (B, m) of the target text, to check the source against.
        reads: the active adapters and the layers in which they fuse.
        layers: the adapter layers, which hold the projections.
        latent_dim: the adapters' latent_dim.

    Raises:
        TypeError, ValueError: the source arguments do not match; the message names the argument.
    """
    latent, mask = _check_latent(source, target, latent_dim)
    projections = {
        adapter: cast(nn.Linear, layer.latent_proj[adapter]) for layer in layers for adapter in layer.latent_proj
    }
    trained = [*reads.weights(), *(p for name in reads.adapters for p in projections[name].parameters())]
    with_grad = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in trained)
    context = LatentContext(with_grad, latent, mask, getattr(model, "dtype", None), projections)
    for adapter in sorted(reads.adapters):
        groups = [group for group in reads.groups if group.adapter == adapter]
        fusing = [layer for group in groups for layer in group.modules]
        x_source = context.project(adapter)
        dropout = fusing[0].lora_dropout[adapter]
        x_source = F.dropout(x_source, getattr(dropout, "p", 0.0), dropout.training)
        if reads.have_hooks():  # call the modules, after the dropout that they share
            modules = {layer: cast(nn.Linear, layer.lora_A[adapter]) for layer in fusing}
            S = {
                layer.flare_key: {adapter: A(x_source.to(execution_device(A), A.weight.dtype))}
                for layer, A in modules.items()
            }
            context.update(S, reads.sites)
            continue
        weights = [full_parameter(weight_of(layer, adapter)) for layer in fusing]
        stacked = torch.cat([A.to(x_source.device, x_source.dtype) for A in weights])
        parts = F.linear(x_source, stacked).split([A.shape[0] for A in weights], dim=-1)
        S = {
            layer.flare_key: {adapter: part.to(A.device)} for layer, A, part in zip(fusing, weights, parts, strict=True)
        }
        context.update(S, reads.sites)
    return context


def _check_latent(
    source: dict[str, Any], target: tuple[int, ...] | None, latent_dim: int
) -> tuple[Tensor, Tensor | None]:
    """Return source_states (B, m, latent_dim) and source_attention_mask (B, m) or None.

    Raises:
        TypeError, ValueError: source_states is missing, one of the two does not match the target's shape or latent_dim,
            or source text was passed.
    """
    text = [name for name in _TEXT if name in source]
    if text:
        raise ValueError(
            f"{', '.join(text)}: an adapter with latent_dim={latent_dim} (FLARE MT) reads no source text; pass the MT "
            f"encoder's last hidden state as source_states (B, m, {latent_dim})"
        )
    latent, mask = source.get("source_states"), source.get("source_attention_mask")
    if latent is None:
        raise ValueError(f"{', '.join(sorted(source))} was given without source_states: pass both, or neither")
    if not isinstance(latent, Tensor) or not latent.is_floating_point():
        kind = f"a tensor of {latent.dtype}" if isinstance(latent, Tensor) else type(latent).__name__
        raise TypeError(f"source_states must be a floating tensor (B, m, {latent_dim}) with latent_dim, got {kind}")
    if latent.dim() != 3 or latent.shape[-1] != latent_dim:
        raise ValueError(
            f"source_states has shape {tuple(latent.shape)}, expected (B, m, {latent_dim}) with latent_dim"
        )
    if target is not None and tuple(latent.shape[:2]) != target:
        raise ValueError(
            f"source_states has shape {tuple(latent.shape)}, the target's input_ids {target}: both need the same batch "
            "size and length; pad the MT encoder's states to the length of the target text"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != latent.shape[:2]):
        what = str(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"source_attention_mask is {what}, expected (B, m) of source_states: {tuple(latent.shape[:2])}"
        )
    return latent.detach(), mask
