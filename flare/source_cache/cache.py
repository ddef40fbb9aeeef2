"""SourceStateCache: the frozen model reads each source text once; later passes read what it gave."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..source.source_pass import Preparation
from ..source.states import SourceStates, StateKey
from .arguments import TIERS
from .fingerprint import fingerprint
from .reader import CachedReader, read
from .request import SourceRequest
from .row_keys import Batch, Plan, accepts_types, counts_relatively, needs_width
from .store import Store
from .watch import Watch

#: Columns of a batch that the frozen model reads.
_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")


@dataclass
class _Bound:
    """What the cache knows of one model that it is bound to. ``plans``: by the states that are wanted."""

    watch: Watch
    relative: bool
    width_counts: bool
    accepts_types: bool
    plans: dict[frozenset[StateKey], Plan] = field(default_factory=dict)

    def plan(self, model: nn.Module, wanted: Collection[StateKey], decoders: Collection[str]) -> Plan:
        """The plan of the wanted states, made once."""
        kind = frozenset(wanted)
        plan = self.plans.get(kind)
        if plan is None:
            plan = self.plans[kind] = Plan.of(kind, decoders, model)
        return plan

    def batch(self, plan: Plan, columns: Mapping[str, Tensor], zero_pads: bool, dtype: torch.dtype | None) -> Batch:
        """The rows of a batch by their names."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "source_cache: rows cannot be looked up while a CUDA graph is captured, as its replays would read the "
                "same rows; call SourceStateCache.lookup before, and copy its states into the graph's buffers"
            )
        return Batch.of(
            plan, columns, relative=self.relative, zero_pads=zero_pads, dtype=dtype, width_counts=self.width_counts
        )


