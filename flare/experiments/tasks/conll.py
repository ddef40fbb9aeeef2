"""CoNLL files: one word and its tag a line, an empty line after each sentence.

    Nelson<TAB>B-PER
    Mandela<TAB>I-PER

Fields are separated by a tab or spaces; of more than two the first is the word and the last the tag. Lines that begin
with -DOCSTART- are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import DataError

COLUMNS = ["tokens", "ner_tags"]


def read_conll(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the sentences as rows of two lists, and the names of the columns.

    Raises:
        DataError: a line without a tag, or a file that is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a word may hold other characters that end a line
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as a text file in UTF-8: {error}") from error
    sentences: list[list[tuple[str, str]]] = [[]]
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if sentences[-1]:
                sentences.append([])
            continue
        fields = line.strip().split("\t") if "\t" in line else line.split()
        if len(fields) < 2:
            raise DataError(
                f"{path}, line {number}: {line.strip()!r} has no tag; a line is a word, a tab or a space, and a tag, "
                "and an empty line ends a sentence"
            )
        sentences[-1].append((fields[0].strip(), fields[-1].strip()))
    names = [[list(column) for column in zip(*sentence, strict=True)] for sentence in sentences if sentence]
    return [dict(zip(COLUMNS, columns, strict=True)) for columns in names], COLUMNS
