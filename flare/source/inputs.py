"""The source of one forward pass: check the source arguments, and read the source's hidden states.

Shapes: B rows, n choices of a row (multiple choice), m positions of a text, u positions of a decoder's input.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import shift_labels
from .arguments import DECODER_ARGUMENTS, SOURCE_ARGUMENTS, did_you_mean
from .context import THREAD, SourceContext
from .fsdp import check_gatherable, reshard_below
from .latent import read_latent
from .memory import Keep, StateMemory, memory_of_pass, mode_of_pass
from .projected import project_states
from .runtime import Reads, Runtime, needs_grad
from .source_pass import Preparation, Reader, context_from_states, read_from_model, read_from_states
from .states import SourceStates, StateKey


def refuse_unknown(model: nn.Module, arguments: Iterable[str], names: Sequence[str] = SOURCE_ARGUMENTS) -> None:
    """Raise TypeError for an argument ``source_...`` that neither ``names`` nor the model's forward contains."""
    for name in arguments:
        if name[:7] == "source_" and name not in names and name not in accepted_by(model):
            raise TypeError(
                f"{name} is not an argument of {type(model).__name__}: its source arguments are {', '.join(names)}"
                f"{did_you_mean(name, names)}"
            )


def target_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """Return (B, m) of the target text, or None if the call does not show it.

    For multiple choice, whose input_ids have the shape (B, n, m), it is (B n, m).
    """
    for candidate in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), args[0] if args else None):
        if isinstance(candidate, Tensor):
            if candidate.ndim == 3 and not candidate.is_floating_point():
                candidate = candidate.flatten(0, 1)
            return tuple(candidate.shape[:2])
    return None


def decoder_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """Return (B, u) of the target's decoder input or labels.

    If the call has neither, return :func:`target_shape`, because the model derives the decoder input from input_ids.
    """
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"):
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.dim() > 1:
            return tuple(value.shape[:2])
    return target_shape(args, kwargs)


def check_ids(name: str, ids: Any, shape: str) -> Tensor:
    """Return token ids; raise TypeError if they are not an integer tensor of two dimensions."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() != 2:
        kind = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor {shape}, got {kind}")
    return ids


def check_same_shape(ids: Tensor, target: tuple[int, ...] | str) -> None:
    """Raise ValueError if the shape of the source's ids is not ``target``, the shape (B, m) of the target's ids.

    If the target's ids are not a tensor, ``target`` is the name of their type, and the check always fails.
    """
    if tuple(ids.shape) != target:
        raise ValueError(
            f"source_input_ids has shape {tuple(ids.shape)}, the target's input_ids {target}: both texts need the same "
            "batch size and length; pad them to one length (flare.FlareDataCollator does)"
        )


def check_source_mask(ids: Tensor, mask: Any) -> Tensor:
    """Return ``source_attention_mask``; raise ValueError if it does not have the shape (B, m) of the ids."""
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        what = str(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"source_attention_mask is {what}, expected the shape of source_input_ids: {tuple(ids.shape)}")
    return mask


def backbone_inputs(model: nn.Module, source: dict[str, Any], target: tuple[int, ...] | None) -> dict[str, Any]:
    """Return the keyword arguments of the source pass, checked against the target's shape (B, m).

    Raises:
        TypeError, ValueError: ids are missing, or ids, a mask or token types do not match; the message names the
            argument.
    """
    ids, mask = source.get("source_input_ids"), source.get("source_attention_mask")
    if ids is None:
        names = ", ".join(sorted(source))
        raise ValueError(f"{names} was given without source_input_ids: pass both, or neither")
    check_ids("source_input_ids", ids, "(B, m)")
    if target is not None:
        check_same_shape(ids, target)
    inputs: dict[str, Any] = {"input_ids": ids}
    if mask is not None:  # no mask of ones is created: transformers would check its values, and wait for the device
        inputs["attention_mask"] = check_source_mask(ids, mask)
    backbone: Any = getattr(model, "base_model", model)
    accepted = accepted_by(backbone)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    types = source.get("source_token_type_ids")
    if types is not None and tuple(types.shape) != tuple(ids.shape):
        raise ValueError(
            f"source_token_type_ids has shape {tuple(types.shape)}, expected the shape of source_input_ids: "
            f"{tuple(ids.shape)}"
        )
    if types is not None and "token_type_ids" in accepted:
        inputs["token_type_ids"] = types
    return inputs


def accepted_by(module: nn.Module) -> frozenset[str]:
    """Return the names of the arguments of a module's forward."""
    forward = getattr(module.forward, "__func__", module.forward)
    if torch.compiler.is_compiling():  # Dynamo would trace into the lru_cache, and warn
        return frozenset(inspect.signature(forward).parameters)
    return _parameters_of(forward)


