"""Select the lines of a table that represent the methods. Ablations have separate tables and figures."""

from __future__ import annotations

from typing import Any

from .collect import METHODS, RunGroup
from .summary import Line, Quality

_MOST_LINES = 10  # a figure with up to this many lines shows all of them


def method_of(group: RunGroup, label: str) -> str:
    """Return the method of a line."""
    return group.of(label)[0].run.record.method


def main_lines(group: RunGroup, table: Quality) -> list[Line]:
    """Return every line if there are at most `_MOST_LINES`, otherwise the representative lines."""
    return list(table.lines) if len(table.lines) <= _MOST_LINES else representative_lines(group, table)


def representative_lines(group: RunGroup, table: Quality) -> list[Line]:
    """Return, for each method, the line closest to the method's defaults.

    All lines whose name was given by the user and all lines of unknown methods are also returned.
    """
    methods: dict[int | None, set[str]] = {}
    for line in table.lines:
        record = group.of(line.label)[0].run.record
        methods.setdefault(record.r, set()).add(record.method)

    def distance(line: Line) -> tuple[Any, ...]:
        """Return a sort key, smallest for a line with default options, all languages and the most common rank r."""
        record = group.of(line.label)[0].run.record
        other_setting = " @ " in line.label or record.fusion not in (None, "add_relu")
        return line.label != record.method, line.label not in table.complete, other_setting, -len(methods[record.r])

    closest: dict[str, Line] = {}
    for line in table.lines:
        method = method_of(group, line.label)
        closest[method] = min(closest.get(method, line), line, key=distance)  # with equal keys, the first line
    return [
        line for line in table.lines if line in closest.values() or _is_main(line.label, method_of(group, line.label))
    ]


def _is_main(label: str, method: str) -> bool:
    """Return whether a line is a method with its defaults, has a name given by the user, or is of an unknown method."""
    return label == method or (not label.startswith(f"{method}-") and " @ " not in label) or method not in METHODS
