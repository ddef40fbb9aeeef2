"""Run transformers' ``generate`` with a source.

A KV cache of flare.generation.caches is passed as ``past_key_values``. It also holds the state of the source's
decoding (flare.generation.decoding). When beam search or sampling selects rows of the target, the cache also selects
their source rows. In every forward pass, the hook before the model (flare.source.hooks) takes S = x_source Aᵀ of the
pass's positions from the cache. In an encoder-decoder, the cache serves the decoder only. The encoder runs and fuses
once, before decoding.

Shapes: B rows of a batch, m positions, hidden states of width d, u positions of a decoder's prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flare_kernels.fusion import EAGER_FUSIONS

from ..source.arguments import DECODER_ARGUMENTS
from ..source.context import THREAD, SourceContext
from ..source.hooks import check_reached, store_target_masks, warn_user
from ..source.inputs import backbone_inputs, check_ids, read_source
from ..source.runtime import Reads, Runtime
from ..source.states import SourceStates
from ..tuner.config import SOURCE_PADDING
from .caches import new_cache
from .decoding import (
    AlignedDecoding,
    FrozenDecoder,
    LatentDecoding,
    ReleaseDecoding,
    SourceDecoding,
    decode_to_end,
    fusing_pairs,
    read_states,
)
from .options import Options, refuse_options
from .shared_pass import SOURCE_PASSES, unsupported_reason, warn_two_passes_once

ALIGNMENTS = ("training", "release")

PADDING_WARNING = (
    "generate was called with source_padding='keep', and a source prompt is shorter than its target prompt: positions "
    "of the target are fused with hidden states of padding. These states depend on the batch's width and on the "
    "attention kernel, so a row's output depends on them too. Pass source_padding='zero' (the default of generate) to "
    "avoid this."
)


def _refuse_mixing(reads: Reads) -> None:
    """Raise ValueError for a fusion in which each position reads all positions, including later ones."""
    for _, adapter, layer in reads.uses:
        fusion = layer.flare_fusion[adapter]
        if fusion in EAGER_FUSIONS:
            raise ValueError(
                f"generate: fusion={fusion!r} of adapter {adapter!r} lets every position read all positions of the "
                "text, including later positions, which are not generated yet. Use source_alignment='release' to "
                "generate as the authors' release does"
            )


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
    """Generate with a source; see ``FlareModel.generate``."""
    if source_pass not in SOURCE_PASSES:
        raise ValueError(f"source_pass={source_pass!r} is not accepted; one of: {', '.join(SOURCE_PASSES)}")
    if source_padding not in (None, *SOURCE_PADDING):
        raise ValueError(f"source_padding={source_padding!r} is not accepted; one of: {', '.join(SOURCE_PADDING)}")
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("generate: gradient checkpointing drops the KV cache in train mode; call model.eval() first")
    # accelerate keeps offloaded weights on the meta device
    device = model.device if model.device.type != "meta" else runtime.active_uses().of_both.device
    source = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in source.items()}
    if runtime.map.decoders:
        if source_pass == "shared":
            raise ValueError(_NOT_SHARED.format(why="the model is an encoder-decoder"))
        return _generate_encoder_decoder(model, runtime, source, source_alignment, source_padding, args, kwargs)
    return _generate_decoder_only(model, runtime, source, source_alignment, source_padding, source_pass, args, kwargs)


_NOT_SHARED = "generate: source_pass='shared' is not possible: {why}; leave source_pass out"


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
    reads = runtime.active_uses().of_text
    refuse_options(options)
    if alignment == "training":
        _refuse_mixing(reads)
    elif options.get("prefill_chunk_size") is not None:
        raise ValueError("generate: prefill_chunk_size cannot be combined with source_alignment='release'")
    elif padding == "zero":
        raise ValueError("generate: source_padding='zero' cannot be combined with source_alignment='release'")
    target = _target_ids(args, kwargs)
    with torch.no_grad():
        decoding = _source_decoding(model, runtime, reads, source, alignment, padding or "zero", target, options)
        _allow_shared_pass(model, runtime, reads, decoding, source_pass)
    _pass_cache(model, decoding, options, kwargs)
    return model.generate(*args, **kwargs)


def _pass_cache(model: Any, decoding: SourceDecoding, options: Options, kwargs: dict[str, Any]) -> None:
    """Add a KV cache that holds ``decoding`` to the keyword arguments of ``generate``."""
    if options.get("cache_implementation") is not None:
        kwargs["cache_implementation"] = None  # generate accepts either this option or a cache
    kwargs["past_key_values"] = new_cache(model, decoding)


def _target_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return the token ids (B, m) or the embeddings (B, m, d) of the target's prompt, and its mask or None."""
    inputs = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("inputs"), args[0] if args else None)
    ids = next((value for value in inputs if isinstance(value, Tensor)), None)
    if ids is None:
        raise ValueError(
            "generate: a source needs the target's input_ids, because source and target are aligned by position"
        )
    return ids, kwargs.get("attention_mask")


