"""Lines that differ in one thing: the rank r, the fusion, the source text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .collect import METHODS, Entry, Group
from .conditions import settings, translator
from .display import model_name
from .summary import Cell, Quality, average

Members = dict[Any, str]  # value of what varies -> label


@dataclass(frozen=True)
class Kind:
    """One thing that is varied: its name, how an entry's value is read, and settings that may differ with it."""

    name: str
    read: Callable[[Entry], Any]
    free: tuple[str, ...]


def source_kind(entry: Entry) -> str | None:
    """Name of the source text: "gold", "mt: <model>", with noise and what differs at test time; None without one."""
    record = entry.run.record
    if record.source_text is None:
        return None
    made_by = translator(entry)
    names = {"gold": "gold", "mt": f"mt: {model_name(made_by)}" if made_by else "mt"}
    kind = names.get(record.source_text, record.source_text)
    noise = record.settings.get("noise") or record.settings.get("source_noise")
    if noise:
        kind += f", {100 * float(noise):g} % noise"
    at_test = entry.setting.partition("/")[2]
    return f"{kind}, {names.get(at_test, at_test)} at test" if at_test else kind


FUSION = Kind("fusion", lambda entry: entry.run.record.fusion, ("fusion",))
RANK = Kind("r", lambda entry: entry.run.record.r, ("r", "alpha", "lora_alpha"))
SOURCE_TEXT = Kind("source text", source_kind, ("source_text", "noise", "source_noise", "mt_model", "translations"))


def families(group: Group, table: Quality, kind: Kind) -> list[Members]:
    """Return lines of one method whose settings differ in one thing alone, two values or more."""
    found: dict[str, Members] = {}
    for line in table.lines:
        entry = group.of(line.label)[0]
        value = kind.read(entry)
        if value is None:
            continue
        given = {n: one for n, one in settings(entry.run).items() if n.rpartition(".")[2] not in kind.free}
        key = json.dumps([entry.run.record.method, given], sort_keys=True, default=str)
        found.setdefault(key, {}).setdefault(value, line.label)
    return [members for members in found.values() if len(members) > 1]


def comparable(table: Quality, found: list[Members]) -> tuple[list[str], list[Members]]:
    """Return the languages that every line of the families has; without one, the families that have them all.

    The second list is empty where the lines have no language in common.
    """
    labels = [label for members in found for label in members.values()]
    languages = [one for one in table.languages if all(table.line(label).cells[one] for label in labels)]
    if languages:
        return languages, found
    return list(table.languages), [members for members in found if set(members.values()) <= set(table.complete)]


def over(group: Group, label: str, metric: str, languages: list[str]) -> Cell:
    """Return a line's average over languages that it has."""
    scores: dict[str, dict[int, float]] = {language: {} for language in languages}
    for entry in group.of(label):
        if entry.language in scores and metric in entry.scores:
            scores[entry.language][entry.seed] = entry.scores[metric]
    found = average(scores, languages)
    assert found is not None, "there is a language"
    return found


def method_of_family(group: Group, members: Members) -> str:
    """Return the method that all lines of a family have."""
    return group.of(next(iter(members.values())))[0].run.record.method


def family_names(group: Group, found: list[Members], kind: Kind) -> list[str]:
    """Return the families' methods, with what is fixed in a family where a name alone would stand twice."""
    methods = [method_of_family(group, members) for members in found]
    return [
        METHODS.get(method, method) if methods.count(method) == 1 else detailed(group, members, kind)
        for members, method in zip(found, methods, strict=True)
    ]


def detailed(group: Group, members: Members, kind: Kind) -> str:
    """Return the method and those of fusion, r and source text that are not varied."""
    record = group.of(next(iter(members.values())))[0].run.record
    details = [METHODS.get(record.method, record.method)]
    if kind is not FUSION and record.fusion is not None:
        details.append(record.fusion)
    if kind is not RANK and record.r is not None:
        details.append(f"r={record.r}")
    if kind is not SOURCE_TEXT and record.source_text is not None:
        details.append(f"{record.source_text} source")
    return ", ".join(details)
