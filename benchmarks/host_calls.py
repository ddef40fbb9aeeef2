"""What the host does in a training step: Python and C calls per block, and this project's files that run.

On a CPU the kernels' path is taken with `flare_kernels.testing.launches_left_out`, which the caller enters: a step then
makes the calls that it makes on a GPU, and its numbers mean nothing. The counts depend on the versions of Python,
torch, transformers and PEFT, not on the machine. `sys.setprofile` sees calls of Python functions and of C functions
from Python; attribute getters, operators and calls made from C are not counted.

===============  =====================================================================================================
frozen           forward of the base model, without gradients
peft             PEFT's LoRA
lora             plain LoRA on this package's layers
flare            source_memory="keep"
flare-recompute  source_memory="recompute"
flare-warm       "keep", the states of all rows in a SourceStateCache in host memory
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
#: The calls of a model of this share of the depth are taken off: what is done once per step cancels.
_SHORT = 1 / 3
_MEMORY = {"flare": "keep", "flare-recompute": "recompute", "flare-warm": "keep"}
_WARMUP = 3


@dataclass
class HostStep:
    """Forward and backward of one variant on one batch; the frozen model's forward alone."""

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
        """Drop the gradients."""
        self.model.zero_grad()

    def warm_up(self) -> HostStep:
        """Run it a few times, so that what is worked out once is there. Returns itself."""
        for _ in range(_WARMUP):
            self.run()
            self.clear()
        return self


def steps_of(shape: HostShape, device: torch.device, variants: tuple[str, ...] = VARIANTS) -> dict[str, HostStep]:
    """The step of each variant, all over one set of frozen weights; B is random."""
    dtype = PRECISION if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    base = base_model(shape.model, shape.depth, 2 * shape.m, device, dtype).requires_grad_(False)
    batch = _batch(shape, device)
    return {variant: _step(variant, shape, same_weights(base), batch) for variant in variants}


def _batch(shape: HostShape, device: torch.device) -> dict[str, Tensor]:
    """Full rows; as many target tokens as source tokens in an encoder-decoder too."""
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
    """Calls of the main thread, and the files of this project in which a function was called, in the order of the first
    call.
    """

    calls: int = 0
    files: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watching_host() -> Iterator[HostCalls]:
    """Count the calls of the running thread; on a CPU the backward pass runs there too."""
    seen = HostCalls()
    files: dict[str, None] = {}

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            files[frame.f_code.co_filename] = None
        if event in ("call", "c_call"):
            seen.calls += 1

    before, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()  # a collection would add the calls of what it finalises
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
        paths = [Path(name) for name in files]
        own = [path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT)]
        seen.files = [name for name in own if name.split("/")[0] in ("flare", "flare_kernels")]


@dataclass(frozen=True)
class PerBlock:
    """Calls of a step, and kernels left out by name, per block; of an encoder-decoder, per pair of blocks."""

    calls: float
    kernels: dict[str, float]


def per_block(variant: str, shape: HostShape, left_out: list[str], whole: HostStep | None = None) -> PerBlock:
    """The difference of two depths over the blocks between them.

    Args:
        left_out: the list that `launches_left_out` yielded.
        whole: the step of ``shape``, where it is there already.
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
