"""fast_lora: add fusing adapters to a transformers model, or convert the adapters of a PEFT LoRA model."""

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
from .config import FLARE_FIELDS, FlareConfig
from .grouping import make_sites
from .layer import FlareLayer
from .model import FlareModel
from .report import FastLoraReport
from .routing import ModelMap

_TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForMultipleChoice": TaskType.SEQ_CLS,  # PEFT has no type for multiple choice; the head is a classifier
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
}
_LORA_FIELDS = {f.name for f in fields(LoraConfig)}
# fields that may differ from the trained adapter's config: lora_dropout can be changed, and PEFT writes the others
_FREE_FIELDS = {"lora_dropout", "peft_type", "peft_version", "base_model_name_or_path"}
# fields that take effect when a PeftModel is created, and not later
_FIXED_BY_PEFT = {"task_type", "inference_mode"}
# attributes that convert_layer adds to PEFT's layer
_ADDED = (
    "flare_fusion",
    "flare_unmergeable",
    "flare_key",
    "flare_rows",
    "lora_cross_attention",
    "latent_proj",
)


def fast_lora(
    model: nn.Module,
    config: FlareConfig | LoraConfig | None = None,
    *,
    adapter_name: str = "default",
    strict: bool = False,
    **overrides: Any,
) -> PeftModel:
    """Add LoRA adapters that fuse a source text with the target text in the query and value projections.

    Example::

        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        model = flare.fast_lora(model, r=64, lora_alpha=128, fusion="add_relu")
        output = model(
            input_ids=..., attention_mask=..., labels=..., source_input_ids=..., source_attention_mask=...
        )

    Args:
        model: a transformers model, modified in place as by ``peft.get_peft_model``; or a PEFT LoRA model, whose
            adapters are converted in place and keep their weights, rank, alpha and target modules. If the call raises,
            the model is unchanged.
        config: a FlareConfig; a ``peft.LoraConfig``, to which FLARE's defaults are added; or None for the defaults.
        adapter_name: name of the new adapter. A PEFT LoRA model keeps its adapters' names.
        strict: raise ValueError if any LoRA module cannot fuse. By default, such a module stays plain LoRA.
        **overrides: fields of FlareConfig, for example ``fusion="mul"`` or ``r=16``. For a PEFT LoRA model: FLARE's
            fields and ``lora_dropout``.

    Returns:
        A ``peft.PeftModel``. It takes ``source_input_ids`` and ``source_attention_mask`` (with ``latent_dim``:
        ``source_states``) in addition to the model's inputs; see :class:`flare.FlareModel`.
        ``model.fast_lora_report()`` lists which modules fuse and why others do not.

    Raises:
        TypeError: ``model`` or ``config`` has the wrong type, or an override is not a field of FlareConfig.
        ValueError: the model's blocks or its query and value projections cannot be found, no module fuses, a name in
            ``fusion_modules`` matches no LoRA module, or a module cannot fuse and ``strict`` is set. For a PeftModel:
            its adapters are not LoRA, are FLARE adapters already or are merged, or ``config`` or an override
            contradicts a trained adapter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model or a peft.PeftModel, got {type(model).__name__}")
    if config is not None and not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a FlareConfig, a peft.LoraConfig or None, got {type(config).__name__}")
    unknown = sorted(set(overrides) - _LORA_FIELDS - FLARE_FIELDS)
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: not a field of FlareConfig. Its fields are all fields of peft.LoraConfig, and "
            f"{', '.join(sorted(FLARE_FIELDS))}"
        )
    if isinstance(model, PeftModel):
        return _convert_peft_model(model, config, overrides, strict)
    flare_config = make_config(config, overrides)
    if flare_config.fusion is not None:
        ModelMap.of(model)  # raises before the model is modified
    if flare_config.task_type is None:
        flare_config.task_type = infer_task_type(model)
    with _restored_on_error(model):
        peft_model = get_peft_model(model, flare_config, adapter_name=adapter_name)
        _check(peft_model, strict)
    return peft_model


@contextlib.contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Restore a transformers model's modules, ``requires_grad`` flags, hooks and attributes if the body raises."""
    modules = [(module, dict(module._modules), set(module._forward_hooks)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = {name: model.__dict__[name] for name in SET_BY_PEFT if name in model.__dict__}
    has_runtime = runtime_of(model) is not None  # transformers' add_adapter has added FLARE adapters before
    try:
        yield
    except Exception:
        if not has_runtime:
            detach(model)
        for module, children, hooks in modules:
            for name, child in children.items():
                if getattr(module, name) is not child:
                    setattr(module, name, child)
            for hook in set(module._forward_hooks) - hooks:  # PEFT adds a hook under gradient checkpointing
                del module._forward_hooks[hook]
        if has_runtime:
            make_sites(model)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        for name in SET_BY_PEFT:
            model.__dict__.pop(name, None)
        model.__dict__.update(attributes)
        raise


def make_config(config: LoraConfig | None, overrides: dict[str, Any]) -> FlareConfig:
    """Return a new FlareConfig with the values of ``config``, replaced by ``overrides``.

    If ``config`` is of a subclass of FlareConfig, the new config is of this subclass. ``config`` is not changed.
    """
    values = {} if config is None else {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    if config is not None and not isinstance(config, FlareConfig):
        values.pop("peft_type", None)
    cls = type(config) if isinstance(config, FlareConfig) else FlareConfig
    return cls(**{**values, **overrides})


def infer_task_type(model: nn.Module) -> str | None:
    """Return PEFT's task type for the model's class name; None if the name implies no task, as for a bare backbone."""
    for suffix, task in _TASKS.items():
        if type(model).__name__.endswith(suffix):
            return task
    return None


def _convert_peft_model(
    model: PeftModel, config: LoraConfig | None, overrides: dict[str, Any], strict: bool
) -> PeftModel:
    tuner = model.base_model
    if isinstance(tuner, FlareModel):
        raise ValueError(
            "model: its adapters are FLARE adapters already; add another with model.add_adapter(name, FlareConfig(...))"
        )
    if type(tuner) is not LoraModel:
        raise ValueError(f"model: only LoRA adapters can fuse, and this PeftModel has a {type(tuner).__name__}")
    configs = {name: _convert_config(name, old, config, overrides) for name, old in tuner.peft_config.items()}
    if any(new.fusion is not None for new in configs.values()):
        ModelMap.of(tuner.model)  # raises before the model is modified
    if any(_is_merged(module) for module in tuner.modules()):
        raise ValueError("model: its adapters are merged into the base weights; call model.unmerge_adapter() first")
    old_configs, old_type = dict(tuner.peft_config), model.peft_type
    layers: list[tuple[Any, type]] = [(m, type(m)) for m in tuner.modules() if isinstance(m, LoraLayer)]
    tuner.peft_config.update(configs)
    tuner.__class__ = FlareModel
    model.peft_type = FLARE
    try:
        for name in configs:
            tuner.convert_adapter(name)
        _check(model, strict)
    except Exception:  # restore the caller's model
        detach(tuner.model)
        for module, cls in layers:
            restore_layer(module, cls)
        tuner.__class__, model.peft_type = LoraModel, old_type
        tuner.peft_config.update(old_configs)
        raise
    for name, new in configs.items():
        if new.lora_dropout != old_configs[name].lora_dropout:
            _set_dropout(layers, name, new.lora_dropout)
    return model


def restore_layer(module: nn.Module, cls: type) -> None:
    """Undo :func:`flare.tuner.layer.convert_layer`: restore the layer's class and remove the added attributes."""
    if not isinstance(module, FlareLayer):
        return
    for name in _ADDED:
        delattr(module, name)
    module.__class__ = cls  # type: ignore[assignment]


def _set_dropout(layers: list[tuple[Any, type]], adapter: str, p: float) -> None:
    """Replace an adapter's lora_dropout in every layer by the module that PEFT creates for probability ``p``."""
    for module, _ in layers:
        if adapter in module.lora_dropout:
            dropout = nn.Dropout(p) if p > 0 else nn.Identity()
            module.lora_dropout[adapter] = dropout.train(module.training)


def _is_merged(module: nn.Module) -> bool:
    """Return whether adapters of a LoRA layer are merged into its base weight."""
    return bool(getattr(module, "merged_adapters", None))


def _convert_config(name: str, old: LoraConfig, config: LoraConfig | None, overrides: dict[str, Any]) -> FlareConfig:
    """Return a trained adapter's config with FLARE's fields and lora_dropout from ``config`` and ``overrides``.

    Raises:
        ValueError: any other field of ``config`` or ``overrides`` contradicts the trained adapter.
    """
    changes: dict[str, Any] = {}
    if config is not None:
        default = FlareConfig() if isinstance(config, FlareConfig) else LoraConfig()
        for f in fields(config):
            value = getattr(config, f.name)
            if f.init and (f.name in FLARE_FIELDS or value != getattr(default, f.name, None)):
                changes[f.name] = value
    changes.update(overrides)
    for key in sorted(set(changes) & _LORA_FIELDS - _FREE_FIELDS):
        if _comparable(changes[key]) == _comparable(getattr(old, key)):
            continue
        if key in _FIXED_BY_PEFT:
            raise ValueError(
                f"{key}={changes[key]!r} is fixed by the PeftModel, which was created with {key}={getattr(old, key)!r} "
                f"for adapter {name!r}: leave {key} out, or set it when you create the PeftModel"
            )
        raise ValueError(
            f"{key}={changes[key]!r} contradicts the trained adapter {name!r}, which has {getattr(old, key)!r}: "
            f"leave {key} out, or pass the base model to train a new adapter"
        )
    values = {f.name: getattr(old, f.name) for f in fields(LoraConfig) if f.init}
    values |= {key: value for key, value in changes.items() if key in FLARE_FIELDS or key == "lora_dropout"}
    return FlareConfig(**values)


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def _check(model: PeftModel, strict: bool) -> None:
    """Raise ValueError if an adapter with a fusion fuses in no module, or a name in fusion_modules matches no module.

    With ``strict``, also raise it if any LoRA module of such an adapter does not fuse.
    """
    tuner = model.base_model
    report: FastLoraReport = tuner.fast_lora_report()
    fusing = [name for name, config in tuner.peft_config.items() if config.fusion is not None]
    for name in fusing:
        paths = {row.module for row in report if row.adapter == name}
        names = {path.rpartition(".")[2] for path in paths}
        unknown = [module for module in tuner.peft_config[name].fusion_modules or () if module not in names | paths]
        if unknown:
            raise ValueError(
                f"fusion_modules: {', '.join(map(repr, unknown))} matches no LoRA module of adapter {name!r}, which "
                f"has {', '.join(sorted(names))}; use these names or full paths of modules, or add the missing names "
                "to target_modules"
            )
        if not any(row.adapter == name for row in report.fused):
            reasons = sorted({row.reason for row in report if row.adapter == name})
            raise ValueError(
                f"nothing fuses: no LoRA module of adapter {name!r} can read a source ({'; '.join(reasons)}). "
                "Include the query and value projections in target_modules, or set fusion=None for plain LoRA"
            )
    if strict and fusing:
        declined = [row for row in report.declined if row.adapter in fusing]
        if declined:
            listed = "\n".join(f"  {row.module}: {row.reason}" for row in declined[:10])
            raise ValueError(f"strict=True, and {len(declined)} LoRA modules do not fuse:\n{listed}")
