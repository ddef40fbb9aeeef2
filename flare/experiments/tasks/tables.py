"""Read tables in the usual file formats.

.csv           comma-separated fields, quoted according to RFC 4180
.tsv           tab-separated fields; if the quotation marks are not balanced or a quotation spans several rows, all of
               them are read as text
.json          a list of rows, {"data": [rows]}, or one row per line
.jsonl         one row per line
.parquet       the columns of a Parquet file
.conll, .txt   one word and its tag per line, an empty line after each sentence
a folder       written by `datasets.Dataset.save_to_disk`

Text files are in UTF-8, with or without a byte order mark. A table may be split into several files (shards), such as
NAME-00000-of-00002.parquet and NAME-00001-of-00002.parquet, which are read as one table.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.json_files import parsed
from .data_error import DataError

#: Columns of a CoNLL file.
CONLL_COLUMNS = ["tokens", "ner_tags"]
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes:
        rows: one mapping column -> value per row.
        columns: names of the columns, in the file's order.
        names: column -> function that returns the label of a class index, for columns whose classes the file names
            (ClassLabel of datasets).
    """

    rows: list[dict[str, Any]]
    columns: list[str]
    names: dict[str, Callable[[int], str]] = field(default_factory=dict)


def find_tables(folder: Path, name: str, suffixes: Sequence[str]) -> list[Path]:
    """Return the paths of the tables called `name` in a folder; for a sharded table, the path of its first shard.

    Shards that count different totals (-of-NNNNN) are different tables.
    """
    paths = [folder / f"{name}{suffix}" for suffix in suffixes if (folder / f"{name}{suffix}").is_file()]
    for suffix in suffixes:
        shards = sorted(folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9]{suffix}"))
        paths += sorted({path.stem[-5:]: path for path in reversed(shards)}.values())
    return [*paths, *([folder / name] if is_saved(folder / name) else [])]


