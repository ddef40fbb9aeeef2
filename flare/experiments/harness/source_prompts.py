"""Build the source prompt of an lm_eval request: the request's prompt with the document's texts in the source language.

lm_eval makes the requests of a task from documents (rows of the data set), with a prompt template.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.utils import apply_template

from ..tasks.files import read_rows
from ..utils.errors import UserError

logger = logging.getLogger("lm_eval.models.flare")  # a child of lm_eval's logger
PREFIX = "source_"
Row = dict[str, Any]


class SourcePrompts:
    """Builds the prompts and continuations of requests in the source language.

    The source texts of a document are its columns ``source_<column>``. With ``file``, they are the columns of one row
    of the file. This is the row with the document's id if the documents and the file have ids, otherwise the row at the
    document's position.

    The source prompt is ``template``, rendered with these texts. Without a template, it is the request's prompt with
    each text of the document replaced by its source text. A continuation that is a text of the document is also
    replaced by its source text.

    Args:
        file: rows in the source language (.jsonl, .json, .csv, .tsv, .parquet); ``{task}`` stands for the task's name.
        columns: names of the columns whose texts are replaced. None: all columns with texts that both the document and
            its source have.
        template: Jinja template of the source prompt, or a file that holds the template. Its variables are the
            document's columns, with the source texts in place of the document's texts.
        id_column: name of the column with the ids, in the documents and in the file.

    Raises:
        UserError: the template's file or ``file`` cannot be read, or an id occurs more than once in ``file``.
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
        self._logged: set[str] = set()
        if file is not None and "{task}" not in file:
            self._table(file)  # raises for a wrong name before anything is computed

    def of(self, request: Any) -> tuple[str, str]:
        """Return the source prompt and the source continuation of a request; the continuation is empty for generation.

        Raises:
            UserError: the document has no source, a source text is empty, ``columns`` names a column that the document
                or its source lacks, a column has different numbers of texts in the document and in its source, or
                the prompt lacks the texts to replace or contains one of them more than once.
        """
        where = _where(request)
        context = str(request.args[0])
        continuation = request.args[1] if isinstance(request.args[1], str) else ""
        row = self._row(request, where)
        pairs = self._pairs(request.doc, row, where)
        if self.template is not None:
            prompt = str(apply_template(self.template, {**request.doc, **row}))
        else:
            prompt = self._replaced(context, continuation, pairs, where, str(request.task_name))
        return prompt, _in_source(continuation, pairs)

    def check_choices(self, requests: Sequence[Any]) -> None:
        """Refuse documents in which only some of the choices have a source text.

        A column with the text of the correct answer would put only this answer into the source language, which shows
        which choice is correct. Columns that the user names are not checked.

        Args:
            requests: all requests that score a continuation.

        Raises:
            UserError: ``columns`` is None, and only some continuations of a document are replaced by source texts.
        """
        if self.columns is not None:
            return
        documents: dict[tuple[str, int], list[Any]] = {}
        for request in requests:
            documents.setdefault((str(request.task_name), request.doc_id), []).append(request)
        for members in documents.values():
            where, doc = _where(members[0]), members[0].doc
            pairs = self._pairs(doc, self._row(members[0], where), where)
            choices = {str(request.args[1]).strip() for request in members}
            found = {name: choices & texts.keys() for name, texts in pairs.items()}
            kept = choices.difference(*found.values())
            replaced = [name for name in found if any(pairs[name][text] != text for text in found[name])]
            if kept and replaced:
                raise UserError(
                    f"{where}: only some of the choices are texts of column {', '.join(replaced)}, so the source has "
                    f"these in the source language and {min(kept)[:40]!r} unchanged, which can show the correct "
                    "answer. Name the columns to replace with source_columns, joined by '+' (the document and its "
                    f"source share {', '.join(pairs)}), without a column that holds the answer"
                )

    def _row(self, request: Any, where: str) -> Row:
        """Return the source texts of a document, by the document's column names."""
        doc = request.doc
        if self.file is None:
            row = {
                name.removeprefix(PREFIX): value
                for name, value in doc.items()
                if name.startswith(PREFIX) and name.removeprefix(PREFIX) in doc
            }
            if not row and self.template is None:
                raise UserError(
                    f"{where}: the document has no source text, and the adapter was trained with source texts. Give "
                    f"source_file=FILE, columns {PREFIX}<column> in the documents (they have {', '.join(doc)}), or "
                    "doc_to_source=TEMPLATE; no_source=True runs the adapter as plain LoRA, which predicts worse"
                )
            return row
        name = self.file.replace("{task}", str(request.task_name))
        rows, by_id = self._table(name)
        if by_id and doc.get(self.id_column) is not None:
            key = str(doc[self.id_column])
            if key not in by_id:
                raise UserError(f"{where}: source_file={name} has no row with {self.id_column}={key}")
            return by_id[key]
        if request.doc_id >= len(rows):
            raise UserError(
                f"{where}: source_file={name} has {len(rows)} rows, matched by position, because documents and file do "
                f"not both have a column {self.id_column}. Name the column of ids with source_id, or add missing rows"
            )
        return rows[request.doc_id]

    def _table(self, name: str) -> tuple[list[Row], dict[str, Row]]:
        """Return the rows of a file, and a dict from id to row. The dict is empty if a row has no id."""
        if name not in self._tables:
            path = Path(name).expanduser()
            if not path.exists():
                raise UserError(f"source_file={name}: no such file")
            rows = read_rows(path).rows
            ids = [str(row[self.id_column]) for row in rows if row.get(self.id_column) not in (None, "")]
            by_id = dict(zip(ids, rows, strict=True)) if len(ids) == len(rows) else {}
            if by_id and len(by_id) < len(rows):
                raise UserError(f"source_file={name}: some values of {self.id_column} occur more than once")
            self._tables[name] = rows, by_id
        return self._tables[name]

    def _pairs(self, doc: Mapping[str, Any], row: Row, where: str) -> dict[str, dict[str, str]]:
        """Return, for each column to replace, a dict from the document's text to its source text."""
        names = [name for name in row if name in doc and name != self.id_column]
        if self.columns is not None:
            missing = [name for name in self.columns if name not in names]
            if missing:
                raise UserError(
                    f"{where}: source_columns={'+'.join(self.columns)}: the document or its source has no "
                    f"column {', '.join(missing)}; both have {', '.join(names) or 'no common column'}"
                )
            names = list(self.columns)
        pairs = {}
        for name in names:
            targets, sources = _texts(doc[name]), _texts(row[name])
            if not targets or len(targets) != len(sources):
                if self.columns is not None:
                    raise UserError(
                        f"{where}: column {name} holds {len(targets)} texts and its source holds {len(sources)}; "
                        "both must hold one text, or lists of the same length"
                    )
                continue
            texts = {a.strip(): b.strip() for a, b in zip(targets, sources, strict=True) if a.strip()}
            if not all(texts.values()):
                raise UserError(f"{where}: the source text of column {name} is empty")
            pairs[name] = texts
        return pairs

    def _replaced(
        self, context: str, continuation: str, pairs: dict[str, dict[str, str]], where: str, task: str
    ) -> str:
        """Return the prompt with every text of the document replaced by its source text."""
        replacements: dict[str, str] = {}
        absent = []
        for name, texts in pairs.items():
            changed = {text: source for text, source in texts.items() if text != source}
            present = {text: source for text, source in texts.items() if text in context}
            if not present and continuation.strip() not in texts:
                absent.append(name)
            for text in changed:
                if (count := context.count(text)) > 1:
                    raise UserError(
                        f"{where}: the text of column {name} ({text[:40]!r}) occurs {count} times in the prompt, so "
                        "it is not clear which one to replace. Give the source prompt with doc_to_source=TEMPLATE, or "
                        "name the columns to replace with source_columns"
                    )
            replacements |= {text: source for text, source in present.items() if text in changed}
        if len(absent) == len(pairs) or (absent and self.columns is not None):
            raise UserError(
                f"{where}: {_nothing_to_replace(absent)}; give the source prompt with doc_to_source=TEMPLATE"
            )
        used = [name for name in pairs if name not in absent]
        self._log_once(
            task,
            f"task {task}: the source prompt is the prompt with these columns in the source language: {', '.join(used)}"
            + (f" (not in the prompt: {', '.join(absent)})" if absent else ""),
        )
        if not replacements:
            return context
        longest_first = "|".join(re.escape(text) for text in sorted(replacements, key=len, reverse=True))
        return re.sub(longest_first, lambda match: replacements[match[0]], context)

    def _log_once(self, task: str, line: str) -> None:
        """Log a line once per task."""
        if task not in self._logged:
            self._logged.add(task)
            logger.info(line)


def _where(request: Any) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _texts(value: Any) -> list[str]:
    """Return a column's value as a list of texts: [value] for a text, a list of texts as it is, [] for other values."""
    values = [value] if isinstance(value, str) else value
    return list(values) if isinstance(values, list) and all(isinstance(one, str) for one in values) else []


def _in_source(continuation: str, pairs: dict[str, dict[str, str]]) -> str:
    """Return the source text of a continuation that is a text of the document; return other continuations unchanged.

    White space before and after the text is kept.
    """
    text = continuation.strip()
    for texts in pairs.values():
        if text in texts:
            return continuation.replace(text, texts[text], 1)
    return continuation


def _nothing_to_replace(absent: Sequence[str]) -> str:
    """Return why a prompt has no text to replace. `absent`: the columns whose texts are not in the prompt."""
    if not absent:
        return "the document and its source share no column with texts, so nothing in the prompt can be replaced"
    texts = f"text of column {absent[0]}" if len(absent) == 1 else f"texts of columns {', '.join(absent)}"
    return f"the prompt does not contain the {texts} exactly as in the document"
