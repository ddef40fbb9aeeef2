"""What can be captured in a CUDA graph: why a model or a batch cannot, and what a captured step takes for granted."""

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

#: Masks (B, m) that say which positions are tokens; one that is all ones may be left out.
MASKS = ("attention_mask", "source_attention_mask", "decoder_attention_mask")
#: Packages whose hooks compute on tensors only, so that their kernels are all there is to replay.
_TENSOR_HOOKS = {"flare", "peft", "transformers", "accelerate", "torch"}
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, FullyShardedDataParallel)


def warn_once(message: str, said: set[str]) -> None:
    """Warn of something about captured steps, unless ``said`` has it."""
    if message not in said:
        said.add(message)
        warnings.warn(f"cuda_graphs: {message}", UserWarning, stacklevel=4)


def unsupported_model(model: nn.Module) -> str | None:
    """Why no step of a model can be captured, or None."""
    modules = dict(model.named_modules())
    for module in modules.values():
        if isinstance(module, _WRAPPERS):
            return f"{type(module).__name__} reduces gradients in hooks that a graph would not run"
        if isinstance(module, FSDPModule):
            return "FSDP2 has sharded the model, and gathers and reduces in hooks that a graph would not run"
    if hasattr(model, "_orig_mod") or is_compiled(model):
        return "the model is compiled; torch.compile(mode='reduce-overhead') makes CUDA graphs of its own"
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        return f"the model's tensors are on several devices ({', '.join(sorted(devices))})"
    if model.training and checkpoints_save_random_state(model):
        return (
            "gradient checkpointing saves the random state on the host, which a capture forbids; without dropout pass "
            "gradient_checkpointing_kwargs={'preserve_rng_state': False}"
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
    """Why the step of one batch cannot be captured, or None."""
    if torch.is_anomaly_enabled():
        return "anomaly detection looks at every gradient on the host"
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                return f"{name} requires a gradient, which would not leave the graph"
        elif not isinstance(value, SourceStates) and not _is_constant(value):
            return f"{name} is a {type(value).__name__}: a batch must hold tensors, constants and flare.SourceStates"
    if "position_ids" in inputs and "attention_mask" not in inputs:
        return "position_ids are given without an attention_mask, so transformers looks in them for packed texts"
    if "position_ids" in inputs and any(name in inputs for name in ("source_input_ids", "source_states")):
        return "position_ids next to a source are looked at on the host, for packed texts, which are refused"
    if "source_input_ids" in inputs:
        asked = {getattr(config, "source_memory", None) for config in _active_configs(model)}
        for memory in ("recompute", "offload"):
            if memory in asked:
                return f"source_memory={memory!r}: backward brings the source states from outside the graph"
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
    """The batch without masks that are all ones, so that attention takes the same kernel eagerly and captured.

    transformers drops such a mask itself in eager mode, but does not look at one while capturing. Masks on the host are
    read there. Reading masks on a device waits for it, once for all of them.
    """
    masks = {name: inputs[name] for name in MASKS if isinstance(inputs.get(name), Tensor) and inputs[name].dim() == 2}
    if "position_ids" in inputs:
        masks.pop("attention_mask", None)  # without one, transformers looks in position_ids for packed texts
    full = torch.stack([mask.bool().all() for mask in masks.values()]).tolist() if masks else []
    dropped = {name for name, is_full in zip(masks, full, strict=True) if is_full}
    return {name: value for name, value in inputs.items() if name not in dropped}


class ModelState:
    """What a captured step takes for granted about a model: where its tensors are, what is trained, and its modes.

    The lists are made once, so :meth:`changed` costs a fraction of a millisecond.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._tensors = [*model.parameters(), *model.buffers()]
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._hooks = [table for module in self._modules for table in module_hooks(module)]
        self._layers = [module for module in self._modules if isinstance(module, BaseTunerLayer)]
        self._seen = self._now()

    def changed(self) -> str:
        """What has changed about the model since this object was made; empty where nothing has."""
        now = self._now()
        return "" if now == self._seen else ", ".join(name for name in now if now[name] != self._seen[name])

    def _now(self) -> dict[str, Any]:
        return {
            "where its tensors are": list(map(Tensor.data_ptr, self._tensors)),
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
