"""Collect the frozen weights that the source pass reads, and the places in the modules where they are stored.

PEFT's wrappers and the model's head are skipped. A base model therefore gives the same list of weights with other
adapters, with another head, and with trained copies of its modules (modules_to_save), which the source pass does not
use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .._compat import AuxiliaryTrainingWrapper, BaseTunerLayer

#: Modules whose plain attributes follow from their weights' shapes or matter in training only.
_WITHOUT_TRAITS = (nn.Linear, nn.Embedding, nn.Dropout, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.Sequential)
#: Types of a module's plain attributes that its forward may read. Such an attribute is called a trait.
_TRAIT_TYPES = (bool, int, float, str, type(None))
#: Kinds of rotary embeddings that recompute their buffers for each length.
_UPDATES_ITSELF = ("dynamic", "longrope")

#: Attributes of a parameter, or of its module's ``state``, in which libraries store the scales of quantised weights.
_SCALES = ("SCB",)


class FrozenWeights:
    """Weights that are saved with the backbone of a transformers model. Their names do not contain PEFT's wrappers.

    A pooler is left out, because the source pass does not run it, and its weights may be random.

    Attributes:
        tensors: (name, tensor) in the order of the modules.
        places: (dictionary, key) of every tensor, and of every module and object on the path to a tensor.
        dictionaries: the non-empty dictionaries in which the modules hold their parameters, buffers and children. A new
            parameter, buffer or child changes the length of its dictionary.
        wrappers: PEFT's adapter layers on the paths to the tensors.
        derived: (name, buffer) of the buffers that the model's code computes once and does not save, such as rotary
            frequencies.
        traits: (name, dictionary, key) of the modules' plain numbers, flags and strings, such as ``sliding_window``.

    Raises:
        ValueError: a weight is trained, merged with an adapter, or repacked by bitsandbytes.
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
        dictionaries = (module._parameters, module._buffers, module._modules)
        self.dictionaries += [dictionary for dictionary in dictionaries if dictionary]
        unsaved, is_constant = module._non_persistent_buffers_set, not _updates_itself(module)
        for dictionary in dictionaries:
            self.places += [(dictionary, key) for key in dictionary if is_constant or key not in unsaved]
        if is_constant:
            self.derived += [
                (f"{name}.{key}", b) for key, b in module._buffers.items() if key in unsaved and b is not None
            ]
        if is_constant and not isinstance(module, _WITHOUT_TRAITS):
            attributes = vars(module)
            self.traits += [(f"{name}.{key}", attributes, key) for key in attributes if _is_trait(key, attributes[key])]
        for key, parameter in module._parameters.items():
            if parameter is not None:
                self._add(f"{name}.{key}", parameter)
                for part, tensor in self._scales(module, parameter):
                    self._add(f"{name}.{key}.{part}", tensor)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in unsaved:
                self._add(f"{name}.{key}", buffer)
        for key, child in module._modules.items():
            if child is not None and key != "pooler":
                self._walk(child, f"{name}.{key}")

    def _add(self, name: str, tensor: Tensor) -> None:
        if tensor.requires_grad:
            raise ValueError(
                f"source_cache: the base model's {name} is trained (requires_grad=True), so its source states change "
                "with every step; freeze it, train a copy (modules_to_save), or leave source_cache out"
            )
        if getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"source_cache: bitsandbytes has repacked the base model's {name} for a CPU, as it does in eval mode, "
                "and rounded its scales, so source states computed before and after that differ; leave source_cache out"
            )
        self.tensors.append((name, tensor))

    def _scales(self, module: nn.Module, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of a quantised weight's tensors that are not parameters."""
        state: Any = getattr(parameter, "quant_state", None)
        # quant_state.as_dict() is not used, because it copies one of the tensors and waits for the device
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
        # HQQ stores ``meta`` and ``bias`` in the module, next to its parameter
        meta, bias = vars(module).get("meta"), vars(module).get("bias")
        if isinstance(meta, dict):
            self.places.append((vars(module), "meta"))
            self.places += [(meta, key) for key, value in meta.items() if isinstance(value, Tensor)]
            yield from ((key, value) for key, value in meta.items() if isinstance(value, Tensor))
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
    """Return whether a module's attribute is a plain value that its forward may read in the source pass."""
    is_excluded = name.startswith("_") or name in ("training", "gradient_checkpointing") or "drop" in name
    return not is_excluded and isinstance(value, _TRAIT_TYPES)


def _updates_itself(module: nn.Module) -> bool:
    """Return whether a module replaces its buffers and attributes in its forward."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return any(part in str(kind) for kind in kinds for part in _UPDATES_ITSELF)
