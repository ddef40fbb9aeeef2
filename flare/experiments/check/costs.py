"""Measure for `flare check` the base's score on the source language, and the time and memory of each method."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import set_seed

from ...source.memory import memory_of
from ..measure import StepTimer
from ..runs.callbacks import Timing, measure_step, set_callbacks
from ..runs.fitting import ExperimentTrainer, autocast_of, training_arguments, training_values
from ..runs.grid import Plan
from ..runs.latent_rows import add_states, latent_encoder, target_texts
from ..runs.methods import build, collator
from ..runs.predictor import Predictor
from ..runs.recorded_settings import adapter_fields
from ..runs.run_settings import CheckSettings
from ..runs.setup import Setup
from ..tasks import Pair
from ..utils.errors import UserError
from ..utils.processes import process_count

_MEMORY_SHARE = 0.9


@dataclass
class Cost:
    """Estimated costs of one run of a method. Costs that could not be measured are None, and `error` gives the reason.

    method: name of the method with its settings (`Plan.variant`).
    step_seconds: median seconds of the timed steps.
    steps: number of optimizer steps of a run.
    train_seconds: seconds of all these steps.
    other_seconds: seconds for predicting the validation split after each epoch and once more at the end, for
        predicting the test split if the run does so, and for FLARE MT's encoder.
    peak_bytes: peak memory of one step, including weights and optimizer state.
    peak_kind: how peak_bytes was measured, "cuda peak" or "live tensors".
    error: why the costs could not be measured, or None.
    """

    method: str
    step_seconds: float | None = None
    steps: int | None = None
    train_seconds: float | None = None
    other_seconds: float | None = None
    peak_bytes: int | None = None
    peak_kind: str | None = None
    error: str | None = None

    @property
    def seconds(self) -> float:
        """Seconds of a whole run: training, predictions and MT encoder. 0 if they were not measured."""
        return (self.train_seconds or 0.0) + (self.other_seconds or 0.0)


@dataclass
class Score:
    """Score of the base on source-language rows.

    split: name of the split.
    rows: number of scored rows.
    scores: metric -> percent.
    majority: accuracy, in percent, of always predicting the most frequent label; None if rows do not have one
        label each.
    """

    split: str
    rows: int
    scores: dict[str, float]
    majority: float | None

    @property
    def at_chance(self) -> bool:
        """Whether the accuracy is at most one standard error above `majority`."""
        accuracy = self.scores.get("accuracy")
        if accuracy is None or self.majority is None:
            return False
        share = self.majority / 100
        return accuracy <= self.majority + 100 * math.sqrt(share * (1 - share) / max(self.rows, 1))


def score_base(setup: Setup, pairs: Sequence[Pair], split: str, batch: int, name: str | None, use_cpu: bool) -> Score:
    """Return the base's score on rows of the source language.

    Args:
        setup: the base model, and the form that converts the task's rows for this model.
        pairs: pairs whose target is a row of the source language.
        split: name of the split of these rows.
        batch: rows per batch.
        name: label of the progress bar; None: no bar.
        use_cpu: whether to use the CPU even if there is a GPU.
    """
    set_seed(0)
    device = _device(use_cpu)
    model = setup.load_model()
    model = model if setup.recipe.quantization is not None else model.to(device)
    rows, _ = setup.form.eval_rows(pairs, with_source=False)
    half = autocast_of(setup.recipe.training) if device.type == "cuda" else None
    scorer = Predictor(setup.form, collator("lora", setup, model), pairs, rows, batch, half, name)
    counts = Counter(pair.target.label for pair in pairs if isinstance(pair.target.label, str))
    majority = 100 * max(counts.values()) / len(pairs) if counts else None
    return Score(split, len(pairs), scorer.scores(scorer(model)), majority)


def measure(settings: CheckSettings, plan: Plan, setup: Setup, splits: Mapping[str, Sequence[Pair]]) -> Cost:
    """Train a few steps of a method in a temporary folder and return the estimated costs of a run."""
    cost = Cost(plan.variant)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _measure(cost, settings, plan, setup, splits, Path(folder))
    except UserError as error:
        cost.error = str(error)
    except RuntimeError as error:  # PyTorch's error if it runs out of memory
        if "memory" not in str(error).lower():
            raise
        cost.error = f"out of memory: {str(error).splitlines()[0]}"
    return cost


def _measure(
    cost: Cost,
    settings: CheckSettings,
    plan: Plan,
    setup: Setup,
    splits: Mapping[str, Sequence[Pair]],
    folder: Path,
) -> None:
    values = training_values(setup.recipe.training, settings.training)
    values |= {"save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
    arguments = training_arguments({**values, "max_steps": settings.steps + 1}, folder, plan.seed, None, {})
    full_arguments = training_arguments(values, folder, plan.seed, None, {})
    accumulation = arguments.gradient_accumulation_steps
    size = arguments.train_batch_size * accumulation * process_count()
    train = list(splits["train"])
    sample = random.Random(0).sample(train, min(len(train), size * (settings.steps + 2)))
    with_source = plan.source_text is not None
    rows, _ = setup.form.train_rows(sample, with_source=with_source)
    test = list(splits["test"])[: settings.eval_batch_size or 2 * arguments.per_device_train_batch_size]
    eval_rows, _ = setup.form.eval_rows(test, with_source=with_source)
    texts = sum(map(len, splits.values()))
    latent_seconds, latent_dim = 0.0, None
    if plan.method == "flare-mt":
        device = _device(arguments.use_cpu)
        encoder = latent_encoder(settings.mt_model or "", plan.target, settings.mt_language, setup.max_length, device)
        start = time.perf_counter()
        pairs = setup.form.trainable(sample)
        rows = add_states(rows, target_texts(pairs), encoder, folder, None)
        latent_seconds = (time.perf_counter() - start) / max(len(pairs), 1) * texts
        eval_rows = add_states(eval_rows, target_texts(test), encoder, folder, None)
        latent_dim = encoder.latent_dim
    set_seed(plan.seed)
    adapter = adapter_fields(setup, plan.r, settings.alpha, settings.dropout, settings.target_modules, settings.adapter)
    model, collate = build(
        plan.method, setup, adapter, fusion=plan.fusion, latent_dim=latent_dim, mixup_layer=settings.mixup_layer
    )
    trainer = ExperimentTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    timer = StepTimer(1, arguments.device)
    set_callbacks(trainer, Timing(timer))
    trainer.train()
    predictor = Predictor(setup.form, collate, test, eval_rows, max(len(test), 1), autocast_of(values))
    start = time.perf_counter()
    predictor(trainer.model)
    per_row = (time.perf_counter() - start) / max(len(test), 1)
    steps_per_epoch = math.ceil(len(train) / size)
    cost.step_seconds = timer.median
    cost.steps = full_arguments.max_steps
    if cost.steps <= 0:
        cost.steps = math.ceil(steps_per_epoch * full_arguments.num_train_epochs)
    epochs = math.ceil(cost.steps / steps_per_epoch)
    cost.train_seconds = cost.steps * (timer.median or 0.0)
    valid = len(splits.get("valid", ()))
    cost.other_seconds = latent_seconds + per_row * ((epochs + 1) * valid + settings.test * len(splits["test"]))
    cost.peak_bytes, _ = measure_step(trainer)
    cost.peak_kind = "cuda peak" if arguments.device.type == "cuda" else "live tensors"


def memory_warning(cost: Cost) -> str | None:
    """Return a warning if a method needs 90 % or more of the device's memory, else None."""
    if cost.peak_bytes is None:
        return None
    device = torch.device("cuda" if cost.peak_kind == "cuda peak" else "cpu")
    total = memory_of(device)
    if cost.peak_bytes < _MEMORY_SHARE * total:
        return None
    return (
        f"{cost.method} needs {cost.peak_bytes / 2**30:.1f} GiB of the device's {total / 2**30:.1f} GiB; use a "
        "smaller --batch-size with --gradient_accumulation_steps, or --gradient_checkpointing"
    )


def _device(use_cpu: bool) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
