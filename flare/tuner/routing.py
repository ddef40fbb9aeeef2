"""Map of a transformers model: its stacks of blocks, self-attention modules, and query and value projections.

Modules are found by names and structure, not by a list of model classes:

* A *stack* is a ModuleList whose children all hold attention projections (`model.layers`, `bert.encoder.layer`,
  `encoder.block`). A *block* is a child of a stack. A stack's *owner* is the module whose forward loops over the stack.
* A *self-attention module* is the parent of a query or value projection. Neither its path nor its class name contains a
  word for cross-attention ("cross", "encdec", ...).
* Modules of a part that reads no text, such as a vision tower, are left out, because the source is a text.
* A linear layer that computes query, key and value together counts as query and value (flare.tuner.fused_qkv).

Most architectures pass unknown keyword arguments from the stack's owner to the attention modules. In these, the
source is passed as such an argument. In other architectures, each block itself receives it (flare.source.carrier).
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
    """Location of a linear layer of an attention module. All paths are dotted names in the model.

    Attributes:
        path: path of the linear layer.
        stack: path of the stack that holds it.
        block: index of its block in the stack.
        attention: path of its attention module.
        is_cross_attention: whether this module is cross-attention.
    """

    path: str
    stack: str
    block: int
    attention: str
    is_cross_attention: bool

    @property
    def block_path(self) -> str:
        """Dotted name of the block."""
        return f"{self.stack}.{self.block}"

    @property
    def owner(self) -> str:
        """Dotted name of the module whose forward loops over the stack."""
        return self.stack.rpartition(".")[0]


@dataclass(frozen=True)
class ModelMap:
    """The stacks of a model and the places of its attention projections.

    Attributes:
        stacks: path of each stack -> number of its blocks.
        places: path of each linear layer in an attention module -> its place.
        query_and_value: paths of the query and value projections of self-attention.
        decoders: paths of the stacks in an encoder-decoder's decoder.
        carried: paths of the stacks whose blocks receive the source themselves, because keyword arguments of the owner
            do not reach the attention modules.
        fused: path of each projection that computes query, key and value together -> the layout of its rows.
    """

    stacks: dict[str, int]
    places: dict[str, Place]
    query_and_value: tuple[str, ...]
    decoders: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()
    fused: dict[str, RowsOfQKV] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelMap:
        """Return the map of a transformers model.

        Raises:
            ValueError: the blocks, or the query and value projections, cannot be found, or the source cannot reach
                them; the message names the model's class and the reason.
        """
        paths = [*_projections(model, QUERY_NAMES + VALUE_NAMES)]
        fused = {} if paths else _fused_projections(model)
        paths = paths or list(fused)
        stacks = _stacks(model, paths)
        if not stacks:
            raise ValueError(
                f"{type(model).__name__}: its blocks cannot be found: {paths[0]} is not inside a torch.nn.ModuleList "
                "whose children all hold query or value projections"
            )
        _refuse_shared_blocks(model, stacks)
        children = {path.rpartition(".")[2] for path in paths}
        places = {}
        for name, module in model.named_modules():
            place = _place(name, module, stacks, model, children)
            if place is not None:
                places[name] = place
        query_and_value = tuple(path for path in paths if path in places and not places[path].is_cross_attention)
        without_block = [path for path in query_and_value if places[path].attention == places[path].block_path]
        if without_block:
            raise ValueError(
                f"{type(model).__name__}: its blocks cannot be found: {places[without_block[0]].stack} holds attention "
                "modules only, so the output of a block cannot be read"
            )
        is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        decoders = frozenset(stack for stack in stacks if is_encoder_decoder and "decoder" in stack.split("."))
        reason = _keywords_lost_reason(model, places[query_and_value[0]]) if query_and_value else ""
        if reason and len(stacks) > 1:
            raise ValueError(f"{type(model).__name__}: the source cannot reach its attention: {reason}")
        return cls(stacks, places, query_and_value, decoders, frozenset(stacks if reason else ()), fused)

    def default_targets(self) -> set[str]:
        """Return the names of the query and value projections, for LoRA's target_modules."""
        return {path.rpartition(".")[2] for path in self.query_and_value}


