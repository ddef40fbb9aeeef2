"""Escape text for Markdown, LaTeX and CSV, and put it into one line."""

from __future__ import annotations

import re
import unicodedata

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "→": r"$\rightarrow$",
    # directly after a line break (\\), LaTeX would read "[" or "*" as an argument of the line break
    "[": "{[}",
    "*": "{*}",
}
# An underscore within a word is not escaped, because it has no meaning in Markdown.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])")


def one_line(text: str) -> str:
    """Replace line breaks, control characters and lone surrogates with spaces."""
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") else letter for letter in text)


def markdown(text: str) -> str:
    """Escape text for a table cell or a line of Markdown."""
    escaped = _MARKDOWN.sub(lambda match: "\\" + match.group(), one_line(text))
    return "\\" + escaped if re.match(r"(#|[-+]\s)", escaped) else escaped


def code(text: str) -> str:
    """Return text as a code span in Markdown."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{one_line(text)}{fence}"


def latex(text: str) -> str:
    """Escape the special characters of LaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in one_line(text))


def csv_cell(value: object) -> object:
    """Return a value for a CSV cell: a text in one line, "" for None, and any other value unchanged.

    A text that a spreadsheet would read as a formula gets a leading apostrophe.
    """
    if not isinstance(value, str):
        return "" if value is None else value
    text = one_line(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text
