"""Draw grouped bars, with the mean written on each bar and, if a bar has several seeds, a dot for every seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..summary import Cell
from .style import (
    COLUMN,
    NORMAL,
    PAGE,
    SMALL,
    is_dark,
    legend_below,
    legend_rows,
    looks,
    new_figure,
    plain_axes,
    rows_of,
    text_width,
)

_NARROWEST = 0.085  # smallest width of a bar, in inches
_SHORTEST = 0.2  # smallest height of a bar that holds a number, as a share of the range of the values
_AXIS = 0.45  # space to the left of the axes, in inches


@dataclass(frozen=True)
class Series:
    """Bars of one kind, which have the same color.

    Attributes:
        name: name in the legend.
        method: the method that determines the color.
        cells: tick of the x axis -> scores; None if there are no scores.
    """

    name: str
    method: str
    cells: dict[str, Cell | None]


def grouped_bars(
    series: Sequence[Series],
    places: Sequence[str],
    *,
    ylabel: str,
    reference: tuple[str, float] | None = None,
    apart: str | None = None,
    digits: int = 1,
) -> Any:
    """Draw the bars of every series at every tick. The figure is as wide as a column if the bars fit, else as a page.

    Args:
        series: bars that are drawn side by side at each tick.
        places: ticks of the x axis, in order. If they do not fit next to each other, they are split over several axes,
            one below the other.
        ylabel: label of the y axis, which starts at 0, or below the lowest value if that is negative.
        reference: name and height of a dotted line through all axes.
        apart: tick (of the average) that a line separates from the other ticks; None: no tick.
        digits: decimals of the numbers on the bars.
    """
    chosen = looks([one.method for one in series])
    least = max(_NARROWEST * len(series) / 0.82, max(text_width(place, NORMAL) for place in places) + 0.04)
    names = [one.name for one in series] + ([f"{reference[0]}: {reference[1]:.1f}"] if reference else [])
    fits = len(places) * max(least, 0.13 * len(series)) <= COLUMN - _AXIS and legend_rows(names, COLUMN) <= 4
    width = COLUMN if fits else PAGE
    rows = rows_of(places, max(1, int((width - _AXIS) / least)))
    longest_row = max(map(len, rows))
    step = (width - _AXIS) / longest_row
    turned = max(text_width(place, NORMAL) for place in places) > step
    figure = new_figure(width, (1.45 + 0.25 * turned) * len(rows) + 0.15 + 0.14 * legend_rows(names, width))
    grid = figure.subplots(len(rows), 1, squeeze=False, sharey=True)[:, 0]
    thick = 0.84 / len(series)
    handles: list[Any] = []
    values = [value for one in series for cell in one.cells.values() if cell for value in (cell.mean, *cell.values)]
    values += [0.0, reference[1] if reference else 0.0]
    low, top = min(values), max(values)
    span = (top - low) or 1.0
    margin = span * (0.12 if thick * step >= text_width("00.0", 6) else 0.2)
    dotted = any(len(cell.values) > 1 for one in series for cell in one.cells.values() if cell)
    for axes, row in zip(grid, rows, strict=True):
        for place, name in enumerate(row):
            if name == apart and place:
                axes.axvline(place - 0.5, color="#aaaaaa", linewidth=0.6)
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
                linewidth=0.3,
            )
            for place, cell in known:
                spots = cell.values if len(cell.values) > 1 else ()
                axes.plot([place + shift] * len(spots), spots, "o", color="black", markersize=1.6, markeredgewidth=0)
                # if there are dots, the mean is written inside the bar (unless the bar is too short for it), because
                # above the dots the mean could be taken for a seed's score
                foot = dotted and cell.mean > _SHORTEST * span
                height, inside = (0.0, look["color"]) if foot else (max([0.0, cell.mean, *spots]), None)
                _number(axes, place + shift, height, f"{cell.mean:.{digits}f}", thick * step, inside)
            for place in sorted(set(range(len(row))) - {place for place, _ in known}):
                axes.text(place + shift, 0, "-", ha="center", va="bottom", fontsize=SMALL, color="#666666")
            if axes is grid[0]:
                handles.append(bars)
        if reference:
            axes.axhline(reference[1], color="black", linewidth=0.8, linestyle=":")
        axes.set_xlim(-0.55, longest_row - 0.45)
        axes.set_ylabel(ylabel, fontsize=NORMAL)
        axes.set_ylim(low - margin / 2 if low < 0 else 0, top + margin)
        if low < 0:
            axes.axhline(0, color="black", linewidth=0.6)
        plain_axes(axes)
        axes.set_xticks(
            range(len(row)), row, rotation=30 if turned else 0, ha="right" if turned else "center", fontsize=NORMAL
        )
        axes.tick_params(axis="x", length=0)
    if reference:
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], color="black", linewidth=0.8, linestyle=":"))
    legend_below(figure, handles, names)
    return figure


def _number(axes: Any, x: float, y: float, text: str, room: float, inside: str | None) -> None:
    """Write a number above a bar, or inside it at the bottom if the color of the bar (`inside`) is given.

    The number is rotated if the bar is narrow, and left out if the bar is too narrow for a rotated number.
    """
    from matplotlib.patheffects import withStroke

    size = 5.5
    if room < 0.075:
        return
    upright = 0.94 * room < 1.25 * text_width(text, size)
    dark = inside is not None and is_dark(inside)
    note = axes.annotate(
        text,
        (x, y),
        xytext=(0, 1.5),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=90 if upright else 0,
        fontsize=size,
        color="white" if dark else "black",
    )
    # an outline makes the number readable on lines and hatches
    note.set_path_effects([withStroke(linewidth=1.5, foreground=inside or "white")])
