"""The source of one forward: its arguments checked, the frozen model run or states taken as given."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..source_cache import CachedReader, SourceStateCache
from .context import SourceContext
from .fsdp import reshard_below
from .inputs import (
    DECODER_ARGUMENTS,
    backbone_inputs,
    check_states,
    decoder_inputs,
    without_trailing_pads,
)
from .latent import read_latent
from .memory import AutocastState, Choice, Keep, Offload, Recompute, RowVisitor, StateMemory, choose
from .runtime import Reads, Runtime, graded
from .source_pass import (
    Preparation,
    Reader,
    keep_states,
    project_states,
    read_from_model,
    read_from_states,
)
from .states import SourceStates, StateKey


def read_source(
    model: nn.Module,
    runtime: Runtime,
    source: dict[str, Any],
    target: tuple[int, ...] | None,
    decoder_target: tuple[int, ...] | None = None,
    source_padding: str | None = None,
    source_cache: SourceStateCache | None = None,
) -> SourceContext:
    """Run the source pass (or take the given states) and return what travels to the layers.

    Args:
        model, runtime: the transformers model and its runtime.
        source: the source arguments that were given.
        target, decoder_target: (B, m) of the target text and (B, u) of its decoder's input, to be checked against.
        source_padding: in place of the adapters' own.
        source_cache: where rows of states are read and kept.

    Raises:
        TypeError, ValueError: source arguments that do not fit; the message names the argument.
    """
    reading = runtime.reading()
    decoder = [name for name in DECODER_ARGUMENTS if name in source]
    if decoder and not runtime.map.decoders:
        raise ValueError(
            f"{decoder[0]}: {type(model).__name__} is not an encoder-decoder, whose decoder these are for; leave it out"
        )
    reads = reading.of_both if decoder else reading.of_text
    if not reads:
        raise ValueError(
            f"{', '.join(sorted(source))}: the active adapters fuse in the decoder only, which reads source_labels "
            "or source_decoder_input_ids; pass one of them too"
        )
    adapters = reads.adapters
    if torch.compiler.is_compiling() and not _is_traceable(model, runtime, reads, source, source_padding, source_cache):
        return _read_outside_the_graph(
            model, runtime, source, target, decoder_target, source_padding=source_padding, source_cache=source_cache
        )
    latent_dim = runtime.setting("latent_dim", adapters)
    if latent_dim is not None:
        reshard_below(model, (layer.flare_key for layer in runtime.layers))
        return read_latent(model, source, target, reads, runtime.layers, latent_dim)
    zeroes = (source_padding or runtime.setting("source_padding", adapters)) == "zero"
    weights = reads.weights()
    device, masks = weights[0].device, {}
    states: Reader | Mapping[StateKey, Tensor]
    if "source_states" in source:
        given = source["source_states"]
        check_states(given, source, target, runtime.setting("source_layer_offset", adapters), weights[0].shape[1])
        if given.attention_mask is not None:
            masks = dict.fromkeys(runtime.map.stacks, given.attention_mask)
        states = read_from_states(given, reads.keys)
    else:
        inputs = backbone_inputs(model, source, target)
        if "attention_mask" in inputs:
            masks = dict.fromkeys(runtime.map.stacks, inputs["attention_mask"])
        if decoder:
            inputs["decoder_input_ids"], mask = decoder_inputs(model, source, decoder_target)
            masks |= dict.fromkeys(runtime.map.decoders, mask)
        if zeroes:
            inputs = without_trailing_pads(inputs)
        dropout = runtime.setting("source_dropout", adapters)
        states = read_from_model(model, inputs, reads.keys, dropout=dropout)
    prepare = Preparation.under_autocast(device, masks if zeroes else {})
    if source_cache is not None and "source_states" not in source:
        check_cacheable(runtime, adapters)
        states = source_cache.reader(
            model,
            inputs,
            reads.keys,
            prepare,
            masks if zeroes else {},
            runtime.map.decoders,
            zero_pads=zeroes,
        )
    if torch.compiler.is_compiling():
        return keep_states(states, prepare, reads.by_key)
    if not graded(weights):
        return _projected(model, runtime, reads, states, prepare, None)
    memory = _memory(model, runtime, reads, source, states, prepare)
    if isinstance(memory, Keep) and not (prepare.packings or reads.mixes):
        kept = states.warm() if isinstance(states, CachedReader) else None
        if kept is not None:  # they are prepared already
            return keep_states(kept, Preparation(prepare.dtype), reads.by_key)
        return keep_states(states, prepare, reads.by_key)
    return _projected(model, runtime, reads, states, prepare, memory)


#: Under torch.compile, which breaks its graph here.
_read_outside_the_graph = torch.compiler.disable(read_source)


def _is_traceable(
    model: nn.Module,
    runtime: Runtime,
    reads: Reads,
    source: dict[str, Any],
    source_padding: str | None,
    source_cache: SourceStateCache | None,
) -> bool:
    """Whether torch.compile can take the source pass into its graph: states stay on the device, in their shape."""
    return (
        source_cache is None
        and not reads.mixes
        and runtime.setting("latent_dim", reads.adapters) is None
        and (source_padding or runtime.setting("source_padding", reads.adapters)) != "zero"
        and _choose(model, runtime, reads, source).mode == "keep"
    )


def _projected(
    model: nn.Module,
    runtime: Runtime,
    reads: Reads,
    states: Reader,
    prepare: Preparation,
    memory: StateMemory | None,
) -> SourceContext:
    reshard_below(model, (layer.flare_key for _, _, layer in reads.wanted))
    return project_states(states, prepare, reads.groups, memory)


def check_cacheable(runtime: Runtime, adapters: set[str]) -> None:
    """Raise ValueError where the adapters' source states cannot be kept over epochs."""
    if not adapters:
        raise ValueError("source_cache: no active adapter of this model fuses two streams; leave it out")
    if runtime.setting("latent_dim", adapters) is not None:
        raise ValueError(
            "source_cache: an adapter with latent_dim (FLARE MT) runs no source pass, so there is nothing to keep; "
            "leave it out"
        )
    if runtime.setting("source_dropout", adapters):
        raise ValueError(
            "source_cache: with source_dropout=True every source pass is another one, so its states cannot be kept; "
            "use source_dropout=False (the default), or leave the cache out"
        )


