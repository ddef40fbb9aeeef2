"""Digests of content, by which data are known wherever they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from .examples import Example, Pair


def digest_of(content: Any) -> str:
    """SHA-256 of something that JSON can write."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def digest_of_rows(rows: Sequence[Example]) -> str:
    """SHA-256 of rows: ids, texts, labels, answers and words, in order."""
    return digest_of(
        [
            [
                row.id,
                list(row.texts.items()),
                row.label,
                [[one.text, one.start] for one in row.answers],
                *([row.words] if row.words else []),  # rows without words keep the digest that they always had
            ]
            for row in rows
        ]
    )


def digests_of_pairs(split: str, pairs: Sequence[Pair], source_text: str | None) -> dict[str, str]:
    """Return {split: digest of the target's rows}, and {split/source_text: digest of the source's} if one is read."""
    found = {split: digest_of_rows([pair.target for pair in pairs])}
    if source_text is not None:
        sources = [pair.source for pair in pairs if pair.source is not None]
        found[f"{split}/{source_text}"] = digest_of_rows(sources)
    return found
