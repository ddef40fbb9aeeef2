"""Describe how the runs of a group were made, and warn if their scores or costs are not comparable.

`collect` explains groups, lines, labels, variants and settings.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from ..runs.records import STALE, Run
from .collect import Entry, RunGroup
from .display import metric_name
from .summary import Cell, costs, spread
from .tables import show

#: Names of options that may differ between the runs of a line, or that have no effect on the result.
_IGNORED = frozenset(
    {"seed", "seeds", "data_seed", "target", "targets", "target_language", "language", "languages", "output"}
    | {
        "output_dir",
        "logging_dir",
        "logging_steps",
        "log_level",
        "run_name",
        "base",
        "base_folder",
        "method",
        "methods",
    }
    | {"variant", "name", "progress", "no_progress", "disable_tqdm", "resume", "overwrite", "keep_checkpoints"}
    | {"save_total_limit", "base_date", "threads", "processes", "report_to", "config", "mt_language"}
)


def settings(run: Run) -> dict[str, Any]:
    """Return all options of a run that affect its result, except seed, languages, base model, method and variant.

    The keys of nested options are joined by a dot: adapter.lora_alpha.
    """
    values: dict[str, Any] = {}
    for name, value in {**run.record.training_arguments, **run.record.settings}.items():
        if isinstance(value, dict):
            values.update({f"{name}.{key}": one for key, one in value.items()})
        else:
            values[name] = value
    for name in ("fusion", "r", "source_text", "target_text"):
        value = getattr(run.record, name)
        if value is not None:
            values[name] = value
    for name in ("fusion", "r"):
        if values.get(f"adapter.{name}") == values.get(name):
            values.pop(f"adapter.{name}", None)
    return {name: value for name, value in values.items() if name.rpartition(".")[2].replace("-", "_") not in _IGNORED}


def warnings(group: RunGroup) -> list[str]:
    """Return warnings about scores or costs that are unreliable or not comparable.

    Scores are not comparable if, for example, the runs of one line have different options, or if the lines of a
    language have different rows. Costs are not comparable if, for example, they come from different machines.
    """
    lines = []
    for label in group.labels:
        entries = group.of(label)
        methods = sorted({entry.run.record.method for entry in entries})
        if len(methods) > 1:
            lines.append(f"{label}: runs of several methods under one name: {', '.join(methods)}")
        for name, values in _differing(entries, lambda entry: settings(entry.run)).items():
            shares = "; ".join(f"{value} in {_places(members)}" for value, members in values.items())
            lines.append(f"{label}: {name} differs between its runs: {shares}")
        for language in group.languages:
            entries = group.of(label, language)
            counts = {str(entry.run.record.data.get("train")) for entry in entries}
            if len(counts) > 1:
                lines.append(
                    f"{label} on {language}: its seeds have different numbers of training rows: {_joined(counts)}"
                )
    lines += _different_rows(group)
    for record in {id(entry.run): entry.run.record for entry in group.entries}.values():
        lines += [str(note) for note in record.data.get("notes") or [] if _questions_score(str(note))]
    trained = [entry for entry in group.entries if entry.run.metrics.seconds_per_step is not None]
    for what, read in _COSTS.items():
        kinds = {str(read(entry.run)) for entry in trained}
        if len(kinds) > 1:
            lines.append(f"costs are not comparable, because their runs have several {what}: {_joined(kinds)}")
    for cost in costs(group):
        low, high = cost.ranges.get("seconds_per_step", (0.0, 0.0))
        if high > _UNSTEADY * low:
            lines.append(
                f"{cost.label}: its runs took {1000 * low:.1f} to {1000 * high:.1f} ms per step, so its costs are "
                "not reliable (was the machine shared, or do the languages' texts differ in length?)"
            )
    for label in group.labels:
        cache_states = _differing(group.of(label), lambda entry: {"source cache": _cache_state(entry)})
        if cache_states:
            lines.append(f"{label}: its costs mix runs with and without a source cache (flare train --source-cache)")
    versions = _differing(group.entries, lambda entry: entry.run.record.environment.get("versions") or {})
    for name, values in versions.items():
        lines.append(f"runs with several versions of {name}: {', '.join(values)}")
    commits = {str(entry.run.record.environment.get("commit")) for entry in group.entries}
    if len(commits) > 1:
        lines.append(f"runs of several commits: {_joined(commits)}")
    return lines


def _cache_state(entry: Entry) -> str:
    """Return "on" or "off" for a run that can cache its source states, and "" for other runs."""
    facts = entry.run.record.data.get("source_cache") or {}
    return "" if not facts else "on" if facts.get("on") else "off"


def _questions_score(note: str) -> bool:
    """Return whether a note of a run says that the run's score is less meaningful."""
    return ": scored with " in note or STALE in note or " is at chance level on " in note


