"""``model.generate`` with a source: transformers' own generate, with a KV cache that carries the source.

Nothing of generate is copied. A subclass of DynamicCache is passed as ``past_key_values``; it carries the source's side
(flare.generation.decoding), follows what beams and samples do to the rows, and the hook before the model
(flare.source.hooks) asks it for the S of the positions that a forward has. Of an encoder-decoder only the decoder's
source needs that: the encoder's is fused once, as in a forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from flare_kernels.fusion import EAGER_FUSIONS

from ..source.arguments import DECODER_ARGUMENTS
from ..source.context import THREAD, SourceContext
from ..source.hooks import SOURCE_OF_CACHE, check_reached, store_target_masks, warn_user
from ..source.inputs import backbone_inputs, check_ids, read_source
from ..source.runtime import Reads, Runtime
from ..source.states import SourceStates
from ..tuner.config import SOURCE_PADDING
from .decoding import (
    AlignedText,
    FrozenText,
    GivenStates,
    LateText,
    SourceDecoding,
    decode_to_the_end,
    read_states,
    say_two_passes,
    slots_of,
)
from .shared_pass import SOURCE_PASSES, obstacle

ALIGNMENTS = ("training", "release")

PADDING_WARNING = (
    "source_padding='keep' and a source prompt that is shorter than its target: positions of the target meet hidden "
    "states of padding, which depend on the batch's width and on the attention kernel, so a row's output does too. "
    "source_padding='zero' (the default of generate) does not have this."
)


# --- caches that carry a source ---------------------------------------------------------------------------------------


class _WithSource:
    """A mixin in front of a cache of transformers': what happens to its rows happens to the source's."""

    flare_decoding: SourceDecoding
    is_croppable = False  # positions cannot be taken back

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(self.flare_decoding.rows_of_cache(beam_idx))  # type: ignore[misc]
        self.flare_decoding.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(self.flare_decoding.rows_of_cache(indices))  # type: ignore[misc]
        self.flare_decoding.select_rows(indices)


class SourceCache(_WithSource, DynamicCache):
    """The target's KV cache of a decoder-only model."""


class SourceEncoderDecoderCache(_WithSource, EncoderDecoderCache):
    """The target's KV cache of an encoder-decoder."""


def _plain_cache(model: Any) -> Any:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def _cache_with(model: Any, source: SourceDecoding) -> Any:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        cache: Any = SourceEncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    else:
        cache = SourceCache(config=config)
    setattr(cache, SOURCE_OF_CACHE, source)
    return cache


# --- options of generate ----------------------------------------------------------------------------------------------


