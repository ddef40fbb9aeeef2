"""What all pictures share: colors that stay apart for color-blind readers (Okabe and Ito), two widths, saving.

A picture has no title: its caption is the figure's label, which report.md prints below it.

matplotlib is imported inside the functions: a report without it has tables and no pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_COLORS = {
    "zero-shot": "#999999",
    "translate-test": "#444444",
    "lora": "#0072B2",
    "input-fusion": "#E69F00",
    "x-mixup": "#009E73",
    "flare-mt": "#CC79A7",
    "flare": "#D55E00",
    "add_relu": "#D55E00",  # FLARE's own fusion
}
_OTHERS = ("#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#E69F00", "#444444")
_HATCHES = (None, "///", "...", "xxx", "\\\\\\", "++")
_MARKERS = "osD^vPX*<>hp"
#: Inches: a column and a page of the ACL's style (and of many other two-column ones).
COLUMN, PAGE = 3.03, 6.30
#: Points, as a picture of these widths is set without scaling.
SMALL, NORMAL = 6.5, 7.5
_DPI = 300


class NothingToDraw(Exception):
    """A picture whose data the runs do not hold; the message says what is missing."""


def new_figure(width: float, height: float) -> Any:
    """An empty figure of width x height inches that never opens a window.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path, formats: Iterable[str]) -> list[Path]:
    """Write a figure as path.<format> for every format; the same figure gives the same bytes."""
    # fixed ids and no date, and letters that stay letters in PDF and SVG
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a dollar sign in a name is one; matplotlib's own labels of axes stay
        text.set_parse_math(r"\mathdefault" in text.get_text())
    written = []
    figure.draw_without_rendering()  # lays it out, once for all formats
    figure.set_layout_engine("none")
    with rc_context({"svg.hashsalt": "flare", "svg.fonttype": "none", "pdf.fonttype": 42}):
        for kind in formats:
            target = path.with_name(f"{path.name}.{kind}")
            stamp: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
            figure.savefig(target, dpi=_DPI, metadata=stamp)
            written.append(target)
    return written


def caption(figure: Any, text: str) -> None:
    """Say what a figure shows; see :func:`caption_of`."""
    figure.set_label(text)


def caption_of(figure: Any) -> str:
    """Return a figure's caption."""
    return str(figure.get_label())


def plain_axes(axes: Any) -> None:
    """The look of all axes: no box, a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_linewidth(0.6)
    axes.tick_params(labelsize=SMALL, width=0.6, length=2.5, pad=2)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)


def looks(methods: Sequence[str]) -> list[dict[str, Any]]:
    """Color, hatch and marker of every line, from its method; no two lines share color and hatch."""
    taken: dict[str, int] = {}
    colors = dict(_COLORS)
    used = {colors[method] for method in methods if method in colors}
    others = itertools.cycle([color for color in _OTHERS if color not in used] or list(_OTHERS))
    found = []
    for index, method in enumerate(methods):
        if method not in colors:
            colors[method] = next(others)
        color = colors[method]
        again = taken.get(color, 0)
        taken[color] = again + 1
        shown = color if again == 0 else _lighter(color, 0.25 + 0.15 * (again % 3))
        hatch = _HATCHES[again % len(_HATCHES)]
        found.append({"color": shown, "hatch": hatch, "marker": _MARKERS[index % len(_MARKERS)]})
    return found


def _lighter(color: str, share: float) -> str:
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def is_dark(color: str) -> bool:
    """Return whether white letters are easier to read on a color than black ones."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 128


def rows_of(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """Items in as few, evenly filled rows of at most `most`."""
    count = -(-len(items) // most)
    size = -(-len(items) // count)
    return [items[i : i + size] for i in range(0, len(items), size)]


def text_width(text: str, points: float = SMALL) -> float:
    """Return about how many inches a text takes."""
    return len(text) * points * 0.0082


def legend_rows(names: Sequence[str], width: float) -> int:
    """Return how many rows a legend of these names takes in so many inches."""
    longest = max((text_width(name) for name in names), default=1.0)
    return -(-len(names) // max(1, int(width / (longest + 0.38))))


def legend_below(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """One legend under all axes, in as many columns as the width has room for."""
    columns = -(-len(names) // legend_rows(names, figure.get_figwidth()))  # as even as the rows allow
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.0,
        handletextpad=0.5,
        borderaxespad=0.2,
    )
