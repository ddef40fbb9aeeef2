"""Assign every adapter layer to a site: a group of projections with the same input (flare.tuner.site).

The query, key and value projections of a self-attention module form one site. Any other adapter layer is a site alone.
"""

from __future__ import annotations

from torch import nn

from .layer import SITE, FlareLayer
from .routing import KEY_NAMES, QUERY_NAMES, VALUE_NAMES, is_cross_attention
from .site import SiblingLinear, Site

_NAMES = QUERY_NAMES + KEY_NAMES + VALUE_NAMES


def make_sites(model: nn.Module) -> None:
    """Remove a model's sites, and assign a new site to every adapter layer and to its siblings.

    A sibling is a frozen nn.Linear that reads the same input; its class becomes SiblingLinear.
    """
    remove_sites(model)
    adapted = {path: module for path, module in model.named_modules() if isinstance(module, FlareLayer)}
    for parent_path in dict.fromkeys(path.rpartition(".")[0] for path in adapted):
        parent = model.get_submodule(parent_path)
        names = _projections_of_one_input(parent_path, parent)
        if names:
            site = Site(parent_path, parent, names)
            for name in names:
                child = parent._modules[name]
                assert child is not None
                if type(child) is nn.Linear:
                    child.__class__ = SiblingLinear
                child.__dict__[SITE] = site
    for path, layer in adapted.items():
        if SITE not in layer.__dict__:
            parent_path, _, name = path.rpartition(".")
            layer.__dict__[SITE] = Site(path, model.get_submodule(parent_path), (name,))  # type: ignore[attr-defined]


def _projections_of_one_input(path: str, parent: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's query, key and value projections, which read the same input.

    The result is () if there are fewer than two, if none has an adapter, or if the module is cross-attention.
    """
    names = tuple(
        name
        for name, child in parent.named_children()
        if name in _NAMES and (isinstance(child, FlareLayer) or type(child) is nn.Linear)
    )
    adapted = any(isinstance(child := parent._modules[name], FlareLayer) and child.lora_A for name in names)
    return names if len(names) > 1 and adapted and not is_cross_attention(path, parent) else ()


def remove_sites(model: nn.Module) -> None:
    """Remove all sites from a model, and change each SiblingLinear back to nn.Linear."""
    for module in model.modules():
        module.__dict__.pop(SITE, None)
        if type(module) is SiblingLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