@dataclass
class Options:
    """Generation options as generate will resolve them: its arguments, its generation_config, the model's."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def get(self, name: str) -> Any:
        given = self.kwargs.get("generation_config", self.args[1] if len(self.args) > 1 else None)
        found = [
            self.kwargs.get(name),
            *(getattr(place, name, None) for place in (given, self.model.generation_config)),
        ]
        return next((value for value in found if value is not None), None)

    def token_ids(self, name: str) -> list[int]:
        """An option that is a token id, several, or none."""
        value = self.get(name)
        if value is None:
            return []
        return [int(one) for one in (value.flatten().tolist() if isinstance(value, Tensor) else _as_list(value))]

    def pad_id(self) -> int:
        """As generate: the pad token, else the first end token."""
        return next(iter([*self.token_ids("pad_token_id"), *self.token_ids("eos_token_id")]), 0)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


_FORWARD_ONLY = "it runs or takes back positions that a source decoded step by step cannot follow"
_OWN_CACHE = "the source is decoded beside the target's own dynamic KV cache"
_OTHER_INPUT = "it runs the model on other text, for which there is no source"
_OWN_LOOP = "it replaces the decoding loop that the source is decoded along with"

#: option -> (whether a value of it asks for what cannot be done with a source, why)
_REFUSED: dict[str, tuple[Any, str]] = {
    "use_cache": (lambda value: value is False, _OWN_CACHE),
    "past_key_values": (lambda value: value is not None, _OWN_CACHE),
    "cache_implementation": (lambda value: value not in (None, "dynamic", "hybrid"), _OWN_CACHE),
    "assistant_model": (lambda value: value is not None, _FORWARD_ONLY),
    "prompt_lookup_num_tokens": (lambda value: value is not None, _FORWARD_ONLY),
    "assistant_early_exit": (lambda value: value is not None, _FORWARD_ONLY),
    "use_mtp": (bool, _FORWARD_ONLY),
    "penalty_alpha": (bool, _OWN_LOOP),
    "dola_layers": (lambda value: value is not None, _OWN_LOOP),
    "num_beam_groups": (lambda value: value is not None and value > 1, _OWN_LOOP),
    "constraints": (lambda value: value is not None, _OWN_LOOP),
    "force_words_ids": (lambda value: value is not None, _OWN_LOOP),
    "custom_generate": (lambda value: value is not None, _OWN_LOOP),
    "token_healing": (bool, _OTHER_INPUT),
    "guidance_scale": (lambda value: value is not None and value != 1, _OTHER_INPUT),
}


def _refuse_options(options: Options) -> None:
    for name, (asks, why) in _REFUSED.items():
        value = options.get(name)
        if asks(value):
            shown = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
            raise ValueError(f"generate: {name}={shown} cannot be combined with a source: {why}; leave it out")


def _refuse_mixing(reads: Reads) -> None:
    """Fusions in which a position looks at all positions of the target, in a stack that writes them one by one."""
    for _, adapter, layer in reads.uses:
        fusion = layer.flare_fusion[adapter]
        if fusion in EAGER_FUSIONS:
            raise ValueError(
                f"generate: fusion={fusion!r} of adapter {adapter!r} lets every position look at all positions of the "
                "text, also at those not yet written: what training did cannot be repeated token by token. "
                "source_alignment='release' generates as the authors' release does"
            )


# --- generate ---------------------------------------------------------------------------------------------------------


def generate(
    model: Any,
    runtime: Runtime,
    source: dict[str, Any],
    source_alignment: str,
    source_padding: str | None,
    source_pass: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """transformers' generate with a source; see ``FlareModel.generate``."""
    if source_pass not in SOURCE_PASSES:
        raise ValueError(f"source_pass={source_pass!r} is not accepted; one of: {', '.join(SOURCE_PASSES)}")
    if source_padding not in (None, *SOURCE_PADDING):
        raise ValueError(f"source_padding={source_padding!r} is not accepted; one of: {', '.join(SOURCE_PADDING)}")
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("generate: gradient checkpointing drops the KV cache in train mode; call model.eval() first")
    device = (
        model.device if model.device.type != "meta" else runtime.reading().of_both.device
    )  # offloaded by accelerate
    source = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in source.items()}
    if runtime.map.decoders:
        if source_pass == "shared":
            raise ValueError(_NOT_SHARED.format(why="an encoder-decoder's source is read apart"))
        return _generate_encoder_decoder(model, runtime, source, source_alignment, source_padding, args, kwargs)
    return _generate_decoder_only(model, runtime, source, source_alignment, source_padding, source_pass, args, kwargs)


_NOT_SHARED = "generate: source_pass='shared' is not possible: {why}; leave it out"


def _generate_decoder_only(
    model: Any,
    runtime: Runtime,
    source: dict[str, Any],
    alignment: str,
    padding: str | None,
    source_pass: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    options = Options(model, args, kwargs)
    reads = runtime.reading().of_text
    _refuse_options(options)
    if alignment == "training":
        _refuse_mixing(reads)
    elif options.get("prefill_chunk_size") is not None:
        raise ValueError("generate: prefill_chunk_size cannot be combined with source_alignment='release'")
    elif padding == "zero":
        raise ValueError("generate: source_padding='zero' cannot be combined with source_alignment='release'")
    target = _target_ids(args, kwargs)
    with torch.no_grad():
        decoding = _decoding(model, runtime, reads, source, alignment, padding or "zero", target, options)
        _share(model, runtime, reads, decoding, source_pass)
    if options.get("cache_implementation") is not None:
        kwargs["cache_implementation"] = None  # dynamic, which is what is passed
    kwargs["past_key_values"] = _cache_with(model, decoding)
    return model.generate(*args, **kwargs)


def _target_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The target's prompt (B, m), or its embeddings, and its mask."""
    given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("inputs"), args[0] if args else None)
    ids = next((one for one in given if isinstance(one, Tensor)), None)
    if ids is None:
        raise ValueError("generate: a source needs the target's input_ids, whose positions it is aligned with")
    return ids, kwargs.get("attention_mask")


