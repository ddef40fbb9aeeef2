"""Build tables that cover several tasks and models: averages, average ranks, and ablations."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .collect import METHODS, RunGroup
from .display import language_name, metric_name, model_names
from .families import FUSION, RANK, SOURCE_TEXT, Factor, Family, average_over, comparable, families, method_of_family
from .main_lines import representative_lines
from .summary import Cell, Quality, quality, ranks_of, spread
from .tables import MISSING, Table, csv_text, show

#: Methods without training on the target language: they get an average but no rank.
UNTRAINED = ("zero-shot", "translate-test")


@dataclass(frozen=True)
class OverviewLine:
    """Scores of one line of the tables (usually a method) on one model.

    Attributes:
        label: label of the line, see `collect`.
        name: display name of the line.
        method: method of the line.
        cells: task -> average over the task's languages; None if a language is missing.
        average: average over the tasks, with one value per seed; None if a task or language is missing.
        ranks: task -> rank (1 is the best) among the trained methods that have every task; empty for other methods.
        rank: mean of `ranks`; None if there are no ranks.
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
    """Lines of one model.

    Attributes:
        model: display name of the model, with the source language if the report has several source languages.
        tasks: display name of a task -> metric.
        lines: the lines, sorted by method in the paper's order.
    """

    model: str
    tasks: Mapping[str, str]
    lines: tuple[OverviewLine, ...]


def overviews(groups: Sequence[RunGroup], metrics: Mapping[str, str]) -> list[Overview]:
    """Return an overview for each model and source language.

    Groups whose test rows differ from the adapters' test rows are left out.

    Args:
        groups: groups of the report.
        metrics: slug of a group -> metric to show.
    """
    groups = [group for group in groups if not group.rows]
    by_model: dict[tuple[str, str], list[RunGroup]] = {}
    for group in groups:
        by_model.setdefault((group.model, group.source), []).append(group)
    shown = _shown_models(groups)
    return [_overview(shown[key], members, metrics) for key, members in by_model.items()]


def _shown_models(groups: Sequence[RunGroup]) -> dict[tuple[str, str], str]:
    """Return {(model, source language): display name}. The name has the language if the groups have several."""
    models = model_names(group.model for group in groups)
    several = len({group.source for group in groups}) > 1
    return {(g.model, g.source): models[g.model] + (f" from {g.source}" if several else "") for g in groups}


def _overview(model: str, groups: Sequence[RunGroup], metrics: Mapping[str, str]) -> Overview:
    tables = {group.shown_task: quality(group, metrics[group.slug]) for group in groups}
    by_task = {group.shown_task: group for group in groups}
    labels: dict[str, tuple[str, str]] = {}
    for task, group in by_task.items():
        for line in representative_lines(group, tables[task]):
            labels.setdefault(line.label, (line.name, group.of(line.label)[0].run.record.method))
    cells = {label: {task: _whole(tables[task], label) for task in tables} for label in labels}
    ranked = [label for label, (_, method) in labels.items() if method not in UNTRAINED and all(cells[label].values())]
    ranks: dict[str, dict[str, float]] = {label: {} for label in labels}
    for task in tables:
        means = {label: cell.mean for label in ranked if (cell := cells[label][task]) is not None}
        for label, place in ranks_of(means).items():
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
    """Return a line's average over languages if the line has all languages of the task, else None."""
    return table.line(label).average if label in table.complete else None


def _average(groups: Mapping[str, RunGroup], label: str, metrics: Mapping[str, str]) -> Cell:
    """Return the mean of the tasks' averages, with its spread over the seeds that every language of every task has."""
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


def overview_table(models: Sequence[Overview]) -> Table:
    """Return a table like Table 1 of the paper: one row for each model and method, one column for each task.

    The last two columns are the average and the average rank.
    """
    tasks = dict(pair for one in models for pair in one.tasks.items())
    head = (
        "model",
        "method",
        *(f"{task} ({metric_name(metric)})" for task, metric in tasks.items()),
        "average",
        "rank",
    )
    rows: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    for one in models:
        first = len(rows)
        columns = [*([line.cells.get(task) for line in one.lines] for task in tasks), [x.average for x in one.lines]]
        for line in one.lines:
            cells = [show(line.cells.get(task)) for task in tasks]
            rank = MISSING if line.rank is None else f"{line.rank:.2f}"
            rows.append((one.model if len(rows) == first else "", line.name, *cells, show(line.average), rank))
        for column, values in enumerate(columns, start=2):
            best |= {(first + at, column) for at in _best([None if cell is None else cell.mean for cell in values])}
        best |= {
            (first + at, len(tasks) + 3) for at in _best([None if x.rank is None else -x.rank for x in one.lines], 2)
        }
    notes = [
        "the column of a task is the average over its languages, in percent; the column average is the mean over tasks",
        "rank: in each task, the trained methods of a model that have every task are ranked by the task's column (1 is "
        f"the best); the column rank is the mean of these ranks; {' and '.join(UNTRAINED)} are not ranked",
    ]
    if any(x.average is not None and x.average.spread is not None for one in models for x in one.lines):
        notes.append("± is the sample standard deviation (n - 1) over seeds' averages")
    if any(cell is None for one in models for line in one.lines for cell in line.cells.values()):
        notes.append(f"{MISSING}: a language of the task is missing")
    return Table("Average over tasks and average rank", head, tuple(rows), tuple(notes), left=2, best=frozenset(best))


