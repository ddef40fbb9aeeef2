"""Tables over several tasks and models: averages, average ranks, and one thing varied."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .collect import METHODS, Group
from .display import language_name, metric_name, model_names
from .families import FUSION, RANK, SOURCE_TEXT, Kind, Members, comparable, families, method_of_family, over
from .main_lines import plainest
from .summary import Cell, Quality, places_of, quality, spread
from .tables import MISSING, Table, csv_text, show

#: Methods that train nothing on the target language: they get an average, and no rank beside the others.
UNTRAINED = ("zero-shot", "translate-test")


@dataclass(frozen=True)
class OverviewLine:
    """One method on one model. cells: task -> average over the task's languages, None where a language lacks.

    average: over the tasks, None where one lacks; its values are the seeds' averages.
    ranks: task -> place among the trained methods that have every task (1 the best); rank: their mean.
    """

    label: str
    name: str
    method: str
    cells: Mapping[str, Cell | None]
    average: Cell | None
    ranks: Mapping[str, float]
    rank: float | None


@dataclass(frozen=True)
class Overview:
    """One model's lines; tasks: name for readers -> its metric."""

    model: str
    tasks: Mapping[str, str]
    lines: tuple[OverviewLine, ...]


def overviews(groups: Sequence[Group], metrics: Mapping[str, str]) -> list[Overview]:
    """Return an overview for each model (and source language), of groups on the adapters' own rows.

    Args:
        groups: of the report.
        metrics: slug of a group -> its metric.
    """
    shown = model_names(group.model for group in groups)
    by_model: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        if not group.rows:
            by_model.setdefault((group.model, group.source), []).append(group)
    several = len({source for _, source in by_model}) > 1
    return [
        _overview(shown[model] + (f" from {source}" if several else ""), members, metrics)
        for (model, source), members in by_model.items()
    ]


def _overview(model: str, groups: Sequence[Group], metrics: Mapping[str, str]) -> Overview:
    tables = {group.shown_task: quality(group, metrics[group.slug]) for group in groups}
    by_task = {group.shown_task: group for group in groups}
    labels: dict[str, tuple[str, str]] = {}
    for task, group in by_task.items():
        for line in plainest(group, tables[task]):
            labels.setdefault(line.label, (line.name, group.of(line.label)[0].run.record.method))
    cells = {label: {task: _whole(tables[task], label) for task in tables} for label in labels}
    ranked = [label for label, (_, method) in labels.items() if method not in UNTRAINED and all(cells[label].values())]
    ranks: dict[str, dict[str, float]] = {label: {} for label in labels}
    for task in tables:
        means = {label: cell.mean for label in ranked if (cell := cells[label][task]) is not None}
        for label, place in places_of(means).items():
            ranks[label][task] = place
    lines = [
        OverviewLine(
            label,
            name,
            method,
            cells[label],
            _average(by_task, label, metrics) if all(cells[label].values()) else None,
            ranks[label],
            statistics.fmean(ranks[label].values()) if ranks[label] else None,
        )
        for label, (name, method) in labels.items()
    ]
    order = list(METHODS)
    lines.sort(key=lambda line: order.index(line.method) if line.method in order else len(order))
    return Overview(model, {task: table.metric for task, table in tables.items()}, tuple(lines))


def _whole(table: Quality, label: str) -> Cell | None:
    """A line's average, where it has all languages of the task."""
    return table.line(label).average if label in table.complete else None


def _average(groups: Mapping[str, Group], label: str, metrics: Mapping[str, str]) -> Cell:
    """The mean of the tasks' averages; its spread is over the seeds that every task and language has."""
    scores = []
    for group in groups.values():
        seeds: dict[str, dict[int, float]] = {}
        for entry in group.of(label):
            if metrics[group.slug] in entry.scores:
                seeds.setdefault(entry.language, {})[entry.seed] = entry.scores[metrics[group.slug]]
        scores.append(list(seeds.values()))
    mean = statistics.fmean(statistics.fmean(statistics.fmean(seeds.values()) for seeds in task) for task in scores)
    common = sorted(set.intersection(*(set(seeds) for task in scores for seeds in task)))
    values = tuple(
        statistics.fmean(statistics.fmean(seeds[seed] for seeds in task) for task in scores) for seed in common
    )
    return Cell(mean, spread(values), values, len(scores))


# --- tables -----------------------------------------------------------------------------------------------------------