def _decoding(
    model: Any,
    runtime: Runtime,
    reads: Reads,
    source: dict[str, Any],
    alignment: str,
    padding: str,
    target: tuple[Tensor, Tensor | None],
    options: Options,
) -> SourceDecoding:
    """The source's side of a decoder-only model's generation."""
    shape = tuple(target[0].shape[:2])
    slots, adapters = slots_of(reads), reads.adapters
    if runtime.setting("latent_dim", adapters) is not None:
        given = read_source(model, runtime, source, shape).bottlenecks
        return GivenStates(slots=slots, given=given, mask=source.get("source_attention_mask"))
    if "source_states" in source:
        raise ValueError(
            "source_states: these are of the prompt alone, and new tokens meet those that the source goes on with: "
            "pass source_input_ids and source_attention_mask"
        )
    _refuse_decoder_arguments(model, source)
    inputs = backbone_inputs(model, source, shape)
    if "token_type_ids" in inputs:
        raise ValueError("source_token_type_ids: generate does not know the types of new tokens; leave it out")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not bool(mask[:, -1].all()):
        raise ValueError(
            "source_attention_mask ends in padding: the source is gone on with after its last position; pad both "
            "prompts on the left (padding_side='left')"
        )
    late = alignment == "release"
    if not late and padding == "keep":
        _warn_of_padding(runtime, mask, target[1])
    text = FrozenText(
        mask=mask,
        cache=_plain_cache(model),
        dropout=runtime.setting("source_dropout", adapters),
        zero_pads=padding == "zero" and not late and not bool(mask.all()),
    )
    ends = torch.tensor(options.token_ids("eos_token_id"), dtype=ids.dtype, device=ids.device)
    if not late:
        return AlignedText(slots=slots, text=text, prompt=ids, end_ids=ends)
    most = _most_new_tokens(options, ids.shape[1])
    return LateText(
        slots=slots, steps=decode_to_the_end(model, runtime, reads, text, ids, ends, options.pad_id(), most)
    )


def _share(model: Any, runtime: Runtime, reads: Reads, decoding: SourceDecoding, source_pass: str) -> None:
    """Have new tokens of both streams go through the model together, where that is possible and asked for.

    Raises:
        ValueError: it was asked for by name and is not possible.
    """
    if source_pass == "separate":
        return
    why, unusual = "the source is not decoded beside the target (FLARE MT, source_alignment='release')", False
    if isinstance(decoding, AlignedText):
        why, unusual = obstacle(model, runtime, reads, decoding.text.cache)
        decoding.shares = not why
    if why and source_pass == "shared":
        raise ValueError(_NOT_SHARED.format(why=why))
    if why and unusual:
        say_two_passes(runtime, why)


def _refuse_decoder_arguments(model: Any, source: dict[str, Any]) -> None:
    for name in DECODER_ARGUMENTS:
        if name in source:
            raise ValueError(f"{name}: {type(model).__name__} is not an encoder-decoder; leave it out")


def _warn_of_padding(runtime: Runtime, source_mask: Tensor, target_mask: Tensor | None) -> None:
    pads = source_mask == 0
    if target_mask is not None:
        pads = pads & (target_mask.to(pads.device) != 0)
    if not runtime.warned_padding and bool(pads.any()):
        runtime.warned_padding = True
        warn_user(PADDING_WARNING)


def _most_new_tokens(options: Options, prompt: int) -> int:
    if options.get("max_new_tokens") is not None:
        return int(options.get("max_new_tokens"))
    if options.get("max_length") is None:
        raise ValueError(
            "source_alignment='release' needs max_new_tokens: the source is decoded, to that many tokens, beforehand"
        )
    return int(options.get("max_length")) - prompt


# --- encoder-decoders -------------------------------------------------------------------------------------------------


