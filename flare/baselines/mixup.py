"""X-Mixup (Yang et al., "Enhancing Cross-lingual Transfer by Manifold Mixup", ICLR 2022, arXiv 2205.04182) under LoRA.

Source and target run through one model, with gradients through both. At one block the target's state after
self-attention is mixed with what its tokens find in the source, by the block's own attention weights:

    a_t, a_s   the states after self-attention, with residual (and LayerNorm where the block has it behind)
    c_t        the same attention once more: queries of a_t, keys and values of a_s, the source's padding masked
    m_t        LN(lambda c_t + (1 - lambda) a_t); LN only in blocks with LayerNorm behind the residual (BERT, XLM-R)
    lambda     lambda0 * sigmoid(w H + b), per text; w and b are trained and start at 1 and 0
    H          entropy of the attention from target to source plus that from source to target, mean over heads and
               tokens; the authors' code takes the mean over padding as well, which makes lambda depend on the batch

and the loss is alpha CE_source + (1 - alpha) CE_target + KL(p_source || p_target) + MSE(rep_source, rep_target).

The paper also trains on the target's back-translation in the source's place (scheduled sampling): left out here. It
trains whole models; here, as in FLARE's comparison, only LoRA, the task head, w and b train.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .._compat import X_MIXUP, register_tuner
from ..source.hooks import take_source
from ..tuner.config import FlareConfig
from ..tuner.convert import infer_task_type, make_config
from ..tuner.model import FlareModel
from . import mixup_layer, mixup_streams
from .lora import plain_lora
from .mixup_layer import MixupRuntime, Streams
from .mixup_place import Place, middle

if TYPE_CHECKING:
    import peft

_CARD = """An X-Mixup adapter: LoRA whose model mixes the text with its source-language counterpart at one block. It
needs the package `flare-kernels` (`import flare` before `PeftModel.from_pretrained`; without it PEFT reports
`KeyError: 'FLARE_X_MIXUP'`).

