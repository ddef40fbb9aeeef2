"""X-Mixup's two runs: the source runs through the whole model, then the target, and their losses are combined.

Hooks on the transformers model do this. Before the target's forward, the source runs through the same model, with
gradients. After the target's forward, the output's loss becomes the weighted sum of both texts' losses plus the
consistency terms, which pull the two texts' class probabilities (KL) and representations (MSE) together.

Shapes: B rows, m tokens per text, d the hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import REPLICA_MARK
from ..source.hooks import take_source, warn_user
from ..source.inputs import SOURCE_ARGUMENTS, check_ids, check_same_shape, check_source_mask
from ..source.packed_rows import refuse_packed_rows
from ..training.collator import SOURCE_POSITIONS
from .mixup_layer import MixupRuntime, Streams, runtime_of

#: Keyword arguments of the model that belong to the source.
X_MIXUP_ARGUMENTS = (*SOURCE_ARGUMENTS, *SOURCE_POSITIONS)
_NOT_TAKEN = ("source_states", "source_decoder_input_ids")
_POSITIONS = ("start_positions", "end_positions")

NO_SOURCE_WARNING = (
    "An X-Mixup adapter was run without a source and is plain LoRA in this step. Pass source_input_ids and "
    "source_attention_mask to the model. With transformers.Trainer, set remove_unused_columns=False (it drops columns "
    "that the base model's forward does not name) or use flare.FlareTrainer, and pad with flare.FlareDataCollator."
)
NO_SOURCE_LABELS_WARNING = (
    "The source has no labels of its own ({missing} missing), so X-Mixup's task loss is only the target's. The "
    "consistency terms are added as usual."
)
NO_LABELS_WARNING = (
    "An X-Mixup adapter is trained without {missing}, so the output has no loss: the source's task loss and the "
    "consistency terms are left out, and in causal rows the target attends to the source's answer. Pass the labels to "
    "the model. With transformers.Trainer, leave label_smoothing_factor and compute_loss_func out, because they take "
    "the labels from the inputs."
)


def attach_streams(model: nn.Module, runtime: MixupRuntime) -> None:
    """Install the hooks on the model. The first one runs before flare.source.hooks removes the source arguments."""
    runtime.handles += [
        model.register_forward_pre_hook(_before_model, with_kwargs=True, prepend=True),
        model.register_forward_hook(_after_model, with_kwargs=True),
        model.register_forward_hook(_end, always_call=True),
    ]


# --- the hooks -------------------------------------------------------------------------------------------------------


def _before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    runtime = runtime_of(model)
    if runtime.mode == "source" or runtime.generating:
        return None
    runtime.end()  # torch does not call _end after a KeyboardInterrupt, so an interrupted forward leaves its state
    source = take_source(model, kwargs, X_MIXUP_ARGUMENTS)
    if not runtime.is_on():
        return args, kwargs
    if not source:
        _warn_once(runtime, NO_SOURCE_WARNING)
        return args, kwargs
    if args:
        kwargs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    _refuse(model, kwargs)
    refuse_packed_rows(model, source, (), kwargs)
    try:
        runtime.streams = _streams(model, runtime, source, kwargs)
        run_source(model, runtime)
    except BaseException:
        runtime.end()
        raise
    runtime.begin("target")
    return (), kwargs


def _after_model(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    runtime = runtime_of(model)
    if runtime.mode != "target" or runtime.generating or getattr(output, "loss", None) is None:
        return None
    assert runtime.streams is not None
    output.loss = _whole_loss(runtime, kwargs, output)
    return output


def _end(model: nn.Module, args: Any, output: Any) -> None:
    runtime = runtime_of(model)
    if runtime.mode == "target" and not runtime.generating:
        runtime.end()


def _refuse(model: nn.Module, kwargs: dict[str, Any]) -> None:
    if REPLICA_MARK in model.__dict__:
        raise ValueError(
            "X-Mixup cannot run under torch.nn.DataParallel, whose threads would share one source: start one process "
            "per GPU (accelerate launch, torchrun), or make a single GPU visible (CUDA_VISIBLE_DEVICES=0)"
        )
    if kwargs.get("return_dict") is False:
        raise ValueError("return_dict=False: X-Mixup adds its losses to the output by name; leave return_dict out")
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: the attention of the mixup block runs twice, and transformers would record the "
            "weights of both runs; leave output_attentions out, or leave the source out"
        )
    cache = kwargs.get("past_key_values")
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0):
        raise ValueError(
            "past_key_values holds earlier positions, which cannot be combined with a source: use model.generate, or "
            "pass the whole text in one call"
        )


# --- the source's forward --------------------------------------------------------------------------------------------


def _streams(model: nn.Module, runtime: MixupRuntime, source: dict[str, Any], target: dict[str, Any]) -> Streams:
    """Return the Streams of one forward, with the masks of both texts and the arguments of the source's forward.

    Raises:
        TypeError, ValueError: a source argument or the target's mask has a wrong type or shape; the message names the
            argument.
    """
    inputs = source_inputs(model, source)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    target_ids = target.get("input_ids")
    check_same_shape(ids, tuple(target_ids.shape) if isinstance(target_ids, Tensor) else type(target_ids).__name__)
    assert isinstance(target_ids, Tensor)
    target_mask = target.get("attention_mask")
    if target_mask is None:
        target_mask = torch.ones_like(target_ids)
    elif not isinstance(target_mask, Tensor) or target_mask.shape != target_ids.shape:
        shape = str(tuple(target_mask.shape)) if isinstance(target_mask, Tensor) else type(target_mask).__name__
        raise ValueError(
            f"attention_mask is {shape}: X-Mixup needs a mask of the target's tokens, {tuple(target_ids.shape)}"
        )
    streams = Streams(visible=mask.bool(), counted=target_mask.bool(), source_inputs=inputs)
    labels = target.get("labels")
    needed = () if runtime.task is None else _POSITIONS if runtime.task == "QUESTION_ANS" else ("labels",)
    if model.training and torch.is_grad_enabled() and any(target.get(name) is None for name in needed):
        _warn_once(runtime, NO_LABELS_WARNING.format(missing=" and ".join(needed)))
    if runtime.task == "CAUSAL_LM" and labels is not None:
        _hide_answers(streams, inputs, ids, labels, source.get("source_labels"))
    elif runtime.task == "QUESTION_ANS":
        _take_positions(runtime, source, target, inputs)
    elif labels is not None:
        # A class of the whole text holds for both texts. The labels of other tasks belong to the target only.
        source_labels = source.get("source_labels", labels if runtime.task == "SEQ_CLS" else None)
        if source_labels is not None:
            inputs["labels"] = source_labels
    if runtime.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS") and labels is not None and "labels" not in inputs:
        _warn_once(runtime, NO_SOURCE_LABELS_WARNING.format(missing="source_labels"))
    return streams


def source_inputs(model: nn.Module, source: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the source's forward.

    These are input_ids and attention_mask (B, m), token types if they were passed, and use_cache=False if the model
    accepts it.

    Raises:
        TypeError, ValueError: an argument is missing, has a wrong type or shape, or is not accepted; the message names
            the argument.
    """
    for name in _NOT_TAKEN:
        if name in source:
            raise ValueError(f"{name}: X-Mixup reads the source as text (source_input_ids); leave {name} out")
    if "source_input_ids" not in source:
        raise ValueError(f"{', '.join(sorted(source))} was passed without source_input_ids: pass both, or neither")
    ids = check_ids("source_input_ids", source["source_input_ids"], "(B, m)")
    mask = source.get("source_attention_mask")
    mask = torch.ones_like(ids) if mask is None else check_source_mask(ids, mask)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "source_token_type_ids" in source:
        inputs["token_type_ids"] = source["source_token_type_ids"]
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def _hide_answers(
    streams: Streams, inputs: dict[str, Any], ids: Tensor, labels: Tensor, source_labels: Tensor | None
) -> None:
    """Hide the answers of both texts. In causal rows, the text contains the answer.

    The target cannot attend to the source's answer. The target's answer is left out of the entropy from which lambda
    (the weight of the source in the mix) is computed.

    Without source_labels, the source's answer starts in the column of the target's first label, where FlareDataCollator
    puts it.
    """
    columns = torch.arange(labels.shape[1], device=labels.device)
    labelled = labels.ne(-100)
    start = torch.where(labelled, columns, labels.shape[1]).amin(1, keepdim=True)
    streams.counted = streams.counted & (columns < start)
    if source_labels is None:
        source_labels = ids.where(streams.visible & (columns >= start), torch.full_like(ids, -100))
    streams.visible = streams.visible & source_labels.eq(-100)
    if source_labels.ne(-100).any():
        inputs["labels"] = source_labels


