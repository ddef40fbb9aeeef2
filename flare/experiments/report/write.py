"""`flare report`: write tables, figures, report.md and report.json from folders of runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..utils.atomic_files import write_json
from ..utils.environment import environment, now
from ..utils.escape import code, markdown
from ..utils.extra import INSTALL
from . import report_folder
from .collect import Collection, ReportError, RunGroup, collect
from .conditions import conditions, notes, warnings
from .cross_task import ABLATIONS, Overview, ablation_table, overview_csv, overview_table, overviews
from .figures import FORMATS, FigureResult, draw_figures, draw_overview_figures
from .summary import costs, quality
from .tables import Table, cost_csv, cost_table, csv_text, quality_csv, quality_table, raw_csv

NO_MATPLOTLIB = f"matplotlib is not installed: {INSTALL}"


@dataclasses.dataclass
class _Section:
    """Section of the report about one group of runs (see `collect`)."""

    group: RunGroup
    tables: list[tuple[str, Table]]  # (file name without its ending, table)
    figures: list[FigureResult]
    warnings: list[str]


@dataclasses.dataclass
class _CrossTask:
    """Section of the report about all groups together."""

    overviews: list[Overview]
    tables: list[tuple[str, Table]]
    figures: list[FigureResult]


def write_report(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "report",
    *,
    metrics: Sequence[str] | None = None,
    title: str | None = None,
    formats: Sequence[str] = ("png", "pdf"),
    overwrite: bool = False,
    print_fn: Callable[[str], None] = print,
) -> Path:
    """Write the report of all runs in the folders `runs`, and return the path of report.md.

    Args:
        runs: folders of runs, or folders that hold them at any depth.
        output: folder of the report. An earlier report in it moves to earlier-N, or is deleted with `overwrite`.
        metrics: names of the metrics to report; None: all metrics of each task. Figures show the first of these metrics
            that the task has. If it has none of them, all its metrics are reported.
        title: heading of report.md.
        formats: formats of the figures, among png, pdf and svg; PNG is always written, for report.md.
        print_fn: prints text for the user, such as a line or a table.

    Raises:
        ReportError: there are no test results, a metric or format is unknown, or the output folder cannot be written to
            or holds files that are not a report.
        RecordError: a folder is missing, or a run.json or metrics.json is damaged.
    """
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown:
        raise ReportError(f"--formats {' '.join(unknown)}: expected one or more of {', '.join(FORMATS)}")
    output = Path(output)
    collection = collect(runs)
    chosen = {group.slug: _metrics(group, metrics, collection) for group in collection.groups}
    report_folder.check(output)
    with report_folder.replacing(output, overwrite, print_fn) as temporary:
        sections = [_section(group, chosen[group.slug], temporary, formats) for group in collection.groups]
        first_metrics = {slug: names[0] for slug, names in chosen.items()}
        cross_task = _cross_task(collection.groups, first_metrics, temporary, formats)
        (temporary / report_folder.RAW).write_text(raw_csv(collection.groups), encoding="utf-8")
        text = _markdown(title or "FLARE experiment", collection, cross_task, sections, runs)
        (temporary / report_folder.TEXT).write_text(text, encoding="utf-8")
        files = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
        content = _report_json(collection, cross_task, sections, chosen, runs, files)
        write_json(temporary / report_folder.REPORT, content)
    _show(collection, cross_task, sections, output, print_fn)
    return output / report_folder.TEXT


def _metrics(group: RunGroup, requested: Sequence[str] | None, collection: Collection) -> list[str]:
    if requested is None:
        return group.metrics
    available = sorted({name for one in collection.groups for name in one.metrics})
    unknown = [name for name in requested if name not in available]
    if unknown:
        raise ReportError(
            f"--metric {' '.join(unknown)}: no run has this metric; available metrics are {', '.join(available)}"
        )
    return [name for name in requested if name in group.metrics] or group.metrics


def _cross_task(
    groups: Sequence[RunGroup], metrics: dict[str, str], temporary: Path, formats: Sequence[str]
) -> _CrossTask:
    """Write an overview if there are several tasks or models, and one table per ablation; return the section."""
    tables: list[tuple[str, Table]] = []
    figures: list[FigureResult] = []
    models = overviews(groups, metrics)
    folder = temporary / report_folder.TABLES
    folder.mkdir(exist_ok=True)
    if sum(len(one.tasks) for one in models) > 1:
        tables.append(("overview", overview_table(models)))
        (folder / "overview.csv").write_text(overview_csv(models), encoding="utf-8")
        figures = _figures(temporary, formats, lambda into, kinds: draw_overview_figures(models, into, kinds))
    for name, (factor, title) in ABLATIONS.items():
        if (table := ablation_table(groups, metrics, factor, title)) is not None:
            tables.append((name, table))
            (folder / f"{name}.csv").write_text(csv_text(table.head, table.rows), encoding="utf-8")
    _write_tables(tables, folder)
    return _CrossTask(models, tables, figures)


def _section(group: RunGroup, metrics: Sequence[str], temporary: Path, formats: Sequence[str]) -> _Section:
    tables = []
    folder = temporary / report_folder.TABLES
    folder.mkdir(exist_ok=True)
    for metric in metrics:
        numbers = quality(group, metric)
        name = f"{group.slug}-{metric}"
        tables.append((name, quality_table(group, numbers)))
        (folder / f"{name}.csv").write_text(quality_csv(numbers), encoding="utf-8")
    cost = cost_table(group)
    if cost is not None:
        tables.append((f"{group.slug}-costs", cost))
        (folder / f"{group.slug}-costs.csv").write_text(cost_csv(costs(group)), encoding="utf-8")
    _write_tables(tables, folder)
    figures = _figures(temporary, formats, lambda into, kinds: draw_figures(group, metrics[0], into, kinds))
    return _Section(group, tables, figures, warnings(group))


def _write_tables(tables: Sequence[tuple[str, Table]], folder: Path) -> None:
    for name, table in tables:
        notes = "".join(f"- {markdown(note)}\n" for note in table.notes)
        (folder / f"{name}.md").write_text(
            f"{markdown(table.title)}\n\n{table.markdown()}\n\n{notes}", encoding="utf-8"
        )
        (folder / f"{name}.tex").write_text(table.latex(), encoding="utf-8")


def _figures(
    temporary: Path, formats: Sequence[str], draw: Callable[[Path, list[str]], list[FigureResult]]
) -> list[FigureResult]:
    folder = temporary / report_folder.FIGURES
    folder.mkdir(exist_ok=True)
    try:
        figures = draw(folder, list(dict.fromkeys(("png", *formats))))
    except ImportError:
        figures = [FigureResult("all", "Figures", [], NO_MATPLOTLIB)]
    if not any(folder.iterdir()):
        folder.rmdir()
    return figures


# --- report.json ------------------------------------------------------------------------------------------------------


def _report_json(
    collection: Collection,
    cross_task: _CrossTask,
    sections: Sequence[_Section],
    metrics: dict[str, list[str]],
    runs: Sequence[str | os.PathLike[str]],
    files: list[str],
) -> dict[str, Any]:
    return {
        "made_by": report_folder.MADE_BY,
        "date": now(),
        "environment": environment(),
        "runs": [str(folder) for folder in runs],
        "runs_found": collection.runs,
        "unfinished": collection.unfinished,
        "overviews": [dataclasses.asdict(one) for one in cross_task.overviews],
        "groups": [
            {
                "name": section.group.slug,
                "task": section.group.task,
                "data": section.group.data,
                "source_language": section.group.source,
                "model": section.group.model,
                "quality": [
                    dataclasses.asdict(quality(section.group, metric)) for metric in metrics[section.group.slug]
                ],
                "costs": [dataclasses.asdict(cost) for cost in costs(section.group)],
                "conditions": [list(line) for line in conditions(section.group)],
                "warnings": section.warnings,
                "captions": {p.name: p.caption for p in section.figures if p.caption},
                "pictures_left_out": {p.name: p.missing for p in section.figures if p.missing},
                "runs": [
                    {
                        "folder": str(entry.run.folder),
                        "setting": entry.setting,
                        "scores": entry.scores,
                        "run": dataclasses.asdict(entry.run.record),
                        "metrics": dataclasses.asdict(entry.run.metrics),
                    }
                    for entry in section.group.entries
                ],
            }
            for section in sections
        ],
        "files": files,
    }


# --- report.md --------------------------------------------------------------------------------------------------------


def _markdown(
    title: str,
    collection: Collection,
    cross_task: _CrossTask,
    sections: Sequence[_Section],
    runs: Sequence[str | os.PathLike[str]],
) -> str:
    lines = [f"# {markdown(title)}", ""]
    done = collection.runs - len(collection.unfinished)
    lines += [f"{done} finished runs in {', '.join(code(str(folder)) for folder in runs)}.", ""]
    if collection.unfinished:
        lines += ["Not in the tables:", "", *(f"- {markdown(line)}" for line in collection.unfinished), ""]
    if len(sections) > 1:
        lines += [
            f"{len(sections)} groups with separate tables; a group has one task, source language and model: "
            f"{', '.join(section.group.slug for section in sections)}.",
            "",
        ]
    if cross_task.tables:
        lines += ["## All tasks" if len(sections) > 1 else "## Ablations", ""]
        lines += _content_lines(cross_task.tables, cross_task.figures)
    for section in sections:
        lines += _group_lines(section)
    return "\n".join(lines).rstrip() + "\n"


def _group_lines(section: _Section) -> list[str]:
    group = section.group
    lines = [f"## {markdown(group.title)}", ""]
    if section.warnings:
        lines += ["**Before comparing:**", "", *(f"- {markdown(line)}" for line in section.warnings), ""]
    lines += _content_lines(section.tables, section.figures)
    lines += ["### Conditions", "", "| | |", "|---|---|"]
    lines += [f"| {markdown(name)} | {markdown(value)} |" for name, value in conditions(group)]
    run_notes = notes(group)
    if run_notes:
        lines += ["", "Notes of the runs about their data:", "", *(f"- {markdown(note)}" for note in run_notes)]
    return [*lines, ""]


def _content_lines(tables: Sequence[tuple[str, Table]], figures: Sequence[FigureResult]) -> list[str]:
    lines = []
    for _, table in tables:
        lines += [f"### {markdown(table.title)}", "", table.markdown(), ""]
        lines += [*(f"- {markdown(note)}" for note in table.notes), ""]
    for figure in figures:
        if figure.files:
            lines += [f"![{markdown(figure.title)}]({report_folder.FIGURES}/{figure.files[0].name})", ""]
            lines += [f"*{markdown(figure.caption)}.*", ""]
    missing = [figure for figure in figures if figure.missing]
    if missing:
        lines += ["Figures left out:", "", *(f"- {markdown(f'{p.title}: {p.missing}')}" for p in missing), ""]
    return lines


# --- terminal ---------------------------------------------------------------------------------------------------------


def _show(
    collection: Collection,
    cross_task: _CrossTask,
    sections: Sequence[_Section],
    output: Path,
    print_fn: Callable[[str], None],
) -> None:
    _show_tables(cross_task.tables, print_fn)
    for section in sections:
        _show_tables(section.tables, print_fn)
        print_fn("")
        for line in section.warnings:
            print_fn(f"Warning: {line}")
        left_out = [f"{p.title} ({p.missing})" for p in section.figures if p.missing]
        if left_out:
            print_fn(f"Figures of {section.group.slug} left out: {'; '.join(left_out)}")
    for line in collection.unfinished:
        print_fn(f"Not in the tables: {line}")
    figures = [*cross_task.figures, *(figure for section in sections for figure in section.figures)]
    count = sum(bool(figure.files) for figure in figures)
    print_fn(
        f"Written to {output}: report.md, report.json, runs.csv, tables/" + (f", {count} figures" if count else "")
    )


def _show_tables(tables: Sequence[tuple[str, Table]], print_fn: Callable[[str], None]) -> None:
    for _, table in tables:
        print_fn("")
        print_fn(table.title)
        print_fn(table.text())
        for note in table.notes:
            print_fn(f"  {note}")
