"""What a training run shows and measures: a bar, seconds per step, a log file, the cost of one step."""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback

from ..measure import StepTimer, peak_bytes, saved_bytes
from ..utils.atomic_files import replacing
from ..utils.json_files import parsed
from ..utils.processes import process_count
from ..utils.progress import counter


class Bar(TrainerCallback):
    """One progress bar or counter per training, in place of the trainer's own with its loss lines."""

    def __init__(self, name: str, enabled: bool) -> None:
        self.name = name
        self.enabled = enabled
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        name = self.name if self.enabled and state.is_world_process_zero else None
        self.bar = counter(name, state.max_steps, "step", state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(1)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()


class Timing(TrainerCallback):
    """Times every step: forward, backward and optimizer, without loading the batch."""

    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.timer.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.timer.stop()


class PeakMemory(TrainerCallback):
    """The most bytes allocated on a CUDA device within a training step: batch, weights and optimizer state included,
    evaluations in between (by other batches, or by generation) left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bytes = max(self.bytes or 0, torch.cuda.max_memory_allocated(self.device))


class Clock(TrainerCallback, ExportableState):
    """Seconds of the whole training and of its steps over all sittings: checkpoints carry them on."""

    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer
        self._before: float = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """So far, evaluation and checkpoints included."""
        return self._before + (0.0 if self._began is None else time.perf_counter() - self._began)

    def state(self) -> dict[str, Any]:
        own = {"seconds": self.seconds, "steps": self.timer.seconds, "processes": process_count()}
        return {"args": {}, "attributes": own}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name, {}) if state.global_step else {}
        found = saved.get("attributes", {})
        same = found.get("processes", 1) == process_count()  # steps of more processes are shorter
        self._before, self.timer.seconds = found.get("seconds", 0.0), list(found.get("steps", []) if same else [])
        self._began = time.perf_counter()
        state.stateful_callbacks[name] = self.state()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._before, self._began = self.seconds, None


class Losses(TrainerCallback, ExportableState):
    """The sum of the losses of all steps over all sittings: checkpoints carry it on, and the trainer's starts at 0.

    Attributes:
        resumed: whether an earlier sitting's are in it.
    """

    def __init__(self) -> None:
        self._total: Any = 0.0
        self.resumed = False

    def add(self, loss: torch.Tensor) -> None:
        """Count a step's loss, without waiting for the device."""
        self._total = self._total + loss.detach().double()

    def mean(self, steps: int) -> float:
        """Return the mean loss of so many optimizer steps."""
        return float(self._total) / max(steps, 1)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": float(self._total)}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name, {}) if state.global_step else {}
        found = saved.get("attributes", {})
        # a checkpoint of an earlier version has no sum: then the log holds the trainer's mean of this sitting
        self._total, self.resumed = found.get("total", 0.0), "total" in found
        state.stateful_callbacks[name] = self.state()


class Log(TrainerCallback):
    """The trainer's logs as lines of JSON; a resumed run goes on behind its checkpoint's line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        # the training's last line is written again
        kept = [line for line in lines if _step(line) <= state.global_step and '"train_runtime"' not in line]
        if len(kept) < len(lines):
            with replacing(self.path) as file:
                file.writelines(f"{line}\n" for line in kept)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}, default=float) + "\n")


def _step(line: str) -> float:
    try:
        return float(parsed(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn by a kill


def quiet(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Give a trainer our callbacks in place of the one that prints dictionaries."""
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep loading bars, remarks and deprecation notes of the libraries out of the output; errors still show."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def measure_step(trainer: Trainer) -> tuple[int, int]:
    """Peak live tensor bytes and bytes saved for backward of one more training step, which the timer does not see.

    The peak counts parameters, buffers, optimizer state, the batch, activations and gradients. The saved bytes leave
    out parameters, buffers and the batch: they are there anyway. The weights are changed by the step.
    """
    gc.collect()  # what earlier methods left in reference cycles would count on a GPU
    model, optimizer = trainer.model, trainer.optimizer
    batch = next(iter(trainer.get_train_dataloader()))
    fixed = [*model.parameters(), *model.buffers(), dict(batch)]
    state = [list(values.values()) for values in optimizer.state.values()]
    model.train()
    # the trainer sets it with its first batch, and one that resumed from its last checkpoint had none
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    with peak_bytes(live=[fixed, state], device=model.device) as peak, saved_bytes(ignore=fixed) as saved:
        trainer.training_step(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    return peak.peak, saved.total
