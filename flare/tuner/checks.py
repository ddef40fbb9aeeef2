"""Checks of what a fusing adapter supports: which LoRA modules fuse, and which adapters can be combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..source.runtime import Runtime
from .config import FlareConfig
from .layer import FlareLayer
from .routing import reads_text


def unfused_reason(
    model: nn.Module, runtime: Runtime, config: FlareConfig, path: str, layer: FlareLayer, adapter: str
) -> str:
    """Return why an adapter does not fuse in a LoRA module; "" if it fuses.

    Args:
        model: the transformers model.
        runtime: the state that the model's hooks share.
        config: the adapter's config.
        path: the module's dotted path.
        layer: the LoRA module.
        adapter: the adapter's name.
    """
    if config.fusion is None:
        return "fusion=None"
    place = runtime.map.places.get(path)
    if place is None and not reads_text(model, path):
        return "it is in a part of the model that does not read text"
    if place is None:
        return "it is not a projection of a block's attention"
    if place.is_cross_attention:
        return "cross-attention does not fuse"
    if config.latent_dim is not None and place.stack in runtime.map.decoders:
        return "with latent_dim, only an encoder-decoder's encoder fuses, because source_states are for the encoder"
    name = path.rpartition(".")[2]
    if config.fusion_modules is None:
        if path not in runtime.map.query_and_value:
            return "only self-attention query and value projections fuse (fusion_modules)"
    elif name not in config.fusion_modules and path not in config.fusion_modules:
        return f"it is not in fusion_modules={list(config.fusion_modules)}"
    hidden = _hidden_size(model)
    if hidden is not None and layer.in_features != hidden:
        return f"its input has width {layer.in_features}, and the source's hidden states have width {hidden}"
    rank, heads = layer.r[adapter], config.cross_attention_heads
    if config.fusion == "cross_attention" and rank % heads:
        return f"cross_attention_heads={heads} does not divide its rank {rank}"
    return ""


def _hidden_size(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None)


def check_combination(
    configs: Mapping[str, FlareConfig], adapters: Sequence[str], weights: Sequence[float], combination_type: str
) -> None:
    """Raise ValueError if adapters cannot be combined into one adapter by combining their A and B.

    The adapters must have the same fusion, source_layer_offset and source_padding. For adapters that fuse:

    - A combination_type that mixes the r columns of S and T or factorises B A again (such as 'svd') is not accepted,
      because the fusion phi(S, T) acts on each column separately.
    - Fusions 'mul' and 'mul_relu' are not accepted: they multiply S and T, so a weight on A would be applied twice.
    - A weight w must be positive, because relu(w z) is not w relu(z) for a negative w.

    Adapters with cross_attention or latent_dim have other trained weights than A and B and cannot be combined.

    Args:
        configs: adapter name -> config.
        adapters: names of the adapters to combine. PEFT reports unknown names.
        weights: the weight of each adapter, in the order of ``adapters``.
        combination_type: as in PEFT's ``add_weighted_adapter``.
    """
    known = [name for name in adapters if name in configs]
    for name in known:
        config = configs[name]
        if config.fusion == "cross_attention" or config.latent_dim is not None:
            trained = "latent_proj" if config.latent_dim is not None else "cross_attention's query, key and value"
            raise ValueError(
                f"adapters: {name!r} trains {trained}, which cannot be combined: only lora_A and lora_B can"
            )
    for key in ("fusion", "source_layer_offset", "source_padding"):
        values = {name: getattr(configs[name], key) for name in known}
        if len(set(values.values())) > 1:
            raise ValueError(f"adapters: cannot combine adapters whose {key} differs: {values}")
    fusion = configs[known[0]].fusion if known else None
    if fusion is None:
        return
    accepted = "accepted: fusion 'add' or 'add_relu', combination_type 'linear' or 'cat', weights above 0"
    if fusion not in ("add", "add_relu"):
        raise ValueError(f"adapters with fusion={fusion!r} cannot be combined; {accepted}")
    if combination_type not in ("linear", "cat"):
        raise ValueError(f"combination_type={combination_type!r} cannot combine adapters that fuse; {accepted}")
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"weights={list(weights)!r} cannot combine adapters that fuse; {accepted}")
