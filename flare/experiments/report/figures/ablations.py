"""Draw the figures of ablations: the rank r, the fusion, the source text, the translator.

A line of the quality table has the scores of one method with one set of options, tested in one way. A family is a set
of lines that differ only in the factor of the ablation, for example in r (see `..families`).
"""

from __future__ import annotations

import statistics
from typing import Any

from ..collect import RunGroup
from ..display import axis_name, language_name
from ..families import (
    FUSION,
    RANK,
    SOURCE_TEXT,
    Factor,
    Family,
    average_over,
    comparable,
    families,
    family_names,
    family_title,
    method_of_family,
)
from ..summary import Quality, quality
from .bars import Series, grouped_bars
from .compare import AVERAGE, base_line, places_on_axis, series_of
from .style import COLUMN, NORMAL, NothingToDraw, caption, legend_below, looks, new_figure, plain_axes

_TRANSLATED = "mt: "  # machine-translated source texts are named "mt: <translator>"


def draw_ranks(group: RunGroup, metric: str) -> Any:
    """Draw the score against r, with one curve per family of lines that differ only in r."""
    table = quality(group, metric)
    languages, shown = _comparable(table, families(group, table, RANK), "no method was trained with several r")
    ticks = sorted({int(r) for family in shown for r in family})
    figure = _curves(group, metric, languages, shown, ticks, RANK)
    axes = figure.axes[0]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_xlabel("Rank r", fontsize=NORMAL)
    caption(figure, f"{group.shown_task}: effect of the adapters' rank{_of(languages)}; bars are ± std over seeds")
    return figure


def draw_translators(group: RunGroup, metric: str) -> Any:
    """Draw the score for each translator of the source text, with one curve per family. Human text comes last."""
    table = quality(group, metric)
    candidates = [_one_text(family) for family in families(group, table, SOURCE_TEXT)]
    candidates = [family for family in candidates if sum(str(kind).startswith(_TRANSLATED) for kind in family) > 1]
    languages, shown = _comparable(table, candidates, "no method has source texts of two translators")
    means: dict[str, list[float]] = {}
    for family in shown:
        for kind, label in family.items():
            means.setdefault(str(kind), []).append(average_over(group, label, metric, languages).mean)
    # translators in ascending order of their mean score over the families, human text last
    kinds = sorted(means, key=lambda kind: (kind == "gold", statistics.fmean(means[kind]), kind))
    figure = _curves(group, metric, languages, shown, kinds, SOURCE_TEXT)
    axes = figure.axes[0]
    names = ["human" if kind == "gold" else kind.removeprefix(_TRANSLATED) for kind in kinds]
    axes.set_xticks(range(len(kinds)), names, fontsize=NORMAL)
    axes.set_xlim(-0.4, len(kinds) - 0.6)
    axes.set_xlabel("Translator of the source text", fontsize=NORMAL)
    caption(figure, f"{group.shown_task}: quality by translator{_of(languages)}; bars are ± std over seeds")
    return figure


def draw_fusions(group: RunGroup, metric: str) -> Any:
    """Draw bars per language for the fusions of one family, and for plain LoRA of the same rank if it was trained.

    The family is the one with the most fusions.
    """
    table = quality(group, metric)
    candidates = families(group, table, FUSION)
    if not candidates:
        raise NothingToDraw("no method was trained with several fusions")
    family = max(candidates, key=len)
    series = [
        series_of(table, table.line(label), fusion, fusion)
        for fusion, label in sorted(family.items(), key=lambda item: str(item[0]))
    ]
    rank = group.of(next(iter(family.values())))[0].run.record.r
    for line in table.lines:
        plain = group.of(line.label)[0].run.record
        if plain.method == "lora" and plain.r == rank:
            series.insert(0, series_of(table, line, "lora", "LoRA (no source)"))
            break
    figure = grouped_bars(
        series, places_on_axis(table), ylabel=axis_name(metric), reference=base_line(group, metric), apart=AVERAGE
    )
    caption(figure, f"{group.shown_task}: effect of the fusion function, {family_title(group, family, FUSION)}")
    return figure


def draw_source_texts(group: RunGroup, metric: str) -> Any:
    """Draw the score with human, machine-translated and noisy source text, with bars of one color per family."""
    table = quality(group, metric)
    languages, shown = _comparable(
        table,
        families(group, table, SOURCE_TEXT),
        "no method has results with several kinds of source text",
    )
    kinds = sorted({str(kind) for family in shown for kind in family}, key=lambda kind: ("gold" not in kind, kind))
    series = [
        Series(
            name,
            method_of_family(group, family),
            {str(kind): average_over(group, label, metric, languages) for kind, label in family.items()},
        )
        for family, name in zip(shown, family_names(group, shown, SOURCE_TEXT), strict=True)
    ]
    figure = grouped_bars(series, kinds, ylabel=axis_name(metric), reference=base_line(group, metric))
    caption(figure, f"{group.shown_task}: effect of the source text{_of(languages)}")
    return figure


def _comparable(table: Quality, candidates: list[Family], missing: str) -> tuple[list[str], list[Family]]:
    if not candidates:
        raise NothingToDraw(missing)
    languages, shown = comparable(table, candidates)
    if not shown:
        raise NothingToDraw("the lines have no target language in common")
    return languages, shown


def _one_text(family: Family) -> Family:
    """Return a family without the lines whose source text has noise or differs between training and test."""
    return {kind: label for kind, label in family.items() if "," not in str(kind)}


def _curves(
    group: RunGroup, metric: str, languages: list[str], shown: list[Family], ticks: list[Any], factor: Factor
) -> Any:
    """Draw one curve per family, with error bars for the standard deviation over seeds.

    The ticks are the values of the factor. A number is its own position on the x axis. For other values, the index in
    `ticks` is the position.
    """
    figure = new_figure(COLUMN, 2.1)
    axes = figure.subplots()
    names = family_names(group, shown, factor)
    for family, look in zip(shown, looks([method_of_family(group, one) for one in shown]), strict=True):
        values = [tick for tick in ticks if tick in family]
        cells = [average_over(group, family[value], metric, languages) for value in values]
        spreads = [cell.spread for cell in cells]
        axes.errorbar(
            [value if isinstance(value, int) else ticks.index(value) for value in values],
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
