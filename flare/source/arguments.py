"""Names of the source arguments of a model's forward.

Shapes: B rows of a batch, n choices of a row, m positions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

#: Keyword arguments of the model that belong to the source; also the source columns of a batch.
SOURCE_ARGUMENTS = (
    "source_input_ids",
    "source_attention_mask",
    "source_token_type_ids",
    "source_labels",
    "source_decoder_input_ids",
    "source_states",
)
#: The source arguments that an encoder-decoder's decoder reads.
DECODER_ARGUMENTS = ("source_labels", "source_decoder_input_ids")


def did_you_mean(name: str, accepted: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the accepted name that is most similar, or "" if none is similar."""
    matches = difflib.get_close_matches(name, accepted, 1, 0.8)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def flatten_choices(source: dict[str, Any]) -> dict[str, Any]:
    """Flatten the source arguments of a multiple choice from (B, n, m) to (B n, m), as the model does with the target.

    ``source_states`` already have the size (B n, m), and are returned unchanged.

    Raises:
        ValueError: one of the other source arguments is not a tensor of three dimensions.
    """
    texts = {name: value for name, value in source.items() if name != "source_states"}
    for name, value in texts.items():
        if not isinstance(value, Tensor) or value.ndim != 3:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name} is {what}: with input_ids (B, n, m) of a multiple choice it must have the same shape, one "
                "source text for each choice (flare.FlareDataCollator creates it)"
            )
    return {**source, **{name: value.flatten(0, 1) for name, value in texts.items()}}
