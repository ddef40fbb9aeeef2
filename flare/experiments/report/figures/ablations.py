"""Pictures of one thing varied: the rank r, the fusion, the source text, the translator."""

from __future__ import annotations

import statistics
from typing import Any

from ..collect import Group
from ..display import axis_name, language_name
from ..families import (
    FUSION,
    RANK,
    SOURCE_TEXT,
    Kind,
    Members,
    comparable,
    detailed,
    families,
    family_names,
    method_of_family,
    over,
)
from ..summary import Quality, quality
from .bars import Series, grouped_bars
from .compare import AVERAGE, base_line, places_on_axis, series_of
from .style import COLUMN, NORMAL, NothingToDraw, caption, legend_below, looks, new_figure, plain_axes

_TRANSLATED = "mt: "


def draw_ranks(group: Group, metric: str) -> Any:
    """Quality over r, a line for every method that was trained with several ranks."""
    table = quality(group, metric)
    languages, found = _found(table, families(group, table, RANK), "no method was trained with several r")
    ticks = sorted({int(r) for members in found for r in members})
    figure = _curves(group, metric, languages, found, ticks, RANK)
    axes = figure.axes[0]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_xlabel("Rank r", fontsize=NORMAL)
    caption(figure, f"{group.shown_task}: effect of the adapters' rank{_of(languages)}; bars are ± std over seeds")
    return figure


def draw_translators(group: Group, metric: str) -> Any:
    """Quality against the translator of the source text, a line for every method, human text at the right."""
    table = quality(group, metric)
    found = [_by_translator(members) for members in families(group, table, SOURCE_TEXT)]
    found = [members for members in found if sum(str(kind).startswith(_TRANSLATED) for kind in members) > 1]
    languages, found = _found(table, found, "no method has source texts of two translators")
    means: dict[str, list[float]] = {}
    for members in found:
        for kind, label in members.items():
            means.setdefault(str(kind), []).append(over(group, label, metric, languages).mean)
    # translators by what the methods make of them, human text last
    kinds = sorted(means, key=lambda kind: (kind == "gold", statistics.fmean(means[kind]), kind))
    figure = _curves(group, metric, languages, found, kinds, SOURCE_TEXT)
    axes = figure.axes[0]
    names = ["human" if kind == "gold" else kind.removeprefix(_TRANSLATED) for kind in kinds]
    axes.set_xticks(range(len(kinds)), names, fontsize=NORMAL)
    axes.set_xlim(-0.4, len(kinds) - 0.6)
    axes.set_xlabel("Translator of the source text", fontsize=NORMAL)
    caption(figure, f"{group.shown_task}: quality by translator{_of(languages)}; bars are ± std over seeds")
    return figure


def draw_fusions(group: Group, metric: str) -> Any:
    """Bars per language for every fusion of one method, with plain LoRA as the bar to meet."""
    table = quality(group, metric)
    found = families(group, table, FUSION)
    if not found:
        raise NothingToDraw("no method was trained with several fusions")
    members = max(found, key=len)  # the others stand in the tables
    series = [
        series_of(table, table.line(label), fusion, fusion)
        for fusion, label in sorted(members.items(), key=lambda item: str(item[0]))
    ]
    rank = group.of(next(iter(members.values())))[0].run.record.r
    for line in table.lines:
        plain = group.of(line.label)[0].run.record
        if plain.method == "lora" and plain.r == rank:
            series.insert(0, series_of(table, line, "lora", "LoRA (no source)"))
            break
    figure = grouped_bars(
        series, places_on_axis(table), ylabel=axis_name(metric), reference=base_line(group, metric), apart=AVERAGE
    )
    caption(figure, f"{group.shown_task}: effect of the fusion function, {detailed(group, members, FUSION)}")
    return figure


def draw_source_texts(group: Group, metric: str) -> Any:
    """Quality with the human source text, with machine translations, with noise; one kind of bar a method."""
    table = quality(group, metric)
    languages, found = _found(
        table,
        families(group, table, SOURCE_TEXT),
        "no method has results with source texts of several kinds",
    )
    kinds = sorted({str(kind) for members in found for kind in members}, key=lambda kind: ("gold" not in kind, kind))
    series = [
        Series(
            name,
            method_of_family(group, members),
            {str(kind): over(group, label, metric, languages) for kind, label in members.items()},
        )
        for members, name in zip(found, family_names(group, found, SOURCE_TEXT), strict=True)
    ]
    figure = grouped_bars(series, kinds, ylabel=axis_name(metric), reference=base_line(group, metric))
    caption(figure, f"{group.shown_task}: effect of the source text{_of(languages)}")
    return figure


def _found(table: Quality, given: list[Members], missing: str) -> tuple[list[str], list[Members]]:
    if not given:
        raise NothingToDraw(missing)
    languages, found = comparable(table, given)
    if not found:
        raise NothingToDraw("the lines have no target language in common")
    return languages, found


def _by_translator(members: Members) -> Members:
    """The lines that were trained and scored with one and the same text: a translator's, or the human one."""
    return {kind: label for kind, label in members.items() if "," not in str(kind)}


def _curves(group: Group, metric: str, languages: list[str], found: list[Members], ticks: list[Any], kind: Kind) -> Any:
    """A line a family over the ticks (their places, where they are no numbers), with spreads."""
    figure = new_figure(COLUMN, 2.1)
    axes = figure.subplots()
    names = family_names(group, found, kind)
    for members, look in zip(found, looks([method_of_family(group, one) for one in found]), strict=True):
        there = [tick for tick in ticks if tick in members]
        cells = [over(group, members[tick], metric, languages) for tick in there]
        spreads = [cell.spread for cell in cells]
        axes.errorbar(
            [tick if isinstance(tick, int) else ticks.index(tick) for tick in there],
            [cell.mean for cell in cells],
            yerr=[one or 0 for one in spreads] if any(spreads) else None,
            marker=look["marker"],
            color=look["color"],
            markersize=3.5,
            linewidth=1.1,
            elinewidth=0.8,
            capsize=2,
        )
    axes.set_ylabel(axis_name(metric), fontsize=NORMAL)
    plain_axes(axes)
    legend_below(figure, [line.lines[0] for line in axes.containers], names)
    return figure


def _of(languages: list[str]) -> str:
    if len(languages) == 1:
        return f", {language_name(languages[0])}"
    return f", average over {len(languages)} languages"
