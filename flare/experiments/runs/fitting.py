"""Train one model: training arguments, choice of the best checkpoint, resuming, and measured costs.

A *recipe* (`flare.recipes`) holds the paper's settings. The user's TrainingArguments override the recipe's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..._compat import use_one_gpu
from ...source.fsdp import is_sharded
from ...source_cache import SourceStateCache
from ...training.trainer import FlareTrainer
from ..measure import StepTimer
from ..utils.errors import UserError, reason
from ..utils.processes import is_main, on_main, process_count
from .callbacks import Bar, Clock, Log, Losses, PeakMemory, Timing, measure_step, set_callbacks
from .checkpoints import last_checkpoint
from .diverged import StopIfNotFinite, check_weights
from .predictor import Predictor
from .records import LOG_FILE, Metrics
from .run_folder import CHECKPOINTS

_TIMER_WARM_UP = 3
_CHECKPOINTS_KEPT = 2  # the best checkpoint, and the newest one to resume from
# Argument given by the user -> argument of the recipe that it replaces.
_REPLACES = {"warmup_ratio": "warmup_steps", "fp16": "bf16"}


class ExperimentTrainer(FlareTrainer):
    """FlareTrainer that evaluates with the task's own metrics, by generation if the model generates its answer.

    Args:
        predictor: predictor of the validation split; None: checkpoints are not evaluated.
        has_source: for each training row, whether it has a source; None if all rows have a source or none has. A batch
            never mixes rows with and without a source.
    """

    def __init__(
        self, *args: Any, predictor: Predictor | None = None, has_source: Sequence[bool] | None = None, **kwargs: Any
    ) -> None:
        self.predictor = predictor
        self.has_source = has_source
        self.losses = Losses()
        super().__init__(*args, **kwargs)
        self.add_callback(self.losses)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the gradients of one batch, and add its loss to the sum that gives ``train_loss`` after a resume."""
        loss = super().training_step(*args, **kwargs)
        self.losses.add(loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the values. After a resume, the final ``train_loss`` also includes the steps before the resume."""
        if "train_loss" in logs and self.losses.resumed:
            logs["train_loss"] = self.losses.mean(self.state.global_step)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the task's metrics on the validation split."""
        assert self.predictor is not None
        scores = self.predictor.scores(self.predictor(self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.has_source is None:
            return super()._get_train_sampler(train_dataset)
        # the batches that the processes compute at the same time must either all have a source or all lack one
        return OneKindSampler(self.has_source, self.args.per_device_train_batch_size * process_count(), self.args.seed)


class OneKindSampler(torch.utils.data.Sampler[int]):
    """Sampler in random order whose batches have either only rows with a source or only rows without one.

    If the last batch is not full, its rows have no source, and neither has the first batch.

    Args:
        has_source: whether each row has a source; the number of True must be a multiple of `batch_size`.
        batch_size: rows per batch, summed over all processes.
        seed: determines the order, together with the epoch.
    """

    def __init__(self, has_source: Sequence[bool], batch_size: int, seed: int) -> None:
        self.has_source, self.batch_size, self.seed = list(has_source), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.has_source)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.has_source), generator=generator).tolist()
        size = self.batch_size
        full_batches, rest = [], []
        for kind in (True, False):
            rows = [row for row in order if self.has_source[row] == kind]
            end = len(rows) - len(rows) % size
            full_batches += [rows[first : first + size] for first in range(0, end, size)]
            rest += rows[end:]
        batches = [full_batches[index] for index in torch.randperm(len(full_batches), generator=generator).tolist()]
        # with several processes, accelerate fills the last batch with the first rows of the epoch
        first = next((index for index, batch in enumerate(batches) if not self.has_source[batch[0]]), None)
        if rest and first is not None:
            batches.insert(0, batches.pop(first))
        for batch in batches:
            yield from batch
        yield from rest


@dataclass
class Fit:
    """A finished training.

    trainer: the trainer, whose model has the selected weights.
    metrics: the metrics that are known after the training.
    """

    trainer: ExperimentTrainer
    metrics: Metrics


