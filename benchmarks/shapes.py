"""Define the sizes that the benchmarks run: shapes of models, from their published configurations, and grids of cases.

A case is one shape of one question, for example the cost of a training step. A grid is a list of cases. Every shape
has: ``question``, the name of its question; ``case``, the name of its case; ``headline``, whether it is one of the main
cases, which the summary and most figures show; and ``estimate_s``, the estimated seconds of the case on a data-centre
GPU. There are three grids: ``tiny`` (default on a CPU: small models, mostly with the proportions of the published
models), ``main`` (default on a GPU: everything that `summary.json` needs, and a few more sizes) and ``full``
(everything). The letters are: d width, M tokens, B rows of a batch, m tokens per text, r rank, L blocks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

GRIDS = ("tiny", "main", "full")
PRIMITIVES = ("shrink", "expand", "grad_bottleneck", "grad_weight", "grad_input")
HOST_SETTINGS = ("plain", "dropout", "checkpointing")
PRECISIONS = ("plain", "nf4")  # frozen weights in the dtype of the activations, or in bitsandbytes' 4 bits


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer.

    ``inner`` is the width of the feed-forward layer. ``stand_in`` tells whether the model is small and made up, and
    stands in for a published model.
    """

    name: str
    family: str
    d: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    bias: bool = False
    stand_in: bool = False

    @property
    def n_q(self) -> int:
        """Return the output width of the query projection."""
        return self.heads * self.head_dim

    @property
    def n_v(self) -> int:
        """Return the output width of the key projection and of the value projection."""
        return self.kv_heads * self.head_dim


LLAMA = ModelShape("Llama 3.1 8B", "llama", 4096, 14336, 32, 32, 8, 128, 128256)
XLMR = ModelShape("XLM-R Large", "xlmr", 1024, 4096, 24, 16, 16, 64, 250002, bias=True)
GEMMA2 = ModelShape("Gemma 2 9B", "gemma2", 3584, 14336, 42, 16, 8, 256, 256000)
MT5 = ModelShape("mT5-XL", "mt5", 2048, 5120, 24, 32, 32, 64, 250112)

TINY_LLAMA = ModelShape("Llama-like", "llama", 256, 896, 2, 4, 1, 64, 256, stand_in=True)
TINY_XLMR = ModelShape("XLM-R-like", "xlmr", 128, 512, 2, 2, 2, 64, 256, bias=True, stand_in=True)
TINY_GEMMA2 = ModelShape("Gemma-2-like", "gemma2", 128, 512, 2, 2, 1, 64, 256, stand_in=True)
TINY_MT5 = ModelShape("mT5-like", "mt5", 128, 320, 2, 2, 2, 64, 256, stand_in=True)

# These models are tiny, so that nearly all of a step's time on a CPU is host work.
HOST_XLMR = ModelShape("XLM-R-like, d = 64", "xlmr", 64, 64, 6, 2, 2, 32, 128, bias=True, stand_in=True)
HOST_LLAMA = ModelShape("Llama-like, d = 64", "llama", 64, 64, 3, 2, 2, 32, 128, stand_in=True)
HOST_MT5 = ModelShape("mT5-like, d = 64", "mt5", 64, 64, 3, 2, 2, 32, 128, stand_in=True)

REAL = (LLAMA, XLMR, GEMMA2, MT5)
TINY = (TINY_LLAMA, TINY_XLMR, TINY_GEMMA2, TINY_MT5)


@dataclass(frozen=True)
class KernelShape:
    """One of the five primitives on one projection ("q" or "v") of a model."""

    model: ModelShape
    primitive: str
    projection: str
    M: int
    r: int

    question = "kernels"

    @property
    def n(self) -> int:
        """Return the output width."""
        return self.model.n_q if self.projection == "q" else self.model.n_v

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the output widths of the adapted projections."""
        return (self.n,)

    @property
    def case(self) -> str:
        return f"kernels/{self.model.family}-{self.projection}/{self.primitive}/M{self.M}-r{self.r}"

    @property
    def headline(self) -> bool:
        return self.model.stand_in or (self.M == 8192 and self.r == 64)

    @property
    def estimate_s(self) -> float:
        """Return the estimated seconds of the case on a data-centre GPU, to balance the parts of a sweep."""
        return 2.0 + 2e-4 * self.M


@dataclass(frozen=True)
class ProjectionShape:
    """Query and value projections of one block. With ``key``, the case includes the frozen key projection."""

    model: ModelShape
    M: int
    r: int
    key: bool = False
    precision: str = "plain"

    question = "projection"

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the output widths of the adapted projections."""
        return (self.model.n_q, self.model.n_v)

    @property
    def case(self) -> str:
        which = "qkv" if self.key else "qv"
        return f"projection/{self.model.family}-{which}/{self.precision}/M{self.M}-r{self.r}"

    @property
    def headline(self) -> bool:
        usual = not self.key and self.precision == "plain"
        return usual and (self.model.stand_in or (self.M == 8192 and self.r == 64))

    @property
    def estimate_s(self) -> float:
        return 20.0 + 5e-4 * self.M


