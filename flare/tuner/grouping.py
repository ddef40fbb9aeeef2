"""Which projections of a model make a site (flare.tuner.site): query, key and value of one self-attention module."""

from __future__ import annotations

from torch import nn

from .layer import SITE, FlareLayer
from .routing import KEY_NAMES, QUERY_NAMES, VALUE_NAMES, is_cross_attention
from .site import SiblingLinear, Site

_NAMES = QUERY_NAMES + KEY_NAMES + VALUE_NAMES


def make_sites(model: nn.Module) -> None:
    """Give every adapter layer of the model its site, whatever sites there were before."""
    remove_sites(model)
    adapted = {path: module for path, module in model.named_modules() if isinstance(module, FlareLayer)}
    for parent_path in dict.fromkeys(path.rpartition(".")[0] for path in adapted):
        parent = model.get_submodule(parent_path)
        shared = _shared_input(parent_path, parent)
        if shared:
            site = Site(parent_path, parent, shared)
            for name in shared:
                child = parent._modules[name]
                assert child is not None
                if type(child) is nn.Linear:
                    child.__class__ = SiblingLinear
                child.__dict__[SITE] = site
    for path, layer in adapted.items():
        if SITE not in layer.__dict__:
            parent_path, _, name = path.rpartition(".")
            layer.__dict__[SITE] = Site(path, model.get_submodule(parent_path), (name,))  # type: ignore[attr-defined]


def _shared_input(path: str, parent: nn.Module) -> tuple[str, ...]:
    """Return the children of a module that read one input; none where there are fewer than two, or no adapter."""
    names = tuple(
        name
        for name, child in parent.named_children()
        if name in _NAMES and (isinstance(child, FlareLayer) or type(child) is nn.Linear)
    )
    adapted = any(isinstance(child := parent._modules[name], FlareLayer) and child.lora_A for name in names)
    return names if len(names) > 1 and adapted and not is_cross_attention(path, parent) else ()


def remove_sites(model: nn.Module) -> None:
    """Take every site off the model, and give the siblings their class back."""
    for module in model.modules():
        module.__dict__.pop(SITE, None)
        if type(module) is SiblingLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
