"""Run decoding steps that call the model once, on the new tokens of both the target and the source.

With ``source_layer_offset=0``, the target's input of a block fuses with the source's input of the same block. A
decoding step can therefore run the model once, on one batch of the target's rows followed by the source's rows:

    frozen weights    read once per step for both texts, also if they are quantised
    adapters          added to the target's rows only; the source's rows run through the frozen model alone
    S = x_source Aᵀ   computed from the source's rows at the input of each block; no state of width d is kept
    KV cache          one for the rows of target and source; beam search reorders only the target's rows

Beams and samples of a prompt share one source row. The prompts of target and source are processed in separate passes,
because the time for a prompt is limited by arithmetic, not by reading weights, and a joint pass would need twice the
activation memory.

Shapes: t rows of the target and s rows of the source, with one new token each; hidden states of width d; V tokens of
the vocabulary.
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
    row_mixing_reason,
)
from ..source.context import Bottlenecks, SiteSource, SourceContext
from ..source.fsdp import is_sharded
from ..source.projected import project_rows
from ..source.runtime import Reads, Runtime
from ..source.source_pass import Preparation, StateGroup
from ..source.states import StateKey
from ..tuner.layer import FlareLayer

SOURCE_PASSES = ("auto", "shared", "separate")

#: Tensor arguments that a shared step supports. Tensors under other names would have rows for the target only.
_PER_ROW = ("input_ids", "attention_mask", "position_ids")


# --- support ----------------------------------------------------------------------------------------------------------


def warn_two_passes_once(runtime: Runtime, why: str) -> None:
    """Warn, once per reason, that the source and the target run in separate passes of the model."""
    runtime.warn_once(f"generate: source and target do not share a pass: {why}")


def unsupported_reason(model: nn.Module, runtime: Runtime, reads: Reads, cache: Any) -> tuple[str, bool]:
    """Return why target and source cannot share a pass ("" if they can), and whether the reason would surprise a user.

    Args:
        model: the transformers model.
        runtime: the model's runtime.
        reads: the source states that the active adapters read.
        cache: an empty KV cache of this model.
    """
    if any(key.position != runtime.map.places[layer.flare_key].block for key, _, layer in reads.uses):
        return "source_layer_offset is 1, which fuses with a block's output; 0 is needed", False
    if _in_training(model):
        return "the model is in train mode; call model.eval()", False
    if torch.compiler.is_compiling() or is_compiled(model):
        return "the model is compiled", False
    if len(runtime.map.stacks) != 1:
        return f"the model has {len(runtime.map.stacks)} stacks of blocks", True
    for path, module in model.named_modules():
        why = _unsupported_module(model, path, module)
        if why:
            return why, True
    if is_sharded(model) or len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is distributed over several devices", True
    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in GROWING_CACHE_LAYERS})
    if kinds:
        return f"the model's KV cache has layers ({', '.join(kinds)}) that may not keep rows separate", True
    rope = _rope_over_batch(model)
    return (f"rope_type={rope!r} depends on the longest row of a batch", True) if rope else ("", False)


def _in_training(module: nn.Module) -> bool:
    """Return whether a module is in train mode. FLARE layers and quantised linears are skipped.

    PEFT adds adapters in train mode even to a model in eval mode, and libraries create quantised linears in train mode.
    """
    if isinstance(module, FlareLayer) or is_quantized_linear(module):
        return False
    return module.training or any(_in_training(child) for child in module.children())


def _unsupported_module(model: nn.Module, path: str, module: nn.Module) -> str:
    if isinstance(module, FlareLayer):
        if module.merged:
            return f"an adapter is merged into {path}"
        if not _sees_every_row(model, path):
            return f"{path} is in a list of modules that may each be called with a part of the rows"
    elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return f"{path} is a {type(module).__name__} of PEFT, which cannot be disabled for the source's rows only"
    why = row_mixing_reason(module)
    return f"{path} {why}" if why else ""


def _sees_every_row(model: nn.Module, path: str) -> bool:
    """Return whether the stack of blocks is the only ModuleList around a layer.

    A layer in a second ModuleList may belong to an expert, which is called with some of the rows only.
    """
    names = path.split(".")
    parents = [".".join(names[:depth]) for depth in range(1, len(names))]
    return sum(isinstance(model.get_submodule(parent), nn.ModuleList) for parent in parents) <= 1


def _rope_over_batch(model: Any) -> str | None:
    """Return the model's type of rotary embedding if it depends on the longest position in a batch."""
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    kinds = [part.get("rope_type") or "" for part in parts]
    return next((kind for kind in kinds if "dynamic" in kind or kind == "longrope"), None)


