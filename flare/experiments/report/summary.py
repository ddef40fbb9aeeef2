"""Compute the numbers of the tables: means, spreads, averages, ranks and costs.

A spread is the sample standard deviation (n - 1) over seeds; a single seed has no spread. An average over languages is
the mean of the languages' means; its spread is over the seeds that all these languages have. `collect` explains groups,
lines and labels.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .collect import RunGroup


@dataclass(frozen=True)
class Cell:
    """Scores of a line in one language, or averaged over languages.

    Attributes:
        mean: mean over the seeds, in percent.
        spread: spread over the seeds; None for fewer than two seeds.
        values: one score per seed, in percent.
        languages: number of averaged languages; 1 for a single language.
    """

    mean: float
    spread: float | None
    values: tuple[float, ...]
    languages: int = 1


@dataclass(frozen=True)
class Line:
    """One line of the quality table.

    Attributes:
        label: label of the line.
        name: display name of the line.
        cells: language -> scores; None if the line has no scores in the language.
        average: average over the languages in which the line has scores.
        common: average over the languages that every line has; None if there are none.
        rank: mean rank over the languages (1 is the best), among the lines that have scores in all languages; None if
            the line lacks a language.
    """

    label: str
    name: str
    cells: dict[str, Cell | None]
    average: Cell | None
    common: Cell | None
    rank: float | None

    @property
    def seeds(self) -> str:
        """Number of seeds per cell: "5", or "3 to 5"."""
        counts = sorted(len(cell.values) for cell in self.cells.values() if cell)
        if not counts:
            return "0"
        return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


@dataclass(frozen=True)
class Quality:
    """Quality table (scores by line and language) of one metric.

    Attributes:
        metric: name of the metric.
        languages: all target languages.
        common: the languages in which every line has scores.
        complete: labels of the lines that have scores in all languages.
        lines: the lines.
    """

    metric: str
    languages: tuple[str, ...]
    common: tuple[str, ...]
    complete: tuple[str, ...]
    lines: tuple[Line, ...]

    def line(self, label: str) -> Line:
        """Return the line with this label."""
        return next(line for line in self.lines if line.label == label)


#: Costs that are shown with their range over runs.
RANGED = ("seconds_per_step", "peak_bytes", "train_seconds")


@dataclass(frozen=True)
class Cost:
    """Costs of a line, as medians over its runs. A cost that no run measured is None.

    Attributes:
        label: label of the line.
        name: display name of the line.
        seconds_per_step: time of a training step, in seconds.
        peak_bytes: peak memory of one process, in bytes.
        train_seconds: training time, in seconds.
        steps: number of training steps.
        trainable_parameters: number of trained parameters.
        runs: number of runs.
        ranges: name of a cost -> its smallest and largest value over the runs that measured it.
        processes: number of processes that share a step, as text ("1", or "1 or 2" if runs differ).
    """

    label: str
    name: str
    seconds_per_step: float | None
    peak_bytes: float | None
    train_seconds: float | None
    steps: float | None
    trainable_parameters: float | None
    runs: int
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    processes: str = "1"


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, or None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def quality(group: RunGroup, metric: str) -> Quality:
    """Return the quality table of a group for one metric, without the lines that lack this metric."""
    languages = tuple(group.languages)
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for entry in group.entries:
        if metric in entry.scores:
            cell = scores.setdefault(entry.label, {}).setdefault(entry.language, {})
            cell[entry.seed] = entry.scores[metric]
    labels = [label for label in group.labels if label in scores]
    common = tuple(language for language in languages if all(language in scores[label] for label in labels))
    complete = tuple(label for label in labels if len(scores[label]) == len(languages))
    ranks = _ranks({label: scores[label] for label in complete}, languages)
    names = group.labels
    lines = [
        Line(
            label,
            names[label],
            {one: _cell(scores[label][one]) if one in scores[label] else None for one in languages},
            average(scores[label], [one for one in languages if one in scores[label]]),
            average(scores[label], common),
            ranks.get(label),
        )
        for label in labels
    ]
    return Quality(metric, languages, common, complete, tuple(lines))


def average(scores: dict[str, dict[int, float]], languages: Sequence[str]) -> Cell | None:
    """Return the average of `scores` ({language: {seed: percent}}) over languages; None if `languages` is empty."""
    if not languages:
        return None
    mean = statistics.fmean(statistics.fmean(scores[one].values()) for one in languages)
    seeds = sorted(set.intersection(*(set(scores[one]) for one in languages)))
    values = tuple(statistics.fmean(scores[one][seed] for one in languages) for seed in seeds)
    return Cell(mean, spread(values), values, len(languages))


def costs(group: RunGroup) -> list[Cost]:
    """Return the costs of every line whose runs measured a step's time, the training time or the peak memory."""
    lines = []
    for label, name in group.labels.items():
        if " @ " in label:  # the same training, scored in another setting
            continue
        runs = [entry.run for entry in group.of(label)]
        cost = Cost(
            label,
            name,
            _median([run.metrics.seconds_per_step for run in runs]),
            _median([run.metrics.peak_bytes for run in runs]),
            _median([run.metrics.train_seconds for run in runs]),
            _median([run.metrics.steps for run in runs]),
            _median([run.record.trainable_parameters for run in runs]),
            len(runs),
            {
                name: (min(known), max(known))
                for name in RANGED
                if (known := [value for run in runs if (value := getattr(run.metrics, name)) is not None])
            },
            " or ".join(map(str, sorted({run.record.processes for run in runs}))),
        )
        if any(value is not None for value in (cost.seconds_per_step, cost.peak_bytes, cost.train_seconds)):
            lines.append(cost)
    return lines


def _cell(seeds: dict[int, float]) -> Cell:
    values = tuple(seeds[seed] for seed in sorted(seeds))
    return Cell(statistics.fmean(values), spread(values), values)


def _ranks(scores: dict[str, dict[str, dict[int, float]]], languages: Sequence[str]) -> dict[str, float]:
    """Return the mean rank over languages (1 is the best); ties share the mean of their ranks."""
    ranks: dict[str, list[float]] = {label: [] for label in scores}
    for language in languages:
        for label, place in ranks_of({one: statistics.fmean(scores[one][language].values()) for one in scores}).items():
            ranks[label].append(place)
    return {label: statistics.fmean(places) for label, places in ranks.items()}


def ranks_of(means: Mapping[str, float]) -> dict[str, float]:
    """Return the rank of each mean (1 is the largest); ties share the mean of their ranks."""
    return {
        label: sum(other > mean for other in means.values()) + (sum(other == mean for other in means.values()) + 1) / 2
        for label, mean in means.items()
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
