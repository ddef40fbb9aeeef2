"""Pictures of the whole comparison: quality by language, and quality against what it costs."""

from __future__ import annotations

import statistics
from typing import Any

from ..collect import Group
from ..summary import Line, Quality, costs, quality
from ..tables import METRIC_NAMES
from .bars import Series, grouped_bars
from .style import NORMAL, NothingToDraw, heading, is_main, legend_below, looks, new_figure, plain_axes

AVERAGE = "average"
_MOST_LINES = 10


def shown_name(metric: str) -> str:
    """The metric's name for an axis."""
    return f"{METRIC_NAMES.get(metric, metric)} (%)"


def method_of(group: Group, label: str) -> str:
    """The method behind a line."""
    return group.of(label)[0].run.record.method


def seeds_text(table: Quality, lines: list[Line]) -> str:
    """ "dots: seeds" only where there are several."""
    many = any(cell and len(cell.values) > 1 for line in lines for cell in line.cells.values())
    return "bars: means, dots: seeds" if many else "one seed"


def main_lines(group: Group, table: Quality) -> list[Line]:
    """Every line where there are few, else the plainest of each method and names of the user's: ablations have
    pictures of their own."""
    lines = list(table.lines)
    if len(lines) <= _MOST_LINES:
        return lines
    methods: dict[int | None, set[str]] = {}
    for line in lines:
        record = group.of(line.label)[0].run.record
        methods.setdefault(record.r, set()).add(record.method)

    def departs(line: Line) -> tuple[Any, ...]:
        """Small for a line that has all languages, the default fusion, and the rank that most methods have."""
        record = group.of(line.label)[0].run.record
        odd = " @ " in line.label or record.fusion not in (None, "add_relu")
        return line.label != record.method, line.label not in table.complete, odd, -len(methods[record.r])

    plainest: dict[str, Line] = {}
    for line in lines:
        method = method_of(group, line.label)
        plainest[method] = min(plainest.get(method, line), line, key=departs)  # of equal ones the first
    return [line for line in lines if line in plainest.values() or is_main(line.label, method_of(group, line.label))]


def draw_comparison(group: Group, metric: str) -> Any:
    """Bars per language and their average, a dot for every seed."""
    table = quality(group, metric)
    lines = main_lines(group, table)
    if len(lines) < 2:
        raise NothingToDraw("there is only one method to show")
    places = list(table.languages)
    series = []
    for line in lines:
        cells = dict(line.cells)
        if len(places) > 1 and line.label in table.complete:
            cells[AVERAGE] = line.average
        series.append(Series(line.name, method_of(group, line.label), cells))
    if len(places) > 1:
        places.append(AVERAGE)
    return grouped_bars(
        series,
        places,
        ylabel=shown_name(metric),
        title=f"{group.task}, {group.source} as the source language ({seeds_text(table, lines)})",
        reference=base_line(group, metric),
        apart=AVERAGE,
    )


def base_line(group: Group, metric: str) -> tuple[str, float] | None:
    """What the fine-tuned base scores on its own language, averaged over its seeds."""
    scores = [
        run.metrics.test["source-language"][metric]
        for run in group.bases
        if metric in run.metrics.test.get("source-language", {})
    ]
    return (f"base on {group.source}", statistics.fmean(scores)) if scores else None


def draw_costs(group: Group, metric: str) -> Any:
    """Quality (average over languages) against seconds per step, training time and peak memory."""
    table = quality(group, metric)
    known = {cost.label: cost for cost in costs(group)}
    lines = [line for line in main_lines(group, table) if line.label in table.complete and line.average]
    costly = [line for line in lines if line.label in known]
    free = [line for line in lines if method_of(group, line.label) in ("zero-shot", "translate-test")]
    if len(costly) < 2:
        raise NothingToDraw("fewer than two methods have costs and a result in every language")
    panels = [
        (title, scale, key)
        for title, scale, key in (
            ("ms per training step", 1e3, "seconds_per_step"),
            (_time_unit(group)[0], _time_unit(group)[1], "train_seconds"),
            (_size_unit(group)[0], _size_unit(group)[1], "peak_bytes"),
        )
        if sum(getattr(known[line.label], key) is not None for line in costly) > 1
    ]
    if not panels:
        raise NothingToDraw("no cost was measured for two methods")
    from matplotlib.lines import Line2D

    width = 1.0 + 3.3 * len(panels)
    figure = new_figure(width, 4.4)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    chosen = dict(
        zip(
            [line.label for line in lines],
            looks([method_of(group, line.label) for line in lines]),
            strict=True,
        )
    )
    handles: dict[str, Any] = {}
    means = [line.average.mean for line in costly if line.average]
    lowest, highest = min(means), max(means)
    for axes, (title, scale, key) in zip(grid, panels, strict=True):
        for line in costly:
            value, average, look = getattr(known[line.label], key), line.average, chosen[line.label]
            if value is None or average is None:
                continue
            low, high = known[line.label].ranges.get(key, (value, value))
            handles[line.name] = axes.errorbar(
                scale * value,
                average.mean,
                xerr=[[scale * (value - low)], [scale * (high - value)]] if high > low else None,
                yerr=average.spread or None,
                fmt=look["marker"],
                color=look["color"],
                markersize=9,
                markeredgecolor="black",
                markeredgewidth=0.5,
                capsize=3,
            )
        for line in free:
            if line.average is None:
                continue
            color, style = chosen[line.label]["color"], "--" if line.label == "zero-shot" else ":"
            look = {"color": color, "linestyle": style, "linewidth": 1.4}
            # a line far below would press all points together: its number stands in the legend
            inside = line.average.mean >= lowest - max(2.0, highest - lowest)
            handle = axes.axhline(line.average.mean, **look) if inside else Line2D([], [], **look)
            handles[f"{line.name}: {line.average.mean:.1f}" + ("" if inside else " (below)")] = handle
        axes.set_xlabel(title, fontsize=NORMAL)
        plain_axes(axes)
        axes.grid(axis="x", color="#dddddd", linewidth=0.7)
        axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    grid[0].set_ylabel(f"{shown_name(metric)}, average of {len(table.languages)}", fontsize=NORMAL)
    legend_below(figure, list(handles.values()), list(handles), width)
    bars = ["± std over seeds"] if any(line.average and line.average.spread for line in costly) else []
    ranged = [low < high for line in costly for low, high in known[line.label].ranges.values()]
    bars += ["least to greatest cost"] if any(ranged) else []
    spread = f", bars: {' and '.join(bars)}" if bars else ""
    heading(figure, f"{group.task}: quality against costs{spread}")
    return figure


def _time_unit(group: Group) -> tuple[str, float]:
    longest = max((cost.train_seconds or 0 for cost in costs(group)), default=0)
    if longest >= 5400:
        return "training time (h)", 1 / 3600
    return ("training time (min)", 1 / 60) if longest >= 180 else ("training time (s)", 1.0)


def _size_unit(group: Group) -> tuple[str, float]:
    largest = max((cost.peak_bytes or 0 for cost in costs(group)), default=0)
    return ("peak memory (GiB)", 2.0**-30) if largest >= 2**30 else ("peak memory (MiB)", 2.0**-20)
