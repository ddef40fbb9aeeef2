"""Compute the rows of FLARE MT, which hold the states of an MT encoder.

FLARE MT fuses these states in place of the states of a source text. The MT encoder reads the target text.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...source.latent_encoder import LatentEncoder
from ..tasks import Pair, nllb_code
from ..utils.errors import UserError, library_errors
from ..utils.model_names import find_model
from ..utils.progress import counter

#: Maximum bytes of states in memory. Further states are written to a file, from which batches are read.
IN_MEMORY = 1 << 30
_BATCH = 32


def latent_encoder(model: str, target: str, language: str | None, max_length: int, device: Any) -> LatentEncoder:
    """Return the MT encoder for a target language.

    Args:
        model: name or folder of an MT model.
        target: name of the language in the experiment.
        language: the language's tag in the MT model; None: looked up in the table of languages, if the model has tags.
        max_length: maximum tokens per text.
        device: device of the encoder.

    Raises:
        UserError: the encoder cannot be loaded, or it has no tag for the language.
    """
    from transformers import AutoTokenizer

    model = find_model(model, "--mt-model")
    with library_errors(f"--mt-model {model}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    tag = language
    if tag is None and hasattr(tokenizer, "src_lang"):
        try:
            tag = nllb_code(target)
        except UserError as error:  # the message names options of flare translate
            message = str(error).replace("--source-code or --target-code", "--mt-language")
            raise UserError(f"--mt-model {model} for {target}: {message}") from error
    with library_errors(f"--mt-model {model} for {target}", advice="; --mt-language sets the tag"):
        return LatentEncoder(model, tokenizer, language=tag, max_length=max_length, device=device)


def add_states(
    rows: Sequence[dict[str, Any]], texts: Sequence[str], encoder: LatentEncoder, folder: Path, name: str | None
) -> list[dict[str, Any]]:
    """Return the rows with ``source_states``, the encoder's states (length, latent_dim) of each text in float32.

    The batches depend only on the texts, so that a resumed run gets the same states.

    Args:
        rows: model rows.
        texts: the target text of each row.
        encoder: the MT encoder.
        folder: folder of a temporary file for the states that exceed `IN_MEMORY` bytes. The file has no name, so it is
            deleted when the rows are freed or the process ends.
        name: label of the progress bar; None: no bar.
    """
    order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
    all_states: list[Any] = [None] * len(texts)
    # (row, offset, shape) of the states of each row in the file; the offset counts numbers, not bytes
    in_file: list[tuple[int, int, tuple[int, ...]]] = []
    size = written = 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(counter(name, len(texts), "row"))
        store: Any = None
        for first in range(0, len(order), _BATCH):
            part = order[first : first + _BATCH]
            for index, states in zip(part, encoder.rows([texts[i] for i in part])["source_states"], strict=True):
                size += states.nbytes
                if size <= IN_MEMORY:
                    all_states[index] = np.array(states)
                    continue
                if store is None:
                    folder.mkdir(parents=True, exist_ok=True)
                    store = stack.enter_context(tempfile.TemporaryFile(dir=folder))
                store.write(np.ascontiguousarray(states).tobytes())
                in_file.append((index, written, states.shape))
                written += states.size
            bar.update(len(part))
        if store is not None:
            store.flush()
            # one mapping for all rows, because each mapping keeps a file open
            numbers = np.memmap(store, np.float32, "c")
            for index, begin, shape in in_file:
                all_states[index] = numbers[begin : begin + int(np.prod(shape))].reshape(shape)
    return [{**row, "source_states": states} for row, states in zip(rows, all_states, strict=True)]


def target_texts(pairs: Sequence[Pair]) -> list[str]:
    """Return the target text of each pair; the texts of several text columns are joined by a space."""
    return [" ".join(pair.target.texts.values()) for pair in pairs]
