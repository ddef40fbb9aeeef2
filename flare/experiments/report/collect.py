"""Collect runs into groups whose scores are comparable: one group for each task, source language and base model.

A task on the user's own data has a group for each data set. Scores of the base on test rows on which no adapter was
scored form a separate group.

A variant is a method with its options ("flare-r8"), or a name given by the user; it names a folder of runs. A setting
says how a run was tested, for example "translate-train" or "zero-shot" (a key of `Metrics.test`). A line of a table has
the scores of one variant in one setting, in all languages and with all seeds. The label of the line identifies it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..runs.records import RecordError, Run, diverged, find_runs, read_record
from ..tasks.registry import OWN
from ..utils.errors import UserError
from .display import language_name, language_names, task_name

#: Methods in the order of the paper's tables, and their display names.
METHODS = {
    "zero-shot": "zero-shot",
    "translate-test": "translate-test",
    "lora": "LoRA",
    "input-fusion": "input-level fusion",
    "x-mixup": "X-Mixup",
    "flare-mt": "FLARE MT",
    "flare": "FLARE",
}
#: The main settings: of adapters, of the base model on target texts, and of the base model on source texts. A line's
#: label names its setting only if the setting is not one of these.
_MAIN = ("translate-train", "zero-shot", "translate-test")


class ReportError(UserError):
    """A report cannot be written; the message says what to do."""


@dataclass(frozen=True)
class Entry:
    """Scores of one run in one setting.

    Attributes:
        run: the run.
        setting: how the run was tested.
        scores: metric -> score in percent.
    """

    run: Run
    setting: str
    scores: dict[str, float]

    @property
    def label(self) -> str:
        """Label of this entry's line: the variant, followed by " @ <setting>" if the setting is not a main setting."""
        variant = self.run.record.variant
        return variant if self.setting in _MAIN else f"{variant} @ {self.setting}"

    @property
    def name(self) -> str:
        """Display name of the label. For example, variant "flare-r8" of method "flare" is shown as "FLARE (r8)"."""
        record = self.run.record
        rest = record.variant.removeprefix(record.method)
        name = record.variant
        if record.method == record.variant == "translate-test":  # its source text may be human or machine-translated
            name = f"{METHODS[record.method]} ({record.source_text or 'gold'} source)"
        elif record.method in METHODS and (not rest or (rest != record.variant and rest.startswith("-"))):
            name = METHODS[record.method] + (f" ({rest[1:].replace('-', ' ')})" if rest else "")
        if self.setting in _MAIN:
            return name
        _, slash, text = self.setting.partition("/")
        return f"{name} ({text} source at test)" if slash else f"{name} ({self.setting})"

    @property
    def language(self) -> str:
        """The target language."""
        return str(self.run.record.target_language)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.run.record.seed


@dataclass
class RunGroup:
    """Runs with the same task, source language and base model, whose scores are shown in the same tables.

    Attributes:
        task: name of the task.
        source: the source language.
        model: name of the pretrained model.
        data: name of the data, if the task is for the user's own data; otherwise empty.
        entries: scores of the runs.
        bases: runs of the fine-tuned bases from which the other runs start.
        slug: short name for files, unique in a report.
        rows: remark on the test rows, if they differ from the rows on which adapters were scored; otherwise empty.
        labels: label of a line -> display name, in the order of the paper's tables.
        languages: target languages, sorted.
        metrics: names of the metrics; the task's first metric comes first.
    """

    task: str
    source: str
    model: str
    data: str = ""
    entries: list[Entry] = field(default_factory=list)
    bases: list[Run] = field(default_factory=list)
    slug: str = ""
    rows: str = ""

    @property
    def labels(self) -> dict[str, str]:
        first: dict[str, Entry] = {}
        for entry in self.entries:
            first.setdefault(entry.label, entry)
        return {label: first[label].name for label in sorted(first, key=lambda label: _sort_key(first[label]))}

    @property
    def languages(self) -> list[str]:
        return sorted({entry.language for entry in self.entries})

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for entry in self.entries for name in entry.scores))

    @property
    def shown_task(self) -> str:
        """Display name of the task, or the name of the user's own data."""
        return self.data or task_name(self.task)

    @property
    def title(self) -> str:
        """Heading of the group's section in the report."""
        languages = ", ".join(language_names(self.languages).values())
        return f"{self.shown_task}: {language_name(self.source)} to {languages}" + (
            f", {self.rows}" if self.rows else ""
        )

    def of(self, label: str, language: str | None = None) -> list[Entry]:
        """Return the entries of a line, sorted by language and seed. If `language` is None, return all languages."""
        entries = [e for e in self.entries if e.label == label and language in (None, e.language)]
        return sorted(entries, key=lambda e: (e.language, e.seed))


