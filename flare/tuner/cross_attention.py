"""The fusion 'cross_attention': the module that holds its weights, and the computation with an attention mask."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flare_kernels import reference


class CrossAttention(nn.Module):
    """Query, key and value weights of ``fusion="cross_attention"`` in one layer: three Linears (r, r) with bias.

    They have the initial values of a new torch.nn.Linear. The adapter layer reads the weights and does not call this
    module.
    """

    def __init__(self, r: int, heads: int, masked: bool = False) -> None:
        super().__init__()
        self.heads, self.masked = heads, masked
        self.query, self.key, self.value = nn.Linear(r, r), nn.Linear(r, r), nn.Linear(r, r)


def masked_cross_attention(
    x: Tensor,
    x_source: Tensor | None,
    base_output: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    fusion: str,
    source_bottleneck: Tensor | None,
    dropout_p: float,
    training: bool,
    weights: Mapping[str, Tensor],
    heads: int,
    mask: tuple[Tensor, bool],
) -> Tensor:
    """Return base_output plus the output (B, m, n) of an adapter with fusion='cross_attention' and a mask.

    The source's queries attend to the target's tokens, and not to the target's padding. If the mask is causal, they do
    not attend to later positions either. Each position attends at least to the target's position of the same index, so
    that the output at padding is finite.

    Args:
        x: (B, m, d), the target's hidden state.
        x_source: (B, m, d), the source's hidden state; None if ``source_bottleneck`` is given.
        base_output: (B, m, n), the frozen layer's output.
        lora_A: (r, d).
        lora_B: (n, r).
        scaling: factor of the adapter's output.
        fusion: not used; the adapter layer passes it to every function that computes a fusion.
        source_bottleneck: S (B, m, r), instead of x_source; None if ``x_source`` is given.
        dropout_p: probability of dropping an entry of x and x_source.
        training: whether dropout is active.
        weights: the parameters of :class:`CrossAttention` by name: "query.weight", "query.bias" and so on.
        heads: number of attention heads.
        mask: (mask, causal): the target's mask (B, m), nonzero at tokens, and whether later positions are masked too.
    """
    dtype = reference.compute_dtype(x, base_output)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    T = F.dropout(x.to(dtype), dropout_p, training) @ A.T
    if source_bottleneck is None:
        assert x_source is not None
        source_bottleneck = F.dropout(x_source.to(dtype), dropout_p, training) @ A.T
    real, causal = mask
    m = x.shape[-2]
    visible = real.to(x.device).bool()[:, None, :].expand(-1, m, -1)
    if causal:
        visible = visible.tril()
    visible = visible | torch.eye(m, dtype=torch.bool, device=x.device)

    def split_heads(stream: Tensor, part: str) -> Tensor:
        weight, bias = (weights[f"{part}.{kind}"].to(dtype) for kind in ("weight", "bias"))
        return F.linear(stream, weight, bias).unflatten(-1, (heads, -1)).transpose(-2, -3)

    query = split_heads(source_bottleneck.to(dtype), "query")
    key, value = split_heads(T, "key"), split_heads(T, "value")
    H = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None]).transpose(-2, -3).flatten(-2)
    return base_output + (scaling * (H @ B.T)).to(base_output.dtype)