@functools.lru_cache(maxsize=256)
def _parameters_of(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def without_trailing_pads(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the backbone's inputs without the last columns that are padding in every row.

    Tokens never attend to padding. The inputs are returned unchanged if they have no mask, or if the mask is on a GPU,
    where finding the last token would wait for the GPU.
    """
    if "attention_mask" not in inputs or inputs["attention_mask"].device.type != "cpu":
        return inputs
    used = inputs["attention_mask"].any(dim=0).nonzero()
    width = int(used.max()) + 1 if len(used) else 1
    per_token = ("input_ids", "attention_mask", "token_type_ids")
    return {name: value[:, :width] if name in per_token else value for name, value in inputs.items()}


def decoder_inputs(model: nn.Module, source: dict[str, Any], target: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Return the frozen decoder's input ids (B, u) and their mask (B, u), checked against the target's shape.

    The mask is 1 at the start token and at every later position that is not padding. Padding is -100 in
    ``source_labels``, and the pad token in ``source_decoder_input_ids``.
    """
    name = "source_decoder_input_ids" if "source_decoder_input_ids" in source else "source_labels"
    ids = check_ids(name, source[name], "(B, u)")
    if target is not None and tuple(ids.shape) != target:
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}, the target's labels or decoder_input_ids {target}: both need the "
            "same batch size and length; pad them to one length (flare.FlareDataCollator does)"
        )
    mask = torch.ones_like(ids)
    if name == "source_decoder_input_ids":
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        if pad is not None:
            mask[:, 1:] = (ids[:, 1:] != pad).to(mask.dtype)
        return ids, mask
    mask[:, 1:] = (ids[:, :-1] != -100).to(mask.dtype)
    shifted = shift_labels(model, ids)
    if shifted is None:
        raise ValueError(
            f"source_labels: {type(model).__name__} does not say how its decoder reads labels "
            "(prepare_decoder_input_ids_from_labels); pass source_decoder_input_ids"
        )
    return shifted, mask


def check_states(states: Any, source: dict[str, Any], target: tuple[int, ...] | None, offset: int, width: int) -> None:
    """Check the user's ``source_states``.

    Args:
        states: the value of ``source_states``.
        source: all source arguments of the call.
        target: (B, m) of the target text; None if it is not known.
        offset: the adapters' source_layer_offset.
        width: width of the model's hidden states.

    Raises:
        TypeError, ValueError: the states have another type, shape, width or source_layer_offset, or another source
            argument was given too.
    """
    if not isinstance(states, SourceStates):
        raise TypeError(f"source_states must be a flare.SourceStates (from encode_source), got {type(states).__name__}")
    others = sorted(set(source) - {"source_states"})
    if others:
        raise ValueError(
            f"{', '.join(others)} and source_states were both given: pass the source once (SourceStates contain "
            "the attention mask; for an encoder-decoder, they are the encoder's states)"
        )
    if any(state.shape[-1] != width for state in states):
        raise ValueError(
            f"source_states are {next(iter(states)).shape[-1]} wide, this model's hidden state {width}: "
            "make them with encode_source of this model"
        )
    if states.offset != offset:
        raise ValueError(f"source_states were read with source_layer_offset={states.offset}, the adapter has {offset}")
    if target is not None and states.shape != target:
        raise ValueError(
            f"source_states are for a source of shape {states.shape}, the target's input_ids have {target}: "
            "pad both texts to one length before encode_source"
        )


# --- reading the source -----------------------------------------------------------------------------------------------