def _source_decoding(
    model: Any,
    runtime: Runtime,
    reads: Reads,
    source: dict[str, Any],
    alignment: str,
    padding: str,
    target: tuple[Tensor, Tensor | None],
    options: Options,
) -> SourceDecoding:
    """Return the state of the source's decoding before the target's first token, for a decoder-only model."""
    shape = tuple(target[0].shape[:2])
    pairs, adapters = fusing_pairs(reads), reads.adapters
    if runtime.setting("latent_dim", adapters) is not None:
        states = read_source(model, runtime, source, shape).bottlenecks
        return LatentDecoding(pairs=pairs, prompt_states=states, mask=source.get("source_attention_mask"))
    if "source_states" in source:
        raise ValueError(
            "source_states: these belong to the prompt only, but new tokens need the states of the source's new "
            "tokens; pass source_input_ids and source_attention_mask instead"
        )
    _refuse_decoder_arguments(model, source)
    inputs = backbone_inputs(model, source, shape)
    if "token_type_ids" in inputs:
        raise ValueError(
            "source_token_type_ids: generate does not know the types of new tokens; leave this argument out"
        )
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not bool(mask[:, -1].all()):
        raise ValueError(
            "source_attention_mask ends in padding, but decoding continues after the last position: pad both prompts "
            "on the left (padding_side='left')"
        )
    aligned = alignment == "training"
    if aligned and padding == "keep":
        _warn_about_padding(runtime, mask, target[1])
    decoder = FrozenDecoder(
        mask=mask,
        cache=new_cache(model),
        dropout=runtime.setting("source_dropout", adapters),
        zero_pads=padding == "zero" and aligned and not bool(mask.all()),
    )
    ends = torch.tensor(options.token_ids("eos_token_id"), dtype=ids.dtype, device=ids.device)
    if aligned:
        return AlignedDecoding(pairs=pairs, decoder=decoder, prompt=ids, end_ids=ends)
    length = options.max_new_tokens(ids.shape[1])
    steps = decode_to_end(model, runtime, reads, decoder, ids, ends, options.pad_id(), length)
    return ReleaseDecoding(pairs=pairs, steps=steps)


def _allow_shared_pass(model: Any, runtime: Runtime, reads: Reads, decoding: SourceDecoding, source_pass: str) -> None:
    """Allow decoding steps that run the model once on target and source, if possible and if ``source_pass`` permits it.

    Raises:
        ValueError: source_pass="shared", and such steps are not possible.
    """
    if source_pass == "separate":
        return
    why, unexpected = "the source is not decoded along with the target (FLARE MT, source_alignment='release')", False
    if isinstance(decoding, AlignedDecoding):
        why, unexpected = unsupported_reason(model, runtime, reads, decoding.decoder.cache)
        decoding.may_share = not why
    if why and source_pass == "shared":
        raise ValueError(_NOT_SHARED.format(why=why))
    if why and unexpected:
        warn_two_passes_once(runtime, why)


def _refuse_decoder_arguments(model: Any, source: dict[str, Any]) -> None:
    for name in DECODER_ARGUMENTS:
        if name in source:
            raise ValueError(f"{name}: {type(model).__name__} is not an encoder-decoder; leave it out")


def _warn_about_padding(runtime: Runtime, source_mask: Tensor, target_mask: Tensor | None) -> None:
    pads = source_mask == 0
    if target_mask is not None:
        pads = pads & (target_mask.to(pads.device) != 0)
    if not runtime.warned_padding and bool(pads.any()):
        runtime.warned_padding = True
        warn_user(PADDING_WARNING)


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
        raise ValueError(
            "source_alignment='release': the authors' release has no encoder-decoder, so this alignment is only for "
            "decoder-only models; use source_alignment='training'"
        )
    if kwargs.get("encoder_outputs") is not None:
        raise ValueError(
            "encoder_outputs cannot be combined with a source, because the encoder fuses too; pass input_ids, or leave "
            "the source out"
        )
    options = Options(model, args, kwargs)
    active = runtime.active_uses()
    in_encoder, in_decoder = active.of_text, active.of_decoder
    target = tuple(_target_ids(args, kwargs)[0].shape[:2])
    decodes = [name for name in DECODER_ARGUMENTS if name in source]
    if decodes and isinstance(source.get("source_states"), SourceStates):
        raise ValueError(
            f"{decodes[0]} and source_states were both given, but source_states holds only the encoder's states: pass "
            f"source_input_ids instead of source_states, or leave {decodes[0]} out"
        )
    with torch.no_grad():
        if decodes and in_decoder:
            refuse_options(options)
            _refuse_mixing(in_decoder)
            context, decoding = _read_encoder(model, runtime, in_encoder, in_decoder, source, padding, target, options)
            _pass_cache(model, decoding, options, kwargs)
        else:
            if all(runtime.configs[adapter].latent_dim is None for adapter in in_encoder.adapters):
                source = {
                    name: value for name, value in source.items() if name not in decodes
                }  # no layer of the decoder fuses
            context = read_source(model, runtime, source, target, source_padding=padding)
    store_target_masks(runtime, in_encoder.uses, context, args, kwargs)
    # generate calls the encoder directly, so the hook before the encoder's blocks takes the context from the slot
    THREAD.slot.forward = context
    try:
        output = model.generate(*args, **kwargs)
    finally:
        THREAD.slot.forward = None
    check_reached(model, context)
    return output


