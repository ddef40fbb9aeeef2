"""The general rule for launch configurations: the tiles of a kernel if no tuned table has an entry for the launch.

The rule depends on dtypes, rank, alignment and shared memory only. It selects a row, which holds tile sizes and launch
options, from the tables in this module. There is no autotuning, so the same call on the same GPU model always runs the
same code. ``python -m flare_kernels.aot --all`` compiles the rows ahead of time. A tuned table
(:mod:`flare_kernels.launch_table`), which ``flare bench --tune`` measures, overrides the rule for the launches that it
lists.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

#: Shared memory per block from which pipelines get more stages (sm_80 has 163 KB, sm_90 and sm_100 have 227 KB).
LARGE_SHARED_BYTES = 160 * 1024
#: Shared memory per block from which a GPU is taken to have wgmma (sm_90, sm_100), whose accumulators take fewer
#: registers per warp.
HOPPER_SHARED_BYTES = 220 * 1024
#: Shared memory per block of sm_86, sm_89 and sm_120. Configurations for less than LARGE_SHARED_BYTES must fit in it.
SMALL_SHARED_BYTES = 99 * 1024

#: A rank is rounded up to the next of these numbers; a rank above 256 counts as 256. A rank above a row's BLOCK_R is
#: processed in blocks.
RANK_BUCKETS = (16, 32, 64, 128, 256)

#: Operand classes: all operands of 2 bytes; 2-byte compute dtype with some 4-byte operands; IEEE float32; 2-byte
#: compute dtype with unaligned rows.
NARROW, MIXED, FLOAT32, UNALIGNED = "narrow", "mixed", "float32", "unaligned"
OPERAND_CLASSES = (NARROW, MIXED, FLOAT32, UNALIGNED)


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes (M tokens, K input width, N output width, R rank; 0 if the axis is not tiled) and launch options."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    #: target number of programs: with fewer tiles, sums are split; with more tiles, a program computes several of them
    programs: int = 256

    def tiles_of(self, names: Sequence[str]) -> dict[str, int]:
        """Return the tile sizes that a kernel with these argument names takes."""
        return {name: getattr(self, name) for name in ("BLOCK_M", "BLOCK_K", "BLOCK_N", "BLOCK_R") if name in names}


#: step -> form -> the kernels of the form that take tile sizes. A step is one operation of the adapter, a form one
#: implementation of it. The general rule takes the first form; "torch" is plain PyTorch. Forms that are never the
#: fastest on an H200 are kept because the tuner may choose them on other GPUs. The times are from
#: tables/nvidia-h200.json: query and value of Llama 8B, M = 8192, r = 64, unless stated otherwise. In "a vs. b us", a
#: is the time of the form next to the comment, and b the time of the form "triton".
FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "shrink": {
        "triton": ("shrink",),
        # tensor descriptors and a persistent grid; never the fastest: 41.2 vs. 40.5 us
        "tma": ("shrink_tma",),
        # split-K in one launch instead of two: the last program of each tile adds up the splits; 40.5 vs. 40.5 us,
        # 13.3 vs. 14.5 us at M = 2048, r = 8
        "last_adds": ("shrink_last_adds",),
        "torch": (),  # XLM-R Large, M = 2048: 12.5 vs. 13.9 us
    },
    "expand": {"triton": ("expand",), "torch": ()},  # torch 87.2 vs. 59.4 us
    "grad_bottleneck": {
        "triton": ("grad_bottleneck",),
        "rows_first": ("grad_bottleneck",),  # XLM-R Large: 28.0 vs. 28.7 us
        "torch": (),  # never the fastest: 111 vs. 64.1 us
    },
    "grad_weight": {
        "triton": ("grad_weight",),
        "tma": ("grad_weight_tma",),  # never the fastest: 50.2 vs. 47.4 us
        "last_adds": ("grad_weight_last_adds",),  # M = 2048: 18.4 vs. 22.1 us; M = 8192: 47.9 vs. 47.4 us
        "torch": (),  # never the fastest: 57.1 vs. 47.4 us
    },
    # measured with dx written to a new buffer: torch 27.8 vs. 33.4 us; at r = 8, torch 25.8 vs. 20.3 us
    "grad_input": {"torch": (), "triton": ("grad_input",)},
    "decode": {"triton": ("shrink_decode", "expand_decode")},
    # order of adapters and frozen products (flare_kernels/order.py), forward and backward: adapter_first 1103 us,
    # frozen_first 1144 us; on XLM-R Large 210 and 212 us; equal at M = 2048
    "order": {"adapter_first": (), "frozen_first": ()},
}

#: (step, form) -> function of operand class and compute capability (90: sm_90; 0: the interpreter) that returns whether
#: the form can run. A form that is not listed runs anywhere. The first form of a step is never listed.
SUPPORTED: dict[tuple[str, str], Callable[[str, int], bool]] = {
    # sm_120 has tensor descriptors too, but too little shared memory for deep pipelines
    (step, "tma"): lambda operands, capability: operands == NARROW and (capability == 0 or 90 <= capability < 120)
    for step in ("shrink", "grad_weight")
}


def can_run(step: str, form: str, operands: str, capability: int) -> bool:
    """Return whether a form of a step runs on operands of this class with this compute capability."""
    predicate = SUPPORTED.get((step, form))
    return predicate is None or predicate(operands, capability)


# A row: BLOCK_M, BLOCK_K, BLOCK_N, largest BLOCK_R, warps, stages with less shared memory than LARGE_SHARED_BYTES, and
# stages with at least that much.
_Row = tuple[int, int, int, int, int, int, int]

# 2-byte operands, one row per rank bucket.
_NARROW_ROWS: dict[str, dict[int, _Row]] = {
    "shrink": {
        16: (64, 64, 0, 16, 8, 4, 4),
        32: (64, 64, 0, 32, 8, 4, 4),
        64: (64, 64, 0, 64, 4, 4, 4),
        128: (64, 64, 0, 128, 8, 3, 4),
        256: (64, 64, 0, 128, 8, 3, 4),
    },
    "expand": {
        16: (128, 0, 64, 16, 8, 2, 2),
        32: (128, 0, 64, 32, 8, 2, 2),
        64: (64, 0, 128, 64, 8, 2, 3),
        128: (64, 0, 64, 128, 4, 2, 3),
        256: (64, 0, 128, 64, 8, 2, 3),
    },
    "grad_bottleneck": {
        16: (64, 64, 128, 16, 4, 3, 3),
        32: (64, 64, 128, 32, 4, 3, 3),
        64: (64, 64, 128, 64, 4, 3, 3),
        128: (64, 64, 128, 128, 8, 2, 3),
        256: (64, 64, 128, 128, 8, 2, 3),
    },
    "grad_weight": {
        16: (64, 64, 0, 16, 8, 3, 4),
        32: (64, 64, 0, 32, 4, 3, 4),
        64: (64, 128, 0, 64, 8, 2, 3),
        128: (64, 128, 0, 128, 8, 2, 3),
        256: (64, 128, 0, 128, 8, 2, 3),
    },
    "shrink_tma": {
        16: (64, 128, 0, 16, 4, 2, 4),
        32: (64, 64, 0, 32, 4, 2, 4),
        64: (64, 64, 0, 64, 4, 3, 4),
        128: (64, 64, 0, 128, 8, 2, 4),
        256: (64, 64, 0, 128, 8, 2, 4),
    },
    "grad_weight_tma": {
        16: (64, 128, 0, 16, 4, 2, 4),
        32: (64, 128, 0, 32, 4, 2, 4),
        64: (64, 128, 0, 64, 4, 1, 4),
        128: (64, 128, 0, 128, 4, 1, 3),
        256: (64, 128, 0, 128, 4, 1, 3),
    },
    "grad_input": {
        16: (128, 64, 0, 16, 8, 2, 2),
        32: (128, 64, 0, 32, 8, 2, 2),
        64: (128, 64, 0, 64, 8, 2, 2),
        128: (128, 64, 0, 128, 8, 2, 2),
        256: (64, 128, 0, 64, 8, 2, 3),
    },
    "shrink_decode": {rank: (16, 64, 0, min(rank, 128), 4, 2, 3) for rank in RANK_BUCKETS},
    "expand_decode": {
        16: (16, 0, 64, 16, 4, 1, 1),
        32: (16, 0, 64, 32, 4, 1, 1),
        64: (16, 0, 64, 64, 4, 1, 1),
        128: (16, 0, 128, 128, 8, 1, 1),
        256: (16, 0, 128, 128, 8, 1, 1),
    },
}

# Rows that replace rows of _NARROW_ROWS on a GPU with at least HOPPER_SHARED_BYTES. On an H200, the tuner found no
# faster configuration than the row of rank 128, which query and value with r = 64 use together (47.4 us, Llama 8B,
# M = 8192).
_HOPPER_ROWS: dict[str, dict[int, _Row]] = {
    "grad_weight": {
        64: (64, 128, 0, 64, 4, 4, 4),
        128: (64, 128, 0, 128, 4, 3, 3),
        256: (64, 128, 0, 128, 4, 3, 3),
    },
}

# The other operand classes have one row per kernel for all ranks. BLOCK_R is the rank's bucket, or the row's largest
# BLOCK_R if the bucket is larger.
_ROWS: dict[str, dict[str, _Row]] = {
    MIXED: {
        "shrink": (64, 32, 0, 128, 8, 3, 5),
        "expand": (64, 0, 64, 128, 8, 2, 2),
        "grad_bottleneck": (64, 64, 64, 128, 8, 2, 2),
        "grad_weight": (64, 64, 0, 128, 8, 2, 2),
        "grad_input": (64, 64, 0, 128, 8, 2, 2),
        "shrink_decode": (16, 64, 0, 128, 4, 2, 3),
        "expand_decode": (16, 0, 64, 128, 4, 1, 1),
    },
    FLOAT32: {
        "shrink": (32, 32, 0, 64, 4, 2, 2),
        "expand": (32, 0, 64, 64, 8, 2, 2),
        "grad_bottleneck": (32, 32, 64, 64, 8, 2, 2),
        "grad_weight": (32, 64, 0, 64, 8, 2, 2),
        "grad_input": (32, 64, 0, 64, 8, 2, 2),
        "shrink_decode": (16, 64, 0, 128, 4, 2, 2),
        "expand_decode": (16, 0, 32, 128, 4, 1, 1),
    },
    UNALIGNED: {
        "shrink": (32, 32, 0, 64, 4, 2, 2),
        "expand": (32, 0, 64, 64, 4, 2, 2),
        "grad_bottleneck": (32, 32, 64, 64, 4, 2, 2),
        "grad_weight": (32, 64, 0, 64, 4, 2, 2),
        "grad_input": (32, 64, 0, 64, 4, 2, 2),
        "shrink_decode": (16, 64, 0, 128, 4, 2, 2),
        "expand_decode": (16, 0, 32, 128, 4, 1, 1),
    },
}

KERNELS = tuple(dict.fromkeys(kernel for forms in FORMS.values() for kernels in forms.values() for kernel in kernels))

# Target number of programs per kernel: one to four per multiprocessor of a large GPU, which has about 130. The decoding
# kernels do not use it.
_PROGRAMS = {
    "shrink": 128,
    "expand": 512,
    "grad_bottleneck": 264,
    "grad_weight": 128,
    "shrink_tma": 132,
    "grad_weight_tma": 132,
    "grad_input": 512,
    "shrink_decode": 1,
    "expand_decode": 1,
}


def rank_bucket(rank: int) -> int:
    """Return the smallest bucket that is at least the rank, or the largest bucket."""
    return next((bucket for bucket in RANK_BUCKETS if rank <= bucket), RANK_BUCKETS[-1])


def operand_class(compute_bytes: int, widest_bytes: int, aligned: bool) -> str:
    """Return the operand class for the bytes of the compute dtype and of the widest operand, and the alignment."""
    if compute_bytes == 4:
        return FLOAT32
    if not aligned:
        return UNALIGNED
    return NARROW if widest_bytes == 2 else MIXED


@cache
def choose(kernel: str, operands: str, rank: int, shared_bytes: int) -> TileConfig:
    """Return the general rule's configuration of a launch. It exists for every operand class, rank and GPU."""
    bucket = rank_bucket(rank)
    kernel = kernel.removesuffix("_last_adds")  # the same kernel, used in the form last_adds
    row = _ROWS[operands].get(kernel) if operands != NARROW else None
    if row is None:  # narrow operands, or a kernel that takes only narrow operands
        row = _NARROW_ROWS[kernel][bucket]
        if shared_bytes >= HOPPER_SHARED_BYTES:
            row = _HOPPER_ROWS.get(kernel, {}).get(bucket, row)
    block_m, block_k, block_n, max_block_r, num_warps, stages_small, stages_large = row
    if shared_bytes >= LARGE_SHARED_BYTES:
        num_stages = stages_large
    elif shared_bytes >= SMALL_SHARED_BYTES:
        num_stages = stages_small
    else:
        num_stages = 1  # other GPUs: no prefetching into shared memory
    return TileConfig(block_m, block_k, block_n, min(bucket, max_block_r), num_warps, num_stages, _PROGRAMS[kernel])