class SourceStateCache(Store):
    """Keeps source states over epochs, row by row, in memory on the device, in host memory and on disk.

    A row is found by its content: token ids, mask and token types, which states are wanted (so the source layer
    offset), the dtype they are kept in, and the base model. It fills until the budget is spent and then stays as it is:
    no row is ever thrown out, so a second epoch finds every row that the first had room for. Rows of a batch that are
    not found are computed in one source pass of those rows alone. A row computed in a smaller batch is the same up to
    the rounding of the kernels (their reduction may depend on the number of rows), a stored one to the last bit.

    Hand it to ``FlareTrainer(source_cache=...)``, or to ``model.set_source_cache(cache)`` in a loop of your own.

    Args:
        budget: bytes over all tiers, or {tier: bytes}. Of one number over several tiers the memory tiers take at most
            half of what is free there.
        tiers: which are used, fastest first: "device", "host" (pinned where there is a GPU), "disk" (only with a
            directory). "auto" measures reading and computing in the first two source passes and uses those tiers that
            are faster than computing.
        directory: where the disk tier keeps its files (made if missing); processes may share it. Files there that are
            foreign or damaged are reported, left alone and not used.

    Raises:
        TypeError, ValueError: a value that is not accepted; the message names the argument.
    """

    def __init__(
        self,
        budget: int | Mapping[str, int],
        tiers: str | Sequence[str] = TIERS,
        directory: str | Path | None = None,
    ) -> None:
        super().__init__(budget, tiers, directory)
        self._models: weakref.WeakKeyDictionary[nn.Module, _Bound] = weakref.WeakKeyDictionary()

    # --- the base model -----------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> None:
        """Tie the cache to the frozen weights of a transformers model, all of whose bytes are read for that.

        Raises:
            ValueError: the cache holds states of another base model, or the weights are not frozen.
        """
        watch = Watch(model)
        self.claim(fingerprint(model), watch.traits)
        self._models[model] = _Bound(watch, counts_relatively(model), needs_width(model), accepts_types(model))

    def _bound(self, model: nn.Module) -> _Bound:
        """Before every pass: the weights are those the cache was bound to; read again only where something moved."""
        bound = self._models.get(model)
        if bound is not None and bound.watch.holds():
            return bound
        if bound is not None:
            watch = Watch(model)
            if watch.stamp == bound.watch.stamp:  # the same weights in other wrappers
                bound.watch = watch
                return bound
        self.bind(model)
        return self._models[model]

    # --- reading ------------------------------------------------------------------------------------------------------

    def reader(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        wanted: Collection[StateKey],
        prepare: Preparation,
        masks: Mapping[str, Tensor] | None = None,
        decoders: Collection[str] = (),
        *,
        zero_pads: bool | None = None,
        host: Mapping[str, Tensor] | None = None,
    ) -> CachedReader:
        """A reader (see flare.source.source_pass) of cached rows; runs the frozen model on the others and keeps them.

        Args:
            model: the transformers model.
            inputs: keyword arguments of its backbone for the whole batch.
            wanted: the states to read.
            prepare: what a state goes through before it is kept (its dtype; rows of pads are dropped by their mask).
            masks: stack -> (B, m), where pads are neither read nor kept (source_padding="zero"); else empty.
            decoders: those stacks among the wanted that read ``decoder_input_ids``.
            zero_pads: whether pads are neither read nor kept; by default where there are masks.
            host: those of ``input_ids``, ``attention_mask``, ``token_type_ids``, ``decoder_input_ids`` and
                ``decoder_attention_mask`` that the caller has on the CPU. Of the others the host waits for a copy.
        """
        masks = masks or {}
        zero_pads = bool(masks) if zero_pads is None else zero_pads
        columns = {name: inputs[name] for name in _COLUMNS if inputs.get(name) is not None}
        mask = next((masks[stack] for stack in decoders if stack in masks), None)
        if mask is not None:
            columns["decoder_attention_mask"] = mask
        if host is not None:
            columns |= {name: host[name] for name in columns if name in host}
        bound = self._bound(model)
        batch = bound.batch(bound.plan(model, wanted, decoders), columns, zero_pads, prepare.dtype)
        return CachedReader(self, model, inputs, batch, prepare, zero_pads)

    def lookup(self, model: Any, batch: Mapping[str, Any], dtype: torch.dtype | None = None) -> SourceStates | None:
        """Return the source states of a batch where every row of it is kept, else None.

        Called with the batch on the host, before it moves to the device, this does not wait for the device: the states
        are copied while the device works on, and the current stream waits for them. Pass them on in place of the source
        (``model(**target, source_states=states)``), or copy them into the buffers of a captured CUDA graph before each
        replay. Without them (None), run the model on the whole batch, which computes and keeps what is missing.

        Args:
            model: a model with FLARE adapters.
            batch: as the model takes it; of what does not begin with ``source_`` only packed rows are looked for.
                ``source_input_ids`` (B, m) integers, ``source_attention_mask`` and ``source_token_type_ids`` of the
                same shape; of an encoder-decoder also ``source_labels`` or ``source_decoder_input_ids`` (B, u).
            dtype: autocast's where the forward runs under autocast and this call does not; by default the one that is
                in force.

        Returns:
            States (B, m, d), contiguous and detached, on the model's device; zero at pads under
            source_padding="zero". Under ``source_labels`` or ``source_decoder_input_ids`` the decoder's (B, u, d) too.
            None also where no active adapter reads a source, and for a model whose blocks lie on several devices.

        Raises:
            TypeError, ValueError: a model without FLARE adapters, a source that is missing or does not fit, an unknown
                ``source_`` name, or packed rows.
            RuntimeError: the call is part of a CUDA graph that is being captured.
        """
        if not hasattr(model, "source_request"):
            raise TypeError(
                f"model must have FLARE adapters (flare.fast_lora adds them), got {type(model).__name__} without any"
            )
        request: SourceRequest = model.source_request()
        bound = self._bound(request.model)
        columns, wanted = request.columns(batch, bound.accepts_types)
        if not wanted:
            return None
        plan = bound.plan(request.model, wanted, request.decoders)
        kind = "cpu" if plan.device is None else plan.device.type
        if dtype is None and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        named = bound.batch(plan, columns, request.zero_pads, dtype)
        states = read(self, named)
        if states is None:
            return None
        padded = not named.streams[0].mask.all()
        return SourceStates(states, request.offset, columns["attention_mask"] if padded else None)

    def __repr__(self) -> str:
        budget, tiers, directory = self._arguments
        return f"SourceStateCache({budget!r}, tiers={tiers!r}, directory={str(directory) if directory else None!r})"

    # A copy of a model shares the cache; one that is pickled takes the arguments along and not the states.
    def __deepcopy__(self, memo: dict[int, Any]) -> SourceStateCache:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SourceStateCache, self._arguments