def _read_encoder(
    model: Any,
    runtime: Runtime,
    in_encoder: Reads,
    in_decoder: Reads,
    source: dict[str, Any],
    padding: str | None,
    target: tuple[int, ...],
    options: Options,
) -> tuple[SourceContext, AlignedDecoding]:
    """Run the frozen encoder on the source. Return a context with S of its layers, and the source's decoding."""
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
    decoder = FrozenDecoder(
        mask=torch.ones_like(prompt),
        cache=new_cache(model),
        dropout=dropout,
        zero_pads=False,
        encoder_outputs=outputs[0],
        encoder_mask=mask,
    )
    ends = torch.tensor(options.token_ids("eos_token_id"), dtype=prompt.dtype, device=prompt.device)
    if options.get("forced_bos_token_id") is not None and "source_labels" in source:
        decoder.first_ids = _first_labels(source["source_labels"], ends, len(prompt))
    decoding = AlignedDecoding(
        pairs=fusing_pairs(in_decoder), in_decoder=True, decoder=decoder, prompt=prompt, end_ids=ends
    )
    return SourceContext.of_bottlenecks(states, in_encoder.sites), decoding


def _decoder_prompt(source: dict[str, Any], options: Options, rows: int) -> Tensor:
    """Return the tokens (B, u) with which the decoder starts on the source: start tokens or source_decoder_input_ids.

    These tokens must have the shape of the target's decoder_input_ids. With source_labels, the decoder fuses and begins
    with the start tokens. The source is decoded greedily, except for its first token (:func:`_first_labels`).
    """
    start_ids = options.token_ids("decoder_start_token_id") or options.token_ids("bos_token_id")
    if not start_ids:
        raise ValueError("generate: decoder_start_token_id is not set; pass it, or set it in model.generation_config")
    start = torch.tensor(start_ids).expand(rows)[:, None] if len(start_ids) == 1 else torch.tensor(start_ids)[:, None]
    if options.kwargs.get("decoder_attention_mask") is not None:
        raise ValueError(
            "generate: decoder_attention_mask cannot be combined with a source for the decoder; leave it out"
        )
    prompt, target = start, start
    if "source_labels" not in source:
        prompt = _with_start_token(
            check_ids("source_decoder_input_ids", source["source_decoder_input_ids"], "(B, u)"), start
        )
    if options.kwargs.get("decoder_input_ids") is not None:
        target = _with_start_token(options.kwargs["decoder_input_ids"], start)
    if prompt.shape != target.shape:
        raise ValueError(
            f"the decoder's first tokens have shape {tuple(prompt.shape)} for the source (source_decoder_input_ids) "
            f"and {tuple(target.shape)} for the target (decoder_input_ids); pass both arguments with the same shape "
            "(default: one start token per row)"
        )
    return prompt


def _first_labels(labels: Any, ends: Tensor, rows: int) -> Tensor:
    """Return the first labels (B, 1) of the source, -1 in rows whose labels are empty or only an end token.

    With forced_bos_token_id, generate starts the target with this token, such as the target's language (NLLB, mBART).
    As in training, the source starts with its own first label, which is its language.
    """
    first = check_ids("source_labels", labels, "(B, u)")[:, :1].to(ends.device)
    if first.shape != (rows, 1):
        raise ValueError(
            f"source_labels has shape {tuple(labels.shape)}: with forced_bos_token_id, generate reads the first label "
            f"of each of the source's {rows} rows; pass labels ({rows}, u), or leave forced_bos_token_id out"
        )
    return first.masked_fill(torch.isin(first, ends) | (first < 0), -1)


def _with_start_token(ids: Tensor, start: Tensor) -> Tensor:
    """Return a decoder's prompt with its start token. Prepend it, as ``generate`` does, if no row starts with it."""
    start = start.to(ids.device)
    if len(ids) == len(start) and bool((ids[:, 0] != start[:, 0]).all()):
        return torch.cat([start, ids], dim=1)
    return ids