**A source is needed at prediction time**: `source_input_ids` and `source_attention_mask` of the same text in the source
language, beside the usual inputs.
"""


@dataclass
class XMixupConfig(FlareConfig):
    """Configuration of an X-Mixup adapter: plain LoRA's, and the mixup's, saved in ``adapter_config.json``.

    Raises:
        TypeError, ValueError: a value that is not accepted; the message names the field.
    """

    fusion: str | None = field(default=None, metadata={"help": "None: X-Mixup's LoRA layers do not fuse."})
    x_mixup_layer: int = field(default=0, metadata={"help": "The block that mixes, counted from 0."})
    x_mixup_lambda0: float = field(
        default=0.5, metadata={"help": "Upper bound of lambda, from 0 (no mixup; the losses stay) to 1."}
    )
    x_mixup_alpha: float = field(default=0.4, metadata={"help": "Weight of the source's task loss, from 0 to 1."})
    x_mixup_layer_norm: bool = field(
        default=True,
        metadata={
            "help": "Whether the mixture goes through the LayerNorm behind the block's self-attention once more, as in "
            "the authors' code; without effect in blocks that have none there."
        },
    )

    @property
    def card(self) -> str:
        return _CARD

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = X_MIXUP  # type: ignore[assignment]
        if self.fusion is not None:
            raise ValueError(f"fusion={self.fusion!r}: an X-Mixup adapter does not fuse; leave it out")
        if isinstance(self.x_mixup_layer, bool) or not isinstance(self.x_mixup_layer, int):
            raise TypeError(f"layer={self.x_mixup_layer!r} must be the number of a block, counted from 0, or None")
        for name in ("lambda0", "alpha"):
            value = getattr(self, f"x_mixup_{name}")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r} must be a number from 0 to 1")
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be a number from 0 to 1")
        if not isinstance(self.x_mixup_layer_norm, bool):
            raise TypeError(f"layer_norm={self.x_mixup_layer_norm!r} must be True or False")


class XMixupModel(FlareModel):
    """The tuner that PEFT makes for ``peft_type: FLARE_X_MIXUP``. Users meet it through :func:`x_mixup`."""

    def _prepare_adapter_config(self, peft_config: FlareConfig, model_config: dict[str, Any]) -> FlareConfig:
        if mixup_layer.is_attached(self.model):
            raise ValueError("a model holds one X-Mixup adapter: delete the other first, or load into a fresh model")
        Place.of(self.model, cast(XMixupConfig, peft_config).x_mixup_layer)  # raises before the model is touched
        return super()._prepare_adapter_config(peft_config, model_config)

    def wire(self, adapter: str) -> None:
        """FLARE's, then w and b and the hooks of both streams."""
        super().wire(adapter)
        config = cast(XMixupConfig, self.peft_config[adapter])
        place = Place.of(self.model, config.x_mixup_layer)
        mixup_layer.add_ratio(self.model, place.block, adapter)
        runtime = MixupRuntime(
            model=self.model,
            place=place,
            adapter=adapter,
            task=infer_task_type(self.model),
            lambda0=config.x_mixup_lambda0,
            alpha=config.x_mixup_alpha,
            layer_norm=config.x_mixup_layer_norm,
            reads=_what_is_read(self.model, place),
        )
        mixup_layer.attach_layer(self.model, runtime)
        mixup_streams.attach_streams(self.model, runtime)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's delete_adapter; the mixup goes with its adapter."""
        if mixup_layer.is_attached(self.model) and mixup_layer.runtime_of(self.model).adapter == adapter_name:
            mixup_layer.detach(self.model)
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """The base model without adapter, mixup and hooks."""
        mixup_layer.detach(self.model)
        return super().unload()

    def check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Raises ValueError: the mixup reads the source and cannot be merged, and without it the model is another."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.peft_config:
                raise ValueError(
                    f"adapter {name!r} is X-Mixup's: what it mixes depends on the source text and cannot be merged "
                    "into the base weights. Keep the adapter beside the model (save_pretrained)"
                )

    def encode_source(self, source_input_ids: Tensor, source_attention_mask: Tensor | None = None) -> Any:
        """Raises ValueError: X-Mixup's source trains along, so that its states cannot be kept."""
        raise ValueError("encode_source: X-Mixup reads the source in every forward; pass source_input_ids to the model")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate, mixing with a source prompt; without one it is plain LoRA's.

        lambda is that of the prompts, and every new token attends to the source's prompt, as in training, where neither
        text shows the other its answer.

        Args:
            *args, **kwargs: as the base model's generate, with ``source_input_ids`` and ``source_attention_mask`` (B,
                m), padded with the target's prompt to one width (decoder-only models: on the left).

        Raises:
            TypeError, ValueError: source arguments that do not fit, or an option that cannot be combined with a source.
        """
        source = take_source(self.model, kwargs, mixup_streams.X_MIXUP_ARGUMENTS)
        runtime, model = mixup_layer.runtime_of(self.model), cast(Any, self.model)
        if not source or not runtime.is_on():
            return super().generate(*args, **kwargs)
        try:
            with torch.no_grad():
                kwargs = _hold_source(model, runtime, source, args, kwargs)
            return model.generate(*args, **kwargs)
        finally:
            runtime.end()


def _hold_source(
    model: Any, runtime: MixupRuntime, source: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Run the source's prompt and hold its keys and values for all forwards of a generation."""
    for name in ("past_key_values", "inputs_embeds", "prefill_chunk_size", "assistant_model", "output_attentions"):
        if kwargs.get(name):
            raise ValueError(f"{name} cannot be combined with a source: leave it out, or leave the source out")
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    inputs = mixup_streams.source_inputs(model, source)
    if not isinstance(ids, Tensor) or ids.shape != inputs["input_ids"].shape:
        what = str(tuple(ids.shape)) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"source_input_ids has shape {tuple(inputs['input_ids'].shape)}, the prompts {what}: pad both to one width"
        )
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not model.config.is_encoder_decoder:
        # generate counts the target's positions from its first token. The same column is to be the same position in
        # both texts, as in training; what then comes before 0 is as far away as it should be under RoPE.
        at = torch.arange(ids.shape[1], device=ids.device)
        inputs["position_ids"] = at - (mask.cumsum(1) == 0).sum(1, keepdim=True)
    runtime.streams = Streams(inputs["attention_mask"].bool(), mask.bool(), source_inputs=inputs)
    runtime.begin("source")
    backbone = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    backbone(**inputs)
    runtime.holds = True
    runtime.begin("target")
    return {**kwargs, "attention_mask": mask}


