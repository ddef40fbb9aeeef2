"""fast_lora: one call puts fusing adapters into a transformers model, or into an existing PEFT LoRA model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn

from .._compat import FLARE, SET_BY_PEFT, LoraLayer
from ..source.hooks import detach
from ..source.runtime import runtime_of
from .config import FlareConfig
from .grouping import make_sites
from .layer import FlareLayer
from .model import FlareModel
from .report import FastLoraReport
from .routing import ModelMap

_TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForMultipleChoice": TaskType.SEQ_CLS,  # PEFT has no type of its own for it; the head is a classifier
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
}
_LORA_FIELDS = {f.name for f in fields(LoraConfig)}
_OWN_FIELDS = {f.name for f in fields(FlareConfig)} - _LORA_FIELDS
# not properties of trained weights: lora_dropout is set anew on an existing adapter, the others are written by PEFT
_FREE_FIELDS = {"lora_dropout", "peft_type", "peft_version", "base_model_name_or_path"}
_FIXED_BY_PEFT = {"task_type", "inference_mode"}
# what adopting adds to a layer of PEFT's
_ADOPTED = ("flare_fusion", "flare_unmergeable", "flare_key", "flare_rows", "lora_cross_attention", "latent_proj")


def fast_lora(
    model: nn.Module,
    config: FlareConfig | LoraConfig | None = None,
    *,
    adapter_name: str = "default",
    strict: bool = False,
    **overrides: Any,
) -> PeftModel:
    """Give a model LoRA adapters whose query and value projections fuse a source and a target stream.

    Args:
        model: a transformers model, modified in place as by ``get_peft_model``, or a PEFT LoRA model: its trained
            adapters are kept, and r, alpha and targets come from them; lora_dropout may be set anew. A call that
            raises leaves either as it was.
        config: FlareConfig, ``peft.LoraConfig`` (its values, with FLARE's defaults for the rest), or None.
        adapter_name: name of the new adapter; with a PEFT model the existing names stay.
        strict: raise where any LoRA module is declined, instead of leaving it plain LoRA.
        **overrides: FlareConfig fields, e.g. ``fusion="mul"``, ``r=16``.

    Returns:
        A ``peft.PeftModel``; call it with ``source_input_ids`` and ``source_attention_mask`` (with ``latent_dim``:
        ``source_states``) beside the usual inputs.
        ``model.fast_lora_report()`` says what was fused and what was declined.

    Raises:
        TypeError: model or config of another kind, or an override that is no field of FlareConfig.
        ValueError: an architecture whose blocks or projections cannot be found, nothing that fuses, a name in
            fusion_modules that no LoRA module has, an override that contradicts a trained adapter, or (``strict``) a
            declined module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model or a peft.PeftModel, got {type(model).__name__}")
    if config is not None and not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a FlareConfig, a peft.LoraConfig or None, got {type(config).__name__}")
    unknown = sorted(set(overrides) - _LORA_FIELDS - _OWN_FIELDS)
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: no field of FlareConfig; its own fields: {', '.join(sorted(_OWN_FIELDS))}"
        )
    if isinstance(model, PeftModel):
        return _adopt_peft_model(model, config, overrides, strict)
    own = make_config(config, overrides)
    if own.fusion is not None:
        ModelMap.of(model)  # raises before the model is touched
    if own.task_type is None:
        own.task_type = infer_task_type(model)
    with _as_it_was(model):
        peft_model = get_peft_model(model, own, adapter_name=adapter_name)
        _check(peft_model, strict)
    return peft_model


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Give a transformers model its own modules, flags, hooks and attributes back where the body raises."""
    modules = [(module, dict(module._modules), set(module._forward_hooks)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = {name: model.__dict__[name] for name in SET_BY_PEFT if name in model.__dict__}
    routed = runtime_of(model) is not None  # it has adapters of ours, by transformers' add_adapter
    try:
        yield
    except Exception:
        if not routed:
            detach(model)
        for module, children, hooks in modules:
            for name, child in children.items():
                if getattr(module, name) is not child:
                    setattr(module, name, child)
            for hook in set(module._forward_hooks) - hooks:  # PEFT's, under gradient checkpointing
                del module._forward_hooks[hook]
        if routed:
            make_sites(model)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for name in SET_BY_PEFT:
            model.__dict__.pop(name, None)
        model.__dict__.update(attributes)
        raise


def make_config(config: LoraConfig | None, overrides: dict[str, Any]) -> FlareConfig:
    """A FlareConfig (or the given subclass) from any LoRA config plus overrides; the given config is not changed."""
    values = {} if config is None else {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    if config is not None and not isinstance(config, FlareConfig):
        values.pop("peft_type", None)
    made = type(config) if isinstance(config, FlareConfig) else FlareConfig
    return made(**{**values, **overrides})


def infer_task_type(model: nn.Module) -> str | None:
    """PEFT's task type from the class name; None where it does not say (the bare backbone, say)."""
    for suffix, task in _TASKS.items():
        if type(model).__name__.endswith(suffix):
            return task
    return None


