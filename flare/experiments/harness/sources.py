"""The source text of a request: the request's own prompt with the document's texts in the source language."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.utils import apply_template

from ..tasks.files import read_rows
from ..utils.errors import UserError

logger = logging.getLogger("lm_eval.models.flare")  # shown as lm_eval shows its own
PREFIX = "source_"
Row = dict[str, Any]


class Sources:
    """Finds the source's prompt and continuation of every request.

    The source's texts of a document are its own columns ``source_<column>``, or, with ``file``, the columns of the
    file's row: the one with the document's id where both have ids, else the one at its position in the split.

    The source's prompt is ``template`` filled in with them, or without a template the request's prompt in which each
    text of the document is replaced with its source. A continuation that is a text of the document is replaced too.

    Args:
        file: rows in the source language (.jsonl, .json, .csv, .tsv, .parquet); ``{task}`` stands for the task's name.
        columns: those to replace; None: all texts that the document and its source have both.
        template: Jinja template of the source's prompt, or a file that holds it. The columns are the document's, with
            the source's texts in place of its own.
        id_column: of documents and of the file's rows.

    Raises:
        UserError: a template's file or the rows cannot be read.
    """

    def __init__(
        self,
        file: str | None = None,
        columns: Sequence[str] | None = None,
        template: str | None = None,
        id_column: str = "id",
    ) -> None:
        self.file, self.columns, self.id_column = file, columns, id_column
        if template is not None and "{" not in template:
            try:
                template = Path(template).expanduser().read_text(encoding="utf-8")
            except OSError as error:
                raise UserError(
                    f"doc_to_source={template}: neither a template with {{{{column}}}} nor a file ({error})"
                ) from error
        self.template = template
        self._tables: dict[str, tuple[list[Row], dict[str, Row]]] = {}
        self._said: set[str] = set()
        if file is not None and "{task}" not in file:
            self._table(file)  # a wrong name is said before anything is computed

    def of(self, request: Any) -> tuple[str, str]:
        """Return the source's prompt and continuation of one request of lm_eval (empty where it generates).

        Raises:
            UserError: the document has no source, or its texts cannot be told apart in the prompt.
        """
        where = f"task {request.task_name}, document {request.doc_id}"
        context = str(request.args[0])
        continuation = request.args[1] if isinstance(request.args[1], str) else ""
        row = self._row(request, where)
        pairs = self._pairs(request.doc, row, where)
        if self.template is not None:
            prompt = str(apply_template(self.template, {**request.doc, **row}))
        else:
            prompt = self._replaced(context, continuation, pairs, where, str(request.task_name))
        return prompt, _in_source(continuation, pairs)

    def _row(self, request: Any, where: str) -> Row:
        """The source's columns of a document, under the document's own names."""
        doc = request.doc
        if self.file is None:
            found = {
                name.removeprefix(PREFIX): value
                for name, value in doc.items()
                if name.startswith(PREFIX) and name.removeprefix(PREFIX) in doc
            }
            if not found and self.template is None:
                raise UserError(
                    f"{where}: there is no source, and the adapter was trained with one. Give source_file=FILE, "
                    f"documents with columns {PREFIX}<column> (it has {', '.join(doc)}) or doc_to_source=TEMPLATE; "
                    "no_source=True runs the adapter as plain LoRA, which predicts worse"
                )
            return found
        name = self.file.replace("{task}", str(request.task_name))
        rows, by_id = self._table(name)
        if by_id and doc.get(self.id_column) is not None:
            key = str(doc[self.id_column])
            if key not in by_id:
                raise UserError(f"{where}: source_file={name} has no row with {self.id_column}={key}")
            return by_id[key]
        if request.doc_id >= len(rows):
            raise UserError(
                f"{where}: source_file={name} has {len(rows)} rows, matched by position because documents and rows do "
                f"not both have a column {self.id_column} (source_id names another)"
            )
        return rows[request.doc_id]

    def _table(self, name: str) -> tuple[list[Row], dict[str, Row]]:
        """Rows of a file in their order, and by id (empty where not every row has one)."""
        if name not in self._tables:
            path = Path(name).expanduser()
            if not path.exists():
                raise UserError(f"source_file={name}: no such file")
            rows, _ = read_rows(path)
            ids = [str(row[self.id_column]) for row in rows if row.get(self.id_column) not in (None, "")]
            by_id = dict(zip(ids, rows, strict=True)) if len(ids) == len(rows) else {}
            if by_id and len(by_id) < len(rows):
                raise UserError(f"source_file={name}: some values of {self.id_column} occur more than once")
            self._tables[name] = rows, by_id
        return self._tables[name]

    def _pairs(self, doc: Mapping[str, Any], row: Row, where: str) -> dict[str, dict[str, str]]:
        """Column -> the document's texts in it, each with its source."""
        names = [name for name in row if name in doc and name != self.id_column]
        if self.columns is not None:
            lacking = [name for name in self.columns if name not in names]
            if lacking:
                raise UserError(
                    f"{where}: source_columns={'+'.join(self.columns)}: the document or its source has no "
                    f"{', '.join(lacking)}; both have {', '.join(names) or 'none'}"
                )
            names = list(self.columns)
        found = {}
        for name in names:
            own, theirs = _texts(doc[name]), _texts(row[name])
            if not own or len(own) != len(theirs):
                if self.columns is not None:
                    raise UserError(
                        f"{where}: column {name} holds {len(own)} texts and its source {len(theirs)}; it must hold a "
                        "text, or a list of texts with as many in the source"
                    )
                continue
            texts = {a.strip(): b.strip() for a, b in zip(own, theirs, strict=True) if a.strip()}
            if not all(texts.values()):
                raise UserError(f"{where}: the source text of column {name} is empty")
            found[name] = texts
        return found

    def _replaced(
        self, context: str, continuation: str, pairs: dict[str, dict[str, str]], where: str, task: str
    ) -> str:
        """The prompt with each text replaced, all at once."""
        sources: dict[str, str] = {}
        absent = []
        for name, texts in pairs.items():
            changed = {own: theirs for own, theirs in texts.items() if own != theirs}
            there = {own: theirs for own, theirs in texts.items() if own in context}
            if not there and continuation.strip() not in texts:
                absent.append(name)
            for own in changed:
                if (count := context.count(own)) > 1:
                    raise UserError(
                        f"{where}: the text of column {name} ({own[:40]!r}) occurs {count} times in the prompt, so "
                        "which one to replace is not known. Give the source's prompt with doc_to_source=TEMPLATE, or "
                        "name the columns to replace with source_columns"
                    )
            sources |= {own: theirs for own, theirs in there.items() if own in changed}
        if absent and (self.columns is not None or len(absent) == len(pairs)):
            raise UserError(
                f"{where}: {_of_columns(absent)} not in the prompt as the document has it; give the source's prompt "
                "with doc_to_source=TEMPLATE"
            )
        used = [name for name in pairs if name not in absent]
        self._say(
            task,
            f"task {task}: the source's prompt is the prompt with the source's {', '.join(used)}"
            + (f" (not in the prompt: {', '.join(absent)})" if absent else ""),
        )
        if not sources:
            return context
        longest_first = "|".join(re.escape(own) for own in sorted(sources, key=len, reverse=True))
        return re.sub(longest_first, lambda found: sources[found[0]], context)

    def _say(self, task: str, line: str) -> None:
        """Log one line for each task."""
        if task not in self._said:
            self._said.add(task)
            logger.info(line)


def _texts(value: Any) -> list[str]:
    """The texts that a column holds: one, several, or none."""
    values = [value] if isinstance(value, str) else value
    return list(values) if isinstance(values, list) and all(isinstance(one, str) for one in values) else []


def _in_source(continuation: str, pairs: dict[str, dict[str, str]]) -> str:
    """The continuation, or its source where it is a text of the document; white space around it stays."""
    text = continuation.strip()
    for texts in pairs.values():
        if text in texts:
            return continuation.replace(text, texts[text], 1)
    return continuation


def _of_columns(names: Sequence[str]) -> str:
    if not names:
        return "no column with texts is in the document and in its source, so there is nothing"
    return f"the text of column {names[0]} is" if len(names) == 1 else f"the texts of columns {', '.join(names)} are"
