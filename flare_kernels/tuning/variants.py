"""The variants of a problem that the tuner compares: each form that can run, with each candidate's tiles.

A form is an implementation of a step, which is one operation of the adapter (:mod:`flare_kernels.forms`). The general
rule (``triton_ops/config.py``) decides form and tiles of a launch without an entry in the launch table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from ..launch_mode import forcing
from ..triton_ops.config import FORMS, TileConfig, can_run, candidates
from ..triton_ops.shared_memory import least_shared_bytes
from .problem import Problem

_LETTERS = {"BLOCK_M": "M", "BLOCK_K": "K", "BLOCK_N": "N", "num_warps": " w", "num_stages": " s", "programs": " p"}


@dataclass(frozen=True)
class Variant:
    """A form of a step and the tiles of its kernels. ``by_rule``: whether form and tiles are the general rule's."""

    form: str
    tiles: Mapping[str, TileConfig] = field(default_factory=dict)
    by_rule: bool = False

    def forced(self) -> AbstractContextManager[None]:
        """Return a context in which the step runs as this variant."""
        tiles: Mapping[str, Any] = self.tiles
        return forcing(form=self.form, **tiles)

    def entry_tiles(self) -> dict[str, dict[str, int]]:
        """Return the tiles as stored in a launch table."""
        return {kernel: asdict(tiles) for kernel, tiles in self.tiles.items()}

    def __str__(self) -> str:
        kernels = (
            "".join(f"{letter}{tiles[name]}" for name, letter in _LETTERS.items() if tiles[name])
            for tiles in self.entry_tiles().values()
        )
        return f"{self.form:<15}{'; '.join(kernels)}".rstrip()


def variants(problem: Problem, shared_bytes: int, capability: int) -> Iterator[Variant]:
    """Yield each form with the general rule's tiles, then with the candidates that may fit in shared memory.

    In a form with several kernels, only one kernel at a time has tiles that differ from the general rule's.
    """
    key = problem.key
    for form, kernels in FORMS[problem.step].items():
        if not can_run(problem.step, form, key.operands, capability):
            continue
        options = {name: list(candidates(name, key.operands, key.rank, shared_bytes)) for name in kernels}
        rule = {name: configs[0] for name, configs in options.items()}
        yield Variant(form, rule, by_rule=form == next(iter(FORMS[problem.step])))
        for name, configs in options.items():
            for tiles in configs[1:]:
                if least_shared_bytes(name, tiles) <= shared_bytes:
                    yield Variant(form, rule | {name: tiles})