@dataclass
class Collection:
    """Data of a report.

    Attributes:
        groups: the groups of runs.
        unfinished: one line for each excluded run, with its folder and the reason.
        runs: number of runs found, including excluded runs.
    """

    groups: list[RunGroup]
    unfinished: list[str]
    runs: int


def collect(folders: Sequence[str | os.PathLike[str]]) -> Collection:
    """Read every run in the folders and their sub-folders, and put the runs into groups.

    Raises:
        ReportError: there are no runs, no run has test results, results are not finite numbers, or two runs have the
            same label, language and seed.
        RecordError: a folder is missing, or a file in it is damaged.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        for run in find_runs(folder):
            runs.setdefault(run.folder.resolve(), run)
    where = ", ".join(str(folder) for folder in folders)
    if not runs:
        raise ReportError(
            f"{where}: no runs found (no run.json in these folders and their sub-folders); flare finetune, flare train "
            "and flare evaluate write runs"
        )
    groups: dict[tuple[str, str, str, str], RunGroup] = {}
    paths = _data_paths(runs.values())
    bases: list[Run] = []
    unfinished = []
    for run in runs.values():
        record, reason = run.record, _exclusion_reason(run)
        if reason:
            unfinished.append(f"{run.folder}: {reason}")
            continue
        if record.kind == "finetune":
            bases.append(run)
            continue
        path = _data_path(run)
        key = record.task, record.source_language, _model(run, runs), paths.get(path, path)
        group = groups.setdefault(key, RunGroup(*key))
        group.entries += [Entry(run, setting, _scores(run, setting)) for setting in run.metrics.test]
    for run in bases:
        _add_base(run, paths, groups.values())
    nonempty = [part for group in groups.values() for part in _split_other_rows(group)]
    if not nonempty:
        raise ReportError(
            f"{where}: nothing to report. Runs: {len(runs)}; among them fine-tuned bases: {len(bases)}, unfinished or "
            f"without test results: {len(unfinished)}" + "".join(f"\n  {line}" for line in unfinished[:5])
        )
    for group in nonempty:
        _check_duplicates(group.entries)
    _set_data_names(nonempty)
    _set_slugs(nonempty)
    return Collection(sorted(nonempty, key=lambda group: group.slug), unfinished, len(runs))


def _split_other_rows(group: RunGroup) -> list[RunGroup]:
    """Return the group and, if needed, a second group with scores of the base on other test rows.

    The scores of the base in a language move to the second group if every adapter of this language was scored on other
    test rows. Scores in a language without adapters stay in the first group.
    """
    trained = [e for e in group.entries if e.run.record.kind == "train" and e.setting == "translate-train"]
    other = [
        entry
        for entry in group.entries
        if entry.run.record.kind == "evaluate"
        and (peers := [one for one in trained if one.language == entry.language])
        and not any(_same_rows(entry.run, one.run) for one in peers)
    ]
    if not other:
        return [group]
    group.entries = [entry for entry in group.entries if entry not in other]
    rows = "scores of the base on test rows on which no adapter was scored"
    return [group, RunGroup(group.task, group.source, group.model, group.data, other, group.bases, rows=rows)]


def _same_rows(one: Run, other: Run) -> bool:
    """Return whether two runs of a language were scored on the same test rows.

    The digests of the rows are compared, or the numbers of rows if a digest was not recorded. If a number was not
    recorded either, the rows count as the same.
    """
    a, b = one.record.data, other.record.data
    digests = [(data.get("digest") or {}).get("test") for data in (a, b)]
    if all(digests):
        return bool(digests[0] == digests[1])
    return a.get("test") == b.get("test") or not (a.get("test") and b.get("test"))


#: Kind of a run -> what to do if its numbers are not finite.
_AFTER_DIVERGING = {
    "finetune": "run flare finetune --no-resume with a smaller --lr",
    "train": "run flare train --no-resume with a smaller --lr",
    "evaluate": "fine-tune the base again (flare finetune --no-resume), then run flare evaluate",
}


def _exclusion_reason(run: Run) -> str | None:
    if what := diverged(run):
        return f"diverged, {what}; {_AFTER_DIVERGING.get(run.record.kind, _AFTER_DIVERGING['train'])}"
    if not run.record.done:
        return f"not finished (status {run.record.status!r}); run the same command again to resume it"
    if run.record.kind != "finetune" and not run.metrics.test:
        return "no test results; flare evaluate adds them"
    return None


def _scores(run: Run, setting: str) -> dict[str, float]:
    scores = run.metrics.test[setting]
    wrong = not isinstance(scores, dict) or any(
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        for value in scores.values()
    )
    if wrong:
        raise ReportError(
            f"{run.folder / 'metrics.json'}: test results of {setting!r} are {scores!r}; expected an object that maps "
            "each metric to a finite number. Correct the file, or leave this run out of the report"
        )
    return {name: float(value) for name, value in scores.items()}


def _model(run: Run, runs: dict[Path, Run]) -> str:
    """Return the pretrained model of a run.

    A run that starts from a fine-tuned base has the pretrained model of this base. If the base is not found, its path
    is returned instead, without the seed.
    """
    base = run.record.base
    if run.record.kind == "finetune" or not base:
        return base
    above = list(run.folder.resolve().parents)[2:3]  # the experiment's folder, above <target>/<variant>/seed-N
    for folder in (Path(base), *(root / "base" / Path(base).name for root in above)):
        if folder.resolve() in runs:
            return runs[folder.resolve()].record.base
        try:
            return read_record(folder).base
        except RecordError:
            continue
    return re.sub(r"/seed-\d+/?$", "", base)


def _data_path(run: Run) -> str:
    """Return the path or hub id of the user's own data, or "" if the task has a fixed data set."""
    return str(run.record.settings.get("data") or "").rstrip("/") if run.record.task in OWN else ""


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _data_paths(runs: Iterable[Run]) -> dict[str, str]:
    """Return {path of the user's own data: path that stands for the data set}, for runs of adapters and evaluations.

    Two paths are one data set (for example on two machines) if they end in the same name and runs on both were scored
    on the same test rows. The first path then stands for both.
    """
    paths: dict[str, str] = {}
    first: dict[tuple[str, str], str] = {}
    for run in runs:
        path = _data_path(run)
        digest = (run.record.data.get("digest") or {}).get("test")
        if not path or run.record.kind == "finetune":
            continue
        old = paths.setdefault(path, path)
        if digest and (new := paths[first.setdefault((_last(path), digest), path)]) != old:
            paths = {one: new if other == old else other for one, other in paths.items()}
    return paths


