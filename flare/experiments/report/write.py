"""`flare report`: from folders of runs to tables, pictures, report.md and report.json."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..utils.atomic_files import write_json
from ..utils.environment import environment, now
from ..utils.escape import code, markdown
from . import report_folder
from .collect import Collection, Group, ReportError, collect
from .conditions import conditions, notes, warnings
from .cross_task import VARIED, Overview, overview_csv, overview_table, overviews, varied_table
from .figures import FORMATS, Picture, draw_all, draw_overviews
from .summary import costs, quality
from .tables import Table, cost_csv, cost_table, csv_text, quality_csv, quality_table, raw_csv

NO_MATPLOTLIB = "matplotlib is not installed: pip install 'flare-kernels[experiments]'"


@dataclasses.dataclass
class _Section:
    """One group with everything that is said about it."""

    group: Group
    tables: list[tuple[str, Table]]  # (file name without its ending, table)
    pictures: list[Picture]
    warnings: list[str]


@dataclasses.dataclass
class _Across:
    """What is said over all groups."""

    overviews: list[Overview]
    tables: list[tuple[str, Table]]
    pictures: list[Picture]


def write_report(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "report",
    *,
    metrics: Sequence[str] | None = None,
    title: str | None = None,
    formats: Sequence[str] = ("png", "pdf"),
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the report of all runs in the folders `runs` and return its report.md.

    Args:
        runs: folders of runs, or folders that hold them at any depth.
        output: folder of the report. An earlier report in it moves to earlier-N there, or is dropped with `overwrite`.
        metrics: names of the metrics to report; the pictures show the first one a task has. None: all of a task's, its
            first one in the pictures.
        title: heading of report.md.
        formats: of the pictures, out of png, pdf and svg; PNG is always written, report.md shows it.
        say: gets one line at a time.

    Raises:
        ReportError: no runs, none finished, an unknown metric, or an output folder that is not a report's.
        RecordError: a folder is missing, or a run.json or metrics.json is damaged.
    """
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown:
        raise ReportError(f"--formats {' '.join(unknown)}: expected one or more of {', '.join(FORMATS)}")
    output = Path(output)
    found = collect(runs)
    chosen = {group.slug: _metrics(group, metrics, found) for group in found.groups}
    report_folder.check(output)
    with report_folder.replacing(output, overwrite, say) as scratch:
        sections = [_section(group, chosen[group.slug], scratch, formats) for group in found.groups]
        across = _across(found.groups, {slug: names[0] for slug, names in chosen.items()}, scratch, formats)
        (scratch / report_folder.RAW).write_text(raw_csv(found.groups), encoding="utf-8")
        text = _markdown(title or "FLARE experiment", found, across, sections, runs)
        (scratch / report_folder.TEXT).write_text(text, encoding="utf-8")
        files = sorted(str(path.relative_to(scratch)) for path in scratch.rglob("*") if path.is_file())
        write_json(scratch / report_folder.REPORT, _everything(found, across, sections, chosen, runs, files))
    _show(found, across, sections, output, say)
    return output / report_folder.TEXT


def _metrics(group: Group, wanted: Sequence[str] | None, found: Collection) -> list[str]:
    if wanted is None:
        return group.metrics
    there = sorted({name for one in found.groups for name in one.metrics})
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise ReportError(f"--metric {' '.join(unknown)}: no run has it; metrics there are {', '.join(there)}")
    return [name for name in wanted if name in group.metrics] or group.metrics


def _across(groups: Sequence[Group], metrics: dict[str, str], scratch: Path, formats: Sequence[str]) -> _Across:
    """What is over all groups: an overview where there are several, and one table for each thing that is varied."""
    tables: list[tuple[str, Table]] = []
    pictures: list[Picture] = []
    found = overviews(groups, metrics)
    folder = scratch / report_folder.TABLES
    folder.mkdir(exist_ok=True)
    if sum(len(one.tasks) for one in found) > 1:
        tables.append(("overview", overview_table(found)))
        (folder / "overview.csv").write_text(overview_csv(found), encoding="utf-8")
        pictures = _pictures(scratch, formats, lambda into, kinds: draw_overviews(found, into, kinds))
    for name, (kind, title) in VARIED.items():
        if (table := varied_table(groups, metrics, kind, title)) is not None:
            tables.append((name, table))
            (folder / f"{name}.csv").write_text(csv_text(table.head, table.rows), encoding="utf-8")
    _write_tables(tables, folder)
    return _Across(found, tables, pictures)


def _section(group: Group, metrics: Sequence[str], scratch: Path, formats: Sequence[str]) -> _Section:
    tables = []
    folder = scratch / report_folder.TABLES
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
    pictures = _pictures(scratch, formats, lambda into, kinds: draw_all(group, metrics[0], into, kinds))
    return _Section(group, tables, pictures, warnings(group))


