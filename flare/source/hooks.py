"""The hooks that take a source from a model's keyword arguments to its adapter layers.

Four hooks, and no modeling code copied or patched:

1. before the transformers model: take ``source_*`` out of the keyword arguments, run the source pass; in a step of
   generation, ask the source that the KV cache carries for its next positions (flare.generation.decoding), or put its
   rows below the target's (flare.generation.shared_pass);
2. before the owner of a block stack: hand the carrier on as a keyword argument of the blocks;
3. before a self-attention module: take the carrier out and give each adapter layer its part;
4. after it: take it away again; after the model: check that every fusing layer was reached.

The functions find everything through the module they are called with, never through a closure, so a deep copy or a
pickled model routes to its own layers.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import is_data_parallel_replica
from ..source_cache import SourceStateCache
from ..tuner import site as joint_attention
from ..tuner.config import FlareConfig
from ..tuner.layer import FlareLayer, weight_of
from ..tuner.routing import ModelMap
from .fsdp import reshard_below
from .inputs import backbone_inputs, check_states, decoder_inputs, decoder_shape, target_shape, without_trailing_pads
from .latent import carry_latent
from .memory import AutocastState, Keep, Offload, Recompute, RowVisitor, StateMemory, choose
from .source_pass import (
    Group,
    Preparation,
    Reader,
    SourceCarrier,
    make_groups,
    read_from_model,
    read_from_states,
    run_source_pass,
)
from .states import SourceStates, StateKey

#: Keyword arguments of the model that belong to the source.
SOURCE_ARGUMENTS = (
    "source_input_ids",
    "source_attention_mask",
    "source_token_type_ids",
    "source_labels",
    "source_decoder_input_ids",
    "source_states",
)
#: Of these, what an encoder-decoder's decoder reads.
DECODER_ARGUMENTS = ("source_labels", "source_decoder_input_ids")
#: A state, and the adapter and layer that read it.
Wanted = tuple[StateKey, str, FlareLayer]

#: Attribute of a target's KV cache that holds the source decoded beside it (flare.generation.decoding).
SOURCE_OF_CACHE = "flare_decoding"

_CARRIER = "flare_source"
_RUNTIME = "_flare_runtime"
_LAYERS = "_flare_layers"

NO_SOURCE_WARNING = (
    "A fusing adapter was trained without a source and is plain LoRA in this step. Pass source_input_ids and "
    "source_attention_mask to the model (with latent_dim: source_states). With transformers.Trainer, set "
    "remove_unused_columns=False (it drops columns that the base model's forward does not name) or use "
    "flare.FlareTrainer, and pad with flare.FlareDataCollator."
)


@dataclass
class Runtime:
    """What the hooks of one transformers model share. Attached to the model; copied and pickled with it."""

    map: ModelMap
    configs: dict[str, FlareConfig]
    layers: list[FlareLayer] = field(default_factory=list)
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    carrier: SourceCarrier | None = None
    source_cache: SourceStateCache | None = None
    step: Any = None  # the flare.generation.shared_pass.SharedStep that runs now
    found: list[FlareLayer] | None = None  # see adopted
    in_source_pass: bool = False
    warned: bool = False
    said: set[str] = field(default_factory=set)
    warned_padding: bool = False

    def wanted(self) -> list[Wanted]:
        """(state, adapter, layer) of every layer that fuses now; none where adapters are off or merged."""
        result = []
        for layer in self.layers:
            if layer.disable_adapters or layer.merged:
                continue
            site = self.map.sites[layer.flare_key]
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A and layer.flare_fusion.get(adapter) is not None:
                    key = StateKey(site.stack, site.block + self.configs[adapter].source_layer_offset)
                    result.append((key, adapter, layer))
        return result

    def setting(self, name: str, adapters: set[str]) -> Any:
        """A config field that adapters active together must share, as there is one source pass for all of them."""
        values = {adapter: getattr(self.configs[adapter], name) for adapter in sorted(adapters)}
        if len(set(values.values())) > 1:
            raise ValueError(f"adapters active together must share {name}, they have {values}: activate one at a time")
        return next(iter(values.values()))

    def by_stack(self, wanted: list[Wanted]) -> tuple[list[Wanted], list[Wanted]]:
        """What is read of the source text, and what of an encoder-decoder's decoder."""
        decoders = self.map.decoders
        return (
            [one for one in wanted if one[0].stack not in decoders],
            [one for one in wanted if one[0].stack in decoders],
        )

    @contextlib.contextmanager
    def source_pass(self) -> Iterator[None]:
        """While the frozen model runs: the hooks stand aside."""
        self.in_source_pass = True
        try:
            yield
        finally:
            self.in_source_pass = False

    def adopted(self, model: nn.Module) -> list[FlareLayer]:
        """Every layer of ours in the model, fusing or not; looked for once until adapters come or go."""
        if self.found is None:
            self.found = [module for module in model.modules() if isinstance(module, FlareLayer)]
        return self.found

    def clear(self) -> None:
        """Let go of the last source; called whenever adapters come or go."""
        self.carrier = self.step = self.found = None


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime attached to a transformers model."""
    return model.__dict__.get(_RUNTIME)


def attach(model: nn.Module, runtime: Runtime) -> None:
    """Install the hooks for ``runtime.layers``, none twice, and those for projections that share their input."""
    if _RUNTIME not in model.__dict__:
        model.__dict__[_RUNTIME] = runtime
        runtime.handles += [
            model.register_forward_pre_hook(_before_model, with_kwargs=True),
            model.register_forward_hook(_check_reached),
            model.register_forward_hook(_after_model, always_call=True),
        ]
    for layer in runtime.layers:
        site = runtime.map.sites[layer.flare_key]
        owner = model.get_submodule(site.owner)
        if not any(hook is _before_stack for hook in owner._forward_pre_hooks.values()):
            owner.__dict__[_RUNTIME] = runtime
            runtime.handles.append(owner.register_forward_pre_hook(_before_stack, with_kwargs=True))
        attention = model.get_submodule(site.attention)
        child = site.path.removeprefix(f"{site.attention}.")
        children = attention.__dict__.setdefault(_LAYERS, [])
        if not children:
            runtime.handles += [
                attention.register_forward_pre_hook(_before_attention, with_kwargs=True),
                attention.register_forward_hook(_after_attention, always_call=True),
            ]
        if child not in children:
            children.append(child)
    joint_attention.wire(model)


def detach(model: nn.Module) -> None:
    """Take every hook and attribute of :func:`attach` off the model again."""
    runtime = model.__dict__.pop(_RUNTIME, None)
    if runtime is None:
        return
    joint_attention.unwire(model)
    for handle in runtime.handles:
        handle.remove()
    for module in model.modules():
        module.__dict__.pop(_RUNTIME, None)
        module.__dict__.pop(_LAYERS, None)


# --- the hooks --------------------------------------------------------------------------------------------------------


def _before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    runtime: Runtime = model.__dict__[_RUNTIME]
    if runtime.in_source_pass:
        return None
    runtime.carrier = None
    source = {name: kwargs.pop(name) for name in SOURCE_ARGUMENTS if name in kwargs}
    source = {name: value for name, value in source.items() if value is not None}
    wanted, cache = runtime.wanted(), kwargs.get("past_key_values")
    if wanted and source:
        _refuse_cached_steps(cache, source)
        if is_data_parallel_replica(model):
            raise ValueError(
                f"{', '.join(sorted(source))} in a model under torch.nn.DataParallel, whose threads would share one "
                "source: start one process per GPU (accelerate launch, torchrun), or show this one a single GPU "
                "(CUDA_VISIBLE_DEVICES=0)"
            )
        runtime.carrier = carry(
            model,
            runtime,
            wanted,
            source,
            target_shape(args, kwargs),
            decoder_shape(args, kwargs),
            source_cache=runtime.source_cache,
        )
        note_target_masks(runtime, wanted, runtime.carrier, args, kwargs)
    elif wanted and cache is not None and hasattr(cache, SOURCE_OF_CACHE):
        source_of = getattr(cache, SOURCE_OF_CACHE)
        runtime.step = None if args else source_of.share(model, runtime, wanted, kwargs)
        if runtime.step is not None:
            runtime.carrier = runtime.step.carrier
            return (), runtime.step.begin()
        shape = (decoder_shape if runtime.map.decoders else target_shape)(args, kwargs)
        runtime.carrier = source_of.carry(model, runtime, wanted, shape, cache.get_seq_length())
    elif wanted and model.training and torch.is_grad_enabled() and not runtime.warned:
        runtime.warned = True
        warn_user(NO_SOURCE_WARNING)
    return args, kwargs


def _refuse_cached_steps(cache: Any, source: dict[str, Any]) -> None:
    """A step of generation: its positions would meet the wrong positions of the source."""
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0):
        raise ValueError(
            f"past_key_values holds earlier positions and {', '.join(sorted(source))} was given: these positions would "
            "meet the wrong ones of the source; use model.generate, or pass the whole text at once"
        )


def _before_stack(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    runtime: Runtime = owner.__dict__[_RUNTIME]
    if runtime.carrier is None or runtime.in_source_pass:
        return None
    return args, {**kwargs, _CARRIER: runtime.carrier}


def _before_attention(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    carrier = kwargs.pop(_CARRIER, None)
    for child in attention.__dict__[_LAYERS]:
        layer = attention.get_submodule(child)
        if isinstance(layer, FlareLayer):
            layer._flare_source = None if carrier is None else carrier.for_layer(layer.flare_key)
            mask = None if carrier is None else carrier.target_masks.get(layer.flare_key)
            layer._flare_mask = None if mask is None else (mask, bool(getattr(attention, "is_causal", False)))
    return args, kwargs


def _after_attention(attention: nn.Module, args: Any, output: Any) -> None:
    for child in attention.__dict__[_LAYERS]:
        layer = attention.get_submodule(child)
        if isinstance(layer, FlareLayer):
            layer._flare_source = layer._flare_mask = None


def note_target_masks(
    runtime: Runtime, wanted: list[Wanted], carrier: SourceCarrier, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """The target's masks (B, m), for the layers whose fusion looks at them (cross_attention_mask).

    Raises:
        ValueError: an attention mask of another form.
    """
    masked = [one for one in wanted if runtime.configs[one[1]].cross_attention_mask]
    for key, adapter, layer in masked:
        in_decoder = key.stack in runtime.map.decoders
        name = "decoder_attention_mask" if in_decoder else "attention_mask"
        mask, shape = kwargs.get(name), (decoder_shape if in_decoder else target_shape)(args, kwargs)
        if mask is None and shape is not None:
            mask = torch.ones(shape, device=weight_of(layer, adapter).device)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            what = str(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name} is {what}: cross_attention_mask=True of adapter {adapter!r} needs it as (B, m)")
        carrier.target_masks[layer.flare_key] = mask


def _check_reached(model: nn.Module, args: Any, output: Any) -> None:
    runtime: Runtime = model.__dict__[_RUNTIME]
    if runtime.carrier is not None and not runtime.in_source_pass:
        check_reached(model, runtime.carrier)


def check_reached(model: nn.Module, carrier: SourceCarrier) -> None:
    """Raises ValueError where a fusing layer has run, or been passed by, without its source."""
    missed = carrier.missed
    if missed:
        raise ValueError(
            f"the source did not reach {len(missed)} of {len(carrier.arrivals)} fusing layers (first: {missed[0]}): "
            f"{type(model).__name__} does not pass unknown keyword arguments from its blocks to its attention"
        )


def _after_model(model: nn.Module, args: Any, output: Any) -> Any:
    runtime: Runtime = model.__dict__[_RUNTIME]
    if runtime.in_source_pass:
        return None
    step, runtime.carrier, runtime.step = runtime.step, None, None
    return None if step is None else step.finish(output)


#: Packages between the user's line and ours.
_NOT_THE_USERS = {"flare", "torch", "peft", "transformers", "accelerate", "trl", "contextlib"}


@torch.compiler.disable
def warn_user(message: str) -> None:
    """A UserWarning at the innermost line that is no library's: the one a user can change."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


