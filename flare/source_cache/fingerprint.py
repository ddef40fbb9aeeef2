"""What the source pass computes depends on: the frozen weights, and the config. One name for both.

The same base under other adapters, another head or trained copies of its modules has the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .checksum import checksum
from .weights import FrozenWeights

#: Config entries that say nothing about hidden states, by name or by a part of it.
_BESIDE = (
    "transformers_version",
    "_name_or_path",
    "architectures",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "return_dict",
    "use_cache",
    "task_specific_params",
    "torchscript",
    # the Trainer takes these from the tokenizer when a training begins; what a model was built with: _padding_indices
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_BESIDE_PARTS = ("dropout", "pdrop", "output_", "attn_implementation", "classifier", "initializer")


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits for the frozen backbone of a transformers model, the same on every device.

    Every byte is read: about the time of one pass over the weights (no copy of them).

    Raises:
        ValueError: weights that are trained, merged with an adapter, sharded over processes or not loaded.
    """
    weights = FrozenWeights(model)
    names = hashlib.blake2b(digest_size=16)
    names.update(f"{_config(getattr(model, 'config', None))} {_padding_indices(model)}".encode())
    seen: dict[int, bytes] = {}
    for name, tensor in weights.tensors:
        found = seen.get(id(tensor))
        if found is None:
            found = seen[id(tensor)] = _described(name, tensor)
        names.update(name.encode() + found)
    return names.hexdigest()


def _described(name: str, tensor: Tensor) -> bytes:
    if tensor.is_meta:
        raise ValueError(f"source_cache: the base model's {name} is on the meta device; load its weights first")
    if hasattr(tensor, "to_local") or hasattr(tensor, "ds_shape"):
        raise ValueError(
            f"source_cache: the base model's {name} is sharded over processes, so no process can tell which model it "
            "is; keep the frozen weights whole (DDP), or leave the cache out"
        )
    described = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype} ".encode(), digest_size=16)
    for part in _plain(tensor):
        described.update(checksum(part))
    return described.digest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass consists of."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor.detach()
        return
    for name in flatten()[0]:
        yield from _plain(getattr(tensor, name))


def config_digest(config: Any) -> bytes:
    """Return 16 bytes for what a config (or None) says about hidden states."""
    return hashlib.blake2b(_config(config).encode(), digest_size=16).digest()


def _config(config: Any) -> str:
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return json.dumps(_relevant(values), sort_keys=True, default=str)


def _padding_indices(model: nn.Module) -> list[tuple[str, str]]:
    """The pad tokens that modules were built with: some count positions from them (RoBERTa's embeddings)."""
    backbone: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
    found = ((type(module).__name__, module.__dict__.get("padding_idx")) for module in backbone.modules())
    return sorted({(kind, str(index)) for kind, index in found if index is not None})


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {str(key): one for key, one in value.items() if key not in _BESIDE}
        return {k: _relevant(v) for k, v in kept.items() if not any(part in k for part in _BESIDE_PARTS)}
    return value
