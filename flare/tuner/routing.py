"""Which module of a transformers model is which: block stacks, self-attention modules, query and value projections.

Nothing here knows an architecture by its class. A *stack* is a ModuleList whose children hold attention projections
(`model.layers`, `bert.encoder.layer`, `encoder.block`); a *block* is one of its children; a *self-attention module* is
the parent of a query or value projection that is not marked as cross-attention; where one linear layer holds query,
key and value, that layer is both (flare.tuner.fused_qkv). Most families pass unknown keyword arguments from the stack's
owner down to the attention modules, which is how the source travels; in the others each block carries it
(flare.source.carrier).
"""

from __future__ import annotations

import dis
import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .._compat import is_linear, out_features
from .fused_qkv import FUSED_QKV_NAMES, RowsOfQKV, rows_of_qkv

QUERY_NAMES = ("q_proj", "query", "q", "q_lin", "query_proj", "wq")
KEY_NAMES = ("k_proj", "key", "k", "k_lin", "key_proj", "wk")
VALUE_NAMES = ("v_proj", "value", "v", "v_lin", "value_proj", "wv")
_CROSS_MARKS = ("cross", "encdec", "encoder_attn", "encoder_decoder")


@dataclass(frozen=True)
class Place:
    """Where a linear layer sits: paths are dotted names below the model, ``block`` counts from 0 within its stack."""

    path: str
    stack: str
    block: int
    attention: str
    is_cross_attention: bool

    @property
    def block_path(self) -> str:
        """The block's own dotted name."""
        return f"{self.stack}.{self.block}"

    @property
    def owner(self) -> str:
        """The module whose forward loops over the stack."""
        return self.stack.rpartition(".")[0]


@dataclass(frozen=True)
class ModelMap:
    """The stacks of a model and the places of its attention projections.

    decoders: an encoder-decoder's decoder. carried: stacks whose blocks carry the source themselves. fused: projections
    that hold query, key and value, and which of their rows are whose.
    """

    stacks: dict[str, int]
    places: dict[str, Place]
    query_and_value: tuple[str, ...]
    decoders: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()
    fused: dict[str, RowsOfQKV] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelMap:
        """Map a transformers model.

        Raises:
            ValueError: no blocks, or no query and value projections; the message names the model and what was sought.
        """
        paths = [
            name for name, module in model.named_modules() if _is_projection(name, QUERY_NAMES + VALUE_NAMES, module)
        ]
        fused = {} if paths else _fused_projections(model)
        paths = paths or list(fused)
        stacks = _stacks(model, paths)
        if not stacks:
            raise ValueError(
                f"{type(model).__name__}: its blocks cannot be found: {paths[0]} lies below no torch.nn.ModuleList"
            )
        _refuse_shared_blocks(model, stacks)
        children = {path.rpartition(".")[2] for path in paths}
        places = {}
        for name, module in model.named_modules():
            place = _place(name, module, stacks, model, children)
            if place is not None:
                places[name] = place
        query_and_value = tuple(path for path in paths if path in places and not places[path].is_cross_attention)
        bare = [path for path in query_and_value if places[path].attention == places[path].block_path]
        if bare:
            raise ValueError(
                f"{type(model).__name__}: its blocks cannot be found: {places[bare[0]].stack} holds attention modules "
                "alone, so what a block hands on cannot be read"
            )
        paired = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        decoders = frozenset(stack for stack in stacks if paired and "decoder" in stack.split("."))
        lost = _loses_keywords(model, places[query_and_value[0]]) if query_and_value else ""
        if lost and len(stacks) > 1:
            raise ValueError(f"{type(model).__name__}: the source cannot reach its attention: {lost}")
        return cls(stacks, places, query_and_value, decoders, frozenset(stacks if lost else ()), fused)

    def default_targets(self) -> set[str]:
        """Names of the query and value projections, as LoRA's target_modules want them."""
        return {path.rpartition(".")[2] for path in self.query_and_value}


