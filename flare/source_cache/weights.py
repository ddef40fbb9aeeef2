"""The frozen weights that the source pass reads, and where each of them hangs.

Weights are read through PEFT's wrappers, so the same base under other adapters, another head or trained copies of its
modules (which the source pass switches off) gives the same list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .._compat import AuxiliaryTrainingWrapper, BaseTunerLayer

#: Modules whose plain attributes say nothing that their weights' shapes do not, or that only training looks at.
_WITHOUT_TRAITS = (nn.Linear, nn.Embedding, nn.Dropout, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.Sequential)
_TRAIT_TYPES = (bool, int, float, str, type(None))
#: Kinds of rotary embeddings that write their buffers anew for the lengths they meet.
_WRITES_ITSELF = ("dynamic", "longrope")

#: Names under which libraries keep the scales of quantised weights on a parameter or its module.
_SCALES = ("SCB",)


class FrozenWeights:
    """Everything saved with the backbone of a transformers model, under the names it has without PEFT.

    A pooler is left out: the source pass does not run it, and it may be random.

    Attributes:
        tensors: (name, tensor) in the order of the modules.
        places: (dictionary, key) of every tensor and of every module and object on the way to one.
        dictionaries: those of modules that hold something: what is added to one changes its length.
        wrappers: the adapter layers on the way.
        derived: (name, buffer) of what is not saved with the model but made by its code (rotary frequencies).
        traits: (name, dictionary, key) of the modules' plain numbers, flags and names, such as ``sliding_window``.

    Raises:
        ValueError: a weight that is trained, merged with an adapter, or repacked by bitsandbytes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[tuple[str, Tensor]] = []
        self.places: list[tuple[dict[str, Any], str]] = [(vars(model), "config")]
        self.dictionaries: list[dict[str, Any]] = []
        self.wrappers: list[nn.Module] = []
        self.derived: list[tuple[str, Tensor]] = []
        self.traits: list[tuple[str, dict[str, Any], str]] = []
        backbone: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
        self.places += [(model._modules, name) for name in model._modules]
        self._walk(backbone, "")

    def _walk(self, module: nn.Module, name: str) -> None:
        if isinstance(module, AuxiliaryTrainingWrapper):
            self.places.append((module._modules, "original_module"))
            self._walk(module.original_module, name)  # type: ignore[arg-type]
            return
        if isinstance(module, BaseTunerLayer):
            if getattr(module, "merged", False):
                raise ValueError(
                    f"source_cache: an adapter is merged into the base model's {name}; call unmerge_adapter() first"
                )
            self.wrappers.append(module)
            self.places.append((module._modules, "base_layer"))
            self._walk(module.get_base_layer(), name)
            return
        self.dictionaries += [held for held in (module._parameters, module._buffers, module._modules) if held]
        unsaved, lasting = module._non_persistent_buffers_set, not _writes_itself(module)
        for held in (module._parameters, module._buffers, module._modules):
            self.places += [(held, own) for own in held if lasting or own not in unsaved]
        if lasting:
            self.derived += [
                (f"{name}.{own}", b) for own, b in module._buffers.items() if own in unsaved and b is not None
            ]
        if lasting and not isinstance(module, _WITHOUT_TRAITS):
            own_values = vars(module)
            self.traits += [(f"{name}.{key}", own_values, key) for key in own_values if _is_trait(key, own_values[key])]
        for own, parameter in module._parameters.items():
            if parameter is not None:
                self._add(f"{name}.{own}", parameter)
                for part, tensor in self._scales(module, parameter):
                    self._add(f"{name}.{own}.{part}", tensor)
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in unsaved:
                self._add(f"{name}.{own}", buffer)
        for own, child in module._modules.items():
            if child is not None and own != "pooler":
                self._walk(child, f"{name}.{own}")

    def _add(self, name: str, tensor: Tensor) -> None:
        if tensor.requires_grad:
            raise ValueError(
                f"source_cache: the base model's {name} is trained (requires_grad=True), so its source states change "
                "with every step; freeze it, train a copy (modules_to_save), or leave the cache out"
            )
        if getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"source_cache: bitsandbytes has repacked the base model's {name} for a CPU, as it does in eval mode, "
                "and rounds its scales in that: states from before and after are of two models; leave the cache out"
            )
        self.tensors.append((name, tensor))

    def _scales(self, module: nn.Module, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a quantised weight that are not parameters."""
        state: Any = getattr(parameter, "quant_state", None)
        # not by its as_dict(), which copies one of them and waits for the device
        nested = getattr(state, "state2", None)
        for holder, attributes in (
            (parameter if state is not None else None, ("quant_state",)),
            (state, ("absmax", "code", "state2", "packing_format_for_cpu")),
            (nested, ("absmax", "code")),
        ):
            if holder is not None:
                self.places += [(vars(holder), attribute) for attribute in attributes]
        for name, holder, attribute in (
            ("absmax", state, "absmax"),
            ("nested_absmax", nested, "absmax"),
            ("nested_quant_map", nested, "code"),
            ("quant_map", state, "code"),
        ):
            value = getattr(holder, attribute, None)
            if isinstance(value, Tensor):
                yield name, value
        # HQQ keeps these beside its one parameter
        meta, bias = vars(module).get("meta"), vars(module).get("bias")
        if isinstance(meta, dict):
            self.places.append((vars(module), "meta"))
            self.places += [(meta, own) for own, value in meta.items() if isinstance(value, Tensor)]
            yield from ((own, value) for own, value in meta.items() if isinstance(value, Tensor))
        if isinstance(bias, Tensor):
            self.places.append((vars(module), "bias"))
            yield "bias", bias
        for name in _SCALES:
            for holder in (parameter, getattr(module, "state", None)):
                value = getattr(holder, name, None)
                if isinstance(value, Tensor):
                    self.places += [(vars(module), "state"), (vars(holder), name)]
                    yield name, value
                    break


def _is_trait(name: str, value: object) -> bool:
    """Whether a module's attribute is a plain value that its forward may read in a frozen pass."""
    off = name.startswith("_") or name in ("training", "gradient_checkpointing") or "drop" in name
    return not off and isinstance(value, _TRAIT_TYPES)


def _writes_itself(module: nn.Module) -> bool:
    """Whether a module exchanges its buffers and attributes in its forward."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return any(part in str(kind) for kind in kinds for part in _WRITES_ITSELF)