def all_configs() -> Iterator[tuple[str, str, int, int, TileConfig]]:
    """Yield all rows: (kernel, operand class, rank bucket, shared memory limit, configuration)."""
    for kernel in KERNELS:
        for operands in OPERAND_CLASSES:
            for bucket in RANK_BUCKETS:
                if operands != NARROW and kernel not in _ROWS[operands]:
                    continue
                for shared_bytes in (SMALL_SHARED_BYTES, LARGE_SHARED_BYTES, HOPPER_SHARED_BYTES):
                    yield kernel, operands, bucket, shared_bytes, choose(kernel, operands, bucket, shared_bytes)


#: The tuner's grid for aligned 2-byte operands: BLOCK_M, BLOCK_K, BLOCK_N, warps, stages, programs.
_CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "shrink": ((64, 128), (64, 128), (0,), (4, 8), (3, 4), (128, 264)),
    "expand": ((64, 128), (0,), (64, 128), (4, 8), (2, 3), (512, 1056)),
    "grad_bottleneck": ((64, 128), (64,), (128, 256), (4, 8), (3,), (132, 264)),
    "grad_weight": ((64,), (64, 128), (0,), (4, 8), (3, 4), (64, 128, 264)),
    "shrink_tma": ((64, 128), (64, 128), (0,), (4, 8), (3, 4), (132,)),
    "shrink_last_adds": ((64,), (64, 128), (0,), (4, 8), (3,), (128, 264)),
    "grad_weight_last_adds": ((64,), (64, 128), (0,), (4,), (3, 4), (128, 264)),
    "grad_weight_tma": ((32, 64), (128, 256), (0,), (4, 8), (3, 4), (132, 264)),
    "grad_input": ((64, 128), (64, 128), (0,), (4, 8), (2, 3), (512,)),
    "shrink_decode": ((16,), (64, 128, 256), (0,), (4, 8), (2, 3), (1,)),
    "expand_decode": ((16,), (0,), (32, 64, 128), (2, 4), (1,), (1,)),
}


def candidates(kernel: str, operands: str, rank: int, shared_bytes: int) -> Iterator[TileConfig]:
    """Yield the tuner's candidates: the general rule's choice, then the grid (for aligned 2-byte operands only)."""
    general = choose(kernel, operands, rank, shared_bytes)
    yield general
    if operands != NARROW:
        return
    for BLOCK_M, BLOCK_K, BLOCK_N, warps, stages, programs in itertools.product(*_CANDIDATES[kernel]):
        candidate = TileConfig(BLOCK_M, BLOCK_K, BLOCK_N, general.BLOCK_R, warps, stages, programs)
        if candidate != general:
            yield candidate
