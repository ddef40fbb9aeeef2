"""The source of one forward pass: how it gets from the model's arguments to the adapter layers.

A :class:`SourceContext` belongs to one forward pass. It is passed to the blocks as a keyword argument, because gradient
checkpointing runs a block again during the backward pass, when only the block's arguments are still available. Modeling
code calls the projections inside a block with a single tensor, so they read the context from the :class:`Slot` of the
running thread.

Shapes: B rows of a batch, m positions, hidden states of width d, rank r.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

#: The keyword argument that passes a context to the blocks.
KEYWORD = "flare_source"

#: S = x_S A^T, the projections of the source's hidden states x_S: path of the layer -> adapter name -> (B, m, r).
Bottlenecks = dict[str, dict[str, Tensor]]


class Slot:
    """State of one thread that hooks and adapter layers share during a forward pass.

    Attributes:
        frozen_pass: the running source pass (flare.source.source_pass), or None. During it, adapter layers act as base
            layers.
        forward: the context of the model's running forward pass; None without a source. A hook passes it to the blocks.
        context: the context of the running block, which its adapter layers read; None without a source.
        pending: outputs that the call of one projection has computed for other projections (flare.tuner.site);
            None if there are none.
        running: whether a forward pass of the model is running.
        plain: whether this forward pass runs under a function transform or tracer (torch.func, torch.export,
            torch.jit.trace) that supports only plain PyTorch operators.
        rows: (number of target rows, number of all rows) in a decoding step that runs target and source rows in one
            batch; otherwise None.
        met: projections that were called in the running block, if the block itself receives the source
            (flare.source.carrier); otherwise None.
    """

    frozen_pass: Any = None
    forward: SourceContext | None = None
    context: SourceContext | None = None
    pending: Any = None
    running: bool = False
    plain: bool = False
    rows: tuple[int, int] | None = None
    met: set[Any] | None = None

    def reset(self) -> None:
        """Remove the state that a forward pass left because a KeyboardInterrupt ended it: torch then runs no hooks."""
        self.running, self.forward, self.context, self.pending = False, None, None, None
        self.plain, self.rows, self.met = False, None, None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.slot = Slot()


#: ``THREAD.slot`` is the slot of the running thread. The slot is a separate object because a torch.compile graph loses
#: writes to the thread-local object itself.
THREAD = _Thread()


class SiteSource:
    """The source of one site, which is a group of layers with the same input (flare.tuner.site).

    Attributes:
        states: adapter name -> x_S (B, m, d), if the site's layers project x_S themselves; otherwise None.
        seed: seed of lora_dropout's masks for x_S; None without dropout. It is drawn when the state is read, in every
            ``source_memory`` mode, so that all modes draw the same masks.
        bottlenecks: S by layer and adapter, if the source pass has projected the states; otherwise None.
        seen: whether the source has reached the site. Each site has its own flag, because torch.compile would guard on
            the contents of a set of all sites.
    """

    seen = False
    states: dict[str, Tensor] | None = None
    seed: Tensor | None = None
    bottlenecks: Bottlenecks | None = None


class SourceContext:
    """The source of one forward pass.

    It is not a dataclass, because FSDP2's mixed precision would copy a dataclass for each block.

    Args:
        with_grad: whether gradients were enabled when the source was read.
        state_of: function that returns x_S (B, m, d) for (layer, adapter). A context that holds S with gradients needs
            it, because under reentrant checkpointing layers compute S again from x_S.
    """

    #: The decoding step on target and source rows (flare.generation.shared_pass) that this context belongs to, or None.
    step: Any = None

    def __init__(self, with_grad: bool, state_of: Callable[[str, str], Tensor] | None = None) -> None:
        self.with_grad, self.state_of = with_grad, state_of
        self.sites: dict[str, SiteSource] = {}
        self.stacked_A: dict[tuple[str, ...], Tensor] = {}  # layers -> their stacked A in the compute dtype
        self.target_masks: dict[str, Tensor] = {}  # layer -> (B, m), if its fusion reads a mask
        self.reentrant = False

    @classmethod
    def of_bottlenecks(cls, bottlenecks: Bottlenecks, sites: Mapping[str, str]) -> SourceContext:
        """Return a context that holds given S, without gradients. ``sites``: path of a layer -> path of its site."""
        context = cls(with_grad=False)
        context.update(bottlenecks, sites)
        return context

    def update(self, bottlenecks: Bottlenecks, sites: Mapping[str, str]) -> None:
        """Add S (B, m, r) of layers and adapters. ``sites``: path of a layer -> path of its site."""
        for layer, by_adapter in bottlenecks.items():
            source = self.sites.setdefault(sites[layer], SiteSource())
            source.bottlenecks = {} if source.bottlenecks is None else source.bottlenecks
            source.bottlenecks.setdefault(layer, {}).update(by_adapter)

    @property
    def bottlenecks(self) -> Bottlenecks:
        """All S, by layer and adapter."""
        bottlenecks: Bottlenecks = {}
        for source in self.sites.values():
            bottlenecks |= source.bottlenecks or {}
        return bottlenecks

    def of_layer(self, site: str, layer: str, adapter: str) -> tuple[Tensor | None, Tensor | None]:
        """Return (x_S, S) for a layer's adapter. At least one is None; both are None if the adapter does not fuse."""
        source = self.sites.get(site)
        if source is None:
            return None, None
        source.seen = True
        if source.states is not None:
            return source.states.get(adapter), None
        S = (source.bottlenecks or {}).get(layer, {}).get(adapter)
        if S is not None and self.is_reentrant():
            return self.make_state(layer, adapter), None
        return None, S

    def is_reentrant(self) -> bool:
        """Return whether the blocks run under reentrant checkpointing.

        Reentrant checkpointing disables gradients inside the blocks, although they are enabled in the model's forward
        pass. No gradient flows into S from such a block, so its layers have to compute S themselves.
        """
        if self.with_grad and not torch.is_grad_enabled():
            self.reentrant = True
        return self.reentrant

    def make_state(self, layer: str, adapter: str) -> Tensor:
        """Return the state x_S (B, m, d) for a layer that computes S itself."""
        assert self.state_of is not None
        return self.state_of(layer, adapter)

    @property
    def missed(self) -> list[str]:
        """Sites that the source has not reached yet."""
        return sorted(site for site, source in self.sites.items() if not source.seen)
