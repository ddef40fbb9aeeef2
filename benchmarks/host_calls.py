"""Count the host work of a training step: Python and C calls per block, and the files of this project that run.

On a CPU the caller enters `flare_kernels.testing.launches_left_out`. A step then makes the same calls as on a GPU, but
launches no kernels, so its results are meaningless. The counts depend on the versions of Python, torch, transformers
and PEFT, not on the machine. `sys.setprofile` sees calls of Python functions, and calls of C functions from Python.
Attribute getters, operators and calls made from C are not counted. The variants of a step are:

===============  =====================================================================================================
frozen           forward of the base model, without gradients
peft             PEFT's LoRA
lora             plain LoRA on this package's layers
flare            FLARE with source_memory="keep"
flare-recompute  FLARE with source_memory="recompute"
flare-warm       FLARE with source_memory="keep" and all source states in a SourceStateCache in host memory
===============  =====================================================================================================
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from models import FUSION, PRECISION, base_model, lora_config, same_weights
from results import ROOT
from shapes import HostShape
from torch import Tensor, nn

import flare

VARIANTS = ("frozen", "peft", "lora", "flare", "flare-recompute", "flare-warm")
#: Depth of a second, shallower model, divided by the depth of the measured model. Its calls are subtracted, which
#: cancels the calls that a step makes outside the blocks.
_SHORT = 1 / 3
_MEMORY = {"flare": "keep", "flare-recompute": "recompute", "flare-warm": "keep"}
_WARMUP = 3


@dataclass
class HostStep:
    """A step of one variant on one batch: forward and, if ``graded``, backward. The frozen model runs only forward."""

    model: Any
    batch: dict[str, Tensor]
    graded: bool

    def run(self) -> None:
        if self.graded:
            self.model(**self.batch).loss.backward()
        else:
            with torch.no_grad():
                self.model(**self.batch)

    def clear(self) -> None:
        """Clear the gradients."""
        self.model.zero_grad()

    def warm_up(self) -> HostStep:
        """Run the step a few times, so that values that are computed once are cached. Return the step itself."""
        for _ in range(_WARMUP):
            self.run()
            self.clear()
        return self


def steps_of(shape: HostShape, device: torch.device, variants: tuple[str, ...] = VARIANTS) -> dict[str, HostStep]:
    """Return the step of each variant. All variants share one set of frozen weights. LoRA's B is random."""
    dtype = PRECISION if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    base = base_model(shape.model, shape.depth, 2 * shape.m, device, dtype).requires_grad_(False)
    batch = _batch(shape, device)
    return {variant: _step(variant, shape, same_weights(base), batch) for variant in variants}


def _batch(shape: HostShape, device: torch.device) -> dict[str, Tensor]:
    """Return rows without padding. The labels of an encoder-decoder have as many tokens as its input."""
    texts = torch.randint(5, shape.model.vocabulary, (3, shape.B, shape.m), device=device)
    labels = {"xlmr": torch.arange(shape.B, device=device) % 3, "llama": texts[0], "mt5": texts[2]}
    return {"input_ids": texts[0], "source_input_ids": texts[1], "labels": labels[shape.model.family]}


def _step(variant: str, shape: HostShape, model: Any, batch: dict[str, Tensor]) -> HostStep:
    if variant != "frozen":
        dropout = 0.1 if shape.setting == "dropout" else 0.0
        config = lora_config(shape.model.family, shape.r, dropout)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(next(model.parameters()).dtype)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    if variant in _MEMORY:
        model = flare.fast_lora(model, fusion=FUSION, source_memory=_MEMORY[variant])
    elif variant == "lora":
        model = flare.fast_lora(model, fusion=None)
    if variant == "flare-warm":
        model.set_source_cache(flare.SourceStateCache({"host": 1 << 34}, tiers=("host",)))
    if shape.setting == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if variant not in _MEMORY:
        batch = {name: value for name, value in batch.items() if name != "source_input_ids"}
    return HostStep(model.train(), batch, variant != "frozen")


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass
class HostCalls:
    """Number of calls, and the files of this project whose functions were called, in order of the first call."""

    calls: int = 0
    files: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watching_host() -> Iterator[HostCalls]:
    """Count the calls of the current thread. On a CPU, this thread also runs the backward pass."""
    seen = HostCalls()
    files: dict[str, None] = {}

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            files[frame.f_code.co_filename] = None
        if event in ("call", "c_call"):
            seen.calls += 1

    before, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()  # a collection would add the calls of finalisers
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
        paths = [Path(name) for name in files]
        names = [path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT)]
        seen.files = [name for name in names if name.split("/")[0] in ("flare", "flare_kernels")]


@dataclass(frozen=True)
class PerBlock:
    """What one block adds to the counts of a step. An encoder and a decoder block together count as one block.

    Attributes:
        calls: Python and C calls.
        kernels: skipped launches of each kernel, by the kernel's name.
    """

    calls: float
    kernels: dict[str, float]


def per_block(variant: str, shape: HostShape, left_out: list[str], whole: HostStep | None = None) -> PerBlock:
    """Return the difference between the counts at two depths, divided by the difference of the depths.

    Args:
        variant: one of `VARIANTS`.
        shape: sizes of the step.
        left_out: the list of skipped kernels that `launches_left_out` yields.
        whole: the step of ``shape``, if the caller has built it already.
    """
    cpu = torch.device("cpu")
    depth = int(_SHORT * shape.depth)
    short = steps_of(replace(shape, depth=depth), cpu, (variant,))[variant]
    whole = whole or steps_of(shape, cpu, (variant,))[variant]
    blocks = shape.depth - depth
    many, few = (_count(step.warm_up(), left_out) for step in (whole, short))
    kernels = {name: (count - few[1][name]) / blocks for name, count in many[1].items()}
    return PerBlock((many[0] - few[0]) / blocks, kernels)


def _count(step: HostStep, left_out: list[str]) -> tuple[int, Counter[str]]:
    before = len(left_out)
    with watching_host() as seen:
        step.run()
    step.clear()
    return seen.calls, Counter(left_out[before:])