def _take_positions(
    runtime: MixupRuntime, source: dict[str, Any], target: dict[str, Any], inputs: dict[str, Any]
) -> None:
    if any(target.get(name) is None for name in _POSITIONS):
        return
    positions = {name: source.get(f"source_{name}") for name in _POSITIONS}
    if any(value is None for value in positions.values()):
        missing = "source_start_positions and source_end_positions"
        _warn_once(runtime, NO_SOURCE_LABELS_WARNING.format(missing=missing))
    else:
        inputs.update(positions)


def _warn_once(runtime: MixupRuntime, message: str) -> None:
    if message not in runtime.warned:
        runtime.warned.add(message)
        warn_user(message)


def run_source(model: Any, runtime: MixupRuntime) -> None:
    """Run the source through the model. An encoder-decoder without source labels runs only its encoder."""
    streams = runtime.streams
    assert streams is not None
    runtime.begin("source")
    inputs = streams.source_inputs
    if model.config.is_encoder_decoder and "labels" not in inputs:
        streams.source_output = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    else:
        streams.source_output = model(**inputs)


# --- the losses ------------------------------------------------------------------------------------------------------


def _whole_loss(runtime: MixupRuntime, target: dict[str, Any], output: Any) -> Tensor:
    """Return alpha * source loss + (1 - alpha) * target loss + KL + MSE.

    Without a source loss, alpha is 0. KL is added only if a whole text is classified into one of two or more classes.
    """
    streams = runtime.streams
    assert streams is not None
    loss: Tensor = output.loss
    source_loss = getattr(streams.source_output, "loss", None)
    if source_loss is not None:
        loss = runtime.alpha * source_loss + (1 - runtime.alpha) * loss
    if runtime.task == "SEQ_CLS" and output.logits.shape[-1] > 1 and not target["labels"].is_floating_point():
        loss = loss + kl_term(streams.source_output.logits, output.logits)
    texts = {"source": streams.source_inputs, "target": target}
    return loss + mse_term(*(_representation(runtime, streams.hidden[name], text) for name, text in texts.items()))