def _refuse_shared_blocks(model: nn.Module, stacks: dict[str, int]) -> None:
    """Raise ValueError for a block that runs several times (ALBERT): it would need a source state for each run."""
    runs = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if len(stacks) == 1 and isinstance(runs, int):
        ((stack, blocks),) = stacks.items()
        if runs > blocks:
            raise ValueError(
                f"{type(model).__name__}: its config has {runs} blocks and {stack} holds {blocks}: blocks that share "
                "weights are not supported, because each needs the source state of its own depth"
            )


def _fused_projections(model: nn.Module) -> dict[str, RowsOfQKV]:
    """Return the linear layers that compute query, key and value together, with the layout of their rows.

    Raises:
        ValueError: there are none, or their layout is unknown.
    """
    config = getattr(model, "config", None)
    modules = _projections(model, FUSED_QKV_NAMES)
    layouts = {name: rows_of_qkv(config, out_features(module)) for name, module in modules.items()}
    known = {name: layout for name, layout in layouts.items() if layout is not None}
    if known and len(known) == len(layouts):
        return known
    names = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
    reason = (
        f"its query, key and value share one linear layer ({names}), and the layout of its rows is not known for "
        f"model_type={getattr(config, 'model_type', None)!r}"
        if modules
        else f"no linear layer is named {', '.join(QUERY_NAMES)} or {', '.join(VALUE_NAMES)}"
    )
    raise ValueError(f"{type(model).__name__}: query and value projections cannot be found: {reason}")


def _keywords_lost_reason(model: nn.Module, place: Place) -> str:
    """Return why keyword arguments of the stack's owner do not reach the attention module; "" if they do."""
    inner = place.attention.removeprefix(place.block_path).strip(".").split(".")
    between = [".".join([place.block_path, *inner[:depth]]) for depth in range(len(inner))]
    for path in (place.owner, *between):
        module = model.get_submodule(path)
        if isinstance(module, nn.ModuleList):
            continue  # a container is not called
        if not _uses_keywords(module.forward):
            return f"{type(module).__name__}.forward ({path or 'the model'}) does not pass on keyword arguments"
    return ""


def _uses_keywords(forward: Any) -> bool:
    """Return whether a function has a parameter ``**kwargs`` and reads it. Many functions accept and ignore it."""
    code = inspect.unwrap(getattr(forward, "__func__", forward)).__code__
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    last = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    name = code.co_varnames[last]
    loaded = (op.argval for op in dis.get_instructions(code) if op.opname.startswith("LOAD"))
    return any(name == value or (isinstance(value, tuple) and name in value) for value in loaded)


def _projections(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return path -> linear layer, for the layers with one of the names that read text."""
    return {
        path: module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in names and is_linear(module) and reads_text(model, path)
    }


def reads_text(model: nn.Module, path: str) -> bool:
    """Return whether a module belongs to a part of the model that reads text, and not to a vision or audio tower.

    The parts of a transformers model declare what they read (``input_modalities``). If the whole model reads no text,
    no part is left out.
    """
    parts = path.split(".")
    parents = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    declared = [part for part in (getattr(parent, "input_modalities", None) for parent in parents) if part is not None]
    return not declared or "text" in declared[-1] or "text" not in declared[0]


def _stacks(model: nn.Module, projections: list[str]) -> dict[str, int]:
    """Return path -> number of children, for the outermost ModuleLists whose children all hold a projection."""
    stacks: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or not name:
            continue
        if any(name.startswith(f"{outer}.") for outer in stacks):
            continue  # a list inside a block, such as T5's `layer`
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
                return None  # not in an attention module: part of an MLP, or BERT's attention.output.dense
            is_cross = is_cross_attention(path[len(stack) + 1 :], model.get_submodule(attention))
            return Place(path, stack, block, attention, is_cross)
    return None


def is_cross_attention(path: str, attention: nn.Module) -> bool:
    """Return whether a path, or the class name of its attention module, is marked as cross-attention."""
    marked = f"{path}.{type(attention).__name__}".lower()
    return any(mark in marked for mark in _CROSS_MARKS)
