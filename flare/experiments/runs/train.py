"""`flare train`: every method on every target language and seed, from one fine-tuned base."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..tasks import JoinedForm, Pair
from ..tasks.digest import digests_of_pairs
from ..tasks.reading import shown_labels
from ..utils.environment import environment, now
from ..utils.errors import UserError
from ..utils.processes import is_main, only_main, process_count, wait
from .activations import write_activations
from .adapter_card import describe
from .base import Base, find_base
from .bottleneck import measure_bottleneck
from .caching import CachePlan, plan_cache
from .callbacks import quiet_libraries
from .chance import chance_notes
from .fitting import add_cost, autocast_of, batch_size, fit, of_one_process, save, training_arguments, training_values
from .known_data import mark, remember
from .latent_rows import add_states, latent_encoder, target_texts
from .methods import READS_SOURCE, build, for_method, variant_name
from .options import parse_bytes
from .predictor import PREDICTIONS, Predictor, write_predictions
from .provenance import read_provenance
from .recorded_settings import adapter_fields, claimed, common_settings, expect_no_source, location, summary
from .records import RunRecord, write_metrics, write_record
from .run_folder import CHECKPOINTS, open_run
from .run_settings import TrainSettings
from .setup import Data, Notes, Setup, place_of, prepare, task_of, with_targets
from .trained import ADAPTER

_BOTTLENECK_ROWS = 256


@dataclass(frozen=True)
class Plan:
    """One run of the grid. source_text and target_text are what its method reads."""

    target: str
    method: str
    fusion: str | None
    r: int | None
    seed: int
    variant: str
    source_text: str | None
    target_text: str

    @property
    def name(self) -> str:
        return f"{self.target} {self.variant} seed {self.seed}"

    @property
    def train_source(self) -> str | None:
        """The source text in training: machine-translated target text is a translation of the gold source."""
        return "gold" if self.source_text is not None and self.target_text == "mt" else self.source_text


def plans(settings: TrainSettings) -> list[Plan]:
    """Every run of the grid: languages, then seeds, then methods."""
    made = []
    for target in settings.target or ():
        for seed in settings.seeds:
            for method, fusion, r in settings.variants():
                source = settings.source_text if method in READS_SOURCE else None
                name = settings.name or variant_name(
                    method,
                    fusion,
                    r if r != 64 else None,
                    source_text=source,
                    target_text=settings.target_text,
                    train_only=settings.train_only_fusion,
                )
                made.append(Plan(target, method, fusion, r, seed, name, source, settings.target_text))
    return made


def run_train(settings: TrainSettings, say: Callable[[str], None] = print) -> list[Path]:
    """Train the whole grid into OUTPUT/<target>/<variant>/seed-N; finished runs are skipped, unfinished ones go on.

    Returns:
        The runs' folders.

    Raises:
        UserError: something the user can mend; runs that are finished by then stay.
    """
    settings.check()
    say = only_main(say)
    with quiet_libraries():
        bases = {seed: find_base(settings.output, settings.base, seed) for seed in settings.seeds}
        notes = Notes(say)
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
            folders.append(_Run(settings, plan, base, data, setup, notes, say, chance[plan.seed]).run())
    return folders


def read_grid(settings: Any, bases: dict[int, Base], notes: Notes) -> tuple[Any, Data, list[Plan]]:
    """Return the settings with form and targets filled in, the data with their task, and the runs that are meant.

    Raises:
        UserError: the bases or the data do not fit the settings.
    """
    labels = check_bases(settings, bases)
    settings = replace(settings, form=form_of(settings, bases))
    place = place_of(settings, settings.data, settings.source_language)
    task, table = shown_labels(task_of(settings, labels=labels), place, settings.source_language)
    data = Data(task, place, settings.source_language, settings.translations, settings.rows)
    notes(table)
    settings = with_targets(settings, data, notes)
    grid = plans(settings)
    data.check_languages([plan.target for plan in grid if plan.target_text == "gold"])
    return settings, data, grid


def check_bases(settings: TrainSettings, bases: dict[int, Base]) -> tuple[str, ...] | None:
    """The labels the bases were fine-tuned on; UserError where it was another task or language."""
    labels = None
    for base in bases.values():
        record = base.record
        if record is None:
            continue
        for name, there, now_ in (
            ("task", record.task, settings.task),
            ("source", record.source_language, settings.source_language),
        ):
            if there != now_:
                raise UserError(
                    f"the base {base.model} was fine-tuned with --{name} {there}; --{name} {now_} needs a base of its "
                    "own (flare finetune with another --output)"
                )
        labels = tuple(record.settings.get("labels") or ()) or None
        if settings.labels is not None and labels is not None and settings.labels != labels:
            raise UserError(f"--labels: the base {base.model} was fine-tuned on {', '.join(labels)}, in this order")
    return labels


def form_of(settings: TrainSettings, bases: dict[int, Base]) -> str | None:
    """The form that the bases were fine-tuned in: a head that was not trained with them would be a random one."""
    for base in bases.values():
        there = None if base.record is None else base.record.settings.get("family")
        if there is not None and settings.form not in (None, there):
            raise UserError(
                f"--form {settings.form}: the base {base.model} was fine-tuned with --form {there}; leave it out, or "
                "fine-tune another base (flare finetune with another --output)"
            )
        if there is not None:
            return str(there)
    return settings.form


class _Run:
    """One run from its folder to its last file."""

    def __init__(
        self,
        settings: TrainSettings,
        plan: Plan,
        base: Base,
        data: Data,
        setup: Setup,
        notes: Notes,
        say: Callable[[str], None],
        base_notes: list[str],
    ) -> None:
        self.settings, self.plan, self.base, self.data, self.setup = settings, plan, base, data, setup
        self.notes, self.say, self.base_notes = notes, say, base_notes
        self.folder = settings.output / plan.target / plan.variant / f"seed-{plan.seed}"
        self.values = training_values(setup.recipe.training, settings.training)
        self.adapter = adapter_fields(
            setup, plan.r, settings.alpha, settings.dropout, settings.target_modules, settings.adapter
        )
        self.latent: Any = None

    def run(self) -> Path:
        """Train and evaluate, unless it is done; returns the folder."""
        record = self._record()
        with claimed(self.folder) as claim:
            state = claim(lambda: open_run(self.folder, record, self.settings.resume, self.say))
            if state == "done":
                self.say(f"{self.plan.name}: done before, in {self.folder}")
                if is_main():
                    self._mark_changes()
            else:
                self._train(record, claim)
            wait()
        return self.folder

    def _mark_changes(self) -> None:
        """Say where the rows of a finished run are not what they were."""
        with contextlib.suppress(UserError):  # data that are gone change nothing about it
            splits, _ = self._splits()
            for line in mark(self.folder, self.plan.name, self._digests(splits)):
                self.say(f"{line} (--no-resume trains anew)")

    def _splits(self) -> tuple[dict[str, list[Pair] | None], list[str]]:
        """The pairs of every split that the run reads, None for one that is not there, and the notes about them."""
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
        found: dict[str, str] = {}
        for split, pairs in splits.items():
            text = self.plan.source_text if split == "test" else self.plan.train_source
            if split == "valid" and self.settings.train_only_fusion:
                text = None
            found |= digests_of_pairs(split, pairs, text) if pairs is not None else {}
        return found

    def _record(self) -> RunRecord:
        plan, settings = self.plan, self.settings
        own: dict[str, Any] = {"adapter": self.adapter, "base_date": self.base.made}
        if plan.method == "flare-mt":
            own |= {"mt_model": location(settings.mt_model or ""), "mt_language": settings.mt_language}
        if isinstance(self.setup.form, JoinedForm):
            own["prompt"] = self.setup.form.prompt
        if plan.method == "x-mixup":
            own["mixup_layer"] = settings.mixup_layer
        if settings.train_only_fusion:
            own["train_only_fusion"] = True
        if "mt" in (plan.source_text, plan.target_text):
            own["translations"] = location(str(settings.translations))
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
            settings={**common_settings(settings, self.data, self.setup), **own},
            training_arguments=self.values,
            base=self.base.shown,
            environment=environment(bool(self.values.get("use_cpu"))),
            date=now(),
        )

    def _train(self, record: RunRecord, claim: Callable[[Callable[[], str]], str]) -> None:
        plan, settings, setup = self.plan, self.settings, self.setup
        with_source = plan.source_text is not None
        splits, news = self._splits()
        train, valid, test = splits["train"] or [], splits["valid"], splits["test"]
        texts = (plan.source_text, plan.target_text)
        translation = read_provenance(settings.translations, self.data.source, plan.target, texts)
        digests = self._digests(splits)
        claim(lambda: remember(self.folder, digests))
        record.data = {
            "notes": [*self.base_notes, *self.notes(news, plan.target)],
            "translation": translation,
            "digest": digests,
        }
        groups = None
        if settings.train_only_fusion:
            rows, groups = self._half(train, record)
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
        record.data["notes"] += self.notes(setup.drawn_notes)
        record.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        record.data |= {"train": len(rows), "valid": len(valid or ()), "test": len(test or ())}
        metric = self.data.task.metrics[0] if valid else None
        arguments = training_arguments(self.values, self.folder, plan.seed, metric, settings.training)
        batch = settings.eval_batch_size or 2 * batch_size(self.values)
        half = autocast_of(self.values)
        reads = with_source and not settings.train_only_fusion

        def predictor(pairs: list[Pair], split: str) -> Predictor:
            made = self._rows(pairs, split, reads, record)
            return Predictor(setup.form, collate, pairs, made, batch, half, self._bar(split))

        if settings.train_only_fusion:
            expect_no_source()
        validation = predictor(valid, "valid") if valid else None
        read = rows if validation is None or setup.form.layout != "encoder" else [*rows, *validation.rows]
        keeping = CachePlan(None, {})
        if plan.method == "flare":
            budget = parse_bytes(settings.source_cache_budget, "--source-cache-budget")
            keeping = plan_cache(settings.source_cache, budget, model, collate, read, arguments, half)
            record.data["source_cache"] = keeping.facts
            self.notes([keeping.note] if keeping.note else [], plan.name)
        done = fit(
            model,
            collate,
            rows,
            arguments,
            self.folder,
            name=plan.name,
            progress=settings.progress,
            say=self.say,
            predictor=validation,
            groups=groups,
            source_cache=keeping.cache,
        )
        trainer = done.trainer
        save(trainer, self.folder / ADAPTER)
        if is_main():
            describe(self.folder / ADAPTER, trainer.accelerator.unwrap_model(trainer.model), record)
        if test:
            scorer = predictor(test, "test")
            predictions = scorer(trainer.model)
            done.metrics.test["translate-train"] = scorer.scores(predictions)
            record.data["notes"] += self.notes(setup.form.prediction_notes(predictions), f"{plan.name} test")
            if is_main():
                write_predictions(self.folder / PREDICTIONS, test, predictions)
            if (plan.fusion is not None and reads) or plan.method == "flare-mt":
                some = test[:_BOTTLENECK_ROWS]
                kept = [pair.target.id for pair in setup.form.trainable(some)]
                made = self._rows(some, "test", reads, record, training=True, quietly=True)
                done.metrics.bottleneck, activations = measure_bottleneck(
                    trainer.model, collate, made, kept, batch, half
                )
                if activations is not None and is_main():
                    write_activations(self.folder, activations)
        add_cost(done)
        if is_main():
            write_metrics(self.folder, done.metrics)
            record.status = "done"
            write_record(self.folder, record)
            if not settings.keep_checkpoints:
                shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
            scores = done.metrics.test.get("translate-train") or done.metrics.valid
            self.say(f"{plan.name}: {summary(scores, done.metrics)}")

    def _valid(self) -> tuple[list[Pair] | None, list[str]]:
        """Validation pairs: as the training's, or None where there are none; and the notes about them."""
        plan = self.plan
        language = self.data.source if plan.target_text == "mt" else plan.target
        if not self.data.has(language, "valid"):
            return None, [f"{language} has no valid split: the last checkpoint is used"]
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
        """A split's rows in the form, with FLARE MT's states where the method reads them."""
        make = self.setup.form.train_rows if training else self.setup.form.eval_rows
        rows, news = make(pairs, with_source=with_source)
        if not quietly:
            record.data["notes"] += self.notes(news, f"{self.plan.target} {split}")
        if self.plan.method == "x-mixup" and training and rows and "start_positions" in rows[0]:
            return self._with_source_spans(rows, pairs, record)
        if self.plan.method != "flare-mt":
            return rows  # type: ignore[no-any-return]
        if self.latent is None:
            assert self.settings.mt_model is not None
            self.latent = latent_encoder(
                self.settings.mt_model, self.plan.target, self.settings.mt_language, self.setup.max_length, "cpu"
            )
        kept = self.setup.form.trainable(pairs) if training else pairs
        on_gpu = torch.cuda.is_available() and not self.values.get("use_cpu")
        self.latent.encoder.to("cuda" if on_gpu else "cpu")
        made = add_states(rows, target_texts(kept), self.latent, self.folder, self._bar(f"{split} states"))
        self.latent.encoder.to("cpu")  # training's memory is the method's own
        return made

    def _with_source_spans(
        self, rows: list[dict[str, Any]], pairs: list[Pair], record: RunRecord
    ) -> list[dict[str, Any]]:
        """Rows for X-Mixup's loss on the source's own answers, where every source has its answer."""
        sources = [Pair(pair.source) for pair in self.setup.form.trainable(pairs) if pair.source is not None]
        spans = self.setup.form.train_rows(sources, with_source=False)[0]
        if len(spans) < len(rows):
            lost = (
                f"{len(rows) - len(spans)} source rows lack their answer: x-mixup trains on the target's answers only"
            )
            record.data["notes"] += self.notes([lost], self.plan.target)
            return rows
        names = ("start_positions", "end_positions")
        return [
            {**row, **{f"source_{name}": span[name] for name in names}} for row, span in zip(rows, spans, strict=True)
        ]

    def _half(self, train: list[Pair], record: RunRecord) -> tuple[list[dict[str, Any]], list[bool]]:
        """Rows of which half have a source, chosen by the seed, as many as whole batches; and which ones have."""
        size = of_one_process(self.values, process_count())[0] * process_count()
        chosen = size * round(len(train) / 2 / size)
        if not 0 < chosen < len(train):
            raise UserError(
                f"--train-only-fusion: {len(train)} rows make no two batches of {size}, one with and one without a "
                "source; use a smaller --batch-size"
            )
        order = list(range(len(train)))
        random.Random(self.plan.seed).shuffle(order)
        fused = set(order[:chosen])
        rows, groups = [], []
        for wanted in (True, False):
            pairs = [pair for index, pair in enumerate(train) if (index in fused) == wanted]
            made = self._rows(pairs, "train", wanted, record, training=True)
            if wanted and len(made) % size:
                made = made[: len(made) - len(made) % size]
            rows += made
            groups += [wanted] * len(made)
        record.data["notes"] += self.notes(
            [f"{sum(groups)} of {len(rows)} training rows have a source"], self.plan.target
        )
        return rows, groups

    def _bar(self, what: str) -> str | None:
        return f"{self.plan.name} {what}" if self.settings.progress and is_main() else None
