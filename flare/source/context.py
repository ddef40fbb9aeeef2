"""The source of one forward: what travels from the model's arguments to the adapter layers, and where a layer finds it.

A :class:`SourceContext` belongs to one forward. It travels to the blocks as a keyword argument, because gradient
checkpointing runs a block again when nothing else of the forward is alive. From a block's pre-hook to the projections
inside, which modeling code calls with nothing but a tensor, it goes through the :class:`Slot` of the running thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

#: The keyword argument under which a context travels to the blocks.
KEYWORD = "flare_source"

#: S by layer and adapter: path -> adapter name -> (B, m, r).
Bottlenecks = dict[str, dict[str, Tensor]]


class Slot:
    """What the code that runs now has left for the modules it calls.

    Attributes:
        frozen_pass: the source pass that runs (flare.source.source_pass); its layers are the base model's.
        forward: the context of the model's forward, for the hook before the owner of its blocks.
        context: the context of the block that runs.
        pending: outputs that one projection has computed for its neighbours (flare.tuner.site).
        running: whether a forward of the model runs.
        plain: whether it runs under a transform or tracer that takes plain PyTorch operators only.
        rows: (rows of the target, rows of both streams) in a decoding step that both share; None elsewhere.
        met: projections that have met the source, in a block that carries it (flare.source.carrier); None elsewhere.
    """

    frozen_pass: Any = None
    forward: SourceContext | None = None
    context: SourceContext | None = None
    pending: Any = None
    running: bool = False
    plain: bool = False
    rows: tuple[int, int] | None = None
    met: set[Any] | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.slot = Slot()


#: ``THREAD.slot`` is the slot of the running thread. An object of its own: what a graph of torch.compile writes to a
#: thread-local object itself is lost where the graph ends.
THREAD = _Thread()


class SiteSource:
    """What one site (flare.tuner.site) reads, by adapter: states x_S (B, m, d), or S (B, m, r) of its layers.

    ``seed`` is that of the dropout masks of a state: drawn where the state is read, as where S is made of it there, so
    that a step's numbers do not depend on how its states wait for backward.

    ``seen`` says whether the source has reached the site: an object per site that a block only writes to, because
    torch.compile would guard on the contents of a set.
    """

    seen = False
    states: dict[str, Tensor] | None = None
    seed: Tensor | None = None
    bottlenecks: Bottlenecks | None = None


class SourceContext:
    """The source of one forward.

    Not a dataclass: FSDP2's mixed precision would hand each block a copy of one.

    Args:
        graded: whether gradients were on where the source was read.
        state_of: for S alone: finds the state that a (layer, adapter) reads, for layers that make their own S.
    """

    #: the decoding step of both streams that this is the context of (flare.generation.shared_pass)
    step: Any = None

    def __init__(self, graded: bool, state_of: Callable[[str, str], Tensor] | None = None) -> None:
        self.graded, self.state_of = graded, state_of
        self.sites: dict[str, SiteSource] = {}
        self.stacked_A: dict[tuple[str, ...], Tensor] = {}  # layers -> their A in the compute dtype, below each other
        self.target_masks: dict[str, Tensor] = {}  # layer -> (B, m), where a fusion looks at it
        self.reentrant = False

    @classmethod
    def of_bottlenecks(cls, bottlenecks: Bottlenecks, sites: Mapping[str, str]) -> SourceContext:
        """Return a context of S alone, without gradients; ``sites``: layer -> its site."""
        context = cls(graded=False)
        context.update(bottlenecks, sites)
        return context

    def update(self, bottlenecks: Bottlenecks, sites: Mapping[str, str]) -> None:
        """File S (B, m, r) of layers and adapters."""
        for layer, own in bottlenecks.items():
            known = self.sites.setdefault(sites[layer], SiteSource())
            known.bottlenecks = {} if known.bottlenecks is None else known.bottlenecks
            known.bottlenecks.setdefault(layer, {}).update(own)

    @property
    def bottlenecks(self) -> Bottlenecks:
        """Every S, by layer and adapter."""
        found: Bottlenecks = {}
        for source in self.sites.values():
            found |= source.bottlenecks or {}
        return found

    def of_layer(self, site: str, layer: str, adapter: str) -> tuple[Tensor | None, Tensor | None]:
        """Return (x_S, S) for a layer's adapter, one of the two; neither where it does not fuse."""
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
        """Whether the blocks run without a graph where the model ran with one: reentrant checkpointing, which sends no
        gradient into S.
        """
        if self.graded and not torch.is_grad_enabled():
            self.reentrant = True
        return self.reentrant

    def make_state(self, layer: str, adapter: str) -> Tensor:
        """Return the state x_S (B, m, d) of a layer that makes its own S."""
        assert self.state_of is not None
        return self.state_of(layer, adapter)

    @property
    def missed(self) -> list[str]:
        """The sites that the source has not reached yet."""
        return sorted(site for site, source in self.sites.items() if not source.seen)