@dataclass(frozen=True)
class StepShape:
    """A training step on B rows of texts of m tokens, through ``depth`` blocks (None: all blocks of the model).

    On a GPU whose memory does not suffice, the step has fewer blocks. If ``padded``, three eighths of the positions are
    padding, and the batch has masks. Otherwise rows are full and have no mask.
    """

    model: ModelShape
    B: int
    m: int
    r: int
    depth: int | None = None
    precision: str = "plain"
    question: str = "step"
    padded: bool = False

    @property
    def case(self) -> str:
        depth = "" if self.depth is None else f"-L{self.depth}"
        padded = "-padded" if self.padded else ""
        return f"{self.question}/{self.model.family}/{self.precision}/B{self.B}-m{self.m}-r{self.r}{depth}{padded}"

    @property
    def has_liger(self) -> bool:
        """Return whether Liger rows are measured: whole steps of causal models, full rows, no quantised weights."""
        causal = self.model.family in ("llama", "gemma2")
        return causal and self.question == "step" and self.precision == "plain" and not self.padded

    @property
    def headline(self) -> bool:
        usual = self.question == "step" and self.precision == "plain" and not self.padded
        return usual and (self.model.stand_in or (self.m == 512 and self.B == 16 and self.r == 64))

    @property
    def estimate_s(self) -> float:
        big = self.model.d > 1024
        depth = self.depth or (16 if big else self.model.layers)
        return (45.0 if big else 25.0) + 2e-9 * self.B * self.m * depth * self.model.d**1.5


@dataclass(frozen=True)
class HostShape:
    """A step on B rows of m tokens through ``depth`` blocks, to measure the work of the host.

    ``setting`` is "plain", "dropout" (lora_dropout 0.1) or "checkpointing" (every block, use_reentrant=False).
    """

    model: ModelShape
    B: int
    m: int
    r: int
    depth: int
    setting: str = "plain"

    question = "host"

    @property
    def case(self) -> str:
        return f"host/{self.model.family}/{self.setting}/B{self.B}-m{self.m}-r{self.r}-L{self.depth}"

    @property
    def headline(self) -> bool:
        return self.setting == "plain"

    @property
    def estimate_s(self) -> float:
        return 30.0


@dataclass(frozen=True)
class DecodeShape:
    """The adapters of one block on M new tokens, while decoding. The source's bottleneck S is an input."""

    model: ModelShape
    M: int
    r: int

    question = "decode"

    @property
    def case(self) -> str:
        return f"decode/{self.model.family}/M{self.M}-r{self.r}"

    @property
    def headline(self) -> bool:
        return self.model.stand_in or (self.M == 1 and self.r == 64)

    @property
    def estimate_s(self) -> float:
        return 4.0


@dataclass(frozen=True)
class GenerateShape:
    """A call of `generate` that adds ``new`` tokens to each of B prompts of m tokens."""

    model: ModelShape
    B: int
    m: int
    new: int
    r: int
    depth: int

    question = "generate"

    @property
    def case(self) -> str:
        return f"generate/{self.model.family}/B{self.B}-m{self.m}-new{self.new}-r{self.r}-L{self.depth}"

    @property
    def headline(self) -> bool:
        return self.model.stand_in or (self.B == 1 and self.r == 64)

    @property
    def estimate_s(self) -> float:
        return 20.0 + 0.004 * self.new * self.depth * 10


Shape = KernelShape | ProjectionShape | StepShape | HostShape | DecodeShape | GenerateShape


def grid() -> str:
    """Return the name of the grid: FLARE_BENCH_GRID if it is set, otherwise ``main`` with a GPU and ``tiny`` without.

    Raises:
        ValueError: there is no grid of that name.
    """
    chosen = os.environ.get("FLARE_BENCH_GRID") or ("main" if torch.cuda.is_available() else "tiny")
    if chosen not in GRIDS:
        raise ValueError(f"FLARE_BENCH_GRID={chosen!r} is not one of {', '.join(GRIDS)}")
    return chosen


def kernels(which: str) -> list[KernelShape]:
    """Return the cases of the five primitives. The grid ``full`` has M from 1 to 32k and r of 8, 64 and 128."""
    if which == "tiny":
        return [KernelShape(m, p, q, 512, 16) for m, q in ((TINY_LLAMA, "v"), (TINY_XLMR, "q")) for p in PRIMITIVES]
    projections = [(LLAMA, "q"), (LLAMA, "v"), (XLMR, "q")]
    sizes, ranks = (8192,), (64,)
    if which == "full":
        projections += [(MT5, "q"), (GEMMA2, "q"), (GEMMA2, "v")]
        sizes, ranks = (1, 16, 64, 256, 1024, 2048, 8192, 32768), (8, 64, 128)
    return [KernelShape(m, p, q, M, r) for m, q in projections for p in PRIMITIVES for M in sizes for r in ranks]