def _refuse_shared_blocks(model: nn.Module, stacks: dict[str, int]) -> None:
    """One block that is run as several (ALBERT) would meet one source state where it should meet several."""
    runs = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if len(stacks) == 1 and isinstance(runs, int):
        ((stack, blocks),) = stacks.items()
        if runs > blocks:
            raise ValueError(
                f"{type(model).__name__}: its config names {runs} blocks and {stack} holds {blocks}: blocks that share "
                "their weights cannot be told apart, and each needs the source state of its own depth"
            )


def _fused_projections(model: nn.Module) -> dict[str, RowsOfQKV]:
    """Return the linear layers that hold query, key and value.

    Raises:
        ValueError: there are none, or it is not known which of their rows are whose.
    """
    config = getattr(model, "config", None)
    found = {name: module for name, module in model.named_modules() if _is_projection(name, FUSED_QKV_NAMES, module)}
    rows = {name: rows_of_qkv(config, out_features(module)) for name, module in found.items()}
    known = {name: own for name, own in rows.items() if own is not None}
    if known and len(known) == len(rows):
        return known
    names = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
    why = (
        f"its query, key and value share one linear layer ({names}), and which of its rows are whose is not known for "
        f"model_type={getattr(config, 'model_type', None)!r}"
        if found
        else f"no linear layer is named {', '.join(QUERY_NAMES)} or {', '.join(VALUE_NAMES)}"
    )
    raise ValueError(f"{type(model).__name__}: query and value projections cannot be found: {why}")


def _loses_keywords(model: nn.Module, place: Place) -> str:
    """Return which module from the stack's owner down to the attention hands unknown keyword arguments not on."""
    inner = place.attention.removeprefix(place.block_path).strip(".").split(".")
    between = [".".join([place.block_path, *inner[:depth]]) for depth in range(len(inner))]
    for path in (place.owner, *between):
        module = model.get_submodule(path)
        if isinstance(module, nn.ModuleList):
            continue  # a container is not called
        if not _uses_keywords(module.forward):
            return f"{type(module).__name__}.forward ({path or 'the model'}) hands no further keyword arguments on"
    return ""


def _uses_keywords(forward: Any) -> bool:
    """Whether a function takes any keyword arguments and reads them; many take them for the sake of their callers."""
    code = inspect.unwrap(getattr(forward, "__func__", forward)).__code__
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    last = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    name = code.co_varnames[last]
    loads = (each.argval for each in dis.get_instructions(code) if each.opname.startswith("LOAD"))
    return any(name == value or (isinstance(value, tuple) and name in value) for value in loads)


def _is_projection(path: str, names: tuple[str, ...], module: nn.Module) -> bool:
    return path.rpartition(".")[2] in names and is_linear(module)


def _stacks(model: nn.Module, projections: list[str]) -> dict[str, int]:
    """Outermost ModuleLists whose every child holds an attention projection -> number of blocks."""
    stacks: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or not name:
            continue
        if any(name.startswith(f"{outer}.") for outer in stacks):
            continue  # a list inside a block, as T5's `layer`
        if all(any(path.startswith(f"{name}.{index}.") for path in projections) for index in range(len(module))):
            stacks[name] = len(module)
    return stacks


def _place(
    path: str, module: nn.Module, stacks: dict[str, int], model: nn.Module, projections: set[str]
) -> Place | None:
    if not is_linear(module) or path.endswith((".base_layer", ".quant_linear_module")):
        return None
    for stack in stacks:
        if path.startswith(f"{stack}."):
            block = int(path[len(stack) + 1 :].split(".")[0])
            attention = path.rpartition(".")[0]
            siblings = [child for child, _ in model.get_submodule(attention).named_children()]
            if projections.isdisjoint(siblings):
                return None  # not a child of an attention module: an MLP, or BERT's attention.output.dense
            is_cross = is_cross_attention(path[len(stack) + 1 :], model.get_submodule(attention))
            return Place(path, stack, block, attention, is_cross)
    return None


def is_cross_attention(path: str, attention: nn.Module) -> bool:
    """Whether a path, or the class of the attention module it leads to, is marked as cross-attention."""
    marked = f"{path}.{type(attention).__name__}".lower()
    return any(mark in marked for mark in _CROSS_MARKS)
