"""Which module of a transformers model is which: block stacks, self-attention modules, query and value projections.

Nothing here knows an architecture by its class. A *stack* is a ModuleList whose children hold attention projections
(`model.layers`, `bert.encoder.layer`, `encoder.block`); a *block* is one of its children; a *self-attention module* is
the parent of a query or value projection that is not marked as cross-attention. In all supported families the model
passes unknown keyword arguments from the stack's owner down to the attention modules, which is how the source travels.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from .._compat import is_linear

QUERY_NAMES = ("q_proj", "query", "q", "q_lin", "query_proj", "wq")
KEY_NAMES = ("k_proj", "key", "k", "k_lin", "key_proj", "wk")
VALUE_NAMES = ("v_proj", "value", "v", "v_lin", "value_proj", "wv")
FUSED_QKV_NAMES = ("query_key_value", "qkv_proj", "qkv", "Wqkv", "c_attn", "in_proj", "in_proj_weight")
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
    def owner(self) -> str:
        """The module whose forward loops over the stack."""
        return self.stack.rpartition(".")[0]


@dataclass(frozen=True)
class ModelMap:
    """The stacks of a model and the places of its attention projections; ``decoders``: an encoder-decoder's decoder."""

    stacks: dict[str, int]
    places: dict[str, Place]
    query_and_value: tuple[str, ...]
    decoders: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module) -> ModelMap:
        """Map a transformers model.

        Raises:
            ValueError: no blocks, or no query and value projections; the message names the model and what was sought.
        """
        paths = [
            name for name, module in model.named_modules() if _is_projection(name, QUERY_NAMES + VALUE_NAMES, module)
        ]
        if not paths:
            fused = sorted({name.rpartition(".")[2] for name, _ in model.named_modules()} & set(FUSED_QKV_NAMES))
            why = (
                f"its query, key and value share one linear layer ({', '.join(fused)}), which cannot be told apart"
                if fused
                else f"no linear layer is named {', '.join(QUERY_NAMES)} or {', '.join(VALUE_NAMES)}"
            )
            raise ValueError(f"{type(model).__name__}: query and value projections cannot be found: {why}")
        stacks = _stacks(model, paths)
        if not stacks:
            raise ValueError(
                f"{type(model).__name__}: its blocks cannot be found: {paths[0]} lies below no torch.nn.ModuleList"
            )
        _refuse_shared_blocks(model, stacks)
        places = {}
        for name, module in model.named_modules():
            place = _place(name, module, stacks, model)
            if place is not None:
                places[name] = place
        query_and_value = tuple(path for path in paths if path in places and not places[path].is_cross_attention)
        if query_and_value:
            _refuse_lost_keywords(model, places[query_and_value[0]])
        paired = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        decoders = frozenset(stack for stack in stacks if paired and "decoder" in stack.split("."))
        return cls(stacks, places, query_and_value, decoders)

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


def _refuse_lost_keywords(model: nn.Module, place: Place) -> None:
    """Every module from the stack's owner down to the attention must take keyword arguments it does not know."""
    inner = place.attention.removeprefix(f"{place.stack}.{place.block}").strip(".").split(".")
    block = f"{place.stack}.{place.block}"
    between = [".".join([block, *inner[:depth]]) for depth in range(len(inner))]
    for path in (place.owner, *between):
        module = model.get_submodule(path)
        if isinstance(module, nn.ModuleList):
            continue  # a container is not called
        parameters = inspect.signature(module.forward).parameters.values()
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            raise ValueError(
                f"{type(model).__name__}: the source cannot reach its attention: {type(module).__name__}.forward "
                f"({path or 'the model'}) takes no further keyword arguments to pass on"
            )


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


def _place(path: str, module: nn.Module, stacks: dict[str, int], model: nn.Module) -> Place | None:
    if not is_linear(module) or path.endswith((".base_layer", ".quant_linear_module")):
        return None
    for stack in stacks:
        if path.startswith(f"{stack}."):
            block = int(path[len(stack) + 1 :].split(".")[0])
            attention = path.rpartition(".")[0]
            names = QUERY_NAMES + VALUE_NAMES
            siblings = [child for child, _ in model.get_submodule(attention).named_children()]
            if not any(name in siblings for name in names):
                return None  # not a child of an attention module: an MLP, or BERT's attention.output.dense
            is_cross = is_cross_attention(path[len(stack) + 1 :], model.get_submodule(attention))
            return Place(path, stack, block, attention, is_cross)
    return None


def is_cross_attention(path: str, attention: nn.Module) -> bool:
    """Whether a path, or the class of the attention module it leads to, is marked as cross-attention."""
    marked = f"{path}.{type(attention).__name__}".lower()
    return any(mark in marked for mark in _CROSS_MARKS)
