"""FLARE MT's rows: an MT encoder's states of the target text, computed once per split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..errors import UserError
from ..latent_encoder import LatentEncoder
from ..tasks import Pair, nllb_code

#: Larger states are kept in a file, from which batches are read.
IN_MEMORY = 1 << 30
_BATCH = 32


def latent_encoder(model: str, target: str, language: str | None, max_length: int, device: Any) -> LatentEncoder:
    """The MT encoder for a target language.

    Args:
        model: name or folder of an MT model.
        target: the language as the experiment names it.
        language: its tag, where the table's is not wanted.
        max_length: of a text.

    Raises:
        UserError: it cannot be loaded, or has no tag for the language.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tag = language
        if tag is None and hasattr(tokenizer, "src_lang"):
            tag = nllb_code(target)
        return LatentEncoder(model, tokenizer, language=tag, max_length=max_length, device=device)
    except UserError as error:  # of the table of languages, which speaks of flare translate's options
        said = str(error).replace("--source-code or --target-code", "--mt-language")
        raise UserError(f"--mt-model {model} for {target}: {said}") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--mt-model {model} for {target}: {error} (--mt-language sets the tag)") from error


def add_states(
    rows: Sequence[dict[str, Any]], texts: Sequence[str], encoder: LatentEncoder, file: Path, name: str | None
) -> list[dict[str, Any]]:
    """The rows with ``source_states`` (length, latent_dim) of their texts.

    The batches depend on the texts alone, so that a resumed run gets the same states.

    Args:
        rows, texts: of equal number.
        encoder: the MT encoder.
        file: where states larger than `IN_MEMORY` are kept.
        name: shown beside a bar; None: no bar.
    """
    order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
    found: list[Any] = [None] * len(texts)
    size = 0
    store = None
    with tqdm(total=len(texts), desc=name, unit="row", disable=name is None, leave=False) as bar:
        for first in range(0, len(order), _BATCH):
            part = order[first : first + _BATCH]
            for index, states in zip(part, encoder.rows([texts[i] for i in part])["source_states"], strict=True):
                size += states.nbytes
                if size > IN_MEMORY:
                    if store is None:
                        file.parent.mkdir(parents=True, exist_ok=True)
                        store = file.open("wb")
                    at = store.tell()
                    store.write(np.ascontiguousarray(states).tobytes())
                    found[index] = (at, states.shape)
                else:
                    found[index] = np.array(states)
            bar.update(len(part))
    if store is not None:
        store.close()
        for index, kept in enumerate(found):
            if isinstance(kept, tuple):
                found[index] = np.memmap(file, np.float32, "r", kept[0], kept[1])
    return [{**row, "source_states": states} for row, states in zip(rows, found, strict=True)]


def target_texts(pairs: Sequence[Pair]) -> list[str]:
    """The target's own text of each pair; several texts as one."""
    return [" ".join(pair.target.texts.values()) for pair in pairs]
