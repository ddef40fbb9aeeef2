"""SourceStateCache: the frozen model reads each source text once, and later epochs read its states from the cache.

A row is one text of a batch. A stack is the list of blocks of a decoder-only model, of an encoder, or of a decoder.

Shapes: B rows of a batch, m positions, hidden states of width d, u positions of a decoder's input.
"""

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
    """Facts about a model that the cache is bound to.

    Attributes:
        watch: detects changes of the model.
        relative: whether a text keeps its states when all its positions are shifted (:func:`counts_relatively`).
        width_counts: whether the states depend on the padded width of the batch (:func:`needs_width`).
        accepts_types: whether the model takes token types (:func:`accepts_types`).
        plans: set of required states -> their Plan: their stacks, and the storage order of the states.
    """

    watch: Watch
    relative: bool
    width_counts: bool
    accepts_types: bool
    plans: dict[frozenset[StateKey], Plan] = field(default_factory=dict)

    def plan(self, model: nn.Module, keys: Collection[StateKey], decoders: Collection[str]) -> Plan:
        """Return the Plan of the required states, which is built when they are first required."""
        required = frozenset(keys)
        plan = self.plans.get(required)
        if plan is None:
            plan = self.plans[required] = Plan.of(required, decoders, model)
        return plan

    def batch(self, plan: Plan, columns: Mapping[str, Tensor], zero_pads: bool, dtype: torch.dtype | None) -> Batch:
        """Return a batch's rows and their keys; raise RuntimeError during the capture of a CUDA graph."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "source_cache: rows cannot be looked up while a CUDA graph is captured, because every replay would "
                "read the rows of the capture; call SourceStateCache.lookup before each replay, and copy the returned "
                "states into the graph's buffers"
            )
        return Batch.of(
            plan, columns, relative=self.relative, zero_pads=zero_pads, dtype=dtype, width_counts=self.width_counts
        )


class SourceStateCache(Store):
    """Cache of source states that is kept over epochs. Each row is stored on the device, in host memory or on disk.

    A row is looked up by its content: the inputs of the frozen model (token ids, mask, token types; with
    source_padding="keep" also the padding), the required states (and so the source layer offset), the dtype of the
    states, and the base model. The cache fills until the budget is spent. No row is evicted, so a second epoch finds
    every row that the first one stored. Rows of a batch that are not in the cache are computed in one source pass of
    those rows alone.

    A stored row is returned bit for bit as it was computed. A row that is computed in a smaller batch may differ by
    rounding from the same row in the whole batch, because the kernels' reductions may depend on the number of rows.

    Pass the cache to ``FlareTrainer(source_cache=...)``, or to ``model.set_source_cache(cache)`` in your own training
    loop.

    Args:
        budget: total bytes of all tiers, or {tier: bytes}. If one number covers several tiers, "device" and "host" each
            take at most half of the free memory of the device or of the host.
        tiers: the tiers to use: "device", "host" (pinned if there is a GPU), "disk" (only with a directory). They are
            used in this order, fastest first. "auto" measures, in the first two source passes, the time to compute a
            row. It then uses the tiers from which reading a row is faster.
        directory: folder of the disk tier's files, created if missing. Several processes may share it. Foreign or
            damaged files in it are reported, not used and not changed.

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
        """Bind the cache to a transformers model. This reads all bytes of its frozen weights.

        Raises:
            ValueError: the cache holds states of another base model, or the weights are not frozen.
        """
        watch = Watch(model)
        self.claim(fingerprint(model), watch.traits)
        self._models[model] = _Bound(watch, counts_relatively(model), needs_width(model), accepts_types(model))

    def _bound(self, model: nn.Module) -> _Bound:
        """Return the facts about a model, and bind the cache to the model if it is new or has changed.

        This is called before every pass. The weights are read only when the model is bound.
        """
        bound = self._models.get(model)
        if bound is not None and bound.watch.is_unchanged():
            return bound
        if bound is not None:
            watch = Watch(model)
            if watch.stamp == bound.watch.stamp:  # the same weights under other PEFT wrappers
                bound.watch = watch
                return bound
        self.bind(model)
        return self._models[model]

    # --- reading ------------------------------------------------------------------------------------------------------

    def reader(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        keys: Collection[StateKey],
        prepare: Preparation,
        masks: Mapping[str, Tensor] | None = None,
        decoders: Collection[str] = (),
        *,
        zero_pads: bool | None = None,
        host: Mapping[str, Tensor] | None = None,
    ) -> CachedReader:
        """Return a reader of the states of a batch: a function that passes each state to a visitor.

        The reader takes cached rows from the cache. It computes the other rows with the frozen model, and stores them.
        flare.source.source_pass defines readers and visitors.

        Args:
            model: the transformers model.
            inputs: keyword arguments of its backbone for the whole batch.
            keys: the states to read.
            prepare: casts a state to autocast's dtype (if any), and sets the state's padding to zero (if ``prepare``
                has masks), before the state is stored.
            masks: stack -> attention mask (B, m), for a decoder (B, u), under source_padding="zero"; otherwise empty.
            decoders: the stacks that read ``decoder_input_ids``.
            zero_pads: True if padding is neither read nor stored. Default: True if ``masks`` is not empty.
            host: CPU copies of ``input_ids``, ``attention_mask``, ``token_type_ids``, ``decoder_input_ids`` and
                ``decoder_attention_mask``, if the caller has them. Each column that is not given here is copied
                from the device, and the call waits for the copy.
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
        batch = bound.batch(bound.plan(model, keys, decoders), columns, zero_pads, prepare.dtype)
        return CachedReader(self, model, inputs, batch, prepare, zero_pads)

    def lookup(self, model: Any, batch: Mapping[str, Any], dtype: torch.dtype | None = None) -> SourceStates | None:
        """Return the source states of a batch if all its rows are cached, otherwise None.

        If the batch is still on the host, this call does not wait for the device: the states are copied in the
        background, and the current stream waits for them. Pass the states instead of the source
        (``model(**target, source_states=states)``), or copy them into the buffers of a captured CUDA graph before each
        replay. If the result is None, run the model on the whole batch, which computes and stores the missing rows.

        Args:
            model: a model with FLARE adapters.
            batch: the model's arguments. ``source_input_ids`` (B, m) integers, ``source_attention_mask`` and
                ``source_token_type_ids`` of the same shape; for an encoder-decoder also ``source_labels`` or
                ``source_decoder_input_ids`` (B, u). Other arguments are only used to detect packed rows and unknown
                names.
            dtype: autocast dtype of the forward pass. Needed if the forward pass runs under autocast and this call
                does not. Default: the autocast dtype of this call.

        Returns:
            States (B, m, d), contiguous and detached, on the model's device; zero at padding under
            source_padding="zero". With ``source_labels`` or ``source_decoder_input_ids`` also the decoder's states
            (B, u, d). The result is also None if no active adapter reads a source, if the model's blocks are on
            several devices, or while tiers="auto" has not chosen the tiers yet.

        Raises:
            TypeError, ValueError: the model has no FLARE adapters, the source is missing or has a wrong type or shape,
                a ``source_`` name is unknown, or rows are packed.
            RuntimeError: a CUDA graph is being captured.
        """
        if not hasattr(model, "source_request"):
            raise TypeError(
                f"model must have FLARE adapters (flare.fast_lora adds them), got {type(model).__name__} without any"
            )
        request: SourceRequest = model.source_request()
        bound = self._bound(request.model)
        columns, keys = request.columns(batch, bound.accepts_types)
        if not keys:
            return None
        plan = bound.plan(request.model, keys, request.decoders)
        kind = "cpu" if plan.device is None else plan.device.type
        if dtype is None and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        rows = bound.batch(plan, columns, request.zero_pads, dtype)
        states = read(self, rows)
        if states is None:
            return None
        padded = not rows.texts[0].mask.all()
        return SourceStates(states, request.offset, columns["attention_mask"] if padded else None)

    def __repr__(self) -> str:
        budget, tiers, directory = self._arguments
        return f"SourceStateCache({budget!r}, tiers={tiers!r}, directory={str(directory) if directory else None!r})"

    # A copied model shares the cache. A pickled model keeps the cache's arguments but not its states.
    def __deepcopy__(self, memo: dict[int, Any]) -> SourceStateCache:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SourceStateCache, self._arguments