def _different_rows(group: RunGroup) -> list[str]:
    """Return warnings about languages whose lines were trained or scored on different rows.

    For instance, methods that read a source drop the rows that have no source.
    """
    lines = []
    for language in group.languages:
        entries = [entry for entry in group.entries if entry.language == language and entry.setting in _MAIN_SETTINGS]
        for split, what in (("train", "trained"), ("test", "scored")):
            counts: dict[str, dict[str, None]] = {}
            for entry in entries:
                rows = entry.run.record.data.get(split)
                if rows and (split == "test" or entry.run.record.kind == "train"):
                    counts.setdefault(str(rows), {})[entry.name] = None
            if len(counts) > 1:
                shares = "; ".join(f"{rows}: {', '.join(names)}" for rows, names in counts.items())
                lines.append(f"{language}: its lines were {what} on different numbers of rows: {shares}")
        scored: dict[str, dict[str, None]] = {}
        for entry in entries:
            if digest := (entry.run.record.data.get("digest") or {}).get("test"):
                scored.setdefault(f"{digest} {entry.run.record.data.get('test')}", {})[entry.name] = None
        if len({key.split()[1] for key in scored}) < len(scored):
            shares = "; ".join(", ".join(names) for names in scored.values())
            lines.append(f"{language}: its lines were scored on different test rows: {shares}")
    return lines


#: Warn if a step of the slowest run takes more than this many times as long as a step of the fastest run. Equal steps
#: in eager mode vary by up to 30 % between runs.
_UNSTEADY = 1.5
_MAIN_SETTINGS = ("translate-train", "zero-shot", "translate-test")
_COSTS: dict[str, Callable[[Run], Any]] = {
    "devices": lambda run: run.record.environment.get("device"),
    "processors": lambda run: run.record.environment.get("cpu"),
    "thread counts": lambda run: run.record.environment.get("threads"),
    "numbers of processes": lambda run: run.record.processes,
    "ways of measuring memory": lambda run: run.metrics.peak_kind,
}


