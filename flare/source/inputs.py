"""The arguments of one forward: the target's shape, the source's inputs, and whether the two fit each other.

Shapes: B rows, m positions of a text, u of a decoder's input.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .states import SourceStates

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


def target_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """(B, m) of the target text, where the call shows it."""
    for candidate in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), args[0] if args else None):
        if isinstance(candidate, Tensor):
            return tuple(candidate.shape[:2])
    return None


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
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise ValueError(
            f"source_labels: {type(model).__name__} does not say how its decoder reads labels "
            "(prepare_decoder_input_ids_from_labels); pass source_decoder_input_ids"
        )
    return shift(labels=ids), mask


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
