"""Trainer callbacks for the progress bar, times, memory, losses and the log file.

The module also has functions that silence warnings, and one that measures the memory of a training step.
"""

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
    """Show a progress bar of a training, in place of the trainer's bar and its printed losses."""

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
    """Time every step (forward, backward and optimizer). Loading the batch is not timed."""

    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.timer.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.timer.stop()


class PeakMemory(TrainerCallback):
    """Measure the peak of the bytes allocated on a CUDA device during training steps.

    The peak includes the batch, weights and optimizer state, but not the evaluations between steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bytes = max(self.bytes or 0, torch.cuda.max_memory_allocated(self.device))


class Clock(TrainerCallback, ExportableState):
    """Time the whole training.

    Checkpoints save the seconds of the training and of its steps, so that a resumed run continues from them.
    """

    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer
        self._before: float = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far, including evaluation and checkpoints, and including the time before a resume."""
        return self._before + (0.0 if self._began is None else time.perf_counter() - self._began)

    def state(self) -> dict[str, Any]:
        attributes = {"seconds": self.seconds, "steps": self.timer.seconds, "processes": process_count()}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name, {}) if state.global_step else {}
        attributes = saved.get("attributes", {})
        # the time of a step depends on the number of processes
        same_processes = attributes.get("processes", 1) == process_count()
        self._before = attributes.get("seconds", 0.0)
        self.timer.seconds = list(attributes.get("steps", []) if same_processes else [])
        self._began = time.perf_counter()
        state.stateful_callbacks[name] = self.state()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._before, self._began = self.seconds, None


class Losses(TrainerCallback, ExportableState):
    """Sum the losses of all steps.

    Checkpoints save the sum, because the trainer's own sum restarts at 0 in a resumed run.

    Attributes:
        resumed: whether the sum includes steps from before a resume.
    """

    def __init__(self) -> None:
        self._total: Any = 0.0
        self.resumed = False

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss that the trainer returned for one batch to the sum, without waiting for the device.

        With gradient accumulation, this loss is the batch's share of the step's loss.
        """
        self._total = self._total + loss.detach().double()

    def mean(self, steps: int) -> float:
        """Return the sum divided by a number of optimizer steps."""
        return float(self._total) / max(steps, 1)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": float(self._total)}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name, {}) if state.global_step else {}
        attributes = saved.get("attributes", {})
        # Checkpoints of earlier versions of this package hold no sum. `resumed` is then False, and the trainer's own
        # train_loss is logged.
        self._total, self.resumed = attributes.get("total", 0.0), "total" in attributes
        state.stateful_callbacks[name] = self.state()


class Log(TrainerCallback):
    """Write one line of JSON to a file for each log of the trainer.

    A resumed run first deletes the lines of steps after its checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        # the line of a finished training (train_runtime) will be written again
        earlier = [line for line in lines if _step(line) <= state.global_step and '"train_runtime"' not in line]
        if len(earlier) < len(lines):
            with replacing(self.path) as file:
                file.writelines(f"{line}\n" for line in earlier)

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
        return float("inf")  # the process was killed while it wrote this line


def set_callbacks(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Replace the trainer's callback that prints dictionaries with the given callbacks."""
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the loading bars and logged warnings of transformers, and FutureWarnings of transformers and PEFT.

    Errors are still shown.
    """
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


def ignore_missing_source() -> None:
    """Silence the warnings of a fusing adapter without a source, for runs in which this is intended."""
    warnings.filterwarnings("ignore", "A fusing adapter (predicts|was trained) without a source")


def measure_step(trainer: Trainer) -> tuple[int, int]:
    """Run one more training step, and return its peak bytes and the bytes that it saves for backward.

    The peak counts parameters, buffers, optimizer state, the batch, activations and gradients. The saved bytes exclude
    parameters, buffers and the batch, which exist anyway. The step is not timed, and it changes the weights.
    """
    gc.collect()  # otherwise the peak on a GPU includes memory that reference cycles of earlier runs still hold
    model, optimizer = trainer.model, trainer.optimizer
    batch = next(iter(trainer.get_train_dataloader()))
    fixed = [*model.parameters(), *model.buffers(), dict(batch)]
    state = [list(values.values()) for values in optimizer.state.values()]
    model.train()
    # the trainer sets this at its first batch, but a run resumed after its last step has had no batch
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    with peak_bytes(live=[fixed, state], device=model.device) as peak, saved_bytes(ignore=fixed) as saved:
        trainer.training_step(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    return peak.peak, saved.total