def projections(which: str) -> list[ProjectionShape]:
    """Return the cases of the q and v projections; some include the frozen k, and some have nf4 weights."""
    if which == "tiny":
        base = [ProjectionShape(TINY_LLAMA, 512, 8), ProjectionShape(TINY_XLMR, 512, 8)]
        return [*base, replace(base[0], key=True), replace(base[0], precision="nf4")]
    if which == "main":
        base = [ProjectionShape(model, 8192, 64) for model in (LLAMA, XLMR)]
        return [*base, replace(base[0], key=True), replace(base[0], precision="nf4")]
    base = [
        ProjectionShape(model, M, r) for model in REAL for M in (1, 64, 512, 2048, 8192, 32768) for r in (8, 64, 128)
    ]
    more = [ProjectionShape(model, 8192, 64) for model in REAL]
    return [*base, *(replace(s, key=True) for s in more), *(replace(s, precision="nf4") for s in more)]


def blocks(which: str) -> list[StepShape]:
    """Return the cases of one transformer block."""
    if which == "tiny":
        return [StepShape(model, 2, 32, 8, depth=1, question="block") for model in TINY]
    if which == "main":
        return [StepShape(model, 16, 512, 64, depth=1, question="block") for model in (LLAMA, XLMR)]
    return [
        StepShape(model, 8192 // m, m, 64, depth=1, precision=precision, question="block")
        for model in REAL
        for m in (128, 512)
        for precision in PRECISIONS
    ]


def steps(which: str) -> list[StepShape]:
    """Return the cases of whole training steps, on full rows and on padded rows."""
    if which == "tiny":
        tiny = [StepShape(model, 4, 32, 8, depth=model.layers) for model in TINY]
        return [*tiny, *(replace(full, padded=True) for full in tiny[:2])]
    if which == "main":
        full = [StepShape(XLMR, 16, 512, 64), StepShape(LLAMA, 16, 512, 64, depth=8)]
        return [replace(shape, padded=padded) for padded in (False, True) for shape in full]
    shapes = [
        StepShape(model, 8192 // m, m, 64, precision=precision)
        for model in REAL
        for m in (128, 512)
        for precision in PRECISIONS
    ]
    return [*shapes, *(replace(shape, padded=True) for shape in shapes if shape.headline)]


def host(which: str) -> list[HostShape]:
    """Return the cases that measure the work of the host in a training step.

    Their batches have more than 64 tokens, because batches of up to 64 tokens run the kernels for decoding.
    """
    if which == "tiny":
        models = (HOST_XLMR, HOST_LLAMA, HOST_MT5)
        return [HostShape(model, 2, 64, 8, model.layers, setting) for model in models for setting in HOST_SETTINGS]
    if which == "main":
        return [HostShape(XLMR, 16, 512, 64, XLMR.layers, setting) for setting in ("plain", "dropout")]
    depths = ((XLMR, XLMR.layers), (LLAMA, 8), (MT5, 8))
    return [HostShape(model, 16, 512, 64, depth, setting) for model, depth in depths for setting in HOST_SETTINGS]


def scaling(which: str) -> list[StepShape]:
    """Return base cases, and cases in which one of m, B, r and depth differs from its base case; none for ``main``."""
    if which == "main":
        return []
    if which == "tiny":
        base = StepShape(TINY_LLAMA, 2, 32, 8, depth=2, question="scaling")
        varied = [{"m": 16}, {"m": 64}, {"depth": 1}]
        # with texts as long as the paper's, FLARE saves the most time compared with input-level fusion
        long = StepShape(TINY_XLMR, 1, 512, 8, depth=2, question="scaling")
        return [base, *(replace(base, **change) for change in varied), long]
    cases: dict[str, StepShape] = {}
    for model in (XLMR, LLAMA):
        base = StepShape(model, 16, 256, 64, depth=8, question="scaling")
        changes: list[dict[str, int]] = [{}]
        changes += [{"m": m} for m in (64, 128, 512, 1024)]
        changes += [{"B": B} for B in (1, 4, 32)]
        changes += [{"r": r} for r in (8, 128)]
        changes += [{"depth": depth} for depth in (1, 2, 4, 16)]
        for change in changes:
            shape = replace(base, **change)  # type: ignore[arg-type]
            cases[shape.case] = shape
    return list(cases.values())


def decoding(which: str) -> list[DecodeShape]:
    """Return the cases of adapters on a few new tokens."""
    if which == "tiny":
        return [DecodeShape(model, M, 8) for model in (TINY_LLAMA, TINY_XLMR) for M in (1, 16)]
    models, sizes = ((LLAMA, XLMR), (1, 64)) if which == "main" else (REAL, (1, 2, 4, 8, 16, 32, 64))
    return [DecodeShape(model, M, 64) for model in models for M in sizes]


def generation(which: str) -> list[GenerateShape]:
    """Return the cases of whole `generate` calls."""
    if which == "tiny":
        return [GenerateShape(TINY_LLAMA, 2, 16, 4, 8, depth=2)]
    if which == "main":
        return [GenerateShape(LLAMA, 1, 128, 16, 64, depth=8)]
    return [GenerateShape(model, B, 128, 32, 64, depth=16) for model in (LLAMA, GEMMA2) for B in (1, 8, 64)]
