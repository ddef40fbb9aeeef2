"""Text as Markdown, LaTeX, CSV and a terminal's line show it: what has a meaning there is escaped."""

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
    # behind \\ these would be its arguments
    "[": "{[}",
    "*": "{*}",
}
# An underscore within a word means nothing in Markdown.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])")


def one_line(text: str) -> str:
    """Text without line breaks, control characters and half characters."""
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") else letter for letter in text)


def markdown(text: str) -> str:
    """Text in Markdown, in a cell or a line, as it stands."""
    shown = _MARKDOWN.sub(lambda found: "\\" + found.group(), one_line(text))
    return "\\" + shown if re.match(r"(#|[-+]\s)", shown) else shown


def code(text: str) -> str:
    """Text as a span of code in Markdown."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{one_line(text)}{fence}"


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in one_line(text))


def csv_cell(value: object) -> object:
    """A cell of a CSV file: a text that a spreadsheet would take for a formula has an apostrophe in front."""
    if not isinstance(value, str):
        return "" if value is None else value
    text = one_line(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text