def kl_term(source_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return KL(p_source || p_target), averaged over the rows. Both logits are (B, classes)."""
    source, target = (_wide(logits).log_softmax(-1) for logits in (source_logits, target_logits))
    return F.kl_div(target, source, log_target=True, reduction="batchmean")


def mse_term(source: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of two representations (B, d)."""
    return F.mse_loss(_wide(target), _wide(source))


def _representation(runtime: MixupRuntime, hidden: Tensor, text: dict[str, Any]) -> Tensor:
    """Return a text's representation (B, d), computed from its last hidden states (B, tokens, d).

    If the model classifies whole texts by their first or last token, it is this token's state. In all other models it
    is the mean over the tokens.
    """
    ids, mask = text["input_ids"], text.get("attention_mask")
    if runtime.task != "SEQ_CLS" or runtime.classifier_token == "mean":
        weights = (torch.ones_like(ids) if mask is None else mask)[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    if runtime.classifier_token == "first":
        return hidden[:, 0]
    config: Any = runtime.model.config
    pad = config.get_text_config().pad_token_id
    columns = torch.arange(ids.shape[1], device=ids.device)
    last = columns[-1].expand(len(ids)) if pad is None else (columns * ids.ne(pad)).argmax(1)
    return hidden[torch.arange(len(ids), device=ids.device), last]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
