"""`flare report`: from folders of runs to tables, pictures, report.md and report.json."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..atomic_files import write_json
from ..environment import environment, now
from ..escape import code, markdown
from . import folder as places
from .collect import Collection, Group, ReportError, collect
from .conditions import conditions, notes, warnings
from .pictures import FORMATS, Picture, draw_all
from .summary import costs, quality
from .tables import Table, cost_csv, cost_table, quality_csv, quality_table, raw_csv

NO_MATPLOTLIB = "matplotlib is not installed: pip install 'flare-kernels[plots]'"


@dataclasses.dataclass
class _Section:
    """One group with everything that is said about it."""

    group: Group
    tables: list[tuple[str, Table]]  # (file name without its ending, table)
    pictures: list[Picture]
    warnings: list[str]


def write_report(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "report",
    *,
    metrics: Sequence[str] | None = None,
    title: str | None = None,
    formats: Sequence[str] = ("png",),
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
    places.check(output)
    with places.replacing(output, overwrite, say) as scratch:
        sections = [_section(group, chosen[group.slug], scratch, formats, say) for group in found.groups]
        (scratch / places.RAW).write_text(raw_csv(found.groups), encoding="utf-8")
        text = _markdown(title or "FLARE experiment", found, sections, runs)
        (scratch / places.TEXT).write_text(text, encoding="utf-8")
        files = sorted(str(path.relative_to(scratch)) for path in scratch.rglob("*") if path.is_file())
        write_json(scratch / places.REPORT, _everything(found, sections, chosen, runs, files))
    _show(found, sections, output, say)
    return output / places.TEXT


def _metrics(group: Group, wanted: Sequence[str] | None, found: Collection) -> list[str]:
    if wanted is None:
        return group.metrics
    there = sorted({name for one in found.groups for name in one.metrics})
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise ReportError(f"--metric {' '.join(unknown)}: no run has it; metrics there are {', '.join(there)}")
    return [name for name in wanted if name in group.metrics] or group.metrics


def _section(
    group: Group, metrics: Sequence[str], scratch: Path, formats: Sequence[str], say: Callable[[str], None]
) -> _Section:
    tables = []
    folder = scratch / places.TABLES
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
    for name, table in tables:
        notes = "".join(f"- {markdown(note)}\n" for note in table.notes)
        (folder / f"{name}.md").write_text(
            f"{markdown(table.title)}\n\n{table.markdown()}\n\n{notes}", encoding="utf-8"
        )
        (folder / f"{name}.tex").write_text(table.latex(), encoding="utf-8")
    pictures_folder = scratch / places.PICTURES
    pictures_folder.mkdir(exist_ok=True)
    kinds = list(dict.fromkeys(("png", *formats)))
    try:
        pictures = draw_all(group, metrics[0], pictures_folder, kinds)
    except ImportError:
        pictures = [Picture("all", "Pictures", [], NO_MATPLOTLIB)]
    if not any(pictures_folder.iterdir()):
        pictures_folder.rmdir()
    return _Section(group, tables, pictures, warnings(group))


# --- report.json ------------------------------------------------------------------------------------------------------


def _everything(
    found: Collection,
    sections: Sequence[_Section],
    metrics: dict[str, list[str]],
    runs: Sequence[str | os.PathLike[str]],
    files: list[str],
) -> dict[str, Any]:
    return {
        "made_by": places.MADE_BY,
        "date": now(),
        "environment": environment(),
        "runs": [str(folder) for folder in runs],
        "runs_found": found.runs,
        "unfinished": found.unfinished,
        "groups": [
            {
                "name": section.group.slug,
                "task": section.group.task,
                "source_language": section.group.source,
                "model": section.group.model,
                "quality": [
                    dataclasses.asdict(quality(section.group, metric)) for metric in metrics[section.group.slug]
                ],
                "costs": [dataclasses.asdict(cost) for cost in costs(section.group)],
                "conditions": [list(line) for line in conditions(section.group)],
                "warnings": section.warnings,
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
    title: str, found: Collection, sections: Sequence[_Section], runs: Sequence[str | os.PathLike[str]]
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
    for section in sections:
        lines += _group_lines(section)
    return "\n".join(lines).rstrip() + "\n"


def _group_lines(section: _Section) -> list[str]:
    group = section.group
    lines = [f"## {markdown(group.title)}", ""]
    if section.warnings:
        lines += ["**Before comparing:**", "", *(f"- {markdown(line)}" for line in section.warnings), ""]
    for _, table in section.tables:
        lines += [f"### {markdown(table.title)}", "", table.markdown(), ""]
        lines += [*(f"- {markdown(note)}" for note in table.notes), ""]
    for picture in section.pictures:
        if picture.files:
            lines += [f"![{markdown(picture.title)}]({places.PICTURES}/{picture.files[0].name})", ""]
    missing = [picture for picture in section.pictures if picture.missing]
    if missing:
        lines += ["Pictures left out:", "", *(f"- {markdown(f'{p.title}: {p.missing}')}" for p in missing), ""]
    lines += ["### Conditions", "", "| | |", "|---|---|"]
    lines += [f"| {markdown(name)} | {markdown(value)} |" for name, value in conditions(group)]
    said = notes(group)
    if said:
        lines += ["", "What the runs said about their data:", "", *(f"- {markdown(note)}" for note in said)]
    return [*lines, ""]


# --- the screen -------------------------------------------------------------------------------------------------------


def _show(found: Collection, sections: Sequence[_Section], output: Path, say: Callable[[str], None]) -> None:
    for section in sections:
        for _, table in section.tables:
            say("")
            say(table.title)
            say(table.text())
            for note in table.notes:
                say(f"  {note}")
        say("")
        for line in section.warnings:
            say(f"Warning: {line}")
        left_out = [f"{p.title} ({p.missing})" for p in section.pictures if p.missing]
        if left_out:
            say(f"Pictures of {section.group.slug} left out: {'; '.join(left_out)}")
    for line in found.unfinished:
        say(f"Not in the tables: {line}")
    count = sum(bool(picture.files) for section in sections for picture in section.pictures)
    say(f"Written to {output}: report.md, report.json, runs.csv, tables/" + (f", {count} pictures" if count else ""))
