"""The whole grid in parts of under nine minutes: which case belongs to which part.

    python benchmarks/sweep.py          # how many parts there are, and what each holds
    benchmarks/run_gpu.sh sweep 3       # run the third

Parts are balanced by the shapes' estimates and depend on the grid alone, so that they stay what they were when a part
is run again; cases with a result of the same sources are skipped then.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import shapes
import torch

#: Estimated seconds of a part; run_gpu.sh stops one at nine minutes.
PART_S = 360.0


def all_cases(which: str) -> list[shapes.Shape]:
    """Every case of a grid, in the order of the questions."""
    return [
        *shapes.kernels(which),
        *shapes.projections(which),
        *shapes.blocks(which),
        *shapes.steps(which),
        *shapes.host(which),
        *shapes.decoding(which),
        *shapes.generation(which),
        *shapes.scaling(which),
    ]


@cache
def parts(which: str) -> tuple[tuple[str, ...], ...]:
    """The names of the cases of each part: largest first, each into the emptiest part."""
    cases = sorted(all_cases(which), key=lambda shape: -shape.estimate_s)
    count = max(1, -(-int(sum(shape.estimate_s for shape in cases)) // int(PART_S)))
    loads = [0.0] * count
    found: list[list[str]] = [[] for _ in range(count)]
    for shape in cases:
        part = loads.index(min(loads))
        loads[part] += shape.estimate_s
        found[part].append(shape.case)
    return tuple(tuple(part) for part in found)


def cases_of(part: int) -> set[str]:
    """The cases of part 1, 2, ...

    Raises:
        ValueError: a part that the grid does not have.
    """
    found = parts(shapes.grid())
    if not 1 <= part <= len(found):
        raise ValueError(f"--part {part}: the grid {shapes.grid()!r} has parts 1 to {len(found)}")
    return set(found[part - 1])


def gpu_name() -> str:
    """The device's name as a folder's."""
    return torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"


def result_folders() -> list[Path]:
    """Where earlier parts may have left results: $OUT, and this device's folder."""
    own = Path(__file__).parent / "results" / gpu_name()
    return [Path(os.environ["OUT"]), own] if os.environ.get("OUT") else [own]


if __name__ == "__main__":
    which = shapes.grid()
    estimates = {shape.case: shape.estimate_s for shape in all_cases(which)}
    for number, names in enumerate(parts(which), 1):
        print(f"part {number}: {len(names)} cases, about {sum(estimates[name] for name in names):.0f} s")