def training_values(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's values of TrainingArguments fields, overridden by the user's values (`given`)."""
    values = dict(recipe)
    for name in given:
        values.pop(_REPLACES.get(name, ""), None)
    if "per_device_train_batch_size" in given:
        # a batch size from the user is the number of rows of an optimizer step
        values.pop("gradient_accumulation_steps", None)
    return {**values, **given}


def batch_size(values: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch if a single process trains.

    Args:
        values: result of :func:`training_values`.
    """
    return int(values.get("per_device_train_batch_size", 8))


def per_process_batch(values: Mapping[str, Any], processes: int) -> tuple[int, int]:
    """Return the rows per batch of one process and its batches per optimizer step.

    A step has the same number of rows for any number of processes. With more processes, each process computes fewer
    batches per step. The batches become smaller only if the rows could not be shared equally otherwise. They never
    become larger, because then they might not fit the memory of one process.

    Args:
        values: result of :func:`training_values`, for a single process.
        processes: number of processes that share a step.

    Raises:
        UserError: the processes cannot share the rows of a step equally.
    """
    size, batches = batch_size(values), int(values.get("gradient_accumulation_steps", 1))
    share, rest = divmod(size * batches, processes)
    if rest or not share:
        raise UserError(
            f"--batch-size {size}: {processes} processes cannot share the {size * batches} rows of a step equally; "
            f"use a multiple of {processes}, or another number of processes"
        )
    size = next(rows for rows in range(min(size, share), 0, -1) if share % rows == 0)
    return size, share // size


def training_arguments(
    values: Mapping[str, Any], folder: Path, seed: int, metric: str | None, given: Mapping[str, Any]
) -> TrainingArguments:
    """Return the TrainingArguments of a run.

    By default a checkpoint is saved each epoch. If `metric` is given, the trainer loads the best checkpoint at the end.
    Each process uses one GPU, so that a step has the rows that `values` name.

    Args:
        values: result of :func:`training_values`.
        folder: folder of the run.
        seed: seed of initialisation, shuffling and dropout.
        metric: metric that selects the best checkpoint; None: there is no validation split.
        given: name -> value of the fields that the user set.

    Raises:
        UserError: TrainingArguments rejects the values, or they need a validation split that the data do not have.
    """
    defaults: dict[str, Any] = {
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "epoch" if "logging_steps" not in given else "steps",
        "save_total_limit": _CHECKPOINTS_KEPT,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # keep a NaN loss visible
    }
    steps = "save_steps" in given or "eval_steps" in given
    defaults["save_strategy"] = given.get("eval_strategy", "steps" if steps else "epoch")
    if metric is not None:
        strategy = given.get("save_strategy", defaults["save_strategy"])
        defaults["eval_strategy"] = "steps" if strategy == "steps" else "epoch"
        if strategy == "steps":
            every = given.get("eval_steps", given.get("save_steps", 500))
            defaults |= {"eval_steps": every, "save_steps": every}
        defaults |= {"metric_for_best_model": metric, "greater_is_better": True, "load_best_model_at_end": True}
    elif given.get("eval_strategy", "no") != "no" or "eval_steps" in given:
        raise UserError("--eval_strategy and --eval_steps need a valid split, and the data have no valid split")
    merged = {**defaults, **values, "output_dir": str(folder / CHECKPOINTS), "seed": seed, "data_seed": seed}
    if process_count() > 1:
        size, batches = per_process_batch(values, process_count())
        merged |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": batches}
        if not torch.accelerator.is_available():
            merged["use_cpu"] = True  # otherwise every process would train alone, without sharing gradients
    try:
        arguments = TrainingArguments(**merged)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"these training arguments cannot be used: {error}") from error
    use_one_gpu(arguments)
    by_steps = metric is not None and arguments.save_strategy == "steps"
    if by_steps and arguments.save_steps != arguments.eval_steps:
        raise UserError(
            f"--save_steps {arguments.save_steps:g} and --eval_steps {arguments.eval_steps:g} must be equal, because "
            "the best checkpoint can only be loaded if it was saved; give one of them, or --save_strategy best"
        )
    if arguments.max_steps <= 0 and arguments.num_train_epochs <= 0:
        raise UserError(f"--epochs must be greater than 0; got {arguments.num_train_epochs}")
    return arguments


def autocast_of(values: Mapping[str, Any]) -> torch.dtype | None:
    """Return the mixed-precision dtype of a training, for predictions outside the trainer; None for float32.

    Args:
        values: result of :func:`training_values`.
    """
    return torch.bfloat16 if values.get("bf16") else torch.float16 if values.get("fp16") else None