# --- the source pass of one forward -----------------------------------------------------------------------------------


@torch.compiler.disable  # the frozen pass stays eager under a compiled model: its hooks come and go
def carry(
    model: nn.Module,
    runtime: Runtime,
    wanted: list[Wanted],
    source: dict[str, Any],
    target: tuple[int, ...] | None,
    decoder_target: tuple[int, ...] | None = None,
    source_padding: str | None = None,
    source_cache: SourceStateCache | None = None,
) -> SourceCarrier:
    """Run the source pass (or read the given states) and return what travels to the layers.

    Args:
        model, runtime, wanted: the transformers model, its runtime and what fuses now.
        source: the source arguments that were given.
        target, decoder_target: (B, m) of the target text and (B, u) of its decoder's input, to be checked against.
        source_padding: in place of the adapters' own.
        source_cache: where rows of states are read and kept.

    Raises:
        TypeError, ValueError: source arguments that do not fit; the message names the argument.
    """
    decoder = [name for name in DECODER_ARGUMENTS if name in source]
    if decoder and not runtime.map.decoders:
        raise ValueError(
            f"{decoder[0]}: {type(model).__name__} is no encoder-decoder, whose decoder these are for; leave it out"
        )
    if not decoder:
        wanted, _ = runtime.by_stack(wanted)
        if not wanted:
            raise ValueError(
                f"{', '.join(sorted(source))}: the active adapters fuse in the decoder only, which reads source_labels "
                "or source_decoder_input_ids; pass one of them too"
            )
    adapters = {adapter for _, adapter, _ in wanted}
    latent_dim = runtime.setting("latent_dim", adapters)
    reshard_below(model, (layer.flare_key for layer in (runtime.layers if latent_dim else (w[2] for w in wanted))))
    if latent_dim is not None:
        return carry_latent(model, source, target, wanted, runtime.layers, latent_dim)
    groups, weights = make_groups(wanted)
    keys = {group.key for group in groups}
    zero_pads = (source_padding or runtime.setting("source_padding", adapters)) == "zero"
    device = weights[0].device
    if "source_states" in source:
        states = source["source_states"]
        check_states(states, source, target, runtime.setting("source_layer_offset", adapters), weights[0].shape[1])
        masks = {} if states.attention_mask is None else dict.fromkeys(runtime.map.stacks, states.attention_mask)
        reader = read_from_states(states, keys)
    else:
        inputs = backbone_inputs(model, source, target)
        masks = dict.fromkeys(runtime.map.stacks, inputs["attention_mask"])
        if decoder:
            inputs["decoder_input_ids"], mask = decoder_inputs(model, source, decoder_target)
            masks |= dict.fromkeys(runtime.map.decoders, mask)
        if zero_pads:
            inputs = without_trailing_pads(inputs)
        reader = read_from_model(model, inputs, keys, dropout=runtime.setting("source_dropout", adapters))
    masks = masks if zero_pads else {}
    prepare = Preparation.under_autocast(device, masks)
    if source_cache is not None and "source_states" not in source:
        check_cacheable(runtime, adapters)
        reader = source_cache.reader(model, inputs, keys, prepare, masks, runtime.map.decoders)
    memory = _memory(model, runtime, adapters, source, groups, weights, reader, prepare)
    with runtime.source_pass():
        return run_source_pass(reader, prepare, groups, weights, memory)