def _adopt_peft_model(
    model: PeftModel, config: LoraConfig | None, overrides: dict[str, Any], strict: bool
) -> PeftModel:
    tuner = model.base_model
    if isinstance(tuner, FlareModel):
        raise ValueError(
            "model: its adapters already run through flare; add another with model.add_adapter(name, FlareConfig(...))"
        )
    if type(tuner) is not LoraModel:
        raise ValueError(f"model: only LoRA adapters can fuse, this PeftModel has a {type(tuner).__name__}")
    configs = {name: _converted(name, old, config, overrides) for name, old in tuner.peft_config.items()}
    if any(new.fusion is not None for new in configs.values()):
        ModelMap.of(tuner.model)  # raises before the model is touched
    if any(_is_merged(module) for module in tuner.modules()):
        raise ValueError("model: its adapters are merged into the base weights; call model.unmerge_adapter() first")
    old_configs, old_type = dict(tuner.peft_config), model.peft_type
    layers: list[tuple[Any, type]] = [(m, type(m)) for m in tuner.modules() if isinstance(m, LoraLayer)]
    tuner.peft_config.update(configs)
    tuner.__class__ = FlareModel
    model.peft_type = FLARE
    try:
        for name in configs:
            tuner.wire(name)
        _check(model, strict)
    except Exception:  # leave the caller's model as it was
        detach(tuner.model)
        for module, cls in layers:
            release(module, cls)
        tuner.__class__, model.peft_type = LoraModel, old_type
        tuner.peft_config.update(old_configs)
        raise
    for name, new in configs.items():
        if new.lora_dropout != old_configs[name].lora_dropout:
            _set_dropout(layers, name, new.lora_dropout)
    return model


def release(module: nn.Module, cls: type) -> None:
    """Undo :func:`flare.tuner.layer.adopt`: the layer gets its former class back and loses what was added to it."""
    if not isinstance(module, FlareLayer):
        return
    for name in _ADOPTED:
        delattr(module, name)
    module.__class__ = cls  # type: ignore[assignment]


def _set_dropout(layers: list[tuple[Any, type]], adapter: str, p: float) -> None:
    """A new lora_dropout on every layer of an adapter, as PEFT makes it."""
    for module, _ in layers:
        if adapter in module.lora_dropout:
            dropout = nn.Dropout(p) if p > 0 else nn.Identity()
            module.lora_dropout[adapter] = dropout.train(module.training)


def _is_merged(module: nn.Module) -> bool:
    """Whether a LoRA layer's adapters are merged into its base weight now."""
    return bool(getattr(module, "merged_adapters", None))


def _converted(name: str, old: LoraConfig, config: LoraConfig | None, overrides: dict[str, Any]) -> FlareConfig:
    """The trained adapter's own config with FLARE's fields from ``config`` and ``overrides``."""
    given: dict[str, Any] = {}
    if config is not None:
        default = FlareConfig() if isinstance(config, FlareConfig) else LoraConfig()
        for f in fields(config):
            value = getattr(config, f.name)
            if f.init and (f.name in _OWN_FIELDS or value != getattr(default, f.name, None)):
                given[f.name] = value
    given.update(overrides)
    for key in sorted(set(given) & _LORA_FIELDS - _FREE_FIELDS):
        ours, theirs = _comparable(given[key]), _comparable(getattr(old, key))
        if ours != theirs and key in _FIXED_BY_PEFT:
            raise ValueError(
                f"{key}={given[key]!r}: it is fixed by the PeftModel, whose adapter {name!r} has "
                f"{getattr(old, key)!r}: leave it out, or set it where the PeftModel is made"
            )
        if ours != theirs:
            raise ValueError(
                f"{key}={given[key]!r} contradicts the trained adapter {name!r}, which has {getattr(old, key)!r}: "
                "leave it out, or start from the base model"
            )
    kept = {f.name: getattr(old, f.name) for f in fields(LoraConfig) if f.init}
    own = {key: value for key, value in given.items() if key in _OWN_FIELDS or key == "lora_dropout"}
    return FlareConfig(**{**kept, **own})


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def _check(model: PeftModel, strict: bool) -> None:
    """Raises where nothing fuses or no module has a name in fusion_modules, and under strict where one is declined."""
    tuner = model.base_model
    report: FastLoraReport = tuner.fast_lora_report()
    wants = [name for name, config in tuner.peft_config.items() if config.fusion is not None]
    for name in wants:
        paths = {row.module for row in report if row.adapter == name}
        names = {path.rpartition(".")[2] for path in paths}
        unknown = [module for module in tuner.peft_config[name].fusion_modules or () if module not in names | paths]
        if unknown:
            raise ValueError(
                f"fusion_modules: {', '.join(map(repr, unknown))} matches no LoRA module of adapter {name!r}, which "
                f"has {', '.join(sorted(names))}; use these names or full paths, or add to target_modules"
            )
        if not any(row.adapter == name for row in report.fused):
            reasons = sorted({row.reason for row in report if row.adapter == name})
            raise ValueError(
                f"nothing fuses: no LoRA module of adapter {name!r} can take a source ({'; '.join(reasons)}). "
                "Include the query and value projections in target_modules, or set fusion=None for plain LoRA"
            )
    if strict and wants:
        declined = [row for row in report.declined if row.adapter in wants]
        if declined:
            listed = "\n".join(f"  {row.module}: {row.reason}" for row in declined[:10])
            raise ValueError(f"strict=True and {len(declined)} LoRA modules were declined:\n{listed}")
