"""What the numbers of a group hold for, and what speaks against comparing them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from ..runs.records import STALE, Run
from .collect import Entry, Group
from .display import metric_name
from .summary import Cell, costs, spread
from .tables import show

#: Settings that are meant to differ between the runs of a line, or that do not decide about the result.
_FREE = frozenset(
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
    """Everything by name that decides about a run's result, beside seed, language and variant.

    What stands in a map is named with a dot: adapter.lora_alpha.
    """
    given: dict[str, Any] = {}
    for name, value in {**run.record.training_arguments, **run.record.settings}.items():
        if isinstance(value, dict):
            given.update({f"{name}.{key}": one for key, one in value.items()})
        else:
            given[name] = value
    for name in ("fusion", "r", "source_text", "target_text"):
        value = getattr(run.record, name)
        if value is not None:
            given[name] = value
    for name in ("fusion", "r"):
        if given.get(f"adapter.{name}") == given.get(name):
            given.pop(f"adapter.{name}", None)
    return {name: value for name, value in given.items() if name.rpartition(".")[2].replace("-", "_") not in _FREE}


def warnings(group: Group) -> list[str]:
    """Lines that mix runs of different settings, and costs that come from different machines."""
    found = []
    for label in group.labels:
        entries = group.of(label)
        methods = sorted({entry.run.record.method for entry in entries})
        if len(methods) > 1:
            found.append(f"{label}: runs of several methods under one name: {', '.join(methods)}")
        for name, values in _differing(entries, lambda entry: settings(entry.run)).items():
            shares = "; ".join(f"{value} in {_places(members)}" for value, members in values.items())
            found.append(f"{label}: {name} differs between its runs: {shares}")
        for language in group.languages:
            here = group.of(label, language)
            counts = {str(entry.run.record.data.get("train")) for entry in here}
            if len(counts) > 1:
                found.append(f"{label} on {language}: its seeds have different training rows: {_joined(counts)}")
    found += _different_rows(group)
    for record in {id(entry.run): entry.run.record for entry in group.entries}.values():
        found += [str(note) for note in record.data.get("notes") or [] if _speaks_against(str(note))]
    trained = [entry for entry in group.entries if entry.run.metrics.seconds_per_step is not None]
    for what, read in _COSTS.items():
        kinds = {str(read(entry.run)) for entry in trained}
        if len(kinds) > 1:
            found.append(f"costs are not comparable, their runs have several {what}: {_joined(kinds)}")
    for cost in costs(group):
        low, high = cost.ranges.get("seconds_per_step", (0.0, 0.0))
        if high > _UNSTEADY * low:
            found.append(
                f"{cost.label}: its runs took {1000 * low:.1f} to {1000 * high:.1f} ms per step: its costs say little "
                "(was the machine shared, or are the languages' texts of other lengths?)"
            )
    for label in group.labels:
        kept = _differing(group.of(label), lambda entry: {"source cache": _cache_state(entry)})
        if kept:
            found.append(f"{label}: costs are of runs with and without a source cache (flare train --source-cache)")
    versions = _differing(group.entries, lambda entry: entry.run.record.environment.get("versions") or {})
    for name, values in versions.items():
        found.append(f"runs with several versions of {name}: {', '.join(values)}")
    commits = {str(entry.run.record.environment.get("commit")) for entry in group.entries}
    if len(commits) > 1:
        found.append(f"runs of several commits: {_joined(commits)}")
    return found


def _cache_state(entry: Entry) -> str:
    """ "on" or "off" of a run that could keep its source states between epochs; else empty."""
    facts = entry.run.record.data.get("source_cache") or {}
    return "" if not facts else "on" if facts.get("on") else "off"


def _speaks_against(note: str) -> bool:
    """Whether a run's note says that its score is not what it seems."""
    return ": scored with " in note or STALE in note or " is at chance level on " in note


def _different_rows(group: Group) -> list[str]:
    """Lines about languages whose lines were not trained or scored on equally many rows.

    Methods that read a source lose the rows that have none, for instance.
    """
    found = []
    for language in group.languages:
        here = [entry for entry in group.entries if entry.language == language and entry.setting in _OWN_ROWS]
        for split, what in (("train", "trained"), ("test", "scored")):
            counts: dict[str, dict[str, None]] = {}
            for entry in here:
                rows = entry.run.record.data.get(split)
                if rows and (split == "test" or entry.run.record.kind == "train"):
                    counts.setdefault(str(rows), {})[entry.name] = None
            if len(counts) > 1:
                shares = "; ".join(f"{rows}: {', '.join(names)}" for rows, names in counts.items())
                found.append(f"{language}: its lines were {what} on different numbers of rows: {shares}")
        scored: dict[str, dict[str, None]] = {}
        for entry in here:
            if digest := (entry.run.record.data.get("digest") or {}).get("test"):
                scored.setdefault(f"{digest} {entry.run.record.data.get('test')}", {})[entry.name] = None
        if len({key.split()[1] for key in scored}) < len(scored):
            shares = "; ".join(", ".join(names) for names in scored.values())
            found.append(f"{language}: its lines were scored on different test rows, as many or not: {shares}")
    return found


