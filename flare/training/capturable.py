"""Check whether a training step can be captured as a CUDA graph, and whether a captured model has changed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .._compat import BaseTunerLayer, checkpoints_save_random_state, has_gradient_hooks, is_compiled, module_hooks
from ..source.states import SourceStates

#: Masks (rows, positions), 1 at tokens and 0 at padding. A mask of ones may be left out.
MASKS = ("attention_mask", "source_attention_mask", "decoder_attention_mask")
#: Packages whose hooks only launch kernels, which a replay launches too.
_TENSOR_HOOKS = {"flare", "peft", "transformers", "accelerate", "torch"}
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, FullyShardedDataParallel)


def warn_once(message: str, warned: set[str]) -> None:
    """Warn with the prefix "cuda_graphs: " and add the message to ``warned``; do nothing if ``warned`` contains it."""
    if message not in warned:
        warned.add(message)
        warnings.warn(f"cuda_graphs: {message}", UserWarning, stacklevel=4)


def unsupported_model(model: nn.Module) -> str | None:
    """Return why no step of a model can be captured, or None if nothing in the model prevents it."""
    modules = dict(model.named_modules())
    for module in modules.values():
        if isinstance(module, _WRAPPERS):
            return f"{type(module).__name__} reduces gradients in hooks, which a graph would not run"
        if isinstance(module, FSDPModule):
            return "the model is sharded by FSDP2, which gathers and reduces in hooks, and a graph would not run them"
    if hasattr(model, "_orig_mod") or is_compiled(model):
        return "the model is compiled; torch.compile(mode='reduce-overhead') makes its own CUDA graphs"
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        return f"the model's tensors are on several devices ({', '.join(sorted(devices))})"
    if model.training and checkpoints_save_random_state(model):
        return (
            "gradient checkpointing saves the random state on the host, which a capture forbids; if the model has no "
            "dropout, pass gradient_checkpointing_kwargs={'preserve_rng_state': False}"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and has_gradient_hooks(parameter):
            return f"{name} has a gradient hook, whose Python code a replay would not run"
    for name, module in modules.items():
        for hook in (hook for table in module_hooks(module) for hook in table.values()):
            if _package(hook) not in _TENSOR_HOOKS:
                return f"{name or 'the model'} has a hook ({_name(hook)}), whose Python code a replay would not run"
    return None


def _function(hook: Any) -> Any:
    return _function(hook.func) if isinstance(hook, functools.partial) else hook


def _package(hook: Any) -> str:
    function = _function(hook)
    module = getattr(function, "__module__", None) or type(function).__module__
    return str(module).partition(".")[0]


def _name(hook: Any) -> str:
    function = _function(hook)
    return getattr(function, "__qualname__", type(function).__qualname__)


def unsupported_batch(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Return why the step of one batch cannot be captured, or None."""
    if torch.is_anomaly_enabled():
        return "anomaly detection reads every gradient on the host"
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                return f"{name} requires a gradient, which would stay inside the graph"
        elif not isinstance(value, SourceStates) and not _is_constant(value):
            return f"{name} is a {type(value).__name__}: a batch must hold tensors, constants and flare.SourceStates"
    if "position_ids" in inputs and "attention_mask" not in inputs:
        return "position_ids are given without an attention_mask, so transformers checks their values for packed texts"
    if "position_ids" in inputs and any(name in inputs for name in ("source_input_ids", "source_states")):
        return "position_ids with a source are checked for packed texts on the host, which a capture cannot do"
    if "source_input_ids" in inputs:
        settings = {getattr(config, "source_memory", None) for config in _active_configs(model)}
        for memory in ("recompute", "offload"):
            if memory in settings:
                return f"source_memory={memory!r}: the backward pass gets the source states from outside the graph"
    return None


def _is_constant(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _active_configs(model: nn.Module) -> list[Any]:
    configs = getattr(model, "peft_config", {})
    return [configs[name] for name in getattr(model, "active_adapters", ()) if name in configs]


def without_full_masks(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch without masks of ones, so that attention uses the same kernel in eager and captured steps.

    Transformers drops such a mask itself in eager mode, but cannot read masks during capture. Reading a mask on a
    device waits for the device, so all masks are read together.
    """
    masks = {name: inputs[name] for name in MASKS if isinstance(inputs.get(name), Tensor) and inputs[name].dim() == 2}
    if "position_ids" in inputs:
        masks.pop("attention_mask", None)  # not dropped: without it, transformers checks position_ids for packed texts
    full = torch.stack([mask.bool().all() for mask in masks.values()]).tolist() if masks else []
    dropped = {name for name, is_full in zip(masks, full, strict=True) if is_full}
    return {name: value for name, value in inputs.items() if name not in dropped}


class ModelState:
    """State of a model that a captured step depends on.

    The state is: the addresses of its tensors, ``requires_grad`` and training flags, the adapters and their scalings,
    and hooks. The lists of modules and tensors are built once, so :meth:`changed` takes a fraction of a millisecond.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._tensors = [*model.parameters(), *model.buffers()]
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._hooks = [table for module in self._modules for table in module_hooks(module)]
        self._layers = [module for module in self._modules if isinstance(module, BaseTunerLayer)]
        self._initial = self._current()

    def changed(self) -> str:
        """Return a comma-separated list of what has changed since this object was made, or an empty string."""
        current = self._current()
        if current == self._initial:
            return ""
        return ", ".join(name for name in current if current[name] != self._initial[name])

    def _current(self) -> dict[str, Any]:
        return {
            "addresses of its tensors": list(map(Tensor.data_ptr, self._tensors)),
            "requires_grad": [tensor.requires_grad for tensor in self._tensors],
            "gradient hooks": list(map(has_gradient_hooks, self._trained)),
            "training mode": [module.training for module in self._modules],
            "module hooks": list(map(len, self._hooks)),
            "adapters": tuple(getattr(self._model, "peft_config", ())),
            "active adapters or their scaling": [
                (layer.disable_adapters, layer.merged, *layer.active_adapters, *getattr(layer, "scaling", {}).values())
                for layer in self._layers
            ],
        }