def _what_is_read(model: Any, place: Place) -> str:
    if model.config.is_encoder_decoder:
        return "mean"
    return "last" if getattr(model.get_submodule(place.attention), "is_causal", False) else "first"


register_tuner(XMixupConfig, XMixupModel, [f.name for f in fields(XMixupConfig) if f.name.startswith("x_")], X_MIXUP)


def x_mixup(
    model: Any,
    config: peft.LoraConfig | None = None,
    *,
    layer: int | None = None,
    lambda0: float = 0.5,
    alpha: float | None = None,
    layer_norm: bool = True,
    **overrides: Any,
) -> peft.PeftModel:
    """Plain LoRA whose model mixes target and source at one block, and trains on both texts.

    Call it as a fusing model: with the batches of FlareDataCollator, ``source_input_ids`` and
    ``source_attention_mask`` (B, m) beside the usual inputs. The output is the target's, with ``loss`` the sum of all
    terms. Training and inference mix where a source is given; without one a model says so once and is plain LoRA.

    Which terms there are: the KL term for classifiers of whole texts. The source's task loss where the source has
    labels: a class is both texts'; spans need ``source_start_positions`` and ``source_end_positions`` in the rows;
    encoder-decoders ``source_labels``; causal rows the source's answer (``source_labels`` of the collator's rows);
    labels per token ``source_labels`` (B, m). Without them the target's counts whole, which is said once. The MSE term
    always, over the token that a classifier reads (first, or a decoder's last), else the mean over the tokens.

    In causal models the target's tokens see the whole of the source's prompt, and no answer; lambda is made of the
    prompts. A sliding window does not bound the attention to the source.

    Args:
        model: a transformers model, modified in place: BERT, RoBERTa, XLM-R, DistilBERT, T5 and mT5 (in the encoder),
            Llama, Mistral, Qwen, Gemma and what is made like them.
        config: as for :func:`plain_lora`.
        **overrides: as for :func:`plain_lora`.
        layer: the block that mixes, counted from 0. Default: the middle one (half the number of blocks); the paper
            chooses by development score.
        lambda0: upper bound of lambda. 0 is no mixup at all; the consistency terms stay.
        alpha: weight of the source's task loss. Default: 0.2 for spans, as the authors, else 0.4.
        layer_norm: whether a block with LayerNorm behind its residual norms the mixture, as the authors' code does.

    Raises:
        TypeError, ValueError: as :func:`plain_lora`; a PeftModel; a block that does not exist or is of another make.
    """
    import peft

    if isinstance(model, peft.PeftModel):
        raise ValueError("model: X-Mixup starts from a transformers model, got a PeftModel; merge its adapter first")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if overrides.pop("fusion", None) is not None:
        raise ValueError("x_mixup does not fuse: leave fusion out, or call flare.fast_lora to fuse two streams")
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise ValueError("x_mixup mixes one text with one text, and a multiple choice has several; use another method")
    if alpha is None:
        alpha = 0.2 if infer_task_type(model) == "QUESTION_ANS" else 0.4
    own = {
        "x_mixup_layer": middle(model) if layer is None else layer,
        "x_mixup_lambda0": lambda0,
        "x_mixup_alpha": alpha,
        "x_mixup_layer_norm": layer_norm,
    }
    values: dict[str, Any] = {}
    if config is not None:
        plain = make_config(config, {"fusion": None})
        values = {f.name: getattr(plain, f.name) for f in fields(FlareConfig) if f.init}
    return plain_lora(model, XMixupConfig(**{**values, **own}), **overrides)


def load_x_mixup(model: Any, folder: Any, **options: Any) -> peft.PeftModel:
    """``peft.PeftModel.from_pretrained`` for an adapter of :func:`x_mixup`, which works too once flare is imported.

    Args:
        model: the base model, modified in place.
        folder: what ``save_pretrained`` wrote.
        options: as for ``from_pretrained``, such as ``is_trainable``.

    Raises:
        ValueError: an adapter of another kind.
    """
    import peft

    config = peft.PeftConfig.from_pretrained(folder)
    if not isinstance(config, XMixupConfig):
        raise ValueError(f"{folder} holds an adapter of type {config.peft_type}, not {X_MIXUP}: use PeftModel")
    return peft.PeftModel.from_pretrained(model, folder, **options)
