"""X-Mixup (Yang et al., "Enhancing Cross-lingual Transfer by Manifold Mixup", ICLR 2022, arXiv 2205.04182) under LoRA.

Source and target run through one model, with gradients through both. At one block, the target's state after
self-attention is mixed with the result of a second attention, from the target to the source. The second attention uses
the weights of the block's self-attention:

    a_t, a_s   the states after self-attention and residual (and LayerNorm, in post-norm blocks)
    c_t        the second attention: queries from a_t, keys and values from a_s, with the source's padding masked
    m_t        LN(lambda c_t + (1 - lambda) a_t); LN only in post-norm blocks (BERT, XLM-R)
    lambda     lambda0 * sigmoid(w H + b), per text; lambda0 is set by the user, w and b are trained and start at 1
               and 0
    H          entropy of the attention from target to source plus entropy of the attention from source to target,
               each a mean over heads and tokens. (The authors' code averages over padding too, so there lambda depends
               on the batch.)

The loss is alpha CE_source + (1 - alpha) CE_target + KL(p_source || p_target) + MSE(rep_source, rep_target). CE is the
task's loss of a text, p the predicted class probabilities (only classifiers of whole texts have the KL term), and rep
a vector made of a text's last hidden states. alpha is set by the user.

Differences from the paper: scheduled sampling, which sometimes replaces the source by the target's back-translation, is
not implemented. The paper trains whole models; here, as in FLARE's comparison, only LoRA, the task head, w and b train.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .._compat import X_MIXUP, register_tuner
from ..generation.options import Options
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
language, in addition to the usual inputs.
"""


