"""Split the grid (the list of all cases) into parts that should take less than nine minutes each.

    python benchmarks/sweep.py          # list the parts
    benchmarks/run_gpu.sh sweep 3       # run the third part

The parts are balanced by the estimated seconds of their cases. They depend on the grid only, so a part has the same
cases when it is run again. A repeated run skips the cases that were measured with the current source files.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import shapes
import torch

#: Estimated seconds of a part. run_gpu.sh stops a part after nine minutes.
PART_S = 360.0


def all_cases(which: str) -> list[shapes.Shape]:
    """Return the shape of every case of a grid, one question after the other."""
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
    """Return the case names of each part.

    The longest cases are assigned first, each to the part that has the fewest estimated seconds so far.
    """
    cases = sorted(all_cases(which), key=lambda shape: -shape.estimate_s)
    count = max(1, -(-int(sum(shape.estimate_s for shape in cases)) // int(PART_S)))
    loads = [0.0] * count
    names: list[list[str]] = [[] for _ in range(count)]
    for shape in cases:
        part = loads.index(min(loads))
        loads[part] += shape.estimate_s
        names[part].append(shape.case)
    return tuple(tuple(part) for part in names)


def cases_of(part: int) -> set[str]:
    """Return the case names of a part, counted from 1.

    Raises:
        ValueError: the grid does not have this part.
    """
    all_parts = parts(shapes.grid())
    if not 1 <= part <= len(all_parts):
        raise ValueError(f"--part {part}: the grid {shapes.grid()!r} has parts 1 to {len(all_parts)}")
    return set(all_parts[part - 1])


def gpu_name() -> str:
    """Return the name of the GPU as a folder name, or "cpu" without a GPU."""
    return torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"


def result_folders() -> list[Path]:
    """Return the folders that may hold results of earlier parts: $OUT (if it is set) and results/DEVICE."""
    device_folder = Path(__file__).parent / "results" / gpu_name()
    return [Path(os.environ["OUT"]), device_folder] if os.environ.get("OUT") else [device_folder]


if __name__ == "__main__":
    which = shapes.grid()
    estimates = {shape.case: shape.estimate_s for shape in all_cases(which)}
    for number, names in enumerate(parts(which), 1):
        print(f"part {number}: {len(names)} cases, about {sum(estimates[name] for name in names):.0f} s")
