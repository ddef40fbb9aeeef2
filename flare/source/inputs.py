"""The source of one forward: its arguments, whether they fit the target's, and how its states are read.

Shapes: B rows, m positions of a text, u of a decoder's input.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import shift_labels
from .context import THREAD, SourceContext
from .fsdp import check_whole, reshard_below
from .latent import read_latent
from .memory import AutocastState, Choice, Keep, Offload, Recompute, RowVisitor, StateMemory, choose
from .projected import project_states
from .runtime import Reads, Runtime, graded
from .source_pass import Preparation, Reader, keep_states, read_from_model, read_from_states
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


def did_you_mean(name: str, accepted: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the accepted name nearest to one, or nothing where none is near."""
    near = difflib.get_close_matches(name, accepted, 1, 0.8)
    return f"; did you mean {near[0]!r}?" if near else ""


def refuse_unknown(model: nn.Module, given: Iterable[str], names: Sequence[str]) -> None:
    """Raise TypeError for an argument ``source_...`` that neither ``names`` nor the model's forward has."""
    for name in given:
        if name[:7] == "source_" and name not in names and name not in accepted_by(model):
            raise TypeError(
                f"{name} is not an argument of {type(model).__name__}: of a source it reads {', '.join(names)}"
                f"{did_you_mean(name, names)}"
            )


def target_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """(B, m) of the target text, where the call shows it; (B n, m) of the n choices of each row (B, n, m)."""
    for candidate in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), args[0] if args else None):
        if isinstance(candidate, Tensor):
            if candidate.ndim == 3 and not candidate.is_floating_point():
                candidate = candidate.flatten(0, 1)
            return tuple(candidate.shape[:2])
    return None


def one_text_a_row(source: dict[str, Any]) -> dict[str, Any]:
    """The source arguments of a multiple choice, (B, n, m) as (B n, m), which is how the model reads the target's.

    States stay: they are those of (B n, m) already.

    Raises:
        ValueError: ids, a mask or token types of other than three dimensions.
    """
    texts = {name: value for name, value in source.items() if name != "source_states"}
    for name, value in texts.items():
        if not isinstance(value, Tensor) or value.ndim != 3:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name} is {what}: next to input_ids (B, n, m) of a multiple choice it must be of the same shape, "
                "one source text for each choice (flare.FlareDataCollator makes them)"
            )
    return {**source, **{name: value.flatten(0, 1) for name, value in texts.items()}}


def decoder_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """(B, u) of the target's decoder input; a model that makes it of its input_ids has it as long as these."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"):
        given = kwargs.get(name)
        if isinstance(given, Tensor) and given.dim() > 1:
            return tuple(given.shape[:2])
    return target_shape(args, kwargs)


def check_ids(name: str, ids: Any, shape: str) -> Tensor:
    """Token ids of two dimensions; TypeError, naming the argument, for anything else."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() != 2:
        kind = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor {shape}, got {kind}")
    return ids


def check_same_shape(ids: Tensor, target: tuple[int, ...] | str) -> None:
    """ValueError where the source's ids (B, m) have not the shape of the target's, or these are something else."""
    if tuple(ids.shape) != target:
        raise ValueError(
            f"source_input_ids has shape {tuple(ids.shape)}, the target's input_ids {target}: both texts need the same "
            "batch size and length; pad them to one length (flare.FlareDataCollator does)"
        )


def check_source_mask(ids: Tensor, mask: Any) -> Tensor:
    """``source_attention_mask``; ValueError where it has not the shape of the ids (B, m)."""
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        what = str(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"source_attention_mask is {what}, expected the shape of source_input_ids: {tuple(ids.shape)}")
    return mask


def backbone_inputs(model: nn.Module, source: dict[str, Any], target: tuple[int, ...] | None) -> dict[str, Any]:
    """Keyword arguments of the frozen pass, checked against the target's shape (B, m).

    Raises:
        TypeError, ValueError: ids, a mask or token types that do not fit; the message names the argument.
    """
    ids, mask = source.get("source_input_ids"), source.get("source_attention_mask")
    if ids is None:
        given = ", ".join(sorted(source))
        raise ValueError(f"{given} was given without source_input_ids: pass both, or neither")
    check_ids("source_input_ids", ids, "(B, m)")
    if target is not None:
        check_same_shape(ids, target)
    inputs: dict[str, Any] = {"input_ids": ids}
    if mask is not None:  # one of ones would cost a reduction and a wait for the device
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
    """Names of the arguments of a module's forward."""
    forward = getattr(module.forward, "__func__", module.forward)
    if torch.compiler.is_compiling():  # which would trace into the cache, and warn
        return frozenset(inspect.signature(forward).parameters)
    return _parameters_of(forward)


