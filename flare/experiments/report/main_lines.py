"""Select the lines that represent the methods; ablations have separate tables and figures."""

from __future__ import annotations

from typing import Any

from .collect import METHODS, RunGroup
from .summary import Line, Quality

_MOST_LINES = 10


def method_of(group: RunGroup, label: str) -> str:
    """Return the method of a line."""
    return group.of(label)[0].run.record.method


def main_lines(group: RunGroup, table: Quality) -> list[Line]:
    """Return every line if there are few, else the representative lines."""
    return list(table.lines) if len(table.lines) <= _MOST_LINES else representative_lines(group, table)


def representative_lines(group: RunGroup, table: Quality) -> list[Line]:
    """Return, for each method, the line closest to its defaults, and all lines with names given by the user."""
    methods: dict[int | None, set[str]] = {}
    for line in table.lines:
        record = group.of(line.label)[0].run.record
        methods.setdefault(record.r, set()).add(record.method)

    def distance(line: Line) -> tuple[Any, ...]:
        """Return a small key for a line with the defaults, all languages, and the rank that most methods have."""
        record = group.of(line.label)[0].run.record
        other_setting = " @ " in line.label or record.fusion not in (None, "add_relu")
        return line.label != record.method, line.label not in table.complete, other_setting, -len(methods[record.r])

    closest: dict[str, Line] = {}
    for line in table.lines:
        method = method_of(group, line.label)
        closest[method] = min(closest.get(method, line), line, key=distance)  # the first of equal ones
    return [
        line for line in table.lines if line in closest.values() or _is_main(line.label, method_of(group, line.label))
    ]


def _is_main(label: str, method: str) -> bool:
    """Return whether a line is a method with its defaults or has a name given by the user."""
    return label == method or (not label.startswith(f"{method}-") and " @ " not in label) or method not in METHODS
