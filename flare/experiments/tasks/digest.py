"""SHA-256 digests that identify data by content, independent of where it is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from .examples import Example, Pair


def digest_of(content: Any) -> str:
    """Return the SHA-256 digest of a JSON-serializable value."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def digest_of_rows(rows: Sequence[Example]) -> str:
    """Return the SHA-256 digest of rows in order: ids, texts, labels, answers and words."""
    return digest_of(
        [
            [
                row.id,
                list(row.texts.items()),
                row.label,
                [[answer.text, answer.start] for answer in row.answers],
                # a row without words adds nothing here, so that its digest equals its digest in earlier versions
                *([row.words] if row.words else []),
            ]
            for row in rows
        ]
    )


def digest_of_texts(rows: Sequence[Example]) -> str:
    """Return the SHA-256 digest of the texts of rows in order, without ids, labels and answers."""
    return digest_of([list(row.texts.values()) for row in rows])


def digests_of_pairs(split: str, pairs: Sequence[Pair], source_text: str | None) -> dict[str, str]:
    """Return the digest of the target rows under the key `split`, and the digest of the source rows.

    The key of the second digest is "<split>/<source_text>". If `source_text` is None (no source), only the first digest
    is returned.
    """
    digests = {split: digest_of_rows([pair.target for pair in pairs])}
    if source_text is not None:
        sources = [pair.source for pair in pairs if pair.source is not None]
        digests[f"{split}/{source_text}"] = digest_of_rows(sources)
    return digests
