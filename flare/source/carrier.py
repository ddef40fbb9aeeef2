"""Pass the source to the layers of a block that does not pass keyword arguments on to its attention.

The block receives the source, and puts it into the running thread's Slot (flare.source.context), where the layers find
it.

Gradient checkpointing runs a block again during the backward pass, with the arguments of its first call. The source
therefore has to be one of the arguments: ``__call__`` adds it, and ``forward`` removes it. transformers' checkpointing
runs between the two, so it stores the source. A checkpoint around ``__call__`` does not.

The attention of such a block may call a projection a second time, with an input that is not a text (DeBERTa's relative
positions). A projection fuses only in its first call within a block; ``Slot.met`` holds the projections that
were called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .context import KEYWORD, THREAD


class CarryingBlock:
    """Mixin in front of a block's class that passes the source through the block's arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block with the source of the running forward pass.

        Raises:
            ValueError: a reentrant checkpoint encloses this call. Its recompute would run without a source.
        """
        slot = THREAD.slot
        if slot.frozen_pass is None and slot.forward is not None:
            if slot.forward.with_grad and not torch.is_grad_enabled():
                raise ValueError(
                    f"{type(self).__mro__[2].__name__} is called without gradients in a forward pass that needs them: "
                    "a reentrant checkpoint around the block (such as torch's CheckpointWrapper, which accelerate's "
                    "FSDP option activation_checkpointing adds) would lose the source in its recompute. Use "
                    "model.gradient_checkpointing_enable() instead"
                )
            kwargs[KEYWORD] = slot.forward
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Put the source into the thread's slot, where the block's layers find it, and run the block."""
        slot = THREAD.slot
        slot.context, slot.met = kwargs.pop(KEYWORD, None), set()
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            slot.context = slot.pending = slot.met = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the block's original class, since the class created here cannot be imported."""
        return _blank, (type(self).__mro__[2],), self.__dict__


_CLASSES: dict[type, type] = {}


def make_carrying(block: nn.Module) -> None:
    """Change a block's class to one that passes the source through the block's arguments."""
    if not isinstance(block, CarryingBlock):
        block.__class__ = _carrying_class(type(block))  # type: ignore[assignment]


def restore_class(block: nn.Module) -> None:
    """Change a block's class back to the original one."""
    if type(block) in _CLASSES.values():
        block.__class__ = type(block).__mro__[2]  # type: ignore[assignment]


def _carrying_class(cls: type) -> type:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Carrying{cls.__name__}", (CarryingBlock, cls), {"__module__": cls.__module__})
    return _CLASSES[cls]


def _blank(cls: type) -> nn.Module:
    """Return an uninitialised block, whose attributes unpickling then sets; ``cls``: the block's original class."""
    carrying: Any = _carrying_class(cls)
    return carrying.__new__(carrying)  # type: ignore[no-any-return]
