"""`flare train`: train every method on every target language with every seed.

Each run starts from the base that was fine-tuned with the same seed, or from the model that --base names. All runs of
one command are called the grid (:mod:`flare.experiments.runs.grid`).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..tasks import JoinedForm, Pair
from ..tasks.digest import digests_of_pairs
from ..utils.environment import environment, now
from ..utils.errors import UserError
from ..utils.options import parse_bytes
from ..utils.processes import is_main, on_main, only_main, process_count, wait
from .activations import write_activations
from .adapter_card import fill_run_card
from .base import Base, find_base
from .bottleneck import measure_bottleneck
from .caching import CachePlan, plan_cache
from .callbacks import ignore_missing_source, quiet_libraries
from .chance import chance_notes
from .data_digests import note_changed_rows, record_digests
from .fitting import (
    add_cost,
    autocast_of,
    batch_size,
    fit,
    per_process_batch,
    save,
    training_arguments,
    training_values,
)
from .grid import Plan, read_grid
from .latent_rows import add_states, latent_encoder, target_texts
from .methods import build, for_method
from .predictor import PREDICTIONS, Predictor, write_predictions
from .provenance import read_provenance
from .recorded_settings import adapter_fields, common_settings, location
from .records import RunRecord, result_line, write_metrics, write_record
from .run_folder import delete_checkpoints, locked, open_run
from .run_settings import TrainSettings
from .setup import Data, Notes, Setup, prepare
from .trained_adapter import ADAPTER

_BOTTLENECK_ROWS = 256


def run_train(settings: TrainSettings, print_fn: Callable[[str], None] = print) -> list[Path]:
    """Train every run of the grid in OUTPUT/<target>/<variant>/seed-N.

    With `settings.resume` (the default), finished runs are skipped and unfinished runs are resumed. Without it, all of
    them are restarted.

    Returns:
        The runs' folders.

    Raises:
        UserError: an error the user can fix. Runs that finished before the error are kept.
    """
    settings.check()
    print_fn = only_main(print_fn)
    with quiet_libraries():
        bases = {seed: find_base(settings.output, settings.base, seed) for seed in settings.seeds}
        notes = Notes(print_fn)
        settings, data, grid = read_grid(settings, bases, notes)
        folders = []
        chance = {
            seed: notes(chance_notes(Path(base.model))) if base.record is not None else []
            for seed, base in bases.items()
        }
        for plan in grid:
            base = bases[plan.seed]
            setup = for_method(plan.method, prepare(settings, data.task, base.model, settings.training))
            notes(setup.notes)
            folders.append(_Run(settings, plan, base, data, setup, notes, print_fn, chance[plan.seed]).run())
    return folders


class _Run:
    """One run of the grid, from opening its folder to writing its last file."""

    def __init__(
        self,
        settings: TrainSettings,
        plan: Plan,
        base: Base,
        data: Data,
        setup: Setup,
        notes: Notes,
        print_fn: Callable[[str], None],
        base_notes: list[str],
    ) -> None:
        self.settings, self.plan, self.base, self.data, self.setup = settings, plan, base, data, setup
        self.notes, self.print_fn, self.base_notes = notes, print_fn, base_notes
        self.folder = settings.output / plan.target / plan.variant / f"seed-{plan.seed}"
        self.values = training_values(setup.recipe.training, settings.training)
        self.adapter = adapter_fields(
            setup, plan.r, settings.alpha, settings.dropout, settings.target_modules, settings.adapter
        )
        self.latent: Any = None

    def run(self) -> Path:
        """Train and evaluate, or skip a finished run. Return the run's folder."""
        record = self._record()
        with locked(self.folder):
            state = on_main(lambda: open_run(self.folder, record, self.settings.resume, self.print_fn))
            if state == "done":
                self.print_fn(f"{self.plan.name}: already done, in {self.folder}")
                if is_main():
                    self._note_changed_rows()
            else:
                self._train(record)
            wait()
        return self.folder

    def _note_changed_rows(self) -> None:
        """Print which rows of a finished run have changed, and write these notes into its run.json."""
        with contextlib.suppress(UserError):  # a finished run does not need its data
            splits, _ = self._splits()
            for line in note_changed_rows(self.folder, self.plan.name, self._digests(splits)):
                self.print_fn(f"{line} (--no-resume trains again)")

    def _splits(self) -> tuple[dict[str, list[Pair] | None], list[str]]:
        """Return split -> its pairs (None for a split that is missing or not used), and notes about them."""
        plan = self.plan
        train, notes = self.data.pairs(
            plan.target, "train", target_text=plan.target_text, source_text=plan.train_source
        )
        valid, more = self._valid()
        splits, notes = {"train": train, "valid": valid, "test": None}, [*notes, *more]
        if self.settings.test:
            splits["test"], more = self.data.pairs(plan.target, "test", source_text=plan.source_text)
            notes += more
        return splits, notes

    def _digests(self, splits: dict[str, list[Pair] | None]) -> dict[str, str]:
        digests: dict[str, str] = {}
        for split, pairs in splits.items():
            text = self.plan.source_text if split == "test" else self.plan.train_source
            if split == "valid" and self.settings.train_only_fusion:
                text = None
            digests |= digests_of_pairs(split, pairs, text) if pairs is not None else {}
        return digests

    def _record(self) -> RunRecord:
        plan, settings = self.plan, self.settings
        method_settings: dict[str, Any] = {"adapter": self.adapter, "base_date": self.base.date}
        if plan.method == "flare-mt":
            method_settings |= {"mt_model": location(settings.mt_model or ""), "mt_language": settings.mt_language}
        if isinstance(self.setup.form, JoinedForm):
            method_settings["prompt"] = self.setup.form.prompt
        if plan.method == "x-mixup":
            method_settings["mixup_layer"] = settings.mixup_layer
        if settings.train_only_fusion:
            method_settings["train_only_fusion"] = True
        if "mt" in (plan.source_text, plan.target_text):
            method_settings["translations"] = location(str(settings.translations))
        return RunRecord(
            kind="train",
            status="running",
            task=self.data.task.name,
            source_language=self.data.source,
            target_language=plan.target,
            method=plan.method,
            variant=plan.variant,
            seed=plan.seed,
            fusion=plan.fusion,
            r=self.adapter["r"],
            source_text=plan.source_text,
            target_text=plan.target_text,
            settings={**common_settings(settings, self.data, self.setup), **method_settings},
            training_arguments=self.values,
            base=self.base.shown,
            environment=environment(bool(self.values.get("use_cpu"))),
            date=now(),
        )

    def _train(self, record: RunRecord) -> None:
        plan, settings, setup = self.plan, self.settings, self.setup
        with_source = plan.source_text is not None
        splits, messages = self._splits()
        train, valid, test = splits["train"] or [], splits["valid"], splits["test"]
        texts = (plan.source_text, plan.target_text)
        translation = read_provenance(settings.translations, self.data.source, plan.target, texts)
        digests = self._digests(splits)
        on_main(lambda: record_digests(self.folder, digests))
        record.data = {
            "notes": [*self.base_notes, *self.notes(messages, plan.target)],
            "translation": translation,
            "digest": digests,
        }
        has_source = None
        if settings.train_only_fusion:
            rows, has_source = self._half_with_source(train, record)
        else:
            rows = self._rows(train, "train", with_source, record, training=True)
        set_seed(plan.seed)
        model, collate = build(
            plan.method,
            setup,
            self.adapter,
            fusion=plan.fusion,
            latent_dim=None if self.latent is None else self.latent.latent_dim,
            mixup_layer=settings.mixup_layer,
        )
        record.data["notes"] += self.notes(setup.model_notes)
        record.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        record.data |= {"train": len(rows), "valid": len(valid or ()), "test": len(test or ())}
        metric = self.data.task.metrics[0] if valid else None
        arguments = training_arguments(self.values, self.folder, plan.seed, metric, settings.training)
        batch = settings.eval_batch_size or 2 * batch_size(self.values)
        half = autocast_of(self.values)
        reads = with_source and not settings.train_only_fusion

        def predictor(pairs: list[Pair], split: str) -> Predictor:
            rows = self._rows(pairs, split, reads, record)
            return Predictor(setup.form, collate, pairs, rows, batch, half, self._bar(split))

        if settings.train_only_fusion:
            ignore_missing_source()
        validation = predictor(valid, "valid") if valid else None
        cached = rows if validation is None or setup.form.layout != "encoder" else [*rows, *validation.rows]
        cache_plan = CachePlan(None, {})
        if plan.method == "flare":
            budget = parse_bytes(settings.source_cache_budget, "--source-cache-budget")
            cache_plan = plan_cache(settings.source_cache, budget, model, collate, cached, arguments, half)
            record.data["source_cache"] = cache_plan.facts
            self.notes([cache_plan.note] if cache_plan.note else [], plan.name)
        done = fit(
            model,
            collate,
            rows,
            arguments,
            self.folder,
            name=plan.name,
            progress=settings.progress,
            print_fn=self.print_fn,
            predictor=validation,
            has_source=has_source,
            source_cache=cache_plan.cache,
        )
        trainer = done.trainer
        save(trainer, self.folder / ADAPTER)
        if is_main():
            fill_run_card(self.folder / ADAPTER, trainer.accelerator.unwrap_model(trainer.model), record)
        if test:
            scorer = predictor(test, "test")
            predictions = scorer(trainer.model)
            done.metrics.test["translate-train"] = scorer.scores(predictions)
            record.data["notes"] += self.notes(setup.form.prediction_notes(predictions), f"{plan.name} test")
            if is_main():
                write_predictions(self.folder / PREDICTIONS, test, predictions)
            if (plan.fusion is not None and reads) or plan.method == "flare-mt":
                pairs = test[:_BOTTLENECK_ROWS]
                ids = [pair.target.id for pair in setup.form.trainable(pairs)]
                bottleneck_rows = self._rows(pairs, "test", reads, record, training=True, quietly=True)
                done.metrics.bottleneck, activations = measure_bottleneck(
                    trainer.model, collate, bottleneck_rows, ids, batch, half
                )
                if activations is not None and is_main():
                    write_activations(self.folder, activations)
        add_cost(done)
        if is_main():
            write_metrics(self.folder, done.metrics)
            record.status = "done"
            write_record(self.folder, record)
            if not settings.keep_checkpoints:
                delete_checkpoints(self.folder)
            scores = done.metrics.test.get("translate-train") or done.metrics.valid
            self.print_fn(f"{plan.name}: {result_line(scores, done.metrics)}")

    def _valid(self) -> tuple[list[Pair] | None, list[str]]:
        """Return the validation pairs, or None if there is no validation split, and notes about them.

        The texts of the pairs are gold or machine-translated, as in training. With --train-only-fusion, the pairs have
        no source text.
        """
        plan = self.plan
        language = self.data.source if plan.target_text == "mt" else plan.target
        if not self.data.has(language, "valid"):
            return None, [f"{language} has no valid split, so the last checkpoint is used"]
        source = None if self.settings.train_only_fusion else plan.train_source
        return self.data.pairs(plan.target, "valid", target_text=plan.target_text, source_text=source)

    def _rows(
        self,
        pairs: list[Pair],
        split: str,
        with_source: bool,
        record: RunRecord,
        training: bool = False,
        quietly: bool = False,
    ) -> list[dict[str, Any]]:
        """Return the model rows of a split.

        Rows of FLARE MT include the MT encoder's states. X-Mixup's training rows for questions include the positions of
        the answers in the source text.
        """
        make = self.setup.form.train_rows if training else self.setup.form.eval_rows
        rows, messages = make(pairs, with_source=with_source)
        if not quietly:
            record.data["notes"] += self.notes(messages, f"{self.plan.target} {split}")
        if self.plan.method == "x-mixup" and training and rows and "start_positions" in rows[0]:
            return self._with_source_spans(rows, pairs, record)
        if self.plan.method != "flare-mt":
            return rows  # type: ignore[no-any-return]
        if self.latent is None:
            assert self.settings.mt_model is not None
            self.latent = latent_encoder(
                self.settings.mt_model, self.plan.target, self.settings.mt_language, self.setup.max_length, "cpu"
            )
        pairs = self.setup.form.trainable(pairs) if training else pairs
        on_gpu = torch.cuda.is_available() and not self.values.get("use_cpu")
        self.latent.encoder.to("cuda" if on_gpu else "cpu")
        rows = add_states(rows, target_texts(pairs), self.latent, self.folder, self._bar(f"{split} states"))
        self.latent.encoder.to("cpu")  # frees the GPU's memory for the training
        return rows

    def _with_source_spans(
        self, rows: list[dict[str, Any]], pairs: list[Pair], record: RunRecord
    ) -> list[dict[str, Any]]:
        """Return the rows with the positions of the answers in the source text, which X-Mixup's source loss needs.

        If a source text lacks its answer, return the rows unchanged.
        """
        sources = [Pair(pair.source) for pair in self.setup.form.trainable(pairs) if pair.source is not None]
        spans = self.setup.form.train_rows(sources, with_source=False)[0]
        if len(spans) < len(rows):
            missing = len(rows) - len(spans)
            note = f"{missing} source rows lack their answer, so x-mixup trains on the target's answers only"
            record.data["notes"] += self.notes([note], self.plan.target)
            return rows
        names = ("start_positions", "end_positions")
        return [
            {**row, **{f"source_{name}": span[name] for name in names}} for row, span in zip(rows, spans, strict=True)
        ]

    def _half_with_source(self, train: list[Pair], record: RunRecord) -> tuple[list[dict[str, Any]], list[bool]]:
        """Return the training rows, half of them with a source, and for each row whether it has a source.

        The seed selects the rows with a source. Their number is rounded to whole batches.
        """
        size = per_process_batch(self.values, process_count())[0] * process_count()
        chosen = size * round(len(train) / 2 / size)
        order = list(range(len(train)))
        random.Random(self.plan.seed).shuffle(order)
        fused = set(order[:chosen])
        rows, has_source = [], []
        for kind in (True, False):
            pairs = [pair for index, pair in enumerate(train) if (index in fused) == kind]
            part = self._rows(pairs, "train", kind, record, training=True)
            if kind and len(part) % size:
                part = part[: len(part) - len(part) % size]
            rows += part
            has_source += [kind] * len(part)
        # several processes need a full batch of each kind (see OneKindSampler)
        if not any(has_source) or has_source.count(False) < (size if process_count() > 1 else 1):
            raise UserError(
                f"--train-only-fusion: {len(train)} rows are too few for two batches of {size}, one with and one "
                "without a source; use a smaller --batch-size"
            )
        record.data["notes"] += self.notes(
            [f"{sum(has_source)} of {len(rows)} training rows have a source"], self.plan.target
        )
        return rows, has_source

    def _bar(self, what: str) -> str | None:
        return f"{self.plan.name} {what}" if self.settings.progress and is_main() else None