@dataclass
class XMixupConfig(FlareConfig):
    """Configuration of an X-Mixup adapter: the fields of plain LoRA, and fields for the mixup.

    It is saved in ``adapter_config.json``. :func:`x_mixup` creates it.

    Raises:
        TypeError, ValueError: a value is not accepted; the message names the field.
    """

    fusion: str | None = field(default=None, metadata={"help": "Always None: the LoRA layers of X-Mixup do not fuse."})
    x_mixup_layer: int = field(default=0, metadata={"help": "The block that mixes, counted from 0."})
    x_mixup_lambda0: float = field(
        default=0.5, metadata={"help": "Upper bound of lambda, from 0 (hidden states are not mixed) to 1."}
    )
    x_mixup_alpha: float = field(default=0.4, metadata={"help": "Weight of the source's task loss, from 0 to 1."})
    x_mixup_layer_norm: bool = field(
        default=True,
        metadata={
            "help": "Whether the mixture goes through the LayerNorm that follows the block's self-attention, as in the "
            "authors' code. No effect in blocks without such a LayerNorm."
        },
    )

    @property
    def card(self) -> str:
        return _CARD

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = X_MIXUP  # type: ignore[assignment]
        if self.fusion is not None:
            raise ValueError(f"fusion={self.fusion!r}: an X-Mixup adapter does not fuse; leave fusion out")
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
    """PEFT tuner for ``peft_type: FLARE_X_MIXUP``. Users create it with :func:`x_mixup`."""

    def _prepare_adapter_config(self, peft_config: FlareConfig, model_config: dict[str, Any]) -> FlareConfig:
        if mixup_layer.is_attached(self.model):
            raise ValueError(
                "a model holds one X-Mixup adapter: delete the existing adapter first, or load into a fresh model"
            )
        Place.of(self.model, cast(XMixupConfig, peft_config).x_mixup_layer)  # raises before the model is touched
        return super()._prepare_adapter_config(peft_config, model_config)

    def convert_adapter(self, adapter: str) -> None:
        """Convert the adapter as FLARE does, and add w, b and the hooks that run and mix both texts."""
        super().convert_adapter(adapter)
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
            classifier_token=_classifier_token(self.model, place),
        )
        mixup_layer.attach_layer(self.model, runtime)
        mixup_streams.attach_streams(self.model, runtime)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does. If it is the X-Mixup adapter, remove the mixup too."""
        if mixup_layer.is_attached(self.model) and mixup_layer.runtime_of(self.model).adapter == adapter_name:
            mixup_layer.detach(self.model)
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """Return the base model without adapter, mixup and hooks."""
        mixup_layer.detach(self.model)
        return super().unload()

    def check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError, because the mixup depends on the source text and cannot be merged into weights."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.peft_config:
                raise ValueError(
                    f"adapter {name!r} is an X-Mixup adapter: its mixture depends on the source text, so it cannot be "
                    "merged into the base weights. Keep the adapter and save it (save_pretrained)"
                )

    def encode_source(self, source_input_ids: Tensor, source_attention_mask: Tensor | None = None) -> Any:
        """Raise ValueError, because training changes how the model reads the source, so states cannot be kept."""
        raise ValueError("encode_source: X-Mixup reads the source in every forward; pass source_input_ids to the model")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with transformers' ``generate``. Without a source prompt, the model is plain LoRA.

        lambda is computed from the prompts, and every new token attends to the source's prompt. This matches training,
        where neither text can read the other's answer.

        Args:
            *args, **kwargs: arguments of the base model's generate, and ``source_input_ids`` and
                ``source_attention_mask`` (B, m). Source and target prompts are padded to one width, in decoder-only
                models on the left.

        Raises:
            TypeError, ValueError: a source argument has a wrong type or shape, or an option cannot be combined with a
                source.
        """
        source = take_source(self.model, kwargs, mixup_streams.X_MIXUP_ARGUMENTS)
        runtime, model = mixup_layer.runtime_of(self.model), cast(Any, self.model)
        runtime.end()  # an interrupted forward leaves its state, and generate may call the encoder directly
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
    """Run the model on the source's prompt, and keep the prompt's keys and values for all forwards of a generation.

    Return the keyword arguments of ``generate``, with the target's attention mask.
    """
    for name in ("past_key_values", "inputs_embeds", "prefill_chunk_size", "assistant_model", "output_attentions"):
        if kwargs.get(name):
            raise ValueError(f"{name} cannot be combined with a source: leave it out, or leave the source out")
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    inputs = mixup_streams.source_inputs(model, source)
    if not isinstance(ids, Tensor) or ids.shape != inputs["input_ids"].shape:
        shape = str(tuple(ids.shape)) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"source_input_ids has shape {tuple(inputs['input_ids'].shape)}, but the target's prompts have {shape}: "
            "pad both to one width"
        )
    mask = kwargs.get("attention_mask")
    if mask is None:  # inferred as in transformers' generate
        options = Options(model, args, kwargs)
        pads = options.token_ids("pad_token_id")[:1] or [-1]
        is_end = pads[0] in options.token_ids("eos_token_id")
        mask = torch.ones_like(ids) if is_end else ids.ne(pads[0]).long()
    if not model.config.is_encoder_decoder:
        # generate counts positions from the target's first token. As in training, a column has the same position in
        # both texts. Negative positions are fine, because RoPE depends on distances only.
        columns = torch.arange(ids.shape[1], device=ids.device)
        inputs["position_ids"] = columns - (mask.cumsum(1) == 0).sum(1, keepdim=True)
    runtime.streams = Streams(inputs["attention_mask"].bool(), mask.bool(), source_inputs=inputs)
    runtime.begin("source")
    backbone = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    backbone(**inputs)
    runtime.generating = True
    runtime.begin("target")
    return {**kwargs, "attention_mask": mask}