def _add_base(run: Run, paths: dict[str, str], groups: Iterable[RunGroup]) -> None:
    """Add a fine-tuned base to the groups of its task, source language, model and data set.

    If no group has the path of the base's data, the data may have been moved. The base is then added to the groups
    whose data have the same name.
    """
    record, path = run.record, _data_path(run)
    key = record.task, record.source_language, record.base
    same = [group for group in groups if (group.task, group.source, group.model) == key]
    exact = [group for group in same if group.data == paths.get(path)]
    for group in exact or [group for group in same if _last(group.data) == _last(path)]:
        group.bases.append(run)


def _set_data_names(groups: Sequence[RunGroup]) -> None:
    """Replace each group's path of the user's own data by a name that no other data set of the report has.

    The name is the last part of the path. It has more parts if another path ends in the same part, and is followed by
    the task if another task has the same data or is shown by this name.
    """
    paths = {group.data for group in groups if group.data}
    names = {path: _shortest_end(path, paths - {path}) for path in paths}
    tasks: dict[str, set[str]] = {}
    for group in groups:
        tasks.setdefault(names.get(group.data) or task_name(group.task), set()).add(group.task)
    for group in groups:
        if name := names.get(group.data):
            group.data = f"{name} ({group.task})" if len(tasks[name]) > 1 else name


def _shortest_end(path: str, others: Iterable[str]) -> str:
    """Return the shortest end of a path, in whole parts, that no other path has."""
    parts = path.split("/")
    for start in range(len(parts) - 1, 0, -1):
        if all(other.split("/")[start - len(parts) :] != parts[start:] for other in others):
            return "/".join(parts[start:])
    return path


def _check_duplicates(entries: Iterable[Entry]) -> None:
    seen: dict[tuple[str, str, int], Entry] = {}
    for entry in entries:
        other = seen.setdefault((entry.label, entry.language, entry.seed), entry)
        if other is not entry:
            raise ReportError(
                f"two runs of {entry.label} on {entry.language} with seed {entry.seed}: {other.run.folder} and "
                f"{entry.run.folder}. Write a separate report for each run, or train one of the runs again under "
                "another name (flare train --name)"
            )


def _sort_key(entry: Entry) -> tuple[int, bool, list[tuple[int, int | str]]]:
    method = entry.run.record.method
    place = list(METHODS).index(method) if method in METHODS else len(METHODS)
    pieces = [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", entry.label)]
    return place, entry.label != method, pieces


def _set_slugs(groups: Sequence[RunGroup]) -> None:
    """Set a unique slug for each group.

    It consists of the name of the task or of the user's data, "other-rows" if the group has other test rows than the
    adapters, the source language if the task's groups have several, the model if they have several, and a number if the
    slug is taken.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "x"

    for group in groups:
        same = [other for other in groups if (other.task, other.data) == (group.task, group.data)]
        parts = [group.data or group.task, *(["other-rows"] if group.rows else [])]
        if len({other.source for other in same}) > 1:
            parts.append(group.source)
        if len({other.model for other in same}) > 1:
            parts.append(Path(group.model).name)
        slug = "-".join(map(plain, parts))
        taken = {other.slug for other in groups if other is not group}
        number, group.slug = 2, slug
        while group.slug in taken:
            group.slug, number = f"{slug}-{number}", number + 1
