"""The oracle: FLARE's formulas in plain PyTorch, differentiated by autograd, in any dtype including float64.

Tests compare the kernels with this module. It defines what the fused implementations compute (paper section 3,
equations 1 to 4). Nothing is fused, and every intermediate result has the compute dtype.

Shapes: m length, d input width, n output width, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dropout as _dropout
from .fusion import ALL_FUSIONS, FUSIONS, get_fusion


def fuse(
    S: Tensor, T: Tensor, fusion: str | None, weights: Mapping[str, Tensor] | None = None, *, heads: int = 1
) -> Tensor:
    """Return phi(S, T). S, T and the result are (..., m, r).

    Args:
        S: down-projected source stream.
        T: down-projected target stream.
        fusion: one of ``FUSIONS`` or ``"cross_attention"``, ``"matmul"``, ``"matmul_relu"``; None returns T.
        weights: for ``cross_attention``: ``query.weight``, ``key.weight``, ``value.weight`` (r, r) and the three
            ``.bias`` (r). The query is computed from the source, key and value from the target. There is neither a mask
            nor an output projection.
        heads: attention heads of ``cross_attention``; must divide r.

    Raises:
        ValueError: unknown fusion, missing weights, or heads that do not divide r.
    """
    if fusion is None:
        return T
    if fusion in FUSIONS:
        return get_fusion(fusion)(S, T)
    if fusion == "matmul":
        return S @ (T.transpose(-1, -2) @ T)
    if fusion == "matmul_relu":
        S, T = S.relu(), T.relu()
        return S @ (T.transpose(-1, -2) @ T)
    if fusion == "cross_attention":
        return _cross_attention(S, T, weights, heads)
    raise ValueError(f"fusion={fusion!r} is not one of {', '.join(ALL_FUSIONS)} (or None)")


def _cross_attention(S: Tensor, T: Tensor, weights: Mapping[str, Tensor] | None, heads: int) -> Tensor:
    """Return softmax(Q K^T / sqrt(r / heads)) V with Q = Wq S + bq, K = Wk T + bk, V = Wv T + bv."""
    required = [f"{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
    missing = [name for name in required if weights is None or name not in weights]
    if missing or weights is None:
        raise ValueError(f"weights: cross_attention needs {', '.join(required)}; missing: {', '.join(missing)}")
    r = T.shape[-1]
    if heads < 1 or r % heads:
        raise ValueError(f"heads={heads} must divide the rank r={r}")

    def split(stream: Tensor, part: str) -> Tensor:
        projected = F.linear(stream, weights[f"{part}.weight"], weights[f"{part}.bias"])
        return projected.unflatten(-1, (heads, r // heads)).transpose(-2, -3)

    query, key, value = split(S, "query"), split(T, "key"), split(T, "value")
    attention = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(r // heads), dim=-1)
    return (attention @ value).transpose(-2, -3).flatten(-2)


def drop(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """Return inverted dropout of x (..., d), with the packed mask that the kernels regenerate from the same seed."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    mask = _dropout.packed_mask(seed, rows, x.shape[-1], p, stream)
    if mask is None:
        return x
    return x * (_dropout.unpack(mask, x.shape[-1], x.dtype) * _dropout.keep_scale(p)).view(x.shape)


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
    backend: str = "reference",
    weights: Mapping[str, Tensor] | None = None,
    heads: int = 1,
) -> Tensor:
    """Return y = base_output + scaling * phi(x_source A^T, x A^T) B^T, computed with plain PyTorch operators.

    Arguments as in :func:`flare_kernels.fused_lora`, plus ``weights`` and ``heads`` of :func:`fuse`. ``backend`` is
    ignored. ``base_output`` is not modified. The streams and the adapters are cast to the dtype that
    :func:`compute_dtype` returns.
    """
    del backend
    dtype = compute_dtype(x, base_output)
    x = x.to(dtype)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    p = dropout_p if training else 0.0
    seed = _dropout.draw_seed(x.device) if p > 0 else torch.zeros((), dtype=torch.int64)
    T = drop(x, p, seed, _dropout.TARGET_STREAM) @ A.T
    if fusion is None or (x_source is None and source_bottleneck is None):
        H = T
    else:
        if source_bottleneck is None:
            assert x_source is not None
            S = drop(x_source.to(dtype), p, seed, _dropout.SOURCE_STREAM) @ A.T
        else:
            S = source_bottleneck.to(dtype)
        if weights is not None:
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
        H = fuse(S, T, fusion, weights, heads=heads)
    return base_output + (scaling * (H @ B.T)).to(base_output.dtype)


def compute_dtype(x: Tensor, base_output: Tensor) -> torch.dtype:
    """Return x's dtype, or base_output's dtype if autocast computed base_output in 16 bits and left x in float32."""
    if x.dtype == torch.float32 and base_output.dtype in (torch.float16, torch.bfloat16):
        return base_output.dtype
    return x.dtype