def _classifier_token(model: Any, place: Place) -> str:
    """Return what represents a text in a classifier's MSE term: "first", "last" or "mean".

    This is the last hidden state of the first or last token, or the mean of the last hidden states of all tokens.
    """
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
    """Return a model with plain LoRA adapters that mixes target and source at one block and trains on both texts.

        model = flare.baselines.x_mixup(model, r=64)
        flare.FlareTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()

    The model takes the batches of FlareDataCollator: ``source_input_ids`` and ``source_attention_mask`` (B, m) in
    addition to the usual inputs. It returns the output for the target, whose ``loss`` is the sum of all terms. The
    model mixes in training and inference. Without a source it warns once and is plain LoRA.

    The terms of the loss (the docstring of the module has the formula):

    - The source's task loss, if the source has labels. A class label counts for both texts. Spans need
      ``source_start_positions`` and ``source_end_positions`` in the rows; encoder-decoders and causal rows need
      ``source_labels`` in the rows. For labels per token, pass ``source_labels`` to the model in your own training
      loop, because FlareDataCollator refuses them. Without source labels the target's task loss has weight 1, and
      there is one warning.
    - The KL term, for classifiers of whole texts.
    - The MSE term, for all models. It compares the last hidden states of one token if a classifier of whole texts reads
      this token (encoders: the first token; decoder-only models: the last token). In all other models it compares means
      over the tokens.

    In causal models the target's tokens attend to the source's prompt but not to its answer, and lambda is computed
    from the prompts. A sliding window does not limit the attention to the source.

    Args:
        model: a transformers model, modified in place: BERT, RoBERTa, XLM-R, DistilBERT, T5 and mT5 (in the encoder),
            Llama, Mistral, Qwen, Gemma and models with the same blocks.
        config: a FlareConfig, a peft.LoraConfig or None.
        layer: the block that mixes, counted from 0. Default: half the number of blocks, rounded down. The paper
            chooses the block by development score.
        lambda0: upper bound of lambda, from 0 to 1. With 0, hidden states are not mixed, and only the loss differs from
            plain LoRA's.
        alpha: weight of the source's task loss, from 0 to 1. Default: 0.2 for question answering, as in the authors'
            code, otherwise 0.4.
        layer_norm: whether a post-norm block applies its LayerNorm to the mixture, as in the authors' code.
        **overrides: fields of FlareConfig, such as ``r`` or ``lora_alpha``.

    Raises:
        TypeError, ValueError: an error of :func:`plain_lora`; ``model`` is not a module, or it is a PeftModel or a
            multiple-choice model; ``fusion`` is not None; ``layer``, ``lambda0``, ``alpha`` or ``layer_norm`` is not
            accepted; or the block of ``layer`` is built differently from the blocks of the models above.
    """
    import peft

    if isinstance(model, peft.PeftModel):
        raise ValueError("model: X-Mixup starts from a transformers model, got a PeftModel; merge its adapter first")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if overrides.pop("fusion", None) is not None:
        raise ValueError("x_mixup does not fuse: leave fusion out, or call flare.fast_lora to fuse two streams")
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise ValueError(
            "x_mixup mixes one text with one text, but a row of multiple choice has several; use another method"
        )
    if alpha is None:
        alpha = 0.2 if infer_task_type(model) == "QUESTION_ANS" else 0.4
    mixup = {
        "x_mixup_layer": middle(model) if layer is None else layer,
        "x_mixup_lambda0": lambda0,
        "x_mixup_alpha": alpha,
        "x_mixup_layer_norm": layer_norm,
    }
    values: dict[str, Any] = {}
    if config is not None:
        plain = make_config(config, {"fusion": None})
        values = {f.name: getattr(plain, f.name) for f in fields(FlareConfig) if f.init}
    return plain_lora(model, XMixupConfig(**{**values, **mixup}), **overrides)


def load_x_mixup(model: Any, folder: Any, **options: Any) -> peft.PeftModel:
    """Load an adapter of :func:`x_mixup`. ``peft.PeftModel.from_pretrained`` does the same once flare is imported.

    Args:
        model: the base model, modified in place.
        folder: the folder that ``save_pretrained`` wrote.
        **options: arguments of ``from_pretrained``, such as ``is_trainable``.

    Raises:
        ValueError: the folder holds an adapter of another type.
    """
    import peft

    config = peft.PeftConfig.from_pretrained(folder)
    if not isinstance(config, XMixupConfig):
        raise ValueError(
            f"{folder} holds an adapter of type {config.peft_type}, not {X_MIXUP}: use PeftModel.from_pretrained"
        )
    return peft.PeftModel.from_pretrained(model, folder, **options)