def is_saved(folder: Path) -> bool:
    """Return whether `datasets.Dataset.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def read_table(path: Path) -> Table:
    """Read a file, or a folder that save_to_disk wrote. If the path is a shard, read all shards of the table.

    Raises:
        DataError: the table cannot be read, a row has more or fewer fields than the header, a column occurs twice, a
            shard is missing, or the shards have different columns.
    """
    if path.is_dir():
        return _read_saved(path)
    shard = _SHARD.fullmatch(path.stem)
    if shard is None:
        return _READERS[path.suffix](path)
    count = int(shard["count"])
    paths = [path.with_name(f"{shard['stem']}-{number:05d}-of-{count:05d}{path.suffix}") for number in range(count)]
    if missing := [shard_path.name for shard_path in paths if not shard_path.is_file()]:
        raise DataError(f"{path.parent}: {len(missing)} of {count} shards are missing, such as {missing[0]}")
    tables = [_READERS[path.suffix](shard_path) for shard_path in paths]
    for shard_path, table in zip(paths, tables, strict=True):
        if table.columns != tables[0].columns:
            raise DataError(
                f"{shard_path} has the columns {', '.join(table.columns)}, and {paths[0].name} has "
                f"{', '.join(tables[0].columns)}; all shards of a table must have the same columns"
            )
    return Table([row for table in tables for row in table.rows], tables[0].columns, tables[0].names)


def check_keys(rows: Sequence[dict[str, Any]], columns: Sequence[str], where: str) -> None:
    """Check that every row has these columns. The rows of a JSON file may have different keys.

    Raises:
        DataError: a row lacks one of the columns.
    """
    for index, row in enumerate(rows):
        missing = [column for column in columns if column not in row]
        if missing:
            count = sum(missing[0] not in other for other in rows)
            raise DataError(
                f"{where}, row {index} (counted from 0): it has no {missing[0]!r}, which other rows have"
                f"{f'; {count - 1} more rows lack it' if count > 1 else ''}. Add it, or remove the row"
            )


def class_names(features: Any) -> dict[str, Callable[[int], str]]:
    """Return column -> function that returns the label of a class index.

    Args:
        features: a `datasets.Features`. Only columns with classes or lists of classes are returned.
    """
    from datasets import ClassLabel

    names = {}
    for column, feature in (features or {}).items():
        element = getattr(feature, "feature", feature)
        if isinstance(element, ClassLabel):
            names[column] = element.int2str
    return names


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Table:
    return _delimited(path, ",", csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> Table:
    """Read a TSV file with quoting or, if that fails or suggests plain quotation marks, without quoting.

    In a file without quoting, a text that starts with a quotation mark may end rows later, and the rows between would
    become part of its field. Such a field has a tab and a line break. If the file cannot be read without quoting, the
    field is really quoted.
    """
    quoted: Table | DataError
    try:
        quoted = _delimited(path, "\t", csv.QUOTE_MINIMAL)
    except DataError as error:
        quoted = error
    if isinstance(quoted, Table) and not any(
        "\n" in cell and "\t" in cell for row in quoted.rows for cell in row.values()
    ):
        return quoted
    try:
        table = _delimited(path, "\t", csv.QUOTE_NONE)
    except DataError:
        if isinstance(quoted, Table):
            return quoted
        raise quoted from None  # most files use quoting, so the first error helps more
    reason = "a quotation spans several rows" if isinstance(quoted, Table) else "they are not balanced"
    warnings.warn(f"{path}: quotation marks are read as text, because {reason}", stacklevel=2)
    return table


def _delimited(path: Path, delimiter: str, quoting: int) -> Table:
    kind, name = {",": ("CSV", "comma"), "\t": ("TSV", "tab")}[delimiter]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # without strict, an unclosed quotation mark would silently make the following rows part of its field
            reader = csv.reader(file, strict=True, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
            head = next(reader, [])
            _check_head(path, head)
            if len(head) == 1 and any(character in head[0] for character in ";\t|,"):
                raise DataError(f"{path}: fields must be separated by {name}s; its head is {head[0]!r}")
            rows, wrong = [], []
            for fields in reader:
                if len(fields) == len(head):
                    rows.append(dict(zip(head, fields, strict=True)))
                elif fields:
                    wrong.append((reader.line_num, len(fields)))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        advice = "; write texts of more than 100,000 characters as JSON lines" if "field limit" in str(error) else ""
        raise DataError(f"{path} cannot be read as a {kind} file in UTF-8: {error}{advice}") from error
    if wrong:
        line, count = wrong[0]
        raise DataError(
            f"{path}, line {line}: {count} fields, but the head has {len(head)} ({', '.join(head)})"
            f"{f'; {len(wrong) - 1} more row(s) like this' if len(wrong) > 1 else ''}. Put quotation marks "
            f"around a text with a {name} or a line break, and double the quotation marks inside it"
        )
    return Table(rows, head)


def _check_head(path: Path, head: Sequence[str]) -> None:
    duplicates = sorted({name for name in head if list(head).count(name) > 1})
    if duplicates:
        shown = ", ".join(map(repr, duplicates))
        named = f"the column {shown} occurs" if len(duplicates) == 1 else f"the columns {shown} occur"
        raise DataError(f"{path}: {named} more than once in the head; rename the repeated ones")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Table:
    try:
        content = parsed(path.read_text(encoding="utf-8-sig"), _object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line, the default of datasets' to_json
            return _read_jsonl(path)
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    except (ValueError, OSError) as error:  # a UnicodeDecodeError is a ValueError
        raise DataError(f"{path} cannot be read as JSON in UTF-8: {error}") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        holds = f"an object with {', '.join(list(content)[:5])}" if isinstance(content, dict) else repr(content)[:40]
        raise DataError(f'{path} must hold a list of rows, or {{"data": [rows]}}; it holds {holds}')
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {index} (counted from 0): it must be an object; it is {str(row)[:40]!r}")
    return _table_of_objects(rows)


def _read_jsonl(path: Path) -> Table:
    rows, number = [], 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                number += 1
                if line.strip():
                    row = parsed(line, _object)
                    if not isinstance(row, dict):
                        raise ValueError("the line is not an object")
                    rows.append(row)
    except (ValueError, OSError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{path}, line {max(number, 1)}: not a JSON object in UTF-8 ({error})") from error
    return _table_of_objects(rows)


def _table_of_objects(rows: list[dict[str, Any]]) -> Table:
    # A key that only some rows have is a column too; check_keys checks the columns that are needed.
    return Table(rows, list(dict.fromkeys(key for row in rows for key in row)))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return row


# --- Parquet and save_to_disk -----------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: pip install pyarrow, or write the data as CSV or JSON lines") from error
    try:
        # pyarrow's read_table would add a column if a parent folder is called NAME=VALUE
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as a Parquet file: {error}") from error
    _check_head(path, table.column_names)
    names = {}
    if b"huggingface" in (table.schema.metadata or {}):
        from datasets import Features

        names = class_names(Features.from_arrow_schema(table.schema))
    return Table(table.to_pylist(), list(table.column_names), names)


def _read_saved(folder: Path) -> Table:
    from datasets import load_from_disk

    try:
        data_set = load_from_disk(str(folder))
        return Table(data_set.to_list(), list(data_set.column_names), class_names(data_set.features))
    except Exception as error:  # datasets and pyarrow raise many different types
        raise DataError(
            f"{folder} cannot be read as a data set written by save_to_disk ({type(error).__name__}: {error})"
        ) from error


# --- CoNLL ------------------------------------------------------------------------------------------------------------


def _read_conll(path: Path) -> Table:
    """Read the sentences of a CoNLL file as rows of two lists, words and tags.

        Nelson<TAB>B-PER
        Mandela<TAB>I-PER

    Fields are separated by a tab or spaces. With more than two fields, the first is the word and the last is the tag.
    An empty line, or a line that starts with -DOCSTART-, ends a sentence.

    Raises:
        DataError: a line has no tag, or the file is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split at U+2028 in a word
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as a text file in UTF-8: {error}") from error
    sentences: list[list[tuple[str, str]]] = [[]]
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if sentences[-1]:
                sentences.append([])
            continue
        line = line.strip(" \t\r")  # strip() and split() without arguments would also remove a word's no-break space
        fields = line.split("\t") if "\t" in line else re.split(" +", line)
        if len(fields) < 2:
            raise DataError(
                f"{path}, line {number}: {line!r} has no tag; a line is a word, a tab or a space, and a tag, "
                "and an empty line ends a sentence"
            )
        sentences[-1].append((fields[0].strip(" "), fields[-1].strip(" ")))
    columns = [[list(column) for column in zip(*sentence, strict=True)] for sentence in sentences if sentence]
    return Table([dict(zip(CONLL_COLUMNS, lists, strict=True)) for lists in columns], CONLL_COLUMNS)


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
#: Suffixes of CoNLL files.
TAGGED = (".conll", ".txt")
_READERS |= dict.fromkeys(TAGGED, _read_conll)