def check_cacheable(runtime: Runtime, adapters: set[str]) -> None:
    """Raises ValueError where the adapters' source states are none that could be kept over epochs."""
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
    adapters: set[str],
    source: dict[str, Any],
    groups: list[Group],
    weights: list[nn.Parameter],
    reader: Reader,
    prepare: Preparation,
) -> StateMemory:
    """How this pass's states wait for backward; says once per reason why it is not as the config asks."""
    ids = next((source[name] for name in ("source_input_ids", *DECODER_ARGUMENTS) if name in source), None)
    device = weights[0].device
    dtype = prepare.dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tokens = 0 if ids is None else ids.numel()
    choice = choose(
        runtime.setting("source_memory", adapters),
        model,
        device,
        len({group.key for group in groups}) * tokens * weights[0].shape[-1] * dtype.itemsize,
        dropout=runtime.setting("source_dropout", adapters),
        given="source_states" in source,
    )
    if choice.reason and choice.reason not in runtime.said:
        runtime.said.add(choice.reason)
        warnings.warn(choice.reason, UserWarning, stacklevel=2)
    if choice.mode == "offload":
        return Offload(device)
    if choice.mode == "keep":
        return Keep()

    def read_again(visit: RowVisitor) -> None:
        with runtime.source_pass():
            reader(lambda key, hidden: visit(key, prepare.rows(key, hidden)))

    inputs = [value for value in source.values() if isinstance(value, Tensor)]
    return Recompute(read_again, AutocastState.now(device), inputs)


