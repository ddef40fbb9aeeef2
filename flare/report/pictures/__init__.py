"""The report's pictures: each is drawn where the runs hold its data, and left out with the reason where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..collect import Group
from .ablations import draw_fusions, draw_ranks, draw_source_texts
from .compare import draw_comparison, draw_costs
from .layers import draw_layers, layered_labels
from .style import NothingToDraw, save

FORMATS = ("png", "pdf", "svg")


class Picture(NamedTuple):
    """A picture that was drawn (`files`), or why not (`missing`)."""

    name: str
    title: str
    files: list[Path]
    missing: str | None


def draw_all(group: Group, metric: str, folder: Path, formats: Sequence[str]) -> list[Picture]:
    """Draw every picture of a group into `folder`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = []
    for name, title, draw in _plan(group, metric):
        try:
            files = save(draw(), folder / f"{group.slug}-{name}", formats)
        except NothingToDraw as reason:
            drawn.append(Picture(name, title, [], str(reason)))
        else:
            drawn.append(Picture(name, title, files, None))
    return drawn


def _plan(group: Group, metric: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    yield "comparison", "Methods by language", partial(draw_comparison, group, metric)
    yield "costs", "Quality against costs", partial(draw_costs, group, metric)
    labels = layered_labels(group)
    for label in labels:
        name = "layers" if label == "flare" else f"layers-{label}"
        yield name, f"Source and target in the bottleneck, {group.labels[label]}", partial(draw_layers, group, label)
    if not labels:
        yield "layers", "Source and target in the bottleneck", _no_bottleneck
    yield "rank", "Effect of r", partial(draw_ranks, group, metric)
    yield "fusion", "Effect of the fusion", partial(draw_fusions, group, metric)
    yield "source-text", "Effect of the source text", partial(draw_source_texts, group, metric)


def _no_bottleneck() -> Any:
    raise NothingToDraw("no fusing run measured the bottleneck")