@functools.lru_cache(maxsize=256)
def _parameters_of(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def without_trailing_pads(inputs: dict[str, Any]) -> dict[str, Any]:
    """The backbone's inputs without the last columns, where they are pads in every row: tokens never look there.

    Only where the mask is on the host: nothing here waits for a device.
    """
    if "attention_mask" not in inputs or inputs["attention_mask"].device.type != "cpu":
        return inputs
    used = inputs["attention_mask"].any(dim=0).nonzero()
    width = int(used.max()) + 1 if len(used) else 1
    per_token = ("input_ids", "attention_mask", "token_type_ids")
    return {name: value[:, :width] if name in per_token else value for name, value in inputs.items()}


def decoder_inputs(model: nn.Module, source: dict[str, Any], target: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """The frozen decoder's input ids (B, u), and where they are tokens; checked against the target's (B, u).

    The start token is one, and so is what follows it unless it is padding: -100 in labels, else the pad token.
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
    """``source_states`` of the user's, checked against the target's shape (B, m), the adapter's offset and the model's
    width.

    Raises:
        TypeError, ValueError: states of another kind or size, or beside another source.
    """
    if not isinstance(states, SourceStates):
        raise TypeError(f"source_states must be a flare.SourceStates (from encode_source), got {type(states).__name__}")
    beside = sorted(set(source) - {"source_states"})
    if beside:
        raise ValueError(
            f"{', '.join(beside)} and source_states were both given: pass the source once (the states carry their "
            "mask; of an encoder-decoder they are the encoder's)"
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
    if torch.compiler.is_exporting() and runtime.map.decoders and not decoder:
        raise ValueError(
            f"{', '.join(sorted(source))} under torch.export, which runs the source pass to its end: pass the input of "
            f"the decoder too ({' or '.join(DECODER_ARGUMENTS)}), or leave the source out"
        )
    reads = reading.of_both if decoder else reading.of_text
    if not reads:
        raise ValueError(
            f"{', '.join(sorted(source))}: the active adapters fuse in the decoder only, which reads source_labels "
            "or source_decoder_input_ids; pass one of them too"
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
    zeroes = (source_padding or runtime.setting("source_padding", adapters)) == "zero"
    weights = reads.weights()
    device, masks = weights[0].device, {}
    if device.type == "meta":
        device = reads.device
    # lora_A is called in its layer, on the state as it is; a graph does that anyway
    compiles, plain = torch.compiler.is_compiling(), slot.plain
    by_modules = plain or (not compiles and graded(weights) and reads.are_touched())
    states: Any  # a reader
    given = "source_states" in source
    if given:
        ready = source["source_states"]
        check_states(ready, source, target, runtime.setting("source_layer_offset", adapters), weights[0].shape[1])
        if ready.attention_mask is not None:
            masks = dict.fromkeys(runtime.map.stacks, ready.attention_mask)
        states = read_from_states(ready, reads.keys)
    else:
        inputs = backbone_inputs(model, source, target)
        if "attention_mask" in inputs:
            masks = dict.fromkeys(runtime.map.stacks, inputs["attention_mask"])
        if decoder:
            inputs["decoder_input_ids"], mask = decoder_inputs(model, source, decoder_target)
            masks |= dict.fromkeys(runtime.map.decoders, mask)
        if zeroes and not by_modules:
            inputs = without_trailing_pads(inputs)
        dropout = runtime.setting("source_dropout", adapters)
        states = read_from_model(model, inputs, reads.keys, dropout=dropout)
    prepare = Preparation.under_autocast(device, masks if zeroes else {})
    if by_modules and prepare.packings:
        prepare = Preparation(prepare.dtype, masks=masks)
    cached = source_cache is not None and not given
    if cached:
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
    if compiles or plain:
        return keep_states(states, prepare, reads.by_key)
    if not graded(weights):
        return _projected(model, runtime, reads, states, prepare, None)
    if by_modules:
        _say_kept(runtime, reads)
        return keep_states(states, prepare, reads.by_key)
    layers_project = not (prepare.packings or reads.mixes)
    if not (layers_project and (given or runtime.setting("source_memory", adapters) == "keep")):
        memory = _memory(model, runtime, reads, source, states, prepare)
        if not (layers_project and isinstance(memory, Keep)):
            return _projected(model, runtime, reads, states, prepare, memory)
    A = weights[0]
    if A.__class__ is not nn.Parameter or A.ndim != 2 or 0 in A.shape:
        check_whole(A)
    kept = states.warm() if cached else None
    if kept is not None:  # they are prepared already
        return keep_states(kept, Preparation(prepare.dtype), reads.by_key)
    return keep_states(states, prepare, reads.by_key)


def _say_kept(runtime: Runtime, reads: Reads) -> None:
    """Warn, once, that states are kept although the config asks for less memory."""
    asked = runtime.setting("source_memory", reads.adapters)
    reason = f"source_memory={asked!r}: hooks on lora_A or lora_dropout need the states, which are kept on the device"
    if asked in ("offload", "recompute") and reason not in runtime.said:
        runtime.said.add(reason)
        warnings.warn(reason, UserWarning, stacklevel=2)


#: Under torch.compile, which breaks its graph here.
_read_outside_the_graph = torch.compiler.disable(read_source)


def _is_traceable(
    model: nn.Module,
    runtime: Runtime,
    reads: Reads,
    source: dict[str, Any],
    source_padding: str | None,
    source_cache: Any,
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
