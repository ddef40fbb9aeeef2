"""Find the families of an ablation: lines that differ only in one factor (the rank r, the fusion or the source text).

`collect` explains lines, labels and settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .collect import METHODS, Entry, RunGroup
from .conditions import settings, translator
from .display import model_name
from .summary import Cell, Quality, average

Family = dict[Any, str]  # value of the factor -> label of its line


@dataclass(frozen=True)
class Factor:
    """A factor of an ablation.

    Attributes:
        name: name of the factor.
        read: function that returns the value of the factor for an entry; None if the entry has no value.
        may_differ: names of the options that may differ between the lines of a family.
    """

    name: str
    read: Callable[[Entry], Any]
    may_differ: tuple[str, ...]


def source_kind(entry: Entry) -> str | None:
    """Return a description of an entry's source text; None if the run reads no source.

    It is "gold" (human text), "mt: <model>" (machine-translated) or "mt" (the model is unknown). The share of noise
    follows if the text has noise, and the source text at test time follows if it differs from the one in training.
    """
    record = entry.run.record
    if record.source_text is None:
        return None
    model = translator(entry)
    names = {"gold": "gold", "mt": f"mt: {model_name(model)}" if model else "mt"}
    kind = names.get(record.source_text, record.source_text)
    noise = record.settings.get("noise") or record.settings.get("source_noise")
    if noise:
        kind += f", {100 * float(noise):g} % noise"
    at_test = entry.setting.partition("/")[2]
    return f"{kind}, {names.get(at_test, at_test)} at test" if at_test else kind


FUSION = Factor("fusion", lambda entry: entry.run.record.fusion, ("fusion",))
RANK = Factor("r", lambda entry: entry.run.record.r, ("r", "alpha", "lora_alpha"))
SOURCE_TEXT = Factor("source text", source_kind, ("source_text", "noise", "source_noise", "mt_model", "translations"))


def families(group: RunGroup, table: Quality, factor: Factor) -> list[Family]:
    """Return the families of a factor: two or more lines of one method that differ in this factor only."""
    by_settings: dict[str, Family] = {}
    for line in table.lines:
        entry = group.of(line.label)[0]
        value = factor.read(entry)
        if value is None:
            continue
        fixed = {n: one for n, one in settings(entry.run).items() if n.rpartition(".")[2] not in factor.may_differ}
        key = json.dumps([entry.run.record.method, fixed], sort_keys=True, default=str)
        by_settings.setdefault(key, {}).setdefault(value, line.label)
    return [family for family in by_settings.values() if len(family) > 1]


def comparable(table: Quality, candidates: list[Family]) -> tuple[list[str], list[Family]]:
    """Select languages and families so that every line of these families has scores in all these languages.

    If all lines share some languages, return these languages and all families. Otherwise return all languages and the
    families whose lines have scores in all languages; the list of families may then be empty.
    """
    labels = [label for family in candidates for label in family.values()]
    languages = [one for one in table.languages if all(table.line(label).cells[one] for label in labels)]
    if languages:
        return languages, candidates
    return list(table.languages), [one for one in candidates if set(one.values()) <= set(table.complete)]


def average_over(group: RunGroup, label: str, metric: str, languages: list[str]) -> Cell:
    """Return a line's average over languages; the line must have all of them."""
    scores: dict[str, dict[int, float]] = {language: {} for language in languages}
    for entry in group.of(label):
        if entry.language in scores and metric in entry.scores:
            scores[entry.language][entry.seed] = entry.scores[metric]
    cell = average(scores, languages)
    assert cell is not None, "languages must not be empty"
    return cell


def method_of_family(group: RunGroup, family: Family) -> str:
    """Return the method of a family's lines."""
    return group.of(next(iter(family.values())))[0].run.record.method


def family_names(group: RunGroup, shown: list[Family], factor: Factor) -> list[str]:
    """Return the families' display names: the method, or `family_title` if several families have this method."""
    methods = [method_of_family(group, family) for family in shown]
    return [
        METHODS.get(method, method) if methods.count(method) == 1 else family_title(group, family, factor)
        for family, method in zip(shown, methods, strict=True)
    ]


def family_title(group: RunGroup, family: Family, factor: Factor) -> str:
    """Return the method, fusion, r and source text of a family, without the factor that varies in the family."""
    record = group.of(next(iter(family.values())))[0].run.record
    details = [METHODS.get(record.method, record.method)]
    if factor is not FUSION and record.fusion is not None:
        details.append(record.fusion)
    if factor is not RANK and record.r is not None:
        details.append(f"r={record.r}")
    if factor is not SOURCE_TEXT and record.source_text is not None:
        details.append(f"{record.source_text} source")
    return ", ".join(details)