def conditions(group: RunGroup) -> list[tuple[str, str]]:
    """Return the conditions under which the runs of a group were made, as (name, value) pairs."""
    records = [entry.run.record for entry in group.entries]
    lines = [
        ("task", group.task),
        ("model", group.model or "unknown"),
        ("source language", group.source),
        ("target languages", ", ".join(group.languages)),
        ("seeds", ", ".join(map(str, sorted({record.seed for record in records})))),
    ]
    texts: dict[str, list[str]] = {}
    for label, name in group.labels.items():
        for text in sorted({_source_text(e) for e in group.of(label) if e.run.record.kind == "train"} - {""}):
            texts.setdefault(text, []).append(name)
    if texts:
        lines.append(("source text in training", "; ".join(f"{text}: {', '.join(who)}" for text, who in texts.items())))
    cache_states: dict[str, list[str]] = {}
    for label, name in group.labels.items():
        for state in sorted({_cache_state(e) for e in group.of(label)} - {""}):
            cache_states.setdefault(state, []).append(name)
    if cache_states:
        lines.append(("source cache", "; ".join(f"{state}: {', '.join(who)}" for state, who in cache_states.items())))
    common, differing = _trained_settings(group)
    lines += [(name, value) for name, value in common.items() if value != "null"]
    lines += [(f"{name} (differs)", value) for name, value in differing.items()]
    sizes: dict[str, list[str]] = {}
    for language in group.languages:
        sizes.setdefault(_sizes([e.run.record.data for e in group.entries if e.language == language]), []).append(
            language
        )
    lines += [(f"rows of {', '.join(who)}", size) for size, who in sizes.items() if size]
    lines += [(f"base, {setting}", scores) for setting, scores in _base_scores(group).items()]
    for what, values in (
        ("device", {str(record.environment.get("device", "unknown")) for record in records}),
        ("processor", {str(record.environment.get("cpu", "unknown")) for record in records}),
        ("threads", {str(record.environment.get("threads", "unknown")) for record in records}),
        ("processes", {str(record.processes) for record in records}),
        ("commit", {str(record.environment.get("commit") or "unknown") for record in records}),
    ):
        lines.append((what, _joined(values)))
    for name in ("flare-kernels", "torch", "transformers", "peft"):
        values = {str((record.environment.get("versions") or {}).get(name, "unknown")) for record in records}
        lines.append((name, _joined(values)))
    dates = sorted(record.date[:10] for record in records if record.date)
    if dates:
        lines.append(("runs started", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"))
    return lines


def notes(group: RunGroup) -> list[str]:
    """Return the runs' notes about their data (dropped rows, cut texts), each once."""
    return list(dict.fromkeys(
        note if str(note).startswith(entry.language) else f"{entry.language}: {note}"
        for entry in group.entries for note in entry.run.record.data.get("notes") or []
    ))  # fmt: skip


def translator(entry: Entry) -> str | None:
    """Return the short name of the model that translated a run's source texts; None if this is not recorded."""
    record = entry.run.record
    by_direction = record.data.get("translation")
    if not isinstance(by_direction, dict):
        return None
    # a source text is translated from the target language
    provenance = by_direction.get(f"{record.target_language}-{record.source_language}", by_direction)
    model = (provenance.get("settings") or {}).get("model") if isinstance(provenance, dict) else None
    name = model.get("name") if isinstance(model, dict) else model
    return str(name).rstrip("/").rpartition("/")[2] if name else None


def _source_text(entry: Entry) -> str:
    text, model = entry.run.record.source_text, translator(entry)
    return "" if text is None else f"{text} ({model})" if text == "mt" and model else text


def _sizes(data: list[dict[str, Any]]) -> str:
    sizes = []
    for split in ("train", "valid", "test"):
        counts = {str(one[split]) for one in data if one.get(split) is not None}
        if counts:
            sizes.append(f"{split} {_joined(counts, ' or ')}")
    return ", ".join(sizes)


def _base_scores(group: RunGroup) -> dict[str, str]:
    """Return setting -> text with the mean and spread of each metric over the seeds of the fine-tuned bases."""
    by_setting: dict[str, dict[str, list[float]]] = {}
    for run in group.bases:
        for setting, scores in run.metrics.test.items():
            for metric, percent in scores.items():
                by_setting.setdefault(setting, {}).setdefault(metric, []).append(percent)
    return {
        setting: ", ".join(
            f"{metric_name(metric)} {show(Cell(statistics.fmean(values), spread(values), tuple(values)))}"
            for metric, values in scores.items()
        )
        for setting, scores in by_setting.items()
    }


def _trained_settings(group: RunGroup) -> tuple[dict[str, str], dict[str, str]]:
    """Return the options that all trained lines share, and the options in which trained lines differ.

    Each is a mapping from the name of an option to a text. For an option that differs, the text has each value with
    the names of its lines. The most frequent value comes last, as "else VALUE".
    """
    by_label: dict[str, dict[str, str]] = {}
    for label, name in group.labels.items():
        runs = [settings(e.run) for e in group.of(label) if e.run.record.kind == "train"]
        if runs:
            keys = dict.fromkeys(key for one in runs for key in one)
            by_label[name] = {key: _joined({_show(one.get(key)) for one in runs}, " or ") for key in keys}
    common, differing = {}, {}
    for key in dict.fromkeys(key for line in by_label.values() for key in line):
        values: dict[str, list[str]] = {}
        for name, line in by_label.items():
            values.setdefault(line.get(key, "-"), []).append(name)
        if len(values) == 1:
            common[key] = next(iter(values))
        else:
            most, *rest = sorted(values.items(), key=lambda item: -len(item[1]))
            differing[key] = "; ".join([*(f"{value}: {', '.join(names)}" for value, names in rest), f"else {most[0]}"])
    return common, differing


def _differing(entries: Iterable[Entry], read: Callable[[Entry], dict[str, Any]]) -> dict[str, dict[str, list[Entry]]]:
    """Return {name: {value: entries}} for every name whose value differs between entries.

    Args:
        entries: the entries.
        read: function that returns {name: value} of an entry.
    """
    members = [(entry, read(entry)) for entry in entries]
    differing: dict[str, dict[str, list[Entry]]] = {}
    for name in dict.fromkeys(name for _, read_values in members for name in read_values):
        values: dict[str, list[Entry]] = {}
        for entry, read_values in members:
            value = _show(read_values[name]) if name in read_values else "not set"
            values.setdefault(value, []).append(entry)
        if len(values) > 1:
            differing[name] = values
    return differing


def _places(entries: list[Entry]) -> str:
    shown = ", ".join(f"{entry.language}/seed-{entry.seed}" for entry in entries[:3])
    return shown if len(entries) <= 3 else f"{shown} and {len(entries) - 3} more"


def _joined(values: Iterable[str], by: str = ", ") -> str:
    return by.join(sorted(values))


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
