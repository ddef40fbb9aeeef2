"""SourceRequest: which source states a model's active adapters read, for lookups in the cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..source.arguments import DECODER_ARGUMENTS, SOURCE_ARGUMENTS, flatten_choices
from ..source.inputs import check_ids, decoder_inputs, refuse_unknown
from ..source.packed_rows import refuse_packed_rows
from ..source.states import StateKey


@dataclass(frozen=True)
class SourceRequest:
    """The source states that a model's active adapters read; returned by ``FlareModel.source_request()``.

    Attributes:
        model: the transformers model (not the PeftModel).
        keys: names of the states in the stacks of blocks that read the source text.
        decoder_keys: names of the states in an encoder-decoder's decoder, which are read if a batch has
            ``source_labels`` or ``source_decoder_input_ids``.
        offset: the adapters' source_layer_offset.
        zero_pads: whether the adapters' source_padding is "zero".
    """

    model: nn.Module
    keys: frozenset[StateKey]
    decoder_keys: frozenset[StateKey]
    offset: int
    zero_pads: bool

    @functools.cached_property
    def decoders(self) -> set[str]:
        """Names of the stacks that contain the states ``decoder_keys``."""
        return {key.stack for key in self.decoder_keys}

    def columns(self, batch: Mapping[str, Any], types: bool) -> tuple[dict[str, Tensor], frozenset[StateKey]]:
        """Return the frozen model's inputs for a batch, by argument name, and the names of the required states.

        Args:
            batch: the arguments of the model's forward.
            types: whether the frozen model reads token types.

        Raises:
            TypeError, ValueError: the source is missing or has a wrong type or shape, a ``source_`` name is unknown,
                or rows are packed; the message names the argument.
        """
        refuse_unknown(self.model, batch)
        refuse_packed_rows(self.model, {name: batch[name] for name in SOURCE_ARGUMENTS if name in batch}, (), batch)
        ids = batch.get("source_input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 3:
            batch = flatten_choices({name: value for name, value in batch.items() if name[:7] == "source_"})
            ids = batch["source_input_ids"]
        ids = check_ids("source_input_ids", ids, "(B, m)")
        columns = {"input_ids": ids}
        for name in ("attention_mask", "token_type_ids") if types else ("attention_mask",):
            column = batch.get(f"source_{name}")
            if column is not None:
                if column.shape != ids.shape:
                    raise ValueError(
                        f"source_{name} has shape {tuple(column.shape)}, expected the shape of source_input_ids: "
                        f"{tuple(ids.shape)}"
                    )
                columns[name] = column
        decoder = {name: batch[name] for name in DECODER_ARGUMENTS if batch.get(name) is not None}
        if not decoder:
            return columns, self.keys
        columns["decoder_input_ids"], mask = decoder_inputs(self.model, decoder, None)
        if self.zero_pads:
            columns["decoder_attention_mask"] = mask
        return columns, self.keys | self.decoder_keys