def _memory(
    model: nn.Module,
    runtime: Runtime,
    reads: Reads,
    source: dict[str, Any],
    reader: Reader,
    prepare: Preparation,
) -> StateMemory:
    """Return how this pass's states wait for backward; says once per reason why it is not as the config asks."""
    weight, choice = reads.weights()[0], _choose(model, runtime, reads, source)
    if choice.reason and choice.reason not in runtime.said:
        runtime.said.add(choice.reason)
        warnings.warn(choice.reason, UserWarning, stacklevel=2)
    if choice.mode == "offload":
        return Offload(weight.device)
    if choice.mode == "keep":
        return Keep()

    def read_again(visit: RowVisitor) -> None:
        reader(lambda key, hidden: visit(key, prepare.rows(key, hidden)))

    inputs = [value for value in source.values() if isinstance(value, Tensor)]
    return Recompute(read_again, AutocastState.now(weight.device), inputs)


def _choose(model: nn.Module, runtime: Runtime, reads: Reads, source: dict[str, Any]) -> Choice:
    ids = next((source[name] for name in ("source_input_ids", *DECODER_ARGUMENTS) if name in source), None)
    weight = reads.weights()[0]
    dtype = Preparation.under_autocast(weight.device).dtype
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tokens = 0 if ids is None else ids.numel()
    return choose(
        runtime.setting("source_memory", reads.adapters),
        model,
        weight.device,
        len(reads.keys) * tokens * weight.shape[-1] * dtype.itemsize,
        dropout=runtime.setting("source_dropout", reads.adapters),
        given="source_states" in source,
    )


def encode(model: nn.Module, runtime: Runtime, source: dict[str, Any]) -> SourceStates:
    """Return the states that the active adapters would read; see ``FlareModel.encode_source``."""
    reading = runtime.reading()
    reads = reading.of_text
    if not reads and reading.of_decoder:
        raise ValueError("encode_source: the active adapters fuse in the decoder only, which this does not read")
    if not reads:
        raise ValueError("encode_source: no active adapter of this model fuses two streams (or adapters are disabled)")
    latent_dim = runtime.setting("latent_dim", reads.adapters)
    if latent_dim is not None:
        raise ValueError(f"encode_source: an adapter with latent_dim={latent_dim} (FLARE MT) reads no source text")
    inputs = backbone_inputs(model, source, None)
    prepare = Preparation.under_autocast(inputs["input_ids"].device)
    dropout = runtime.setting("source_dropout", reads.adapters)
    states: dict[StateKey, Tensor] = {}
    # without inference mode, or training could not save them for its backward pass
    with torch.inference_mode(False):
        read_from_model(model, inputs, reads.keys, dropout=dropout)(
            lambda key, hidden: states.__setitem__(key, prepare(key, hidden))
        )
    return SourceStates(states, runtime.setting("source_layer_offset", reads.adapters), inputs.get("attention_mask"))
