"""Sizes that the benchmarks run: the papers' models on a GPU, small stand-ins of the same proportions on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ProjectionShape:
    """Query and value projection of one block: d input width, n_q and n_v output widths, M tokens, r rank."""

    name: str
    d: int
    n_q: int
    n_v: int
    bias: bool
    M: int
    r: int


@dataclass(frozen=True)
class StepShape:
    """A whole training step: an encoder with classification head, B rows of m tokens."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    B: int
    m: int
    r: int


ON_GPU = torch.cuda.is_available()

PROJECTIONS = (
    [
        ProjectionShape("llama-3.1-8b", 4096, 4096, 1024, False, M, r)
        for M in (64, 512, 2048, 8192, 32768)
        for r in (8, 64, 128)
    ]
    + [
        ProjectionShape("xlm-r-large", 1024, 1024, 1024, True, M, r)
        for M in (64, 512, 2048, 8192, 32768)
        for r in (8, 64, 128)
    ]
    if ON_GPU
    else [
        ProjectionShape("llama-like", 256, 256, 64, False, 512, 16),
        ProjectionShape("xlm-r-like", 128, 128, 128, True, 512, 16),
    ]
)

STEPS = (
    [StepShape("xlm-r-large", 1024, 4096, 24, 16, 250002, 16, m, 64) for m in (128, 256)]
    if ON_GPU
    else [StepShape("xlm-r-like", 128, 512, 4, 4, 1000, 8, 32, 16)]
)