def _generate_encoder_decoder(
    model: Any,
    runtime: Runtime,
    source: dict[str, Any],
    alignment: str,
    padding: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if alignment == "release":
        raise ValueError("source_alignment='release': the authors released no encoder-decoder, so it has no such rule")
    if kwargs.get("encoder_outputs") is not None:
        raise ValueError(
            "encoder_outputs cannot be combined with a source, which the encoder reads too; pass input_ids, or leave "
            "the source out"
        )
    options = Options(model, args, kwargs)
    reading = runtime.reading()
    in_encoder, in_decoder = reading.of_text, reading.of_decoder
    target = tuple(_target_ids(args, kwargs)[0].shape[:2])
    decodes = [name for name in DECODER_ARGUMENTS if name in source]
    if decodes and isinstance(source.get("source_states"), SourceStates):
        raise ValueError(f"{decodes[0]} and source_states were both given: the states are the encoder's alone")
    with torch.no_grad():
        if decodes and in_decoder:
            _refuse_options(options)
            _refuse_mixing(in_decoder)
            context, decoding = _both_stacks(model, runtime, in_encoder, in_decoder, source, padding, target, options)
            kwargs["past_key_values"] = _cache_with(model, decoding)
            if options.get("cache_implementation") is not None:
                kwargs["cache_implementation"] = None
        else:
            if all(runtime.configs[adapter].latent_dim is None for adapter in in_encoder.adapters):
                source = {name: value for name, value in source.items() if name not in decodes}  # no decoder reads them
            context = read_source(model, runtime, source, target, source_padding=padding)
    store_target_masks(runtime, in_encoder.uses, context, args, kwargs)
    THREAD.slot.forward = context  # generate calls the encoder by itself, and the hook before its blocks finds it here
    try:
        found = model.generate(*args, **kwargs)
    finally:
        THREAD.slot.forward = None
    check_reached(model, context)
    return found


def _both_stacks(
    model: Any,
    runtime: Runtime,
    in_encoder: Reads,
    in_decoder: Reads,
    source: dict[str, Any],
    padding: str | None,
    target: tuple[int, ...],
    options: Options,
) -> tuple[SourceContext, AlignedText]:
    """One run of the frozen encoder: the S of the encoder's layers, and the source's decoder ready to begin."""
    adapters = in_encoder.adapters | in_decoder.adapters
    inputs = backbone_inputs(model, source, target)
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    dropout = runtime.setting("source_dropout", adapters)
    zero = (padding or runtime.setting("source_padding", adapters)) == "zero"
    outputs: list[Any] = []
    encoder: nn.Module = model.get_encoder()

    def run() -> None:
        outputs.append(encoder(input_ids=inputs["input_ids"], attention_mask=mask, return_dict=True))

    states = read_states(model, runtime, in_encoder, run, mask if zero else None, dropout)
    prompt = _decoder_prompt(source, options, len(mask)).to(mask.device)
    text = FrozenText(
        mask=torch.ones_like(prompt),
        cache=_plain_cache(model),
        dropout=dropout,
        zero_pads=False,
        encoder_outputs=outputs[0],
        encoder_mask=mask,
    )
    ends = torch.tensor(options.token_ids("eos_token_id"), dtype=prompt.dtype, device=prompt.device)
    decoding = AlignedText(slots=slots_of(in_decoder), in_decoder=True, text=text, prompt=prompt, end_ids=ends)
    return SourceContext.of_bottlenecks(states, in_encoder.sites), decoding


def _decoder_prompt(source: dict[str, Any], options: Options, rows: int) -> Tensor:
    """What the source's decoder begins with (B, u): its start token, or source_decoder_input_ids, as long as the
    target's decoder_input_ids. source_labels only say that the decoder fuses: the source writes its own text.
    """
    start_ids = options.token_ids("decoder_start_token_id") or options.token_ids("bos_token_id")
    if not start_ids:
        raise ValueError("generate: decoder_start_token_id is not set, in the arguments or in model.generation_config")
    start = torch.tensor(start_ids).expand(rows)[:, None] if len(start_ids) == 1 else torch.tensor(start_ids)[:, None]
    if options.kwargs.get("decoder_attention_mask") is not None:
        raise ValueError("generate: decoder_attention_mask cannot be combined with a source for the decoder")
    prompt, target = start, start
    if "source_labels" not in source:
        prompt = _begun(check_ids("source_decoder_input_ids", source["source_decoder_input_ids"], "(B, u)"), start)
    if options.kwargs.get("decoder_input_ids") is not None:
        target = _begun(options.kwargs["decoder_input_ids"], start)
    if prompt.shape != target.shape:
        raise ValueError(
            f"source_decoder_input_ids begins the source's text with {tuple(prompt.shape)} tokens, the target's "
            f"decoder_input_ids with {tuple(target.shape)}: both need one batch size and length (left out: one start "
            "token)"
        )
    return prompt


def _begun(ids: Tensor, start: Tensor) -> Tensor:
    """A decoder's prompt with its start token in front, put there as generate does where no row has it."""
    start = start.to(ids.device)
    if len(ids) == len(start) and bool((ids[:, 0] != start[:, 0]).all()):
        return torch.cat([start, ids], dim=1)
    return ids
