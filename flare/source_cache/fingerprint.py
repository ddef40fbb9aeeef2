"""Compute the fingerprint of a base model: a hash of the parts that source states depend on.

Source states depend on the frozen weights, the config, and the padding_idx of the modules.

The fingerprint does not depend on the model's adapters, on its head, or on trained copies of its modules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .checksum import checksum
from .weights import FrozenWeights

#: Names of config entries that do not affect hidden states.
_IGNORED = (
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
    # The Trainer copies these ids from the tokenizer into the config. The fingerprint includes the modules' padding_idx
    # instead (_padding_indices).
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
#: Parts of the names of further config entries that do not affect hidden states.
_IGNORED_PARTS = ("dropout", "pdrop", "output_", "attn_implementation", "classifier", "initializer")


def fingerprint(model: nn.Module) -> str:
    """Return 32 hexadecimal digits for the frozen backbone of a transformers model. They are the same on every device.

    This reads every byte of the weights, without copying them.

    Raises:
        ValueError: a weight is trained, merged with an adapter, sharded over processes or not loaded.
    """
    weights = FrozenWeights(model)
    total = hashlib.blake2b(digest_size=16)
    total.update(f"{_config(getattr(model, 'config', None))} {_padding_indices(model)}".encode())
    digests: dict[int, bytes] = {}
    for name, tensor in weights.tensors:
        digest = digests.get(id(tensor))
        if digest is None:
            digest = digests[id(tensor)] = _tensor_digest(name, tensor)
        total.update(name.encode() + digest)
    return total.hexdigest()


def _tensor_digest(name: str, tensor: Tensor) -> bytes:
    """Return 16 bytes for a tensor's shape, dtype and values; ``name`` is for errors."""
    if tensor.is_meta:
        raise ValueError(f"source_cache: the base model's {name} is on the meta device; load its weights first")
    if hasattr(tensor, "to_local") or hasattr(tensor, "ds_shape"):
        raise ValueError(
            f"source_cache: the base model's {name} is sharded over processes, so no process can compute the "
            "model's fingerprint; keep the frozen weights whole (DDP), or leave source_cache out"
        )
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype} ".encode(), digest_size=16)
    for part in _plain_tensors(tensor):
        digest.update(checksum(part))
    return digest.digest()


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor subclass consists of."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor.detach()
        return
    for name in flatten()[0]:
        yield from _plain_tensors(getattr(tensor, name))


def config_digest(config: Any) -> bytes:
    """Return 16 bytes for the entries of a config (or None) that affect hidden states."""
    return hashlib.blake2b(_config(config).encode(), digest_size=16).digest()


def _config(config: Any) -> str:
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return json.dumps(_relevant(values), sort_keys=True, default=str)


def _padding_indices(model: nn.Module) -> list[tuple[str, str]]:
    """Return (class name, padding_idx) of the modules. RoBERTa's embeddings compute positions from padding_idx."""
    backbone: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
    indices = ((type(module).__name__, module.__dict__.get("padding_idx")) for module in backbone.modules())
    return sorted({(kind, str(index)) for kind, index in indices if index is not None})


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        entries = {str(key): entry for key, entry in value.items() if key not in _IGNORED}
        return {k: _relevant(v) for k, v in entries.items() if not any(part in k for part in _IGNORED_PARTS)}
    return value