def _write_tables(tables: Sequence[tuple[str, Table]], folder: Path) -> None:
    for name, table in tables:
        notes = "".join(f"- {markdown(note)}\n" for note in table.notes)
        (folder / f"{name}.md").write_text(
            f"{markdown(table.title)}\n\n{table.markdown()}\n\n{notes}", encoding="utf-8"
        )
        (folder / f"{name}.tex").write_text(table.latex(), encoding="utf-8")


def _pictures(scratch: Path, formats: Sequence[str], draw: Callable[[Path, list[str]], list[Picture]]) -> list[Picture]:
    folder = scratch / report_folder.PICTURES
    folder.mkdir(exist_ok=True)
    try:
        pictures = draw(folder, list(dict.fromkeys(("png", *formats))))
    except ImportError:
        pictures = [Picture("all", "Pictures", [], NO_MATPLOTLIB)]
    if not any(folder.iterdir()):
        folder.rmdir()
    return pictures


# --- report.json ------------------------------------------------------------------------------------------------------


def _everything(
    found: Collection,
    across: _Across,
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
        "runs_found": found.runs,
        "unfinished": found.unfinished,
        "overviews": [dataclasses.asdict(one) for one in across.overviews],
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
                "captions": {p.name: p.caption for p in section.pictures if p.caption},
                "pictures_left_out": {p.name: p.missing for p in section.pictures if p.missing},
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
    found: Collection,
    across: _Across,
    sections: Sequence[_Section],
    runs: Sequence[str | os.PathLike[str]],
) -> str:
    lines = [f"# {markdown(title)}", ""]
    done = found.runs - len(found.unfinished)
    lines += [f"{done} finished runs in {', '.join(code(str(folder)) for folder in runs)}.", ""]
    if found.unfinished:
        lines += ["Not in the tables:", "", *(f"- {markdown(line)}" for line in found.unfinished), ""]
    if len(sections) > 1:
        lines += [
            f"{len(sections)} groups, each with tables of its own (task, source language and model are the same in a "
            f"group): {', '.join(section.group.slug for section in sections)}.",
            "",
        ]
    if across.tables:
        lines += ["## All tasks" if len(sections) > 1 else "## One thing varied", ""]
        lines += _content_lines(across.tables, across.pictures)
    for section in sections:
        lines += _group_lines(section)
    return "\n".join(lines).rstrip() + "\n"


def _group_lines(section: _Section) -> list[str]:
    group = section.group
    lines = [f"## {markdown(group.title)}", ""]
    if section.warnings:
        lines += ["**Before comparing:**", "", *(f"- {markdown(line)}" for line in section.warnings), ""]
    lines += _content_lines(section.tables, section.pictures)
    lines += ["### Conditions", "", "| | |", "|---|---|"]
    lines += [f"| {markdown(name)} | {markdown(value)} |" for name, value in conditions(group)]
    said = notes(group)
    if said:
        lines += ["", "What the runs said about their data:", "", *(f"- {markdown(note)}" for note in said)]
    return [*lines, ""]


def _content_lines(tables: Sequence[tuple[str, Table]], pictures: Sequence[Picture]) -> list[str]:
    lines = []
    for _, table in tables:
        lines += [f"### {markdown(table.title)}", "", table.markdown(), ""]
        lines += [*(f"- {markdown(note)}" for note in table.notes), ""]
    for picture in pictures:
        if picture.files:
            lines += [f"![{markdown(picture.title)}]({report_folder.PICTURES}/{picture.files[0].name})", ""]
            lines += [f"*{markdown(picture.caption)}.*", ""]
    missing = [picture for picture in pictures if picture.missing]
    if missing:
        lines += ["Pictures left out:", "", *(f"- {markdown(f'{p.title}: {p.missing}')}" for p in missing), ""]
    return lines


# --- the screen -------------------------------------------------------------------------------------------------------


def _show(
    found: Collection, across: _Across, sections: Sequence[_Section], output: Path, say: Callable[[str], None]
) -> None:
    _show_tables(across.tables, say)
    for section in sections:
        _show_tables(section.tables, say)
        say("")
        for line in section.warnings:
            say(f"Warning: {line}")
        left_out = [f"{p.title} ({p.missing})" for p in section.pictures if p.missing]
        if left_out:
            say(f"Pictures of {section.group.slug} left out: {'; '.join(left_out)}")
    for line in found.unfinished:
        say(f"Not in the tables: {line}")
    drawn = [*across.pictures, *(picture for section in sections for picture in section.pictures)]
    count = sum(bool(picture.files) for picture in drawn)
    say(f"Written to {output}: report.md, report.json, runs.csv, tables/" + (f", {count} pictures" if count else ""))


def _show_tables(tables: Sequence[tuple[str, Table]], say: Callable[[str], None]) -> None:
    for _, table in tables:
        say("")
        say(table.title)
        say(table.text())
        for note in table.notes:
            say(f"  {note}")
