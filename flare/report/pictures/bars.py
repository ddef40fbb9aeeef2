"""Bars per language with a dot for every seed: the comparison of methods, of fusions, of source texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..summary import Cell
from .style import NORMAL, SMALL, heading, legend_below, looks, new_figure, plain_axes, rows_of

_BARS_IN_A_ROW = 42


@dataclass(frozen=True)
class Series:
    """One kind of bar: its name, the method that gives the color, and a cell for every place on the axis."""

    name: str
    method: str
    cells: dict[str, Cell | None]


def grouped_bars(
    series: Sequence[Series],
    places: Sequence[str],
    *,
    ylabel: str,
    title: str,
    reference: tuple[str, float] | None = None,
    apart: str | None = None,
) -> Any:
    """Bars of every series at every place.

    Args:
        series: what stands side by side at a place.
        places: ticks of the axis, in order; broken into rows where one row would be too narrow.
        reference: name and height of a dotted line through all axes.
        apart: a place that is set off from the others (the average).
    """
    chosen = looks([one.method for one in series])
    rows = rows_of(places, max(2, _BARS_IN_A_ROW // max(1, len(series))))
    longest_row = max(map(len, rows))
    step = max(1.0, max(len(place) for place in places) * 0.082)  # inches a place: its bars, or its name
    step = max(step, 0.17 * len(series) + 0.3)
    width = min(11.0, max(5.5, 1.1 + step * longest_row))
    turned = max(len(place) for place in places) * 0.082 > (width - 1.1) / longest_row + 0.02
    height = (2.9 + 0.35 * turned) * len(rows) + 0.9
    figure = new_figure(width, height)
    grid = figure.subplots(len(rows), 1, squeeze=False, sharey=True)[:, 0]
    thick = 0.82 / len(series)
    handles: list[Any] = []
    top = max([100.0, *(value for one in series for cell in one.cells.values() if cell for value in cell.values)])
    for axes, row in zip(grid, rows, strict=True):
        for place, name in enumerate(row):
            if name == apart and place:
                axes.axvline(place - 0.5, color="#aaaaaa", linewidth=0.8)
        for index, (one, look) in enumerate(zip(series, chosen, strict=True)):
            shift = (index - (len(series) - 1) / 2) * thick
            known = [(place, cell) for place, name in enumerate(row) if (cell := one.cells.get(name)) is not None]
            bars = axes.bar(
                [place + shift for place, _ in known],
                [cell.mean for _, cell in known],
                width=0.94 * thick,
                color=look["color"],
                hatch=look["hatch"],
                edgecolor="white",
                linewidth=0.4,
            )
            for place, cell in known:
                spots = cell.values
                axes.plot(
                    [place + shift] * len(spots),
                    spots,
                    "o",
                    color="black",
                    markersize=2.6,
                    markeredgecolor="white",
                    markeredgewidth=0.4,
                    zorder=3,
                )
            for place in range(len(row)):
                if place not in {there for there, _ in known}:
                    axes.text(place + shift, 1, "-", ha="center", fontsize=SMALL, color="#666666")
            if axes is grid[0]:
                handles.append(bars)
        if reference:
            axes.axhline(reference[1], color="black", linewidth=1, linestyle=":")
        axes.set_xlim(-0.55, longest_row - 0.45)
        axes.set_xticks(
            range(len(row)), row, rotation=30 if turned else 0, ha="right" if turned else "center", fontsize=NORMAL
        )
        axes.set_ylabel(ylabel, fontsize=NORMAL)
        axes.set_ylim(0, top * 1.01)
        plain_axes(axes)
        axes.tick_params(axis="x", labelsize=NORMAL, length=0)
    names = [one.name for one in series]
    if reference:
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], color="black", linewidth=1, linestyle=":"))
        names.append(f"{reference[0]}: {reference[1]:.1f}")
    legend_below(figure, handles, names, width)
    heading(figure, title)
    return figure