def fit(
    model: Any,
    collator: Any,
    rows: Sequence[dict[str, Any]],
    arguments: TrainingArguments,
    folder: Path,
    *,
    name: str,
    progress: bool,
    print_fn: Callable[[str], None],
    predictor: Predictor | None = None,
    has_source: Sequence[bool] | None = None,
    source_cache: SourceStateCache | None = None,
) -> Fit:
    """Train a model, or resume its training from the newest complete checkpoint.

    Afterwards the model has the weights of the best checkpoint, or the last weights if `predictor` is None.

    Args:
        model: the model with its adapters, or the base itself.
        collator: the method's collator.
        rows: training rows.
        arguments: result of :func:`training_arguments`.
        folder: folder of the run, with its checkpoints.
        name: name of the run, for messages.
        progress: whether to show a progress bar.
        print_fn: prints one line for the user.
        predictor: see :class:`ExperimentTrainer`.
        has_source: see :class:`ExperimentTrainer`.
        source_cache: cache of source states; None: no cache.

    Raises:
        UserError: there are no rows, the trainer rejects a value, or accelerate sees another number of processes
            than were started.
        DivergedError: the loss or the weights are not finite.
    """
    if not rows:
        raise UserError(f"{name}: there are no rows to train on")
    timer = StepTimer(_TIMER_WARM_UP)
    clock = Clock(timer)
    try:
        trainer = ExperimentTrainer(
            model=model,
            args=arguments,
            train_dataset=list(rows),
            eval_dataset=None if predictor is None else list(predictor.rows),
            data_collator=collator,
            predictor=predictor,
            has_source=has_source,
            source_cache=source_cache,
        )
    except (ValueError, RuntimeError, ImportError) as error:  # such as a report_to whose package is missing
        raise UserError(f"these training arguments cannot be used: {error}") from error
    if trainer.accelerator.num_processes != process_count():
        raise UserError(
            f"{process_count()} processes were started, but accelerate sees {trainer.accelerator.num_processes}; start "
            "them with accelerate launch or torchrun"
        )
    timer.device = arguments.device
    if source_cache is not None and predictor is not None:
        # the trainer may have replaced the collator, and the cache finds only rows that the new collator has padded
        predictor.collator = trainer.data_collator
    set_callbacks(trainer, StopIfNotFinite(), Bar(name, progress), Timing(timer), clock, Log(folder / LOG_FILE))
    checkpoint = on_main(lambda: last_checkpoint(folder, print_fn))
    if checkpoint is not None and is_main():
        print_fn(f"{name}: resumes from step {checkpoint.name.rpartition('-')[2]}")
    peak = PeakMemory(arguments.device)
    if arguments.device.type == "cuda":
        trainer.add_callback(peak)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (ValueError, ArithmeticError, ImportError) as error:  # such as an optimizer whose package is missing
        if trainer.state.global_step:
            raise
        raise UserError(f"{name}: the training cannot start ({reason(error)})") from error
    check_weights(trainer.model, f"step {trainer.state.global_step}")
    metrics = Metrics(train_seconds=round(clock.seconds, 3), seconds_per_step=timer.median)
    metrics.steps = trainer.state.global_step
    metrics.best_checkpoint = trainer.state.best_global_step if predictor is not None else trainer.state.global_step
    if peak.bytes is not None:
        metrics.peak_bytes, metrics.peak_kind = peak.bytes, "cuda peak"
    if predictor is not None:
        metrics.valid = predictor.scores(predictor(trainer.model))
    if source_cache is not None:
        metrics.source_cache = source_cache.stats().facts()
        trainer.model.set_source_cache(None)
    return Fit(trainer, metrics)


def save(trainer: ExperimentTrainer, folder: Path) -> None:
    """Save the trained weights in the format of save_pretrained. Sharded weights are gathered from all processes."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not is_sharded(model)):  # FSDP1
        trainer.save_model(str(folder))
        return
    state = None
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(model, options=options)
    if is_main():
        model.save_pretrained(folder, state_dict=state)


def add_cost(done: Fit) -> None:
    """Measure the peak memory with one more training step, if :func:`fit` has not measured it.

    The step changes the weights, so save them first.
    """
    if done.metrics.peak_kind is None:
        done.metrics.peak_bytes, _ = measure_step(done.trainer)
        done.metrics.peak_kind = "cuda peak" if done.trainer.args.device.type == "cuda" else "live tensors"
