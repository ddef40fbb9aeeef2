"""Draw the activations of the first query bottleneck by token position, before and after ReLU.

The bottleneck is the output of the adapter's down-projection: r numbers ("units") per token, for the source (S) and for
the target (T). One figure shows averages over test rows, the other figures show single rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...runs.activations import ACTIVATIONS_FILE, Activations, Averages, Instance, read_activations
from ..collect import RunGroup
from ..display import language_name, language_names
from .layers import STREAMS
from .style import COLUMN, NORMAL, PAGE, SMALL, NothingToDraw, caption, legend_below, new_figure, plain_axes

_MOST_PANELS = 4  # maximum number of languages side by side
#: Positions at which fewer than this share of the rows, or only one of several rows, have a token are not drawn.
_SHARE = 0.1
_MOST_TOKENS = 40  # maximum number of tokens that are drawn of a single row


def activation_labels(group: RunGroup) -> list[str]:
    """Return the labels of lines whose runs recorded activations by position.

    Lines of other test settings (" @ " in the label) are left out, because they belong to the same runs.
    """
    return [label for label in group.labels if " @ " not in label and _by_language(group, label, files_only=True)]


def draw_averages(group: RunGroup, label: str) -> Any:
    """Draw the mean activation of all units by position, with one column per language.

    The upper row shows the activations before ReLU, the lower row after ReLU.
    """
    panels = _by_language(group, label)
    if not panels:
        raise NothingToDraw("no run measured activations by position")
    shown = language_names(panels)
    figure = new_figure(COLUMN if len(panels) == 1 else PAGE, 2.7)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex="col", sharey="row")
    handles: dict[str, Any] = {}
    for column, (language, activations) in enumerate(panels.items()):
        for row, when in enumerate(("before", "after")):
            axes = grid[row][column]
            for stream, color in STREAMS.items():
                positions, mean, wide = _by_position(getattr(activations, stream), when)
                name = f"source (S), {language_name(group.source)}" if stream == "S" else "target (T)"
                handles[name] = axes.plot(positions, mean, color=color, linewidth=1.0)[0]
                axes.fill_between(positions, mean - wide, mean + wide, color=color, alpha=0.18, linewidth=0)
            plain_axes(axes)
            axes.axhline(0, color="#888888", linewidth=0.5)
        grid[0][column].set_title(shown[language], fontsize=NORMAL)
        grid[1][column].set_xlabel("Token position", fontsize=NORMAL)
        grid[1][column].set_xlim(left=1)
    for row, name in enumerate(("before ReLU", "after ReLU")):
        grid[row][0].set_ylabel(f"Mean activation\n{name}", fontsize=NORMAL)
    grid[1][0].set_ylim(bottom=min(0, grid[1][0].get_ylim()[0]))
    legend_below(figure, list(handles.values()), list(handles))
    first = next(iter(panels.values()))
    rows = max(int(activations.T.counts.max()) for activations in panels.values())
    caption(
        figure,
        f"{group.shown_task}, {group.labels[label]}: mean activation of the {first.S.before.shape[1]} units of the "
        f"first query bottleneck ({first.layer}) by token position, averaged over "
        f"{'up to ' if len(panels) > 1 else ''}{rows} test rows; bands are ± std over rows; positions that fewer than "
        f"{_SHARE:.0%} of the rows, or only one row, reach are left out",
    )
    return figure


def draw_instances(group: RunGroup, label: str, number: int) -> Any:
    """Draw the activations of one test row of each language as images of units by tokens.

    `number` is the index of the row among the single rows that a run recorded. The source is above the target. The left
    column shows the activations before ReLU, the right column after ReLU.
    """
    panels = {
        language: activations.instances[number]
        for language, activations in _by_language(group, label).items()
        if number < len(activations.instances)
    }
    if not panels:
        raise NothingToDraw("no run recorded single rows")
    shown = language_names(panels)
    kinds = [(stream, when) for stream in ("S", "T") for when in ("before", "after")]
    figure = new_figure(PAGE, 0.3 + 1.45 * 2 * len(panels))
    # a language has two rows of panels (S, T) and two columns (before, after)
    grid = figure.subplots(2 * len(panels), 2, squeeze=False)
    most = max(float(np.abs(getattr(one, stream)).max()) for one in panels.values() for stream in "ST")
    image = None
    for place, (language, one) in enumerate(panels.items()):
        for stream, when in kinds:
            axes = grid[2 * place + (stream == "T")][int(when == "after")]
            values, tokens = _shown_part(one, stream)
            image = axes.imshow(
                (np.maximum(values, 0) if when == "after" else values).T,
                aspect="auto",
                cmap="RdBu_r",
                vmin=-most,
                vmax=most,
                interpolation="nearest",
            )
            axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=5)
            axes.set_yticks([])
            axes.tick_params(length=1.5, pad=1, width=0.4)
            if when == "before":
                text = f"{language_name(group.source)} (S)" if stream == "S" else f"{shown[language]} (T)"
                axes.set_ylabel(text, fontsize=NORMAL)
    for column, name in enumerate(("Before ReLU", "After ReLU")):
        grid[0][column].set_title(name, fontsize=NORMAL)
    bar = figure.colorbar(image, ax=list(grid.flat), fraction=0.015, pad=0.01)
    bar.ax.tick_params(labelsize=SMALL, length=2)
    bar.set_label("activation", fontsize=SMALL)
    first = next(iter(panels.values()))
    rows = ", ".join(f"{shown[language]} row {one.id}" for language, one in panels.items())
    caption(
        figure,
        f"{group.shown_task}, {group.labels[label]}: the {first.S.shape[1]} units (vertical) of the first query "
        f"bottleneck for single test rows ({rows})",
    )
    return figure


def _by_language(group: RunGroup, label: str, files_only: bool = False) -> dict[str, Activations]:
    """Return, for at most `_MOST_PANELS` languages, the activations of the first seed that recorded them.

    With `files_only`, the values are True instead, and no file is read.
    """
    by_language: dict[str, Any] = {}
    for entry in group.of(label):
        if entry.language in by_language or len(by_language) == _MOST_PANELS:
            continue
        folder = Path(entry.run.folder)
        activations = (folder / ACTIVATIONS_FILE).is_file() if files_only else read_activations(folder)
        if activations:
            by_language[entry.language] = activations
    return by_language


def _by_position(stream: Averages, when: str) -> tuple[Any, Any, Any]:
    """Return the positions to draw (from 1), the mean over units at each one, and the spread of this mean over rows.

    Positions that too few rows reach are left out (`_SHARE`).
    """
    shown = stream.counts >= max(2, _SHARE * stream.counts.max()) if stream.counts.max() > 1 else stream.counts > 0
    return (
        np.flatnonzero(shown) + 1,
        getattr(stream, when).mean(axis=1)[shown],
        getattr(stream, f"{when}_spread")[shown],
    )


def _shown_part(one: Instance, stream: str) -> tuple[Any, list[str]]:
    values, tokens = getattr(one, stream), one.source_tokens if stream == "S" else one.target_tokens
    return values[:_MOST_TOKENS], [
        token.replace("\u2581", "").replace("Ġ", "") or token for token in tokens[:_MOST_TOKENS]
    ]
