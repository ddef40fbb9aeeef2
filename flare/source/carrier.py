"""Blocks that hand no keyword arguments on to their attention: the block itself takes the source on the way in.

Gradient checkpointing runs a block again with the arguments of its first call, when nothing else of the forward is
alive. So the context is an argument, which ``__call__`` adds and ``forward``, around which transformers puts its
checkpoint, takes out again.

Such an attention may call a projection again with something else than the tokens (DeBERTa's positions). A projection
meets the source in its first call within a block; ``Slot.met`` holds those that have.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .context import KEYWORD, THREAD


class CarryingBlock:
    """A mixin in front of a block's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block, with the source of the running forward."""
        slot = THREAD.slot
        if slot.frozen_pass is None and slot.forward is not None:
            kwargs[KEYWORD] = slot.forward
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block with the source where its layers find it."""
        slot = THREAD.slot
        slot.context, slot.met = kwargs.pop(KEYWORD, None), set()
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            slot.context = slot.pending = slot.met = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the block's own class, which the class made here is found by."""
        return _blank, (type(self).__mro__[2],), self.__dict__


_CLASSES: dict[type, type] = {}


def carry(block: nn.Module) -> None:
    """Have a block carry the source."""
    if not isinstance(block, CarryingBlock):
        block.__class__ = _carrying(type(block))  # type: ignore[assignment]


def release(block: nn.Module) -> None:
    """Give a block its own class back."""
    if type(block) in _CLASSES.values():
        block.__class__ = type(block).__mro__[2]  # type: ignore[assignment]


def _carrying(cls: type) -> type:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Carrying{cls.__name__}", (CarryingBlock, cls), {"__module__": cls.__module__})
    return _CLASSES[cls]


def _blank(cls: type) -> nn.Module:
    made: Any = _carrying(cls)
    return made.__new__(made)  # type: ignore[no-any-return]
