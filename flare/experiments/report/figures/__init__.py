"""Draw the figures of the report. If the runs lack the data of a figure, it is left out, and the reason is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...utils.progress import counter
from ..collect import RunGroup
from ..cross_task import Overview
from .ablations import draw_fusions, draw_ranks, draw_source_texts, draw_translators
from .activations import activation_labels, draw_averages, draw_instances
from .compare import draw_comparison, draw_costs
from .layers import draw_layers, layered_labels
from .overview import draw_average_ranks, draw_tasks
from .style import NothingToDraw, caption_of, save

FORMATS = ("png", "pdf", "svg")
#: Number of figures that draw the activations of single test rows. Each figure shows one row of each language.
_INSTANCES = 2


class FigureResult(NamedTuple):
    """A figure that was drawn (`files`, `caption`), or the reason why it was not (`missing`)."""

    name: str
    title: str
    files: list[Path]
    missing: str | None
    caption: str = ""


#: For each figure: its name (the end of the file name), its title, and the function that draws it.
_Plan = Iterator[tuple[str, str, Callable[[], Any]]]


def draw_figures(group: RunGroup, metric: str, folder: Path, formats: Sequence[str]) -> list[FigureResult]:
    """Draw every figure of a group of runs into `folder`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plan = list(_of_group(group, metric))
    drawn = []
    with counter(f"figures of {group.slug}", len(plan), "figure") as bar:
        for name, title, draw in plan:
            drawn.append(_drawn(name, title, draw, folder / f"{group.slug}-{name}", formats))
            bar.update(1)
    return drawn


def draw_overview_figures(models: Sequence[Overview], folder: Path, formats: Sequence[str]) -> list[FigureResult]:
    """Draw the figures that cover several tasks and models into `folder`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plan = (
        ("average-rank", "Average rank over tasks", partial(draw_average_ranks, models)),
        ("tasks", "Methods by task", partial(draw_tasks, models)),
    )
    return [_drawn(name, title, draw, folder / name, formats) for name, title, draw in plan]


def _drawn(name: str, title: str, draw: Callable[[], Any], path: Path, formats: Sequence[str]) -> FigureResult:
    try:
        figure = draw()
    except NothingToDraw as reason:
        return FigureResult(name, title, [], str(reason))
    return FigureResult(name, title, save(figure, path, formats), None, caption_of(figure))


def _of_group(group: RunGroup, metric: str) -> _Plan:
    yield "comparison", "Methods by language", partial(draw_comparison, group, metric)
    yield "costs", "Quality against costs", partial(draw_costs, group, metric)
    labels = layered_labels(group)
    for label in labels:
        name = "layers" if label == "flare" else f"layers-{label}"
        yield name, f"Source and target in the bottleneck, {group.labels[label]}", partial(draw_layers, group, label)
    if not labels:
        yield "layers", "Source and target in the bottleneck", _no_bottleneck
    labels = activation_labels(group)
    # Draw the activations of one line only: "flare" (FLARE with its defaults) if its runs have activations, otherwise
    # the first line that has them.
    for label in labels[:1] if "flare" not in labels else ["flare"]:
        yield "activations", "Activations by position", partial(draw_averages, group, label)
        for number in range(_INSTANCES):
            draw = partial(draw_instances, group, label, number)
            yield f"activations-row-{number + 1}", f"Activations of a single row ({number + 1})", draw
    if not labels:
        yield "activations", "Activations by position", _no_bottleneck
    yield "rank", "Effect of r", partial(draw_ranks, group, metric)
    yield "fusion", "Effect of the fusion", partial(draw_fusions, group, metric)
    yield "source-text", "Effect of the source text", partial(draw_source_texts, group, metric)
    yield "translators", "Quality by translator", partial(draw_translators, group, metric)


def _no_bottleneck() -> Any:
    raise NothingToDraw("no run of a fusing method measured the bottleneck")
