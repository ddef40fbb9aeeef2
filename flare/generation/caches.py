"""KV caches of the target that also hold the state of the source's decoding (flare.generation.decoding)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from ..source.hooks import SOURCE_OF_CACHE
from .decoding import SourceDecoding


class _WithSource:
    """Mixin for a cache of transformers. When it selects rows of the target, it also selects their source rows."""

    flare_decoding: SourceDecoding
    is_croppable = False  # the source cannot go back to earlier positions

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(self.flare_decoding.rows_of_cache(beam_idx))  # type: ignore[misc]
        self.flare_decoding.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(self.flare_decoding.rows_of_cache(indices))  # type: ignore[misc]
        self.flare_decoding.select_rows(indices)


class SourceCache(_WithSource, DynamicCache):
    """The target's KV cache in a decoder-only model."""


class SourceEncoderDecoderCache(_WithSource, EncoderDecoderCache):
    """The target's KV cache in an encoder-decoder."""


def new_cache(model: Any, source: SourceDecoding | None = None) -> Any:
    """Return an empty KV cache for a model. If ``source`` is given, the cache holds it."""
    config = model.config.get_text_config(decoder=True)
    cache: Any
    if model.config.is_encoder_decoder:
        cls = EncoderDecoderCache if source is None else SourceEncoderDecoderCache
        cache = cls(DynamicCache(config=config), DynamicCache(config=config))
    else:
        cache = (DynamicCache if source is None else SourceCache)(config=config)
    if source is not None:
        setattr(cache, SOURCE_OF_CACHE, source)
    return cache
