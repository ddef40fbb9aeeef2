"""Pictures of one thing varied: the rank r, the fusion, the source text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..collect import METHODS, Entry, Group
from ..conditions import settings, translator
from ..summary import Cell, Quality, average, quality
from ..tables import METRIC_NAMES
from .bars import Series, grouped_bars
from .compare import AVERAGE, base_line, shown_name
from .style import NORMAL, NothingToDraw, heading, legend_below, looks, new_figure, plain_axes


def draw_ranks(group: Group, metric: str) -> Any:
    """Quality over r, a line for every method that was trained with several ranks."""
    table = quality(group, metric)
    found = _families(group, table, lambda e: e.run.record.r, ("r", "alpha", "lora_alpha"))
    if not found:
        raise NothingToDraw("no method was trained with several r")
    languages, found = _comparable(table, found)
    names = _family_names(group, found, ("r",))
    figure = new_figure(6.2, 4.2)
    axes = figure.subplots()
    ticks = sorted({int(r) for members in found for r in members})
    for members, name, look in zip(found, names, looks([_method(group, f) for f in found]), strict=True):
        ranks = sorted(members, key=int)
        cells = [_over(group, members[r], metric, languages) for r in ranks]
        axes.errorbar(
            [int(r) for r in ranks],
            [cell.mean for cell in cells],
            yerr=[cell.spread or 0 for cell in cells],
            marker=look["marker"],
            color=look["color"],
            markersize=6,
            linewidth=1.6,
            capsize=3,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("r", fontsize=NORMAL)
    axes.set_ylabel(_over_label(metric, languages), fontsize=NORMAL)
    plain_axes(axes)
    legend_below(figure, axes.get_legend_handles_labels()[0], names, 6.2)
    heading(figure, f"{group.task}: effect of r (bars: ± std over seeds)")
    return figure


def draw_fusions(group: Group, metric: str) -> Any:
    """Bars per language for every fusion of one method, with plain LoRA as the bar to meet."""
    table = quality(group, metric)
    found = _families(group, table, lambda e: e.run.record.fusion, ("fusion",))
    if not found:
        raise NothingToDraw("no method was trained with several fusions")
    # the family with the most fusions; the others stand in the tables
    members = max(found, key=len)
    series = [
        Series(fusion, fusion, _cells(table, label))
        for fusion, label in sorted(members.items(), key=lambda item: str(item[0]))
    ]
    rank = group.of(next(iter(members.values())))[0].run.record.r
    for line in table.lines:
        plain = group.of(line.label)[0].run.record
        if plain.method == "lora" and plain.r == rank:
            series.insert(0, Series("LoRA (no source)", "lora", _cells(table, line.label)))
            break
    return grouped_bars(
        series,
        _places(table),
        ylabel=shown_name(metric),
        title=f"{group.task}: effect of the fusion, {_detailed(group, members, ('fusion',))}",
        reference=base_line(group, metric),
        apart=AVERAGE,
    )


def draw_source_texts(group: Group, metric: str) -> Any:
    """Quality with the gold source text, with machine translations, with noise; one kind of bar a method."""
    table = quality(group, metric)
    found = _families(group, table, source_kind, ("source_text", "noise", "source_noise", "mt_model", "translations"))
    if not found:
        raise NothingToDraw("no method has results with source texts of several kinds")
    languages, found = _comparable(table, found)
    kinds = sorted({str(kind) for members in found for kind in members}, key=lambda kind: ("gold" not in kind, kind))
    series = [
        Series(
            name,
            _method(group, members),
            {str(kind): _over(group, label, metric, languages) for kind, label in members.items()},
        )
        for members, name in zip(found, _family_names(group, found, ("source_text",)), strict=True)
    ]
    return grouped_bars(
        series,
        kinds,
        ylabel=_over_label(metric, languages),
        title=f"{group.task}: effect of the source text",
        reference=base_line(group, metric),
    )


def source_kind(entry: Entry) -> str | None:
    """Name of the source text: "gold", "mt: <model>", with noise and what differs at test time; None without one."""
    record = entry.run.record
    if record.source_text is None:
        return None
    names = {"gold": "gold", "mt": f"mt: {translator(entry)}" if translator(entry) else "mt"}
    kind = names.get(record.source_text, record.source_text)
    noise = record.settings.get("noise") or record.settings.get("source_noise")
    if noise:
        kind += f", {100 * float(noise):g} % noise"
    at_test = entry.setting.partition("/")[2]
    return f"{kind}, {names.get(at_test, at_test)} at test" if at_test else kind


# --- lines that differ in one thing -----------------------------------------------------------------------------------

Members = dict[Any, str]  # value of what varies -> label


def _families(group: Group, table: Quality, vary: Callable[[Entry], Any], free: tuple[str, ...]) -> list[Members]:
    """Lines of one method whose settings differ in `vary` alone (and the settings in `free`), two values or more."""
    families: dict[str, Members] = {}
    for line in table.lines:
        entry = group.of(line.label)[0]
        value = vary(entry)
        if value is None:
            continue
        given = {n: one for n, one in settings(entry.run).items() if n.rpartition(".")[2] not in free}
        key = json.dumps([entry.run.record.method, given], sort_keys=True, default=str)
        families.setdefault(key, {}).setdefault(value, line.label)
    return [members for members in families.values() if len(members) > 1]


def _comparable(table: Quality, families: list[Members]) -> tuple[list[str], list[Members]]:
    """The languages that every line of the families has; without one, only the families that have them all."""
    labels = [label for members in families for label in members.values()]
    languages = [one for one in table.languages if all(table.line(label).cells[one] for label in labels)]
    if languages:
        return languages, families
    kept = [members for members in families if set(members.values()) <= set(table.complete)]
    if not kept:
        raise NothingToDraw("the lines have no target language in common")
    return list(table.languages), kept


def _over(group: Group, label: str, metric: str, languages: list[str]) -> Cell:
    scores: dict[str, dict[int, float]] = {language: {} for language in languages}
    for entry in group.of(label):
        if entry.language in scores and metric in entry.scores:
            scores[entry.language][entry.seed] = entry.scores[metric]
    found = average(scores, languages)
    assert found is not None, "there is a language"
    return found


def _over_label(metric: str, languages: list[str]) -> str:
    if len(languages) == 1:
        return f"{shown_name(metric)}, {languages[0]}"
    return f"{METRIC_NAMES.get(metric, metric)} (%), average of {len(languages)}"


def _method(group: Group, members: Members) -> str:
    return group.of(next(iter(members.values())))[0].run.record.method


def _family_names(group: Group, families: list[Members], varied: tuple[str, ...]) -> list[str]:
    """Names of the families' methods, with what is fixed in a family where a name alone would stand twice."""
    methods = [_method(group, members) for members in families]
    return [
        METHODS.get(method, method) if methods.count(method) == 1 else _detailed(group, members, varied)
        for members, method in zip(families, methods, strict=True)
    ]


def _detailed(group: Group, members: Members, varied: tuple[str, ...]) -> str:
    """The method and those of fusion, r and source text that are not varied."""
    record = group.of(next(iter(members.values())))[0].run.record
    details = [METHODS.get(record.method, record.method)]
    if "fusion" not in varied and record.fusion is not None:
        details.append(record.fusion)
    if "r" not in varied and record.r is not None:
        details.append(f"r={record.r}")
    if "source_text" not in varied and record.source_text is not None:
        details.append(f"{record.source_text} source")
    return ", ".join(details)


def _cells(table: Quality, label: str) -> dict[str, Cell | None]:
    line = table.line(label)
    cells = dict(line.cells)
    if len(table.languages) > 1 and label in table.complete:
        cells[AVERAGE] = line.average
    return cells


def _places(table: Quality) -> list[str]:
    return [*table.languages, *([AVERAGE] if len(table.languages) > 1 else [])]