def encode(model: nn.Module, runtime: Runtime, source: dict[str, Any]) -> SourceStates:
    """The states that the active adapters would read, computed now and kept; see ``FlareModel.encode_source``."""
    wanted, in_decoder = runtime.by_stack(runtime.wanted())
    if not wanted and in_decoder:
        raise ValueError("encode_source: the active adapters fuse in the decoder only, which this does not read")
    if not wanted:
        raise ValueError("encode_source: no active adapter of this model fuses two streams (or adapters are disabled)")
    adapters = {adapter for _, adapter, _ in wanted}
    latent_dim = runtime.setting("latent_dim", adapters)
    if latent_dim is not None:
        raise ValueError(f"encode_source: an adapter with latent_dim={latent_dim} (FLARE MT) reads no source text")
    keys = {key for key, _, _ in wanted}
    inputs = backbone_inputs(model, source, None)
    prepare = Preparation.under_autocast(inputs["input_ids"].device)
    dropout = runtime.setting("source_dropout", adapters)
    states: dict[StateKey, Tensor] = {}
    # without inference mode, or training could not save them for its backward pass
    with runtime.source_pass(), torch.inference_mode(False):
        read_from_model(model, inputs, keys, dropout=dropout)(
            lambda key, hidden: states.__setitem__(key, prepare(hidden))
        )
    return SourceStates(states, runtime.setting("source_layer_offset", adapters), inputs["attention_mask"])
