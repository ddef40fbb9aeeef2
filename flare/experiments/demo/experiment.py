"""Compare zero-shot, plain LoRA, input-level fusion and FLARE, all from the same fine-tuned base model.

Zero-shot is the base model without an adapter and is not trained further. The other methods have the same rows, seeds,
rank, learning rate, schedule, epochs, batch size, trained head, trainer and kernels. They differ in what they read.
Zero-shot and plain LoRA read only the target text. FLARE and input-level fusion also read the source text. They run
twice: with the unchanged source text ("gold"), and with a source text in which some words are lost or replaced
("noisy"), in training and at test time.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..._compat import use_one_gpu
from ...baselines import InputFusionCollator, input_fusion, max_positions, plain_lora
from ...training.collator import FlareDataCollator
from ...training.trainer import FlareTrainer
from ...tuner.convert import fast_lora
from ..measure import StepTimer
from ..runs.callbacks import Bar, Timing, measure_step, quiet_libraries, set_callbacks
from ..utils.errors import UserError, library_errors
from ..utils.model_names import find_model
from .base_model import BaseConfig, pretrained_base
from .corpus import LABELS, SOURCE_LANGUAGE, TARGET_LANGUAGE, SentencePair, add_noise, make_corpus
from .demo_settings import DemoError, DemoSettings
from .real_data import load_parallel

__all__ = ["Experiment", "embedded_task", "measure_step", "quiet_libraries", "real_task"]

METHODS = ("zero-shot", "lora", "input-fusion", "flare")
WARM_UP = 0.1  # share of the training steps in which the learning rate rises
TIMER_WARM_UP = 3  # number of first steps that seconds_per_step leaves out
EVAL_BATCH = 100
# The seed of the noise is the run's seed plus one of these numbers. The numbers differ, so that training and test
# sources are damaged differently.
_NOISE_TRAIN, _NOISE_TEST = 1_000, 2_000


@dataclass
class DemoTask:
    """Data, tokenizer and base model of a run.

    Attributes:
        source, target: names of the languages.
        labels: names of the classes.
        finetune: source texts with their labels, to fine-tune the base on.
        train: pairs of texts with a label, to train the adapters on.
        test: pairs of texts with a label, to evaluate on.
        base: folder or hub id of the base model, for `AutoModelForSequenceClassification`.
        tokenizer: tokenizer of the base model.
        notes: lines to print and to save with the results, such as the number of dropped rows.
    """

    source: str
    target: str
    labels: tuple[str, ...]
    finetune: list[tuple[str, str]]
    train: list[SentencePair]
    test: list[SentencePair]
    base: str
    tokenizer: Any
    notes: list[str]


def embedded_task(settings: DemoSettings, print_fn: Callable[[str], None] = print) -> DemoTask:
    """Return the task on the embedded corpus (see `.corpus`), with the tiny BERT as the base model."""
    corpus = make_corpus()
    config = BaseConfig() if settings.pretrain_steps is None else BaseConfig(steps=settings.pretrain_steps)
    folder = pretrained_base(config, corpus, settings.cache_dir, print_fn, settings.progress)
    return DemoTask(
        source=SOURCE_LANGUAGE,
        target=TARGET_LANGUAGE,
        labels=LABELS,
        finetune=[(pair.source, pair.label) for pair in corpus.finetune[: settings.rows]],
        train=corpus.train[: settings.rows],
        test=corpus.test[: settings.rows],
        base=str(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        notes=[],
    )


def real_task(settings: DemoSettings, print_fn: Callable[[str], None] = print) -> DemoTask:
    """Return the task on the user's parallel data, with the user's model."""
    assert settings.model and settings.data and settings.source and settings.target
    data = load_parallel(settings.data, settings.source, settings.target)
    for note in data.notes:
        print_fn(f"Data: {note}")
    for line in ("labels of the rows in the source language, which the base is fine-tuned on:", *data.table):
        print_fn(line)
    try:
        model = find_model(settings.model, "--model")
    except UserError as error:
        raise DemoError(str(error)) from error
    with library_errors(f"--model {settings.model}: its tokenizer cannot be loaded", DemoError):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    return DemoTask(
        source=settings.source,
        target=settings.target,
        labels=data.labels,
        finetune=[(row.text, row.label) for row in data.finetune[: settings.rows]],
        train=data.train[: settings.rows],
        test=data.test[: settings.rows],
        base=model,
        tokenizer=tokenizer,
        notes=data.notes,
    )


class Experiment:
    """Run all methods with all seeds; `rows` yields their results.

    Args:
        task: data, tokenizer and base model.
        settings: settings with the defaults filled in (`DemoSettings.resolved`).
        print_fn: prints a line for the user.
    """

    def __init__(self, task: DemoTask, settings: DemoSettings, print_fn: Callable[[str], None] = print) -> None:
        self.task = task
        self.settings = settings
        self.print_fn = print_fn
        self.source_f1: list[float] = []
        self._label_ids = {label: index for index, label in enumerate(task.labels)}

    def rows(self) -> Iterable[dict[str, Any]]:
        """Run every method with every seed, and yield the rows of results.json."""
        if torch.cuda.device_count() > 1:
            self.print_fn(f"One of {torch.cuda.device_count()} GPUs is used (CUDA_VISIBLE_DEVICES selects it)")
        sources = ["gold", *(["noisy"] if self.settings.noise else [])]
        for seed in range(self.settings.seeds):
            base = self.finetuned_base(seed)
            self.source_f1.append(self._source_f1(base, seed))
            base.to("cpu")  # leaves the memory of a GPU to the method that is measured
            self.print_fn(
                f"Seed {seed}: base fine-tuned and tested on {self.task.source}: macro F1 {self.source_f1[-1]:.1f}"
            )
            variants: list[tuple[str, str | None]] = [("zero-shot", None), ("lora", None)]
            variants += [(method, source) for method in ("input-fusion", "flare") for source in sources]
            for method, source in variants:
                row = self.run(method, source, seed, base)
                name = f"{method} ({source} source)" if source else method
                self.print_fn(f"Seed {seed}: {name} on {self.task.target}: macro F1 {row['macro_f1']:.1f}")
                yield row

    def finetuned_base(self, seed: int) -> Any:
        """Return the base model, with all weights fine-tuned on the source language (unless `finetune_epochs` is 0)."""
        set_seed(seed)
        with library_errors(f"--model {self.task.base}: it cannot be loaded for classification", DemoError):
            model = AutoModelForSequenceClassification.from_pretrained(
                self.task.base, num_labels=len(self.task.labels), trust_remote_code=False
            )
        self._check_length(model)
        if not self.settings.finetune_epochs:
            return model
        texts, labels = zip(*self.task.finetune, strict=True)
        rows = [
            {"input_ids": ids, "labels": self._label_ids[label]}
            for ids, label in zip(self._ids(texts), labels, strict=True)
        ]
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(
                model=model,
                args=self._arguments(
                    scratch,
                    seed,
                    self.settings.finetune_epochs,
                    self.settings.finetune_batch_size,
                    self.settings.finetune_lr,
                ),
                train_dataset=rows,
                data_collator=DataCollatorWithPadding(self.task.tokenizer),
            )
            set_callbacks(trainer, self._bar(f"seed {seed} fine-tuning"))
            trainer.train()
        return trainer.model.eval()

    def run(self, method: str, source: str | None, seed: int, base: Any) -> dict[str, Any]:
        """Train a method from the fine-tuned base, evaluate it on the target language, and measure a step's memory.

        Args:
            method: one of `METHODS`. "zero-shot" is only evaluated.
            source: "gold", "noisy", or None for a method that reads no source text.
            seed: seed of the training and of the noise.
            base: the fine-tuned base model, which is copied.

        Returns:
            The row of results.json.
        """
        settings = self.settings
        row: dict[str, Any] = {
            "method": method,
            "seed": seed,
            "macro_f1": None,
            "seconds_per_step": None,
            "peak_bytes": None,
            "saved_bytes": None,
            "source": source,
            "fusion": settings.fusion if method == "flare" else None,
        }
        set_seed(seed)
        model = copy.deepcopy(base)
        options: dict[str, Any] = {"padding": "max_length", "max_length": settings.max_length, "layout": "encoder"}
        adapter: dict[str, Any] = {"r": settings.r, "lora_alpha": settings.alpha}
        collator: Any
        if method == "flare":
            model = fast_lora(model, fusion=settings.fusion, **adapter)
            collator = FlareDataCollator(self.task.tokenizer, **options)
        elif method == "input-fusion":
            collator = InputFusionCollator.for_model(model, self.task.tokenizer, **options)
            model = input_fusion(model, max_length=settings.max_length, **adapter)
        else:
            collator = FlareDataCollator(self.task.tokenizer, require_source=False, **options)
            if method == "lora":
                model = plain_lora(model, **adapter)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = FlareTrainer(
                model=model,
                args=self._arguments(scratch, seed, settings.epochs, settings.batch_size, settings.lr),
                train_dataset=self._rows(self.task.train, source, _NOISE_TRAIN + seed),
                data_collator=collator,
            )
            timer = StepTimer(TIMER_WARM_UP, trainer.args.device)
            name = f"seed {seed} {method}" + (f" ({source})" if source else "")
            set_callbacks(trainer, self._bar(name), Timing(timer))
            if method != "zero-shot":
                trainer.train()
            row["macro_f1"] = _evaluate(
                trainer, self._rows(self.task.test, source, _NOISE_TEST + seed), self.task.labels
            )
            if method != "zero-shot":
                row["seconds_per_step"] = timer.median
                row["peak_bytes"], row["saved_bytes"] = measure_step(trainer)
        return row

    # --- parts --------------------------------------------------------------------------------------------------------

    def _source_f1(self, base: Any, seed: int) -> float:
        rows = self._rows([pair._replace(target=pair.source) for pair in self.task.test], None, 0)
        collator = FlareDataCollator(self.task.tokenizer, require_source=False, layout="encoder")
        with tempfile.TemporaryDirectory() as scratch:
            trainer = FlareTrainer(model=base, args=self._arguments(scratch, seed, 1, 1, 1.0), data_collator=collator)
            set_callbacks(trainer)
            return _evaluate(trainer, rows, self.task.labels)

    def _rows(self, pairs: Sequence[SentencePair], source: str | None, noise_seed: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [
            {"input_ids": ids, "labels": self._label_ids[pair.label]}
            for ids, pair in zip(self._ids([pair.target for pair in pairs]), pairs, strict=True)
        ]
        if source is not None:
            texts = [pair.source for pair in pairs]
            if source == "noisy":
                texts = add_noise(texts, self.settings.noise, noise_seed)
            for row, ids in zip(rows, self._ids(texts), strict=True):
                row["source_input_ids"] = ids
        return rows

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = self.task.tokenizer(
            list(texts), truncation=True, max_length=self.settings.max_length
        )["input_ids"]
        return encoded

    def _arguments(self, scratch: str, seed: int, epochs: Any, batch_size: Any, lr: Any) -> TrainingArguments:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=EVAL_BATCH,
            learning_rate=lr,
            warmup_steps=WARM_UP,
            lr_scheduler_type="linear",
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        use_one_gpu(arguments)
        return arguments

    def _bar(self, name: str) -> TrainerCallback:
        return Bar(name, enabled=self.settings.progress)

    def _check_length(self, model: Any) -> None:
        limit, width = max_positions(model), self.settings.max_length
        if limit is not None and width is not None and 2 * width > limit:
            raise DemoError(
                f"--max-length {width} is too long: input-level fusion reads both texts as one text of {2 * width} "
                f"tokens, but {type(model).__name__} has positions for {limit}; give --max-length {limit // 2} or less"
            )


def macro_f1(predicted: torch.Tensor, truth: torch.Tensor, classes: int) -> float:
    """Return the mean F1 of the classes in percent. A class that neither occurs nor is predicted has F1 0."""
    scores = []
    for index in range(classes):
        correct = ((predicted == index) & (truth == index)).sum().item()
        total = (predicted == index).sum().item() + (truth == index).sum().item()
        scores.append(2 * correct / total if total else 0.0)
    return 100 * sum(scores) / classes


def _evaluate(trainer: Trainer, rows: list[dict[str, Any]], labels: Sequence[str]) -> float:
    output = trainer.predict(rows)  # type: ignore[arg-type]
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    return macro_f1(torch.as_tensor(logits).argmax(-1), torch.as_tensor(output.label_ids), len(labels))
