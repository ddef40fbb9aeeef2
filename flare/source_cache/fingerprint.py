"""What the source pass computes depends on: the frozen weights, and the config. One name for both.

Weights are read through PEFT's wrappers, so the same base under other adapters, another head or trained copies of its
modules (which the source pass switches off) has the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from .checksum import checksum

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

#: Names under which libraries keep the scales of quantised weights on a parameter or its module.
_SCALES = ("SCB",)


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits for the frozen backbone of a transformers model, the same on every device.

    Every byte is read: about the time of one pass over the weights (no copy of them).

    Raises:
        ValueError: weights that are trained, merged with an adapter, sharded over processes or not loaded.
    """
    check_frozen(model)
    names = hashlib.blake2b(digest_size=16)
    names.update(f"{_config(model)} {_padding_indices(model)}".encode())
    seen: dict[int, bytes] = {}
    for name, tensor in frozen_tensors(model):
        found = seen.get(id(tensor))
        if found is None:
            found = seen[id(tensor)] = _described(name, tensor)
        names.update(name.encode() + found)
    return names.hexdigest()


def check_frozen(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Raises ValueError where a weight that the source pass reads is trained; a stamp that changes with the weights.

    The stamp sees in-place changes, other tensors and moves. It does not see a write through ``.data``.
    """
    stamp = []
    for name, tensor in frozen_tensors(model):
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
        stamp.append((id(tensor), _version(tensor), _address(tensor)))
    return tuple(stamp)


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything saved with the backbone, under the names it has without PEFT.

    A pooler is left out: the source pass does not run it, and it may be random.
    """
    backbone: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
    yield from _walk(backbone, "")


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _walk(module.original_module, name)  # type: ignore[arg-type]
        return
    if isinstance(module, BaseTunerLayer):
        if getattr(module, "merged", False):
            raise ValueError(
                f"source_cache: an adapter is merged into the base model's {name}; call unmerge_adapter() first"
            )
        yield from _walk(module.get_base_layer(), name)
        return
    # the modules' own dicts: this is walked before every pass, and named_parameters() takes its time
    for own, parameter in module._parameters.items():
        if parameter is None:
            continue
        yield f"{name}.{own}", parameter
        for part, tensor in _scales(module, parameter):
            yield f"{name}.{own}.{part}", tensor
    for own, buffer in module._buffers.items():
        if buffer is not None and own not in module._non_persistent_buffers_set:
            yield f"{name}.{own}", buffer
    for own, child in module._modules.items():
        if child is not None and own != "pooler":
            yield from _walk(child, f"{name}.{own}")


def _scales(module: nn.Module, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a quantised weight that are no parameters."""
    state: Any = getattr(parameter, "quant_state", None)
    # not by its as_dict(), which copies one of them and waits for the device: this is walked before every pass
    nested = getattr(state, "state2", None)
    for name, holder, attribute in (
        ("absmax", state, "absmax"),
        ("nested_absmax", nested, "absmax"),
        ("nested_quant_map", nested, "code"),
        ("quant_map", state, "code"),
    ):
        value = getattr(holder, attribute, None)
        if isinstance(value, Tensor):
            yield name, value
    for name in _SCALES:
        for holder in (parameter, getattr(module, "state", None)):
            value = getattr(holder, name, None)
            if isinstance(value, Tensor):
                yield name, value
                break


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


def _config(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
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


def _version(tensor: Tensor) -> int:
    return 0 if torch.is_inference(tensor) else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor subclass without storage of its own
        return 0
