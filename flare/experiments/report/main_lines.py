"""Which lines stand for the methods where ablations have tables and pictures of their own."""

from __future__ import annotations

from typing import Any

from .collect import METHODS, Group
from .summary import Line, Quality

_MOST_LINES = 10


def method_of(group: Group, label: str) -> str:
    """Return the method behind a line."""
    return group.of(label)[0].run.record.method


def main_lines(group: Group, table: Quality) -> list[Line]:
    """Return every line where there are few, else the plainest of each method and names of the user's."""
    return list(table.lines) if len(table.lines) <= _MOST_LINES else plainest(group, table)


def plainest(group: Group, table: Quality) -> list[Line]:
    """Return the plainest line of each method and those with names of the user's."""
    methods: dict[int | None, set[str]] = {}
    for line in table.lines:
        record = group.of(line.label)[0].run.record
        methods.setdefault(record.r, set()).add(record.method)

    def departs(line: Line) -> tuple[Any, ...]:
        """Small for a line that has all languages, the default fusion, and the rank that most methods have."""
        record = group.of(line.label)[0].run.record
        odd = " @ " in line.label or record.fusion not in (None, "add_relu")
        return line.label != record.method, line.label not in table.complete, odd, -len(methods[record.r])

    found: dict[str, Line] = {}
    for line in table.lines:
        method = method_of(group, line.label)
        found[method] = min(found.get(method, line), line, key=departs)  # of equal ones the first
    return [
        line for line in table.lines if line in found.values() or _is_main(line.label, method_of(group, line.label))
    ]


def _is_main(label: str, method: str) -> bool:
    """Whether a line is a method with its defaults (or a name of the user's), no ablation."""
    return label == method or (not label.startswith(f"{method}-") and " @ " not in label) or method not in METHODS