def overview_csv(models: Sequence[Overview]) -> str:
    """Return the overview as CSV: one row for each model, method and task, and one row for each average."""
    rows: list[list[object]] = []
    for one in models:
        for line in one.lines:
            for task, metric in one.tasks.items():
                cell = line.cells[task]
                numbers = [cell.mean, cell.spread, len(cell.values)] if cell else [None, None, 0]
                rows.append([one.model, line.label, line.name, task, metric, *numbers, line.ranks.get(task)])
            whole = line.average
            numbers = [whole.mean, whole.spread, len(whole.values)] if whole else [None, None, 0]
            rows.append([one.model, line.label, line.name, "average", "", *numbers, line.rank])
    return csv_text(("model", "variant", "name", "task", "metric", "mean", "std", "n", "rank"), rows)


#: File name -> (factor, title).
ABLATIONS = {
    "fusions": (FUSION, "Fusion functions"),
    "ranks": (RANK, "Rank r of the adapters"),
    "source-texts": (SOURCE_TEXT, "Source text: human, or machine-translated"),
}


def ablation_table(groups: Sequence[RunGroup], metrics: Mapping[str, str], factor: Factor, title: str) -> Table | None:
    """Return the table of an ablation, which compares lines that differ only in one factor.

    The table has a column for each task and, if there are several, a column with the average over the tasks. If there
    is only one task, the columns are its languages and their average. The cell of a task averages over the languages
    that all lines of the task have. If a method has several families (sets of lines that differ only in the factor),
    such as fusions with r=64 and fusions with r=8, the largest family is shown. Return None if there are no families.
    """
    groups = [group for group in groups if not group.rows]
    models = _shown_models(groups)
    cells_of: dict[tuple[str, str, Any], dict[str, Cell]] = {}  # (model, method, value) -> column -> cell
    varied = []
    for group in groups:
        table = quality(group, metrics[group.slug])
        languages, comparable_families = comparable(table, families(group, table, factor))
        if comparable_families:
            varied.append((group, languages, comparable_families))
    one_task = len({group.shown_task for group, _, _ in varied}) == 1
    for group, languages, comparable_families in varied:
        parts = {group.shown_task: languages}
        if one_task:
            parts = {language_name(one): [one] for one in languages}
        largest: dict[str, Family] = {}
        for family in comparable_families:
            method = method_of_family(group, family)
            largest[method] = max(largest.get(method, family), family, key=len)
        for method, family in largest.items():
            for value, label in family.items():
                cells = cells_of.setdefault((models[group.model, group.source], method, value), {})
                cells |= {name: average_over(group, label, metrics[group.slug], part) for name, part in parts.items()}
    if not cells_of:
        return None
    columns = list(dict.fromkeys(name for cells in cells_of.values() for name in cells))
    order = list(METHODS)
    lines = sorted(
        cells_of,
        key=lambda k: (k[0], order.index(k[1]) if k[1] in order else len(order), *_value_order(k[2])),
    )
    rows, best = [], set()
    for key in lines:
        row = [cells_of[key].get(name) for name in columns]
        known = [cell.mean for cell in row if cell is not None]
        average = [f"{statistics.fmean(known):.1f}" if len(known) == len(columns) else MISSING]
        rows.append((key[0], METHODS.get(key[1], key[1]), str(key[2]), *map(show, row), *average[: len(columns) - 1]))
    for column, name in enumerate(columns, start=3):
        for pair in dict.fromkeys(key[:2] for key in lines):
            at = [place for place, key in enumerate(lines) if key[:2] == pair]
            row_cells = [cells_of[lines[place]].get(name) for place in at]
            means = [None if cell is None else cell.mean for cell in row_cells]
            best |= {(at[place], column) for place in _best(means)}
    head = ("model", "method", factor.name, *columns, *["average"][: len(columns) - 1])
    of = (
        f"{metric_name(metrics[varied[0][0].slug])}, {varied[0][0].shown_task}"
        if one_task
        else "each task's first metric"
    )
    notes = (
        f"{of}, in percent; averages over the languages that all lines of a task have",
        "lines that also differ in other options are left out; the best value of a method is bold",
    )
    return Table(title, head, tuple(rows), notes, left=3, best=frozenset(best))


def _value_order(value: object) -> tuple[bool, float, str]:
    return not isinstance(value, int), float(value) if isinstance(value, int) else 0.0, str(value)


def _best(values: Sequence[float | None], digits: int = 1) -> list[int]:
    """Return the indices of the largest value after rounding; [] if there are no values or if all are equal."""
    shown = [None if value is None else round(value, digits) for value in values]
    known = [value for value in shown if value is not None]
    return [at for at, value in enumerate(shown) if value == max(known)] if known and min(known) < max(known) else []
