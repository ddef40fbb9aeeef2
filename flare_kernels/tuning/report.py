"""The tuner's output: a row for each timed problem, then the ratio of each step's time to its lower bound.

A problem is one step (operation) at one size (:mod:`.problem`). A variant is a form (implementation) of the step with
its tiles (:mod:`.variants`). The general rule (``triton_ops/config.py``) decides form and tiles of a launch without an
entry in the launch table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..launch_table import Entry
from .problem import Problem
from .variants import Variant

_SIZES = f"{'step':<16}{'shape':<14}{'tokens':<9}{'rank':<7}"
HEADER = f"{_SIZES}{'best us':>9}{'torch us':>10}{'rule us':>9}   chosen"


@dataclass
class Measurement:
    """The timing of a problem.

    Attributes:
        problem: the step and size that was timed.
        us: name of a form -> time of its best variant in microseconds. The name of the general rule's form with the
            suffix GENERAL_RULE -> time of the general rule's tiles.
        best: the variant to store in the launch table. This is the fastest valid variant of the general rule's form if
            it is slower than the fastest valid variant by no more than the noise, and otherwise the fastest valid
            variant. None if no variant is valid.
        floor_us: the lower bound in microseconds: the step's bytes divided by the copy bandwidth. None for the step
            "order", which is compute-bound.
        tried: number of variants that were checked.
        rejected: a line for each variant that failed or gave wrong results, with the reason.
    """

    problem: Problem
    us: dict[str, float] = field(default_factory=dict)
    best: Variant | None = None
    floor_us: float | None = None
    tried: int = 0
    rejected: list[str] = field(default_factory=list)

    def entry(self, best: Variant) -> Entry:
        """Return the launch table's entry for the best variant."""
        us = self.us | ({} if self.floor_us is None else {"floor": self.floor_us})
        return Entry(best.form, best.entry_tiles(), {name: round(value, 3) for name, value in us.items()})

    def __str__(self) -> str:
        if self.best is None:
            return f"{self.problem}no variant is valid"
        rule = next((us for name, us in self.us.items() if name.endswith(GENERAL_RULE)), None)
        times = (self.us[self.best.form], self.us.get("torch"), rule)
        return f"{self.problem}{_cell(times[0])}{_cell(times[1], 10)}{_cell(times[2])}   {self.best}"


#: Suffix of a form's name for the time of the general rule's tiles.
GENERAL_RULE = ", general rule"


def _cell(value: float | None, width: int = 9, digits: int = 1) -> str:
    return ("-" if value is None else f"{value:.{digits}f}").rjust(width)


def distances(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return time, lower bound and their ratio for each problem, for the table's ``about``.

    Problems without a valid variant are left out, and so are problems of the step "order", which has no lower bound.
    """
    rows = []
    for m in measurements:
        if m.best is not None and m.floor_us is not None:
            us, problem = m.us[m.best.form], m.problem
            sizes = {"step": problem.step, "shape": problem.shape.name, "M": problem.M, "r": problem.r}
            times = {"us": round(us, 3), "floor_us": round(m.floor_us, 3), "ratio": round(us / m.floor_us, 3)}
            rows.append(sizes | {"form": m.best.form} | times)
    return rows


def summary(rows: Sequence[dict[str, Any]], copy_rate: float) -> Iterator[str]:
    """Yield the lines that compare each step, and the sum of the steps of each size, with the lower bound.

    Args:
        rows: from :func:`distances`.
        copy_rate: bytes per microsecond that a copy reads and writes.
    """
    yield f"floor: bytes that a step must move, divided by the bandwidth of a copy, {copy_rate / 1e6:.2f} TB/s"
    yield f"{_SIZES}{'us':>9}{'floor us':>10}{'ratio':>8}   form"
    for (shape, M, r), group in itertools.groupby(rows, key=lambda row: (row["shape"], row["M"], row["r"])):
        steps = list(group)
        for row in steps:
            yield _line(row["step"], shape, M, r, row["us"], row["floor_us"]) + f"   {row['form']}"
        if len(steps) > 1:
            total, floor = (sum(row[name] for row in steps) for name in ("us", "floor_us"))
            yield _line(f"{len(steps)} steps", shape, M, r, total, floor)


def _line(step: str, shape: str, M: int, r: int, us: float, floor: float) -> str:
    return f"{step:<16}{shape:<14}{M:<9}{r:<7}{_cell(us)}{_cell(floor, 10)}{_cell(us / floor, 8, 2)}"
