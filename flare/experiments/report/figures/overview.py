"""Draw the figures that cover several tasks or models: average rank, and scores by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..cross_task import Overview, OverviewLine
from ..display import axis_name
from ..summary import Cell
from .bars import Series, grouped_bars
from .style import NORMAL, PAGE, SMALL, NothingToDraw, caption, looks, new_figure, plain_axes


def draw_average_ranks(overviews: Sequence[Overview]) -> Any:
    """Draw bars of the average rank over tasks, with the methods of a model side by side."""
    ranked = [one for one in overviews if len(one.tasks) > 1 and sum(line.rank is not None for line in one.lines) > 1]
    if not ranked:
        raise NothingToDraw("no model has two trained methods with results in every language of two or more tasks")
    names: dict[str, OverviewLine] = {line.name: line for one in ranked for line in one.lines if line.rank is not None}
    ranks = {(one.model, line.name): line.rank for one in ranked for line in one.lines}
    series = [
        Series(
            name,
            line.method,
            {
                one.model: Cell(rank, None, (rank,))
                for one in ranked
                if (rank := ranks.get((one.model, name))) is not None
            },
        )
        for name, line in names.items()
    ]
    figure = grouped_bars(series, [one.model for one in ranked], ylabel="Average rank", digits=2)
    tasks = list(dict.fromkeys(task for one in ranked for task in one.tasks))
    caption(figure, f"Average rank of the trained methods over {', '.join(tasks)} (1 is the best)")
    return figure


def draw_tasks(overviews: Sequence[Overview]) -> Any:
    """Draw horizontal bars of every method on every model, with one panel per task.

    If there are several tasks, another panel shows the average.
    """
    if sum(len(one.tasks) for one in overviews) < 2:
        raise NothingToDraw("there is only one task on one model")
    tasks = dict(pair for one in overviews for pair in one.tasks.items())
    panels: list[tuple[str, str]] = [(task, axis_name(metric)) for task, metric in tasks.items()]
    if len(tasks) > 1:
        panels.append(("average", "Average (%)"))
    bars = [(one, line) for one in overviews for line in one.lines]
    unique = {line.label: line.method for _, line in bars}  # a method has one color on all models
    colors = dict(zip(unique, looks(list(unique.values())), strict=True))
    several = len(overviews) > 1
    figure = new_figure(PAGE, 0.55 + 0.15 * (len(bars) + (1.2 * len(overviews) if several else 0.5)))
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    heights, at = {}, 0.0
    for one in overviews:
        if several:
            place = {"transform": grid[0].get_yaxis_transform(), "ha": "right", "va": "center"}
            grid[0].text(-0.03, at, one.model, fontsize=SMALL, fontweight="bold", **place)
            at += 1
        for line in one.lines:
            heights[id(line)], at = at, at + 1
        at += 0.2
    for axes, (task, label) in zip(grid, panels, strict=True):
        best = {
            one.model: max((c.mean for line in one.lines if (c := _cell(line, task))), default=0.0) for one in overviews
        }
        for one, line in bars:
            cell = _cell(line, task)
            if cell is None:
                axes.text(0.5, heights[id(line)], "-", va="center", fontsize=SMALL, color="#666666")
                continue
            look = colors[line.label]
            axes.barh(heights[id(line)], cell.mean, height=0.9, color=look["color"], edgecolor="white", linewidth=0.3)
            weight = "bold" if round(cell.mean, 1) == round(best[one.model], 1) else "normal"
            axes.annotate(
                f"{cell.mean:.1f}",
                (max(cell.mean, 0.0), heights[id(line)]),
                xytext=(2, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL - 0.5,
                fontweight=weight,
            )
        axes.set_xlabel(label, fontsize=NORMAL)
        if task != "average":
            axes.set_title(task, fontsize=NORMAL)
        low = min([0.0, *(c.mean for _, line in bars if (c := _cell(line, task)))])  # a correlation can be negative
        axes.set_xlim(1.1 * low, 118)
        axes.set_xticks([tick for tick in (-100, -75, -50, -25, 0, 25, 50, 75, 100) if tick >= low])
        plain_axes(axes)
        axes.grid(False, axis="y")
        axes.grid(axis="x", color="#dddddd", linewidth=0.5)
        axes.tick_params(axis="y", length=0)
    grid[0].set_yticks([heights[id(line)] for _, line in bars], [line.name for _, line in bars], fontsize=SMALL)
    grid[0].set_ylim(at - 0.6, -0.6)
    caption(
        figure, "Methods by task, averages over each task's languages" + ("" if several else f", {overviews[0].model}")
    )
    return figure


def _cell(line: OverviewLine, task: str) -> Cell | None:
    return line.average if task == "average" else line.cells.get(task)
