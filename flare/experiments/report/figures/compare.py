"""Draw the figures of the main comparison: scores by language, and scores against costs."""

from __future__ import annotations

import statistics
from typing import Any

from ..collect import RunGroup
from ..display import axis_name, language_name, language_names
from ..main_lines import main_lines, method_of
from ..summary import Line, Quality, costs, quality
from .bars import Series, grouped_bars
from .style import NORMAL, PAGE, NothingToDraw, caption, legend_below, looks, new_figure, plain_axes

AVERAGE = "Average"


def seeds_text(lines: list[Line]) -> str:
    """Return what a caption says about seeds: the meaning of bars and dots, or "one seed" if no line has several."""
    many = any(cell and len(cell.values) > 1 for line in lines for cell in line.cells.values())
    return "bars are means over seeds, dots are seeds" if many else "one seed"


def series_of(table: Quality, line: Line, method: str, name: str | None = None) -> Series:
    """Return the bars of a line: one for each language, and one for the average.

    There is no bar for the average if there is only one language, or if the line lacks a language.
    """
    shown = language_names(table.languages)
    cells = {shown[one]: cell for one, cell in line.cells.items()}
    if len(table.languages) > 1 and line.label in table.complete:
        cells[AVERAGE] = line.average
    return Series(name or line.name, method, cells)


def places_on_axis(table: Quality) -> list[str]:
    """Return the ticks of the axis: the display names of the languages, and the average if there are several."""
    return [*language_names(table.languages).values(), *([AVERAGE] if len(table.languages) > 1 else [])]


def draw_comparison(group: RunGroup, metric: str) -> Any:
    """Draw bars per language and for the average, with dots for the seeds if there are several.

    Each of the `main_lines` has one bar per language.
    """
    table = quality(group, metric)
    lines = main_lines(group, table)
    if len(lines) < 2:
        raise NothingToDraw("there is only one method to show")
    figure = grouped_bars(
        [series_of(table, line, method_of(group, line.label)) for line in lines],
        places_on_axis(table),
        ylabel=axis_name(metric),
        reference=base_line(group, metric),
        apart=AVERAGE,
    )
    caption(
        figure,
        f"{group.shown_task}: methods by target language, {language_name(group.source)} as the source language "
        f"({seeds_text(lines)})",
    )
    return figure


def base_line(group: RunGroup, metric: str) -> tuple[str, float] | None:
    """Return a name for the fine-tuned base and its mean score on the source language; None if it was not tested."""
    scores = [
        run.metrics.test["source-language"][metric]
        for run in group.bases
        if metric in run.metrics.test.get("source-language", {})
    ]
    return (f"base on {language_name(group.source)}", statistics.fmean(scores)) if scores else None


def draw_costs(group: RunGroup, metric: str) -> Any:
    """Draw the average score over languages against time per step, training time and peak memory.

    Each cost has a panel, whose x axis starts at 0. Costs that fewer than two methods measured are left out. Zero-shot
    and translate-test have no training costs, so they are horizontal lines.
    """
    table = quality(group, metric)
    known = {cost.label: cost for cost in costs(group)}
    lines = [line for line in main_lines(group, table) if line.label in table.complete and line.average]
    trained = [line for line in lines if line.label in known]
    untrained = [line for line in lines if method_of(group, line.label) in ("zero-shot", "translate-test")]
    if len(trained) < 2:
        raise NothingToDraw("fewer than two methods have costs and a result in every language")
    panels = [
        (title, scale, key)
        for title, scale, key in (
            ("Time per step (ms)", 1e3, "seconds_per_step"),
            (_time_unit(group)[0], _time_unit(group)[1], "train_seconds"),
            (_size_unit(group)[0], _size_unit(group)[1], "peak_bytes"),
        )
        if sum(getattr(known[line.label], key) is not None for line in trained) > 1
    ]
    if not panels:
        raise NothingToDraw("no cost was measured for two or more methods")
    from matplotlib.lines import Line2D

    figure = new_figure(PAGE, 2.3)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    chosen = dict(
        zip(
            [line.label for line in lines],
            looks([method_of(group, line.label) for line in lines]),
            strict=True,
        )
    )
    handles: dict[str, Any] = {}
    means = [line.average.mean for line in trained if line.average]
    lowest, highest = min(means), max(means)
    for axes, (title, scale, key) in zip(grid, panels, strict=True):
        for line in trained:
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
                markersize=5,
                markeredgecolor="black",
                markeredgewidth=0.4,
                elinewidth=0.8,
                capsize=2,
            )
        for line in untrained:
            if line.average is None:
                continue
            color, style = chosen[line.label]["color"], "--" if line.label == "zero-shot" else ":"
            look = {"color": color, "linestyle": style, "linewidth": 1.0}
            # a line far below the points would compress their scale, so it appears only in the legend
            inside = line.average.mean >= lowest - max(2.0, highest - lowest)
            handle = axes.axhline(line.average.mean, **look) if inside else Line2D([], [], **look)
            handles[f"{line.name}: {line.average.mean:.1f}" + ("" if inside else " (below)")] = handle
        axes.set_xlabel(title, fontsize=NORMAL)
        plain_axes(axes)
        axes.grid(axis="x", color="#dddddd", linewidth=0.5)
        axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    several = len(table.languages) > 1
    grid[0].set_ylabel(axis_name(metric) + (", average" if several else ""), fontsize=NORMAL)
    legend_below(figure, list(handles.values()), list(handles))
    bars = ["standard deviations over seeds"] if any(line.average and line.average.spread for line in trained) else []
    ranged = [low < high for line in trained for low, high in known[line.label].ranges.values()]
    bars += ["smallest to largest cost"] if any(ranged) else []
    languages = f"average over {len(table.languages)} languages" if several else language_name(table.languages[0])
    caption(
        figure,
        f"{group.shown_task}: quality ({languages}) against costs"
        + (f"; bars are {' and '.join(bars)}" if bars else ""),
    )
    return figure


def _time_unit(group: RunGroup) -> tuple[str, float]:
    longest = max((cost.train_seconds or 0 for cost in costs(group)), default=0)
    if longest >= 5400:
        return "Training time (h)", 1 / 3600
    return ("Training time (min)", 1 / 60) if longest >= 180 else ("Training time (s)", 1.0)


def _size_unit(group: RunGroup) -> tuple[str, float]:
    largest = max((cost.peak_bytes or 0 for cost in costs(group)), default=0)
    return ("Peak memory (GiB)", 2.0**-30) if largest >= 2**30 else ("Peak memory (MiB)", 2.0**-20)
