"""Detect changes of a base model after its fingerprint was computed. The check runs before every source pass.

To be fast, the check uses flat lists that are made once, and functions that run in C. It compares the identity of every
object on the path to a weight, each weight's address, version and ``requires_grad``, the merged adapters, the modules'
plain attributes and the config. If something differs, the cache makes a new :class:`Watch` and compares the two:
the weights may still be the same (for example, in other modules of PEFT).
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import without_torch_function
from .checksum import checksum
from .fingerprint import config_digest
from .weights import FrozenWeights

_trained = attrgetter("requires_grad")
_version = attrgetter("_version")
_merged = attrgetter("merged_adapters")


class Watch:
    """Snapshot of a frozen base model.

    It detects in-place changes, replaced tensors and modules, moves to another device, merged adapters, and changes of
    the config and of the modules' plain attributes. It does not detect a write through ``.data``.

    Attributes:
        stamp: a value to compare two snapshots. It is equal if the weights are the same objects, and the weights, the
            config and the traits did not change between the snapshots.
        traits: name -> value of a plain attribute that the modules' code reads, or the dtype and checksum of a buffer
            that is not saved with the model. Copies of a model in one process have equal traits.

    Raises:
        ValueError: source states of this model cannot be cached; see FrozenWeights.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = FrozenWeights(model)
        self._model_config: Any = getattr(model, "config", None)
        self._holders = [holder for holder, _ in weights.places]
        self._keys = [key for _, key in weights.places]
        self._values = [holder.get(key) for holder, key in weights.places]
        self._dictionaries, self._sizes = weights.dictionaries, sum(map(len, weights.dictionaries))
        self._wrappers = weights.wrappers
        tensors = (*weights.tensors, *weights.derived)
        self._tensors = list({id(tensor): tensor for _, tensor in tensors}.values())
        self._trait_holders = [holder for _, holder, _ in weights.traits]
        self._trait_keys = [key for _, _, key in weights.traits]
        self._trait_values = list(map(dict.get, self._trait_holders, self._trait_keys))
        self.traits: dict[str, Any] = {name: holder[key] for name, holder, key in weights.traits}
        self.traits |= {
            name: (buffer.dtype, checksum(buffer)) for name, buffer in weights.derived if not buffer.is_meta
        }
        self._with_version = [tensor for tensor in self._tensors if not torch.is_inference(tensor)]
        with without_torch_function():
            self._with_address = [tensor for tensor in self._tensors if _has_address(tensor)]
            self._addresses = list(map(Tensor.data_ptr, self._with_address))
            self._versions = list(map(_version, self._with_version))
        self._note_config()
        names = [(name, id(tensor)) for name, tensor in weights.tensors]
        self.stamp = (names, self._addresses, self._versions, self._config, self.traits)

    def _note_config(self) -> None:
        self._config = config_digest(self._model_config)
        self._config_views = list(_views(self._model_config))
        self._config_values = list(chain.from_iterable(self._config_views))

    def is_unchanged(self) -> bool:
        """Return whether the hidden states are as at the snapshot. This makes no Python call per module or weight."""
        with without_torch_function():
            return (
                all(map(is_, map(dict.get, self._holders, self._keys), self._values))
                and sum(map(len, self._dictionaries)) == self._sizes
                and list(map(Tensor.data_ptr, self._with_address)) == self._addresses
                and list(map(_version, self._with_version)) == self._versions
                and not any(map(_trained, self._tensors))
                and not any(map(_merged, self._wrappers))
                and list(map(dict.get, self._trait_holders, self._trait_keys)) == self._trait_values
                and self._config_is_unchanged()
            )

    def _config_is_unchanged(self) -> bool:
        values = list(chain.from_iterable(self._config_views))
        if len(values) == len(self._config_values) and all(map(is_, values, self._config_values)):
            return True
        if config_digest(self._model_config) != self._config:
            return False  # the snapshot is not updated, so the next pass detects the change too
        self._note_config()  # the change does not affect hidden states (for example, use_cache)
        return True


def _views(value: Any) -> Any:
    """Yield live views of the keys and values of a config, of nested configs, and of their dictionaries and lists."""
    if isinstance(value, list):
        yield value
        for item in value:
            yield from _views(item)
    elif isinstance(value, dict) or hasattr(value, "to_dict"):
        entries = value if isinstance(value, dict) else vars(value)
        yield entries.keys()
        yield entries.values()
        for item in entries.values():
            yield from _views(item)


def _has_address(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # a tensor subclass without storage
        return False
    return True