def read_source(
    model: nn.Module,
    runtime: Runtime,
    source: dict[str, Any],
    target: tuple[int, ...] | None,
    decoder_target: tuple[int, ...] | None = None,
    source_padding: str | None = None,
    source_cache: Any = None,
) -> SourceContext:
    """Run the source pass, or use the given states, and return the context for the layers.

    Args:
        model: the transformers model.
        runtime: the runtime attached to the model.
        source: the source arguments of the call.
        target: (B, m) of the target text, to check the source against.
        decoder_target: (B, u) of the target's decoder input, to check the source's decoder input against.
        source_padding: "keep" or "zero", which overrides the adapters' configs. None: the value in these configs.
        source_cache: cache that states are read from and stored in.

    Raises:
        TypeError, ValueError: the source arguments do not match; the message names the argument.
    """
    active = runtime.active_uses()
    decoder = [name for name in DECODER_ARGUMENTS if name in source]
    if decoder and not runtime.map.decoders:
        raise ValueError(
            f"{decoder[0]}: {type(model).__name__} is not an encoder-decoder, so no decoder reads it; leave it out"
        )
    if torch.compiler.is_exporting() and runtime.map.decoders and not decoder:
        raise ValueError(
            f"{', '.join(sorted(source))} under torch.export, which also runs the decoder in the source pass: pass "
            f"the decoder's input too ({' or '.join(DECODER_ARGUMENTS)}), or leave the source out"
        )
    reads = active.of_both if decoder else active.of_text
    if not reads:
        raise ValueError(
            f"{', '.join(sorted(source))}: the active adapters fuse in the decoder only, which reads source_labels "
            "or source_decoder_input_ids; also pass one of them"
        )
    adapters = reads.adapters
    slot = THREAD.slot
    if (
        torch.compiler.is_compiling()
        and not slot.plain
        and not _is_traceable(model, runtime, reads, source, source_padding, source_cache)
    ):
        return _read_outside_the_graph(
            model, runtime, source, target, decoder_target, source_padding=source_padding, source_cache=source_cache
        )
    latent_dim = runtime.setting("latent_dim", adapters)
    if latent_dim is not None:
        reshard_below(model, (layer.flare_key for layer in runtime.layers))
        return read_latent(model, source, target, reads, runtime.layers, latent_dim)
    zero_padding = (source_padding or runtime.setting("source_padding", adapters)) == "zero"
    weights = reads.weights()
    device, masks = weights[0].device, {}
    if device.type == "meta":
        device = reads.device
    # by_modules: each layer must project the state by calling its modules lora_dropout and lora_A, because they have
    # hooks, or because the pass supports only plain operators. In a compiled graph this is not needed, because every
    # layer projects the state itself anyway.
    compiles, plain = torch.compiler.is_compiling(), slot.plain
    by_modules = plain or (not compiles and needs_grad(weights) and reads.have_hooks())
    reader: Any
    states_given = "source_states" in source
    if states_given:
        states = source["source_states"]
        check_states(states, source, target, runtime.setting("source_layer_offset", adapters), weights[0].shape[1])
        if states.attention_mask is not None:
            masks = dict.fromkeys(runtime.map.stacks, states.attention_mask)
        reader = read_from_states(states, reads.keys)
    else:
        inputs = backbone_inputs(model, source, target)
        if "attention_mask" in inputs:
            masks = dict.fromkeys(runtime.map.stacks, inputs["attention_mask"])
        if decoder:
            inputs["decoder_input_ids"], mask = decoder_inputs(model, source, decoder_target)
            masks |= dict.fromkeys(runtime.map.decoders, mask)
        if zero_padding and not by_modules:
            inputs = without_trailing_pads(inputs)
        dropout = runtime.setting("source_dropout", adapters)
        reader = read_from_model(model, inputs, reads.keys, dropout=dropout)
    prepare = Preparation.under_autocast(device, masks if zero_padding else {})
    if by_modules and prepare.tokens:
        prepare = Preparation(prepare.dtype, masks=masks)
    cached = source_cache is not None and not states_given
    if cached:
        check_cacheable(runtime, adapters)
        reader = source_cache.reader(
            model,
            inputs,
            reads.keys,
            prepare,
            masks if zero_padding else {},
            runtime.map.decoders,
            zero_pads=zero_padding,
        )
    if compiles or plain:
        return context_from_states(reader, prepare, reads.by_key)
    if not needs_grad(weights):
        return _projected(model, runtime, reads, reader, prepare, None)
    if by_modules:
        _warn_states_kept(runtime, reads)
        return context_from_states(reader, prepare, reads.by_key)
    layers_project = not (prepare.tokens or reads.mixes_positions)
    if not (layers_project and (states_given or runtime.setting("source_memory", adapters) == "keep")):
        memory = memory_of_pass(model, runtime, reads, source, reader, prepare)
        if not (layers_project and isinstance(memory, Keep)):
            return _projected(model, runtime, reads, reader, prepare, memory)
    A = weights[0]
    if A.__class__ is not nn.Parameter or A.ndim != 2 or 0 in A.shape:
        check_gatherable(A)
    cached_states = reader.warm() if cached else None
    if cached_states is not None:  # the cache stores prepared states, so masks are not applied again
        return context_from_states(cached_states, Preparation(prepare.dtype), reads.by_key)
    return context_from_states(reader, prepare, reads.by_key)


