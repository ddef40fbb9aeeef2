"""Decoding with one pass over the weights: the source's new token goes through the blocks beside the target's.

With ``source_layer_offset=0`` the target that enters a block meets the source that enters the same block, so a decode
step runs the model once, on one batch: the target's rows, and behind them the source's.

    frozen weights    read once a step for both streams, whatever their quantisation
    adapters          added in the target's rows alone; the source's rows are the frozen model's
    S                 made where the source's rows enter a block; no other state of width d lives beside it
    KV cache          one for the rows of both; where beams change places the source's rows stay in theirs

Beams and samples of one prompt share its source row. Prompts are read apart: arithmetic takes the time there, not the
weights, and two streams at once would double what one block passes through memory.

Shapes: t rows of the target, s of the source, one new token each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import (
    GROWING_CACHE_LAYERS,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    is_compiled,
    is_quantized_linear,
    mixes_rows,
)
from ..source.context import Bottlenecks, SiteSource, SourceContext
from ..source.fsdp import is_sharded
from ..source.projected import project_rows
from ..source.runtime import Reads, Runtime
from ..source.source_pass import Preparation, ProjectionGroup
from ..source.states import StateKey
from ..tuner.layer import FlareLayer

SOURCE_PASSES = ("auto", "shared", "separate")

#: What a forward may be given in a shared step; tensors under other names would have rows for the target alone.
_PER_ROW = ("input_ids", "attention_mask", "position_ids")


# --- where it is possible ---------------------------------------------------------------------------------------------


def obstacle(model: nn.Module, runtime: Runtime, reads: Reads, cache: Any) -> tuple[str, bool]:
    """Why the streams cannot share a pass, and whether a user could expect them to; an empty reason where they can.

    Args:
        model, runtime, reads: the transformers model, its runtime and what fuses now.
        cache: an empty KV cache of this model.
    """
    if any(key.position != runtime.map.places[layer.flare_key].block for key, _, layer in reads.uses):
        return "source_layer_offset is 1, with which a block meets the source that has left it; 0 is needed", False
    if _in_training(model):
        return "the model is in train mode (model.eval() leaves it)", False
    if torch.compiler.is_compiling() or is_compiled(model):
        return "the model is compiled", False
    if len(runtime.map.stacks) != 1:
        return f"the model has {len(runtime.map.stacks)} stacks of blocks", True
    for path, module in model.named_modules():
        why = _module_obstacle(model, path, module)
        if why:
            return why, True
    if is_sharded(model) or len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over several devices", True
    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in GROWING_CACHE_LAYERS})
    if kinds:
        return f"the model's KV cache has layers ({', '.join(kinds)}) that are not known to keep rows apart", True
    rope = _rope_over_the_batch(model)
    return (f"rope_type={rope!r} looks at the longest row of a batch", True) if rope else ("", False)


def _in_training(module: nn.Module) -> bool:
    """Whether a module outside the adapters is in train mode; an adapter added to a model in eval mode is, at first."""
    if isinstance(module, FlareLayer) or is_quantized_linear(module):
        return False
    return module.training or any(_in_training(child) for child in module.children())


def _module_obstacle(model: nn.Module, path: str, module: nn.Module) -> str:
    if isinstance(module, FlareLayer):
        if module.merged:
            return f"an adapter is merged into {path}"
        if not _sees_every_row(model, path):
            return f"{path} stands in a list of modules of which each may see a part of the rows"
    elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return f"{path} is a {type(module).__name__} of PEFT's, which cannot be off for the source's rows alone"
    why = mixes_rows(module)
    return f"{path} {why}" if why else ""


def _sees_every_row(model: nn.Module, path: str) -> bool:
    """Whether a layer stands in one list of modules, its stack; experts, which get a part of the tokens, in another."""
    names = path.split(".")
    parents = [".".join(names[:depth]) for depth in range(1, len(names))]
    return sum(isinstance(model.get_submodule(parent), nn.ModuleList) for parent in parents) <= 1


def _rope_over_the_batch(model: Any) -> str | None:
    """The kind of rotary embedding that depends on the longest position in a batch, where the model has one."""
    found = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    kinds = [part.get("rope_type") or "" for part in parts]
    return next((kind for kind in kinds if "dynamic" in kind or kind == "longrope"), None)


def inputs_of_both(kwargs: dict[str, Any], source: dict[str, Any], past: int) -> tuple[dict[str, Any] | None, str]:
    """Keyword arguments of one forward over both streams, or (None, why not).

    Args:
        kwargs: the target's: input_ids (t, 1), and a mask (t, past + 1) where there is padding.
        source: the source's input_ids (s, 1), attention_mask (s, past + 1) and, where the model takes them,
            position_ids (s, 1).
        past: positions in the cache.
    """
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    others = sorted(name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _PER_ROW)
    if others:
        return None, f"{', '.join(others)} was given for the target alone"
    if not isinstance(ids, Tensor):
        return None, "the new tokens of the target were not given as input_ids"
    if mask is None:
        mask = source["attention_mask"].new_ones(len(ids), past + 1)
    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in source:
        given["position_ids"] = kwargs.get("position_ids")
    both = dict(kwargs)
    for name, own in given.items():
        other = source.get(name)
        if not isinstance(own, Tensor) or other is None or own.shape[1:] != other.shape[1:] or own.dim() != 2:
            what = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            return None, f"{name} of the target is {what}, which cannot be put above the source's"
        both[name] = torch.cat([own, other.to(own.device, own.dtype)])
    return both, ""


# --- one cache for both -----------------------------------------------------------------------------------------------


def join_caches(target: Any, source: Any) -> None:
    """Move the source's keys and values (s, heads, m, c) below the target's, layer by layer; its own are let go of."""
    for own, other in zip(target.layers, source.layers, strict=True):
        if not own.is_initialized:
            continue  # blocks that share another's keys and values
        own.keys, other.keys = torch.cat([own.keys, other.keys]), other.keys.new_empty(0)
        own.values, other.values = torch.cat([own.values, other.values]), other.values.new_empty(0)


def part_caches(target: Any, source: Any, rows: int, keep_source: bool) -> None:
    """Undo :func:`join_caches`; ``rows`` are the target's. Without ``keep_source`` the source's are let go of."""
    for index, own in enumerate(target.layers):
        if not own.is_initialized:
            continue
        if keep_source:
            other = source.layers[index] = copy.copy(own)  # its count of positions comes along
            other.keys, other.values = own.keys[rows:].clone(), own.values[rows:].clone()
        own.keys, own.values = own.keys[:rows], own.values[:rows]


# --- one step ---------------------------------------------------------------------------------------------------------


class SharedStep:
    """One forward of the model over both streams; lives from the hook before the model to the hook after it.

    Its context has every site from the start, so that one without its S is noticed; S comes in as the blocks run.

    Args:
        reads: what fuses now.
        inputs: keyword arguments of the forward, of both streams.
        rows: t, the target's rows, which come first.
        settle: what was read of the source in a block -> the S that its rows have (held where a source has ended).
        spread: S with a row per source row -> with a row per target row.
        finished: called after the forward with the settled S of all blocks and the source's logits (s, 1, V).
    """

    def __init__(
        self,
        reads: Reads,
        inputs: dict[str, Any],
        rows: int,
        settle: Callable[[Bottlenecks], Bottlenecks],
        spread: Callable[[Bottlenecks], Bottlenecks],
        finished: Callable[[Bottlenecks, Tensor], None],
    ) -> None:
        self.inputs, self.rows, self.total = inputs, rows, len(inputs["input_ids"])
        self.settle, self.spread, self.finished = settle, spread, finished
        self.sites = reads.sites
        self.groups: dict[StateKey, list[ProjectionGroup]] = {}
        self.context = SourceContext(with_grad=False)
        for group in reads.groups:
            self.groups.setdefault(group.key, []).append(group)
            self.context.sites.setdefault(group.site, SiteSource())
        self.prepare = Preparation.under_autocast(inputs["input_ids"].device)
        self.read: Bottlenecks = {}

    def enter_block(self, key: StateKey, hidden: Tensor) -> None:
        """Both streams (t + s, 1, d) are about to enter a block: make its S."""
        groups = self.groups.get(key)
        if groups is None:
            return
        read = self.settle(project_rows(hidden[self.rows :], self.prepare, groups))
        self.read.update(read)
        self.context.update(self.spread(read), self.sites)

    def finish(self, output: Any) -> Any:
        """Return the output of the target's rows."""
        logits = output[0] if isinstance(output, tuple) else output["logits"]
        self.finished(self.read, logits[self.rows :])
        if isinstance(output, tuple):
            return tuple(self._of_target(one) for one in output)
        for name, value in list(output.items()):
            output[name] = self._of_target(value)
        return output

    def _of_target(self, value: Any) -> Any:
        """The target's rows of a tensor, or of each in a tuple; anything else as it is."""
        if isinstance(value, Tensor):
            return value[: self.rows] if value.dim() and len(value) == self.total else value
        if type(value) is tuple:
            return tuple(self._of_target(one) for one in value)
        return value