_UNSTEADY = 1.5  # eager steps of one kind vary by up to 30 % between runs
_OWN_ROWS = ("translate-train", "zero-shot", "translate-test")
_COSTS: dict[str, Callable[[Run], Any]] = {
    "devices": lambda run: run.record.environment.get("device"),
    "processors": lambda run: run.record.environment.get("cpu"),
    "thread counts": lambda run: run.record.environment.get("threads"),
    "numbers of processes": lambda run: run.record.processes,
    "ways of measuring memory": lambda run: run.metrics.peak_kind,
}


def conditions(group: Group) -> list[tuple[str, str]]:
    """What the tables hold for, as (name, value) lines."""
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
    kept: dict[str, list[str]] = {}
    for label, name in group.labels.items():
        for state in sorted({_cache_state(e) for e in group.of(label)} - {""}):
            kept.setdefault(state, []).append(name)
    if kept:
        lines.append(("source cache", "; ".join(f"{state}: {', '.join(who)}" for state, who in kept.items())))
    common, apart = _shared(group)
    lines += [(name, value) for name, value in common.items() if value != "null"]
    lines += [(f"{name} (differs)", value) for name, value in apart.items()]
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
        lines.append(("runs began", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"))
    return lines


def notes(group: Group) -> list[str]:
    """What the runs said about their data (dropped rows, cut texts), once each."""
    return list(dict.fromkeys(
        note if str(note).startswith(entry.language) else f"{entry.language}: {note}"
        for entry in group.entries for note in entry.run.record.data.get("notes") or []
    ))  # fmt: skip


def translator(entry: Entry) -> str | None:
    """Short name of the model that translated a run's source texts, None where none is known."""
    record = entry.run.record
    found = record.data.get("translation")
    if not isinstance(found, dict):
        return None
    # by direction; a source text is a translation of the target language's
    made = found.get(f"{record.target_language}-{record.source_language}", found)
    model = (made.get("settings") or {}).get("model") if isinstance(made, dict) else None
    name = model.get("name") if isinstance(model, dict) else model
    return str(name).rstrip("/").rpartition("/")[2] if name else None


def _source_text(entry: Entry) -> str:
    text, model = entry.run.record.source_text, translator(entry)
    return "" if text is None else f"{text} ({model})" if text == "mt" and model else text


def _sizes(data: list[dict[str, Any]]) -> str:
    found = []
    for split in ("train", "valid", "test"):
        counts = {str(one[split]) for one in data if one.get(split) is not None}
        if counts:
            found.append(f"{split} {_joined(counts, ' or ')}")
    return ", ".join(found)


def _base_scores(group: Group) -> dict[str, str]:
    """The fine-tuned bases' results by setting: mean and spread over their seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in group.bases:
        for setting, scores in run.metrics.test.items():
            for metric, percent in scores.items():
                found.setdefault(setting, {}).setdefault(metric, []).append(percent)
    return {
        setting: ", ".join(
            f"{metric_name(metric)} {show(Cell(statistics.fmean(values), spread(values), tuple(values)))}"
            for metric, values in scores.items()
        )
        for setting, scores in found.items()
    }


def _shared(group: Group) -> tuple[dict[str, str], dict[str, str]]:
    """Settings that all trained lines share, and those that differ, with who has which value."""
    by_label: dict[str, dict[str, str]] = {}
    for label, name in group.labels.items():
        given = [settings(e.run) for e in group.of(label) if e.run.record.kind == "train"]
        if given:
            keys = dict.fromkeys(key for one in given for key in one)
            by_label[name] = {key: _joined({_show(one.get(key)) for one in given}, " or ") for key in keys}
    common, apart = {}, {}
    for key in dict.fromkeys(key for line in by_label.values() for key in line):
        values: dict[str, list[str]] = {}
        for name, line in by_label.items():
            values.setdefault(line.get(key, "-"), []).append(name)
        if len(values) == 1:
            common[key] = next(iter(values))
        else:
            # the most frequent value goes last and without its owners
            most, *rest = sorted(values.items(), key=lambda item: -len(item[1]))
            apart[key] = "; ".join([*(f"{value}: {', '.join(names)}" for value, names in rest), f"else {most[0]}"])
    return common, apart


def _differing(entries: Iterable[Entry], read: Callable[[Entry], dict[str, Any]]) -> dict[str, dict[str, list[Entry]]]:
    """Names with more than one value among the entries: {name: {value: entries}}."""
    members = [(entry, read(entry)) for entry in entries]
    found: dict[str, dict[str, list[Entry]]] = {}
    for name in dict.fromkeys(name for _, given in members for name in given):
        values: dict[str, list[Entry]] = {}
        for entry, given in members:
            values.setdefault(_show(given[name]) if name in given else "not set", []).append(entry)
        if len(values) > 1:
            found[name] = values
    return found


def _places(entries: list[Entry]) -> str:
    shown = ", ".join(f"{entry.language}/seed-{entry.seed}" for entry in entries[:3])
    return shown if len(entries) <= 3 else f"{shown} and {len(entries) - 3} more"


def _joined(values: Iterable[str], by: str = ", ") -> str:
    return by.join(sorted(values))


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