def _warn_states_kept(runtime: Runtime, reads: Reads) -> None:
    """Warn once that states stay on the device although the config asks for less memory."""
    setting = runtime.setting("source_memory", reads.adapters)
    if setting in ("offload", "recompute"):
        runtime.warn_once(
            f"source_memory={setting!r}: hooks on lora_A or lora_dropout need the states, so they stay on the device"
        )


#: ``read_source`` under torch.compile, with a graph break.
_read_outside_the_graph = torch.compiler.disable(read_source)


def _is_traceable(
    model: nn.Module,
    runtime: Runtime,
    reads: Reads,
    source: dict[str, Any],
    source_padding: str | None,
    source_cache: Any,
) -> bool:
    """Return whether torch.compile can trace the source pass.

    It cannot with a cache, with FLARE MT, with a fusion that mixes positions, with source_padding="zero", or if the
    states do not stay on the device (source_memory).
    """
    return (
        source_cache is None
        and not reads.mixes_positions
        and runtime.setting("latent_dim", reads.adapters) is None
        and (source_padding or runtime.setting("source_padding", reads.adapters)) != "zero"
        and mode_of_pass(model, runtime, reads, source).mode == "keep"
    )


def _projected(
    model: nn.Module,
    runtime: Runtime,
    reads: Reads,
    states: Reader,
    prepare: Preparation,
    memory: StateMemory | None,
) -> SourceContext:
    reshard_below(model, (layer.flare_key for _, _, layer in reads.uses))
    return project_states(states, prepare, reads.groups, memory)


def check_cacheable(runtime: Runtime, adapters: set[str]) -> None:
    """Raise ValueError if the adapters' source states cannot be cached over epochs."""
    if not adapters:
        raise ValueError("source_cache: no active adapter of this model fuses two streams; leave it out")
    if runtime.setting("latent_dim", adapters) is not None:
        raise ValueError(
            "source_cache: an adapter with latent_dim (FLARE MT) runs no source pass, so there is nothing to cache; "
            "leave it out"
        )
    if runtime.setting("source_dropout", adapters):
        raise ValueError(
            "source_cache: with source_dropout=True every source pass gives other states, so they cannot be cached; "
            "use source_dropout=False (the default), or leave the cache out"
        )


def encode(model: nn.Module, runtime: Runtime, source: dict[str, Any]) -> SourceStates:
    """Return the source text's states that the active adapters read; see ``FlareModel.encode_source``."""
    active = runtime.active_uses()
    reads = active.of_text
    if not reads and active.of_decoder:
        raise ValueError(
            "encode_source: the active adapters fuse in the decoder only, and encode_source runs the encoder only"
        )
    if not reads:
        raise ValueError("encode_source: no active adapter of this model fuses two streams (or adapters are disabled)")
    latent_dim = runtime.setting("latent_dim", reads.adapters)
    if latent_dim is not None:
        raise ValueError(f"encode_source: an adapter with latent_dim={latent_dim} (FLARE MT) reads no source text")
    inputs = backbone_inputs(model, source, None)
    prepare = Preparation.under_autocast(inputs["input_ids"].device)
    dropout = runtime.setting("source_dropout", reads.adapters)
    states: dict[StateKey, Tensor] = {}
    # Not in inference mode, because a training step may save these states for its backward pass.
    with torch.inference_mode(False):
        read_from_model(model, inputs, reads.keys, dropout=dropout)(
            lambda key, hidden: states.__setitem__(key, prepare(key, hidden))
        )
    return SourceStates(states, runtime.setting("source_layer_offset", reads.adapters), inputs.get("attention_mask"))
