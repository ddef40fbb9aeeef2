"""`flare evaluate`: the base without training (zero-shot, translate-test), and trained adapters (translate-train)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..tasks import JoinedForm, Pair, resolve_labels
from ..tasks.data_error import some_ids
from ..tasks.digest import digests_of_pairs
from ..utils.environment import environment, now
from ..utils.errors import UserError
from ..utils.names import folder_name
from ..utils.processes import device, errors_reach_all, is_main, on_main, only_main
from .base import Base, find_base, seeds_of
from .callbacks import quiet_libraries
from .known_data import mark
from .latent_rows import add_states, latent_encoder, target_texts
from .methods import READS_SOURCE, collator, for_method, load
from .predictor import PREDICTIONS, Predictor, read_predictions, write_predictions
from .provenance import read_provenance
from .recorded_settings import claimed, common_settings, expect_no_source, location, summary
from .records import Metrics, Run, RunRecord, find_runs, read_metrics, write_metrics, write_record
from .run_folder import open_run
from .run_settings import EvaluateSettings
from .setup import Data, Notes, Setup, place_of, prepare, task_of
from .trained import ADAPTER, as_trained, base_of, batch_and_autocast, placed

_COLUMNS = ("source_column", "target_column")


def run_evaluate(settings: EvaluateSettings, say: Callable[[str], None] = print) -> list[Path]:
    """Evaluate on the test split; what was evaluated before is skipped.

    Returns:
        The folders with the results.

    Raises:
        UserError: something the user can mend.
    """
    settings.check()
    with quiet_libraries():
        return _Evaluation(settings, say).run()


_NO_TRANSLATE_TEST = (
    "translate-test is not done for task {task}: the tags belong to the words of the target's text, and its source has "
    "other words"
)


class _Evaluation:
    """What one call evaluates; task, data and languages come from the runs where they are not given."""

    def __init__(self, settings: EvaluateSettings, say: Callable[[str], None]) -> None:
        self.settings, self.say = settings, only_main(say)
        self.notes = Notes(self.say)
        self.runs = on_main(lambda: find_runs(settings.output) if settings.output.is_dir() else [])
        self.adapters = [run for run in self.runs if run.record.kind == "train"]
        self.folders: list[Path] = []
        self.failed: list[tuple[str, str]] = []

    def run(self) -> list[Path]:
        """All of it; what fails is said at the end and does not keep the rest from being scored."""
        for setting in self.settings.setting:
            if setting == "translate-train":
                self._try(setting, self._adapters)
                continue
            for target in self._targets(setting):
                for seed in self.settings.seeds or seeds_of(self.settings.output, self.settings.base):
                    for text in (self.settings.source_text or ("gold",)) if setting == "translate-test" else (None,):
                        self._try(f"{target} {setting} seed {seed}", partial(self._base, setting, target, seed, text))
        if len(self.failed) == 1 and not self.folders:
            raise UserError(self.failed[0][1])
        if self.failed:
            raise UserError("; ".join(f"{name}: {error}" for name, error in self.failed))
        return list(dict.fromkeys(self.folders))

    def _try(self, name: str, work: Callable[[], list[Path]]) -> None:
        try:
            with errors_reach_all():
                self.folders += work()
        except UserError as error:
            self.failed.append((name, str(error)))

    # --- the base -------------------------------------------------------------------------------------------------

    def _targets(self, setting: str) -> Sequence[str]:
        if self.settings.target:
            return self.settings.target
        found = list(dict.fromkeys(r.record.target_language for r in self.runs if r.record.target_language))
        if not found:
            raise UserError(f"--target is missing: {self.settings.output} has no runs that would tell the languages")
        return [folder_name(name, f"{self.settings.output}: target_language of a run.json") for name in found]

    def _base(self, setting: str, target: str, seed: int, text: str | None) -> list[Path]:
        settings = self.settings
        base = find_base(settings.output, settings.base, seed)
        # a model that flare finetune did not make says nothing of the task, and its adapters do
        begun = (run.record for run in self.adapters if run.record.base == base.shown)
        data, setup = self._prepared(base.record or next(begun, None), base)
        if setting == "translate-test" and data.task.kind == "token-classification":
            refusal = _NO_TRANSLATE_TEST.format(task=data.task.name)
            if len(settings.setting) == 1:
                raise UserError(refusal)
            self.notes([refusal])
            return []
        variant = setting + ("-mt-source" if text == "mt" else "")
        folder = settings.output / target / variant / f"seed-{seed}"
        own: dict[str, Any] = {"base_date": base.made}
        if text == "mt":
            own["translations"] = location(str(settings.translations))
        record = RunRecord(
            kind="evaluate",
            status="running",
            task=data.task.name,
            source_language=data.source,
            target_language=target,
            method=setting,
            variant=variant,
            seed=seed,
            source_text=text,
            settings={**common_settings(settings, data, setup), **own},
            base=base.shown,
            environment=environment(),
            date=now(),
        )
        name = f"{target} {variant} seed {seed}"
        with claimed(folder) as claim:
            if claim(lambda: open_run(folder, record, settings.resume, self.say)) == "done":
                self.say(f"{name}: done before, in {folder}")
                with contextlib.suppress(UserError):  # data that are gone change nothing about it
                    self._mark(folder, name, digests_of_pairs("test", self._base_pairs(data, target, text)[0], text))
                return [folder]
            pairs, news = self._base_pairs(data, target, text)
            provenance = read_provenance(settings.translations, data.source, target, (text, None))
            record.data = {"test": len(pairs), "notes": self.notes(news, target), "translation": provenance}
            record.data["digest"] = digests_of_pairs("test", pairs, text)
            if setting == "translate-test":
                pairs = [_source_alone(pair) for pair in pairs]
            set_seed(seed)  # a base that was not fine-tuned has a random head
            model = placed(setup.load_model(), setup, device())
            scores, predictions = self._predict(
                model, collator("lora", setup, model), setup, pairs, False, name, record
            )
            if is_main():
                write_predictions(folder / PREDICTIONS, pairs, predictions)
                write_metrics(folder, Metrics(test={setting: scores}))
                record.status = "done"
                write_record(folder, record)
        self.say(f"{name}: {summary(scores, Metrics())}")
        return [folder]

    def _base_pairs(self, data: Data, target: str, text: str | None) -> tuple[list[Pair], list[str]]:
        """The test rows that the base is scored on, and the notes: those of the adapters, where there are some."""
        ids = self._scored_ids(target) if self.settings.rows is None else set()
        if ids:  # they decide, not how many rows the base was fine-tuned on
            data = Data(data.task, data.folder, data.source, data.translations)
        pairs, news = data.pairs(target, "test", source_text=text)
        shared = [pair for pair in pairs if pair.target.id in ids]
        if shared and len(shared) < len(pairs):
            lost = [pair.target.id for pair in pairs if pair.target.id not in ids]
            news = [
                *news,
                f"{len(lost)} of {len(pairs)} test rows are left out: no adapter was scored on them {some_ids(lost)}",
            ]
            pairs = shared
        if text is not None and data.task.kind == "qa":
            pairs, more = _answered(pairs, data, target, text)
            news = [*news, *more]
        return pairs, news

    def _scored_ids(self, target: str) -> set[str]:
        """The ids of the test rows that adapters of a target language were scored on."""
        files = [run.folder / PREDICTIONS for run in self.adapters if run.record.target_language == target]
        return {str(row["id"]) for file in files for row in read_predictions(file)}

    def _mark(self, folder: Path, name: str, digests: dict[str, str]) -> None:
        if is_main():
            for line in mark(folder, name, digests):
                self.say(f"{line} (--no-resume scores them anew)")

    # --- adapters -------------------------------------------------------------------------------------------------

    def _adapters(self) -> list[Path]:
        settings = self.settings
        chosen = [
            run
            for run in self.adapters
            if (settings.target is None or run.record.target_language in settings.target)
            and (settings.seeds is None or run.record.seed in settings.seeds)
            and (settings.variant is None or run.record.variant in settings.variant)
        ]
        if not chosen:
            raise UserError(
                f"{settings.output} has no trained adapters"
                + (" of these languages, seeds and variants" if self.adapters else "; run flare train first")
            )
        for run in chosen:
            if not run.record.done:
                self.say(f"{run.folder}: not finished, left out; run flare train again, it goes on")
                continue
            reads = run.record.method in READS_SOURCE and not run.record.settings.get("train_only_fusion")
            if run.record.settings.get("train_only_fusion"):
                expect_no_source()
            texts = settings.source_text if reads and settings.source_text else (run.record.source_text,)
            for text in texts:
                self._try(str(run.folder), partial(self._adapter, run, text, reads))
        return []

    def _adapter(self, run: Run, text: str | None, reads: bool) -> list[Path]:
        record, own = run.record, text == run.record.source_text
        setting = "translate-train" if own else f"translate-train/{text}"
        name = f"{record.target_language} {record.variant} seed {record.seed}" + ("" if own else f" ({text} source)")
        metrics = read_metrics(run.folder)
        if setting in metrics.test and self.settings.resume:
            self.say(f"{name}: done before, in {run.folder}")
            with contextlib.suppress(UserError):  # data that are gone change nothing about it
                data, _ = self._prepared(record, base_of(record, self.settings.output))
                pairs, _ = data.pairs(str(record.target_language), "test", source_text=text)
                self._mark(run.folder, name, digests_of_pairs("test", pairs, text))
            return [run.folder]
        assert record.target_language is not None
        data, setup = self._prepared(record, base_of(record, self.settings.output))
        setup = for_method(record.method, setup)
        if isinstance(setup.form, JoinedForm) and record.settings.get("prompt") != setup.form.prompt:
            there = record.settings.get("prompt") or "two whole ones, one behind the other"
            raise UserError(
                f"{run.folder}: this input-fusion adapter was trained on other prompts ({there}) than "
                f"{setup.form.prompt!r}; train it anew (flare train --no-resume)"
            )
        with claimed(run.folder):
            metrics = read_metrics(run.folder)  # another process may have added to it meanwhile
            pairs, news = data.pairs(record.target_language, "test", source_text=text)
            self.notes(news, record.target_language)
            set_seed(record.seed)  # what a base lacks beside the head (a pooler) is drawn as it was for the training
            model, collate = load(record, setup, run.folder / ADAPTER)
            placed(model, setup, device())
            scores, predictions = self._predict(model, collate, setup, pairs, reads, name, record)
            departs = self._departures(record, data, setup)
            record.data["notes"] = [
                note for note in record.data.get("notes") or [] if not str(note).startswith(f"{name}: scored with ")
            ] + self.notes([f"scored with {departs}"] if departs else [], name)
            digests = digests_of_pairs("test", pairs, text)
            record.data["digest"] = {**(record.data.get("digest") or {}), **digests}
            if is_main():
                write_record(run.folder, record)
                mark(run.folder, name, digests)
                file = PREDICTIONS if own else PREDICTIONS.replace(".jsonl", f"-{text}.jsonl")
                write_predictions(run.folder / file, pairs, predictions)
                metrics.test[setting] = scores
                write_metrics(run.folder, metrics)
        self.say(f"{name}: {summary(scores, Metrics())}")
        return [run.folder]

    def _departures(self, record: RunRecord, data: Data, setup: Setup) -> str:
        """What an adapter is scored with that it was not trained with, in words."""
        here = common_settings(replace(self.settings, rows=data.rows), data, setup)
        names = ("data", "text_columns", "label_column", "rows", "max_length", "padding", "dtype", "quantization")
        there = record.settings
        return ", ".join(
            f"{name} {here[name]} (trained with {there[name]})"
            for name in names
            if name in there and there[name] != here[name]
        )

    # --- both -----------------------------------------------------------------------------------------------------

    def _prepared(self, record: RunRecord | None, base: Base) -> tuple[Data, Setup]:
        """Data and form as in a run, with what was given in their place."""
        settings = self.settings
        there = {} if record is None else record.settings
        columns = self._columns_of(record) if settings.data is None else {}
        merged = as_trained(settings, record, columns)
        source = settings.source or (record.source_language if record is not None else "english")
        folder = settings.data or there.get("data")
        task = task_of(merged, record.task if record is not None else None, there.get("labels"))
        place = None if folder == task.hub_id else place_of(merged, folder, source)
        task = resolve_labels(task, place, source)
        setup = prepare(merged, task, base.model)
        self.notes(setup.notes)
        translations = settings.translations or there.get("translations")
        return Data(task, place, source, None if translations is None else Path(translations), merged.rows), setup

    def _columns_of(self, record: RunRecord | None) -> dict[str, Any]:
        """Columns of both languages in one table; a fine-tuning may know the source's alone, and its adapters both."""
        found = [run.settings for run in (*([record] if record else []), *(run.record for run in self.adapters))]
        columns = {name: next((one[name] for one in found if one.get(name)), None) for name in _COLUMNS}
        return {name: tuple(value) for name, value in columns.items() if value and found[0].get(_COLUMNS[0])}

    def _predict(
        self,
        model: Any,
        collate: Any,
        setup: Setup,
        pairs: list[Pair],
        reads: bool,
        name: str,
        record: RunRecord,
    ) -> tuple[dict[str, float], list[str]]:
        rows, news = setup.form.eval_rows(pairs, with_source=reads)
        self.notes(news, name)
        if record.method == "flare-mt":
            there, target = record.settings, str(record.target_language)
            mt = latent_encoder(there["mt_model"], target, there["mt_language"], setup.max_length, device())
            rows = add_states(rows, target_texts(pairs), mt, self.settings.output, None)
        batch, half = batch_and_autocast(record, setup, self.settings.eval_batch_size, device())
        bar = name if self.settings.progress and is_main() else None
        scorer = Predictor(setup.form, collate, pairs, rows, batch, half, bar)
        predictions = scorer(model)
        self.notes(setup.form.prediction_notes(predictions), name)
        return scorer.scores(predictions), predictions


def _source_alone(pair: Pair) -> Pair:
    """The row as the source language has it; a class is the same in every language, an answer is not."""
    assert pair.source is not None
    return Pair(replace(pair.source, label=pair.source.label or pair.target.label))


def _answered(pairs: list[Pair], data: Data, target: str, text: str) -> tuple[list[Pair], list[str]]:
    """Return the questions whose source has its answers, and a note on those that are left out.

    The others, as after a translation that lost the marks around them, have nothing that an answer in the source
    language can be compared with.

    Raises:
        UserError: no row is left.
    """
    kept = [pair for pair in pairs if pair.source is not None and pair.source.answers]
    lost = [pair.target.id for pair in pairs if pair.source is None or not pair.source.answers]
    note = (
        f"{len(lost)} of {len(pairs)} test questions have no answer in {data.source} (a translation that lost its "
        f"marks has none) and are left out of translate-test {some_ids(lost)}"
    )
    if not kept:
        raise UserError(
            f"{target} translate-test: {note}, so no row is left to score; "
            + ("translate the test split again with flare translate" if text == "mt" else "use --source-text mt")
        )
    return kept, [note] if lost else []