def inputs_of_both(kwargs: dict[str, Any], source: dict[str, Any], past: int) -> tuple[dict[str, Any] | None, str]:
    """Return (keyword arguments of one forward on both target and source, ""), or (None, why this is not possible).

    Args:
        kwargs: keyword arguments of the target's forward: input_ids (t, 1), and attention_mask (t, past + 1) if there
            is padding.
        source: keyword arguments of the source's forward: input_ids (s, 1), attention_mask (s, past + 1) and, if the
            model accepts it, position_ids (s, 1).
        past: number of positions in the cache.
    """
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    others = sorted(name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _PER_ROW)
    if others:
        return None, f"{', '.join(others)} was given for the target only"
    if not isinstance(ids, Tensor):
        return None, "the new tokens of the target were not given as input_ids"
    if mask is None:
        mask = source["attention_mask"].new_ones(len(ids), past + 1)
    target = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in source:
        target["position_ids"] = kwargs.get("position_ids")
    both = dict(kwargs)
    for name, value in target.items():
        other = source.get(name)
        if not isinstance(value, Tensor) or other is None or value.shape[1:] != other.shape[1:] or value.dim() != 2:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            return None, f"{name} of the target is {what}, which cannot be concatenated with the source's"
        both[name] = torch.cat([value, other.to(value.device, value.dtype)])
    return both, ""


# --- one KV cache for target and source -------------------------------------------------------------------------------


def join_caches(target: Any, source: Any) -> None:
    """Append the source's rows of keys and values (s, heads, positions, head size) to the target's cache.

    The source's cache is left with empty tensors.
    """
    for layer, other in zip(target.layers, source.layers, strict=True):
        if not layer.is_initialized:
            continue  # this block uses the keys and values of another block
        layer.keys, other.keys = torch.cat([layer.keys, other.keys]), other.keys.new_empty(0)
        layer.values, other.values = torch.cat([layer.values, other.values]), other.values.new_empty(0)


def split_caches(target: Any, source: Any, rows: int, keep_source: bool) -> None:
    """Undo :func:`join_caches`: keep the first ``rows`` rows in the target's cache.

    Move the source's rows back into the source's cache if ``keep_source``, otherwise drop them.
    """
    for index, layer in enumerate(target.layers):
        if not layer.is_initialized:
            continue
        if keep_source:
            other = source.layers[index] = copy.copy(layer)  # the copy keeps attributes such as the count of positions
            other.keys, other.values = layer.keys[rows:].clone(), layer.values[rows:].clone()
        layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]


# --- one step ---------------------------------------------------------------------------------------------------------


class SharedStep:
    """One forward of the model on both target and source.

    The hook before the model creates this step, and the hook after the model finishes it. The step's context lists
    every site (the projections of one attention module) from the start, so that a site without S is detected. S is
    added to the context while the blocks run.

    Args:
        reads: the source states that the active adapters read.
        inputs: keyword arguments of the forward, with the rows of target and source.
        rows: t, the number of target rows, which come first.
        keep_ended: replaces S by the end token's S in the rows of sources that have ended.
        for_target: maps S with one row per source row to S with one row per target row.
        on_finish: called after the forward with the S of all blocks and the source's logits (s, 1, V).
    """

    def __init__(
        self,
        reads: Reads,
        inputs: dict[str, Any],
        rows: int,
        keep_ended: Callable[[Bottlenecks], Bottlenecks],
        for_target: Callable[[Bottlenecks], Bottlenecks],
        on_finish: Callable[[Bottlenecks, Tensor], None],
    ) -> None:
        self.inputs, self.rows, self.total = inputs, rows, len(inputs["input_ids"])
        self.keep_ended, self.for_target, self.on_finish = keep_ended, for_target, on_finish
        self.sites = reads.sites
        self.groups: dict[StateKey, list[StateGroup]] = {}
        self.context = SourceContext(with_grad=False)
        for group in reads.groups:
            self.groups.setdefault(group.key, []).append(group)
            self.context.sites.setdefault(group.site, SiteSource())
        self.prepare = Preparation.under_autocast(inputs["input_ids"].device)
        self.source_states: Bottlenecks = {}

    def enter_block(self, key: StateKey, hidden: Tensor) -> None:
        """Compute S of a block from the source's rows of its input, which has rows of both texts: (t + s, 1, d)."""
        groups = self.groups.get(key)
        if groups is None:
            return
        states = self.keep_ended(project_rows(hidden[self.rows :], self.prepare, groups))
        self.source_states.update(states)
        self.context.update(self.for_target(states), self.sites)

    def finish(self, output: Any) -> Any:
        """Return the forward's output for the target's rows."""
        logits = output[0] if isinstance(output, tuple) else output["logits"]
        self.on_finish(self.source_states, logits[self.rows :])
        if isinstance(output, tuple):
            return tuple(self._of_target(value) for value in output)
        for name, value in list(output.items()):
            output[name] = self._of_target(value)
        return output

    def _of_target(self, value: Any) -> Any:
        """Return the target's rows of a tensor, or of each tensor in a tuple, and any other value unchanged."""
        if isinstance(value, Tensor):
            return value[: self.rows] if value.dim() and len(value) == self.total else value
        if type(value) is tuple:
            return tuple(self._of_target(element) for element in value)
        return value
