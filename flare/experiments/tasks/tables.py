"""Rows of one file or folder, as people keep them.

.csv        fields between commas, quoted as RFC 4180 says
.tsv        fields between tabs; where the quotation marks do not pair up they are text
.json       a list of rows, {"data": [rows]}, or one row per line
.jsonl      one row per line
.parquet    one file
.conll      words and tags (`flare.experiments.tasks.conll`); .txt too
a folder    what `datasets.Dataset.save_to_disk` wrote

Files are UTF-8, with or without a byte order mark. Several shards (NAME-00000-of-00002.parquet) are one table.
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
from .conll import read_conll
from .errors import DataError

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    rows: column -> value.
    columns: in the file's order.
    names: column -> (index -> label), of columns whose classes the file names (datasets' ClassLabel).
    """

    rows: list[dict[str, Any]]
    columns: list[str]
    names: dict[str, Callable[[int], str]] = field(default_factory=dict)


def find_tables(folder: Path, name: str, suffixes: Sequence[str]) -> list[Path]:
    """Return the tables called `name` in a folder; of a table in shards the first shard."""
    found = [folder / f"{name}{suffix}" for suffix in suffixes if (folder / f"{name}{suffix}").is_file()]
    for suffix in suffixes:
        found += sorted(folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9]{suffix}"))[:1]
    return [*found, *([folder / name] if is_saved(folder / name) else [])]


def is_saved(folder: Path) -> bool:
    """Whether `datasets.Dataset.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def read_table(path: Path) -> Table:
    """Read a file, all shards of a table, or a saved folder.

    Raises:
        DataError: it cannot be read, a row has other columns than the head, or a column stands there twice.
    """
    if path.is_dir():
        return _read_saved(path)
    shard = _SHARD.fullmatch(path.stem)
    if shard is None:
        return _READERS[path.suffix](path)
    count = int(shard["count"])
    paths = [path.with_name(f"{shard['stem']}-{one:05d}-of-{count:05d}{path.suffix}") for one in range(count)]
    if missing := [one.name for one in paths if not one.is_file()]:
        raise DataError(f"{path.parent}: {len(missing)} of {count} shards are missing, such as {missing[0]}")
    tables = [_READERS[one.suffix](one) for one in paths]
    for one, table in zip(paths, tables, strict=True):
        if table.columns != tables[0].columns:
            raise DataError(
                f"{one} has the columns {', '.join(table.columns)}, and {paths[0].name} has "
                f"{', '.join(tables[0].columns)}; the shards of a table have the same"
            )
    return Table([row for table in tables for row in table.rows], tables[0].columns, tables[0].names)


def check_keys(rows: Sequence[dict[str, Any]], columns: Sequence[str], where: str) -> None:
    """Raise DataError where a row of a JSON file lacks one of these columns, which others have."""
    for index, row in enumerate(rows):
        lacking = [column for column in columns if column not in row]
        if lacking:
            count = sum(lacking[0] not in other for other in rows)
            raise DataError(
                f"{where}, row {index} (counted from 0): it has no {lacking[0]!r}, which other rows have"
                f"{f'; {count - 1} more lack it' if count > 1 else ''}. Add it, or remove the row"
            )


def class_names(features: Any) -> dict[str, Callable[[int], str]]:
    """Return column -> (index -> label) of datasets' features: of columns of classes, and of lists of classes."""
    from datasets import ClassLabel

    found = {}
    for column, feature in (features or {}).items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, ClassLabel):
            found[column] = inner.int2str
    return found


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Table:
    return _delimited(path, ",", csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> Table:
    try:
        return _delimited(path, "\t", csv.QUOTE_MINIMAL)
    except DataError as quoted:
        try:
            table = _delimited(path, "\t", csv.QUOTE_NONE)
        except DataError:
            raise quoted from None  # the better reason: most files are quoted
        warnings.warn(f"{path}: its quotation marks are read as text, because they do not pair up", stacklevel=2)
        return table


def _delimited(path: Path, mark: str, quoting: int) -> Table:
    kind, name = {",": ("CSV", "comma"), "\t": ("TSV", "tab")}[mark]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # strict: a quotation mark that is never closed would swallow the rows after it
            reader = csv.reader(file, strict=True, delimiter=mark, quoting=quoting)  # type: ignore[arg-type]
            head = next(reader, [])
            _check_head(path, head)
            if len(head) == 1 and any(other in head[0] for other in ";\t|,"):
                raise DataError(f"{path}: the fields must be separated by {name}s; its head is {head[0]!r}")
            rows, wrong = [], []
            for fields in reader:
                if len(fields) == len(head):
                    rows.append(dict(zip(head, fields, strict=True)))
                elif fields:
                    wrong.append((reader.line_num, len(fields)))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        long = "; write texts of more than 100,000 letters as JSON lines" if "field limit" in str(error) else ""
        raise DataError(f"{path} cannot be read as a {kind} file in UTF-8: {error}{long}") from error
    if wrong:
        line, count = wrong[0]
        raise DataError(
            f"{path}, line {line}: {count} fields where the head has {len(head)} ({', '.join(head)})"
            f"{f'; so are {len(wrong) - 1} more rows' if len(wrong) > 1 else ''}. A text with a {name} or a line break "
            "needs quotation marks around it, and one inside it is written twice"
        )
    return Table(rows, head)


def _check_head(path: Path, head: Sequence[str]) -> None:
    twice = sorted({name for name in head if list(head).count(name) > 1})
    if twice:
        raise DataError(f"{path}: the column {', '.join(map(repr, twice))} stands in the head twice; rename one")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Table:
    try:
        content = parsed(path.read_text(encoding="utf-8-sig"), _object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line, as datasets' to_json writes by default
            return _read_jsonl(path)
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    except (ValueError, OSError) as error:  # also what UTF-8 raises
        raise DataError(f"{path} cannot be read as JSON in UTF-8: {error}") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        holds = f"an object with {', '.join(list(content)[:5])}" if isinstance(content, dict) else repr(content)[:40]
        raise DataError(f'{path} must hold a list of rows, or {{"data": [rows]}}; it holds {holds}')
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {index} (counted from 0): not an object, but {str(row)[:40]!r}")
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
                        raise ValueError("it is not an object")
                    rows.append(row)
    except (ValueError, OSError) as error:  # also what UTF-8 and JSON raise
        raise DataError(f"{path}, line {max(number, 1)}: no JSON object in UTF-8 ({error})") from error
    return _table_of_objects(rows)


def _table_of_objects(rows: list[dict[str, Any]]) -> Table:
    # A key that only some rows have is a column all the same; check_keys looks at those that are needed.
    return Table(rows, list(dict.fromkeys(key for row in rows for key in row)))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return made


# --- Parquet and save_to_disk -----------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: pip install pyarrow, or write the data as CSV or JSON lines") from error
    try:
        # ParquetFile: read_table takes a folder called NAME=VALUE above the file for one more column
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
        found = load_from_disk(str(folder))
        return Table(found.to_list(), list(found.column_names), class_names(found.features))
    except Exception as error:  # datasets and pyarrow each raise kinds of their own
        raise DataError(
            f"{folder} cannot be read as a data set that save_to_disk wrote ({type(error).__name__}: {error})"
        ) from error


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
#: Files without a head, of words and tags.
TAGGED = (".conll", ".txt")
_READERS |= dict.fromkeys(TAGGED, lambda path: Table(*read_conll(path)))