def overview_table(found: Sequence[Overview]) -> Table:
    """Return Table 1 of the paper: each model's methods by task, with their average and average rank."""
    tasks = dict(pair for one in found for pair in one.tasks.items())
    head = (
        "model",
        "method",
        *(f"{task} ({metric_name(metric)})" for task, metric in tasks.items()),
        "average",
        "rank",
    )
    rows: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    for one in found:
        first = len(rows)
        columns = [*([line.cells.get(task) for line in one.lines] for task in tasks), [x.average for x in one.lines]]
        for line in one.lines:
            cells = [show(line.cells.get(task)) for task in tasks]
            rank = MISSING if line.rank is None else f"{line.rank:.2f}"
            rows.append((one.model if len(rows) == first else "", line.name, *cells, show(line.average), rank))
        for column, given in enumerate(columns, start=2):
            best |= {(first + at, column) for at in _best([None if cell is None else cell.mean for cell in given])}
        best |= {
            (first + at, len(tasks) + 3) for at in _best([None if x.rank is None else -x.rank for x in one.lines], 2)
        }
    notes = [
        "a task's cell is the average over its languages, in percent; the average is over the tasks",
        "rank: mean over the tasks of the place by that average (1 the best), among a model's trained methods with "
        f"every task; {' and '.join(UNTRAINED)} are not ranked",
    ]
    if any(x.average is not None and x.average.spread is not None for one in found for x in one.lines):
        notes.append("± is the sample standard deviation (n - 1) over seeds' averages")
    if any(cell is None for one in found for line in one.lines for cell in line.cells.values()):
        notes.append(f"{MISSING}: a language of the task lacks")
    return Table("Average over tasks and average rank", head, tuple(rows), tuple(notes), left=2, best=frozenset(best))


def overview_csv(found: Sequence[Overview]) -> str:
    """Return the overview with numbers apart: one row for each model, method and task, and for the average."""
    rows: list[list[object]] = []
    for one in found:
        for line in one.lines:
            for task, metric in one.tasks.items():
                cell = line.cells[task]
                numbers = [cell.mean, cell.spread, len(cell.values)] if cell else [None, None, 0]
                rows.append([one.model, line.label, line.name, task, metric, *numbers, line.ranks.get(task)])
            whole = line.average
            numbers = [whole.mean, whole.spread, len(whole.values)] if whole else [None, None, 0]
            rows.append([one.model, line.label, line.name, "average", "", *numbers, line.rank])
    return csv_text(("model", "variant", "name", "task", "metric", "mean", "std", "n", "rank"), rows)


#: File name -> (what is varied, title).
VARIED = {
    "fusions": (FUSION, "Fusion functions"),
    "ranks": (RANK, "Rank r of the adapters"),
    "source-texts": (SOURCE_TEXT, "Source text: human, or machine-translated"),
}


def varied_table(groups: Sequence[Group], metrics: Mapping[str, str], kind: Kind, title: str) -> Table | None:
    """Return a table of one thing varied, a column for each task (of one task, for each language) and their average.

    A cell is over the languages that all lines of its task have. Of several families of one method (fusions with r=64
    and with r=8, say) the largest one is shown.

    Returns:
        None where no run varies it.
    """
    groups = [group for group in groups if not group.rows]
    models = model_names(group.model for group in groups)
    found: dict[tuple[str, str, Any], dict[str, Cell]] = {}
    varied = []
    for group in groups:
        table = quality(group, metrics[group.slug])
        languages, members = comparable(table, families(group, table, kind))
        if members:
            varied.append((group, languages, members))
    one_task = len({group.shown_task for group, _, _ in varied}) == 1
    for group, languages, members in varied:
        parts = {group.shown_task: languages}
        if one_task:
            parts = {language_name(one): [one] for one in languages}
        largest: dict[str, Members] = {}
        for family in members:
            method = method_of_family(group, family)
            largest[method] = max(largest.get(method, family), family, key=len)
        for method, family in largest.items():
            for value, label in family.items():
                there = found.setdefault((models[group.model], method, value), {})
                there |= {name: over(group, label, metrics[group.slug], part) for name, part in parts.items()}
    if not found:
        return None
    columns = list(dict.fromkeys(name for cells in found.values() for name in cells))
    order = list(METHODS)
    lines = sorted(
        found,
        key=lambda k: (k[0], order.index(k[1]) if k[1] in order else len(order), *_value_order(k[2])),
    )
    rows, best = [], set()
    for key in lines:
        cells = [found[key].get(name) for name in columns]
        known = [cell.mean for cell in cells if cell is not None]
        average = [f"{statistics.fmean(known):.1f}" if len(known) == len(columns) else MISSING]
        rows.append((key[0], METHODS.get(key[1], key[1]), str(key[2]), *map(show, cells), *average[: len(columns) - 1]))
    for column, name in enumerate(columns, start=3):
        for pair in dict.fromkeys(key[:2] for key in lines):
            at = [place for place, key in enumerate(lines) if key[:2] == pair]
            means = [found[lines[place]][name].mean if name in found[lines[place]] else None for place in at]
            best |= {(at[place], column) for place in _best(means)}
    head = ("model", "method", kind.name, *columns, *["average"][: len(columns) - 1])
    of = (
        f"{metric_name(metrics[varied[0][0].slug])}, {varied[0][0].shown_task}"
        if one_task
        else "each task's first metric"
    )
    notes = (
        f"{of}, in percent; averages over the languages that all lines of a task have",
        "lines that differ in more than this are left out; bold is the best of a method",
    )
    return Table(title, head, tuple(rows), notes, left=3, best=frozenset(best))


def _value_order(value: object) -> tuple[bool, float, str]:
    return not isinstance(value, int), float(value) if isinstance(value, int) else 0.0, str(value)


def _best(values: Sequence[float | None], digits: int = 1) -> list[int]:
    """Places of the greatest value as shown; none where all are equal."""
    shown = [None if value is None else round(value, digits) for value in values]
    known = [value for value in shown if value is not None]
    return [at for at, value in enumerate(shown) if value == max(known)] if known and min(known) < max(known) else []
