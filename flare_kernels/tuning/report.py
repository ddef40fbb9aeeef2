"""What the tuner prints: a row for each problem as it is timed, and at the end how far each step is from its floor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..launch_table import Entry
from .problem import Problem
from .variants import Variant

_SIZES = f"{'step':<16}{'shape':<14}{'tokens':<9}{'rank':<7}"
HEADER = f"{_SIZES}{'best us':>9}{'torch us':>10}{'rule us':>9}   taken"


@dataclass
class Finding:
    """What a problem's timing gave.

    us: microseconds of the best variant of each form, and of the general rule. best: the fastest variant, None where
    none counted. floor_us: the step's bytes over the copy bandwidth, None for the order, which is bound by arithmetic.
    tried, refused: how many variants there were, and which did not count and why.
    """

    problem: Problem
    us: dict[str, float] = field(default_factory=dict)
    best: Variant | None = None
    floor_us: float | None = None
    tried: int = 0
    refused: list[str] = field(default_factory=list)

    def entry(self, best: Variant) -> Entry:
        """Return the entry of the launch table."""
        us = self.us | ({} if self.floor_us is None else {"floor": self.floor_us})
        return Entry(best.form, best.entry_tiles(), {name: round(one, 3) for name, one in us.items()})

    def __str__(self) -> str:
        if self.best is None:
            return f"{self.problem}no variant counts"
        rule = next((us for name, us in self.us.items() if name.endswith(GENERAL_RULE)), None)
        times = (self.us[self.best.form], self.us.get("torch"), rule)
        return f"{self.problem}{_cell(times[0])}{_cell(times[1], 10)}{_cell(times[2])}   {self.best}"


#: What the name of a form is followed by where the general rule's tiles were timed.
GENERAL_RULE = ", general rule"


def _cell(value: float | None, width: int = 9, digits: int = 1) -> str:
    return ("-" if value is None else f"{value:.{digits}f}").rjust(width)


def distances(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return microseconds, floor and their ratio of each step at each size, for the table's ``about``."""
    rows = []
    for one in findings:
        if one.best is not None and one.floor_us is not None:
            us, problem = one.us[one.best.form], one.problem
            sizes = {"step": problem.step, "shape": problem.shape.name, "M": problem.M, "r": problem.r}
            times = {"us": round(us, 3), "floor_us": round(one.floor_us, 3), "ratio": round(us / one.floor_us, 3)}
            rows.append(sizes | {"form": one.best.form} | times)
    return rows


def summary(rows: Sequence[dict[str, Any]], copy_rate: float) -> Iterator[str]:
    """Yield the lines that say how far each step is from its floor, and the steps of each size together.

    rows: of :func:`distances`. copy_rate: bytes per microsecond of a copy.
    """
    yield f"floor: bytes that a step must move, over the bandwidth of a copy, {copy_rate / 1e6:.2f} TB/s"
    yield f"{_SIZES}{'us':>9}{'floor us':>10}{'ratio':>8}   form"
    for (shape, M, r), group in itertools.groupby(rows, key=lambda row: (row["shape"], row["M"], row["r"])):
        of_size = list(group)
        for row in of_size:
            yield _line(row["step"], shape, M, r, row["us"], row["floor_us"]) + f"   {row['form']}"
        if len(of_size) > 1:
            total, floor = (sum(row[name] for row in of_size) for name in ("us", "floor_us"))
            yield _line(f"{len(of_size)} steps", shape, M, r, total, floor)


def _line(step: str, shape: str, M: int, r: int, us: float, floor: float) -> str:
    return f"{step:<16}{shape:<14}{M:<9}{r:<7}{_cell(us)}{_cell(floor, 10)}{_cell(us / floor, 8, 2)}"
