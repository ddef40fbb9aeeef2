"""`flare evaluate`: score bases and adapters on the test split.

The option --setting selects the evaluations: zero-shot scores the base on the texts in the target language,
translate-test scores the base on the same texts in the source language, and translate-train scores the adapters.
"""

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
from ..utils.errors import DivergedError, UserError
from ..utils.names import folder_name
from ..utils.processes import device, errors_reach_all, is_main, on_main, only_main
from .base import Base, find_base, seeds_of
from .callbacks import ignore_missing_source, quiet_libraries
from .data_digests import note_changed_rows
from .diverged import has_finite_weights
from .latent_rows import add_states, latent_encoder, target_texts
from .methods import READS_SOURCE, collator, for_method, load
from .predictor import PREDICTIONS, Predictor, read_predictions, write_predictions
from .provenance import read_provenance
from .recorded_settings import common_settings, location
from .records import (
    Metrics,
    Run,
    RunRecord,
    diverged,
    find_runs,
    read_metrics,
    read_record,
    result_line,
    write_metrics,
    write_record,
)
from .run_folder import locked, open_run
from .run_settings import EvaluateSettings
from .setup import Data, Notes, Setup, place_of, prepare, task_of
from .trained_adapter import ADAPTER, base_of_run, batch_and_autocast, to_device, with_run_settings

_COLUMNS = ("source_column", "target_column")


def run_evaluate(settings: EvaluateSettings, print_fn: Callable[[str], None] = print) -> list[Path]:
    """Evaluate on the test split. With `settings.resume`, skip evaluations that already have results.

    Returns:
        The folders with the results.

    Raises:
        UserError: an error the user can fix.
    """
    settings.check()
    with quiet_libraries():
        return _Evaluation(settings, print_fn).run()


_NO_TRANSLATE_TEST = (
    "translate-test is skipped for task {task}, because the tags belong to the words of the target text, and the "
    "source text has different words"
)


class _Evaluation:
    """One call of `flare evaluate`.

    Task, data and languages that the user does not name are taken from the runs in the output folder.
    """

    def __init__(self, settings: EvaluateSettings, print_fn: Callable[[str], None]) -> None:
        self.settings, self.print_fn = settings, only_main(print_fn)
        self.notes = Notes(self.print_fn)
        self.runs = on_main(lambda: find_runs(settings.output) if settings.output.is_dir() else [])
        self.adapters = [run for run in self.runs if run.record.kind == "train"]
        self.folders: list[Path] = []
        self.failed: list[tuple[str, str]] = []

    def run(self) -> list[Path]:
        """Run all evaluations, and return the folders with results.

        If evaluations fail, the others still run. Then one UserError with all messages is raised.
        """
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

    # --- zero-shot and translate-test -----------------------------------------------------------------------------

    def _targets(self, setting: str) -> Sequence[str]:
        if self.settings.target:
            return self.settings.target
        targets = list(dict.fromkeys(r.record.target_language for r in self.runs if r.record.target_language))
        if not targets:
            raise UserError(f"--target is missing, and {self.settings.output} has no runs to take the languages from")
        return [folder_name(name, f"{self.settings.output}: target_language of a run.json") for name in targets]

    def _base(self, setting: str, target: str, seed: int, text: str | None) -> list[Path]:
        settings = self.settings
        base = find_base(settings.output, settings.base, seed)
        # a base that was not fine-tuned has no run.json, so the task is read from the run.json of one of its adapters
        adapters = (run.record for run in self.adapters if run.record.base == base.shown)
        data, setup = self._prepared(base.record or next(adapters, None), base)
        if setting == "translate-test" and data.task.kind == "token-classification":
            refusal = _NO_TRANSLATE_TEST.format(task=data.task.name)
            if len(settings.setting) == 1:
                raise UserError(refusal)
            self.notes([refusal])
            return []
        variant = setting + ("-mt-source" if text == "mt" else "")
        folder = settings.output / target / variant / f"seed-{seed}"
        base_settings: dict[str, Any] = {"base_date": base.date}
        if text == "mt":
            base_settings["translations"] = location(str(settings.translations))
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
            settings={**common_settings(settings, data, setup), **base_settings},
            base=base.shown,
            environment=environment(),
            date=now(),
        )
        name = f"{target} {variant} seed {seed}"
        with locked(folder):
            if on_main(lambda: open_run(folder, record, settings.resume, self.print_fn)) == "done":
                self.print_fn(f"{name}: already done, in {folder}")
                with contextlib.suppress(UserError):  # a finished run does not need its data
                    self._note_changed_rows(
                        folder, name, digests_of_pairs("test", self._base_pairs(data, target, text)[0], text)
                    )
                return [folder]
            pairs, messages = self._base_pairs(data, target, text)
            provenance = read_provenance(settings.translations, data.source, target, (text, None))
            record.data = {"test": len(pairs), "notes": self.notes(messages, target), "translation": provenance}
            record.data["digest"] = digests_of_pairs("test", pairs, text)
            if setting == "translate-test":
                pairs = [_source_only(pair) for pair in pairs]
            set_seed(seed)  # a base that was not fine-tuned has a random head
            model = to_device(setup.load_model(), setup, device())
            scores, predictions = self._predict(
                model, collator("lora", setup, model), setup, pairs, False, name, record
            )
            if is_main():
                write_predictions(folder / PREDICTIONS, pairs, predictions)
                write_metrics(folder, Metrics(test={setting: scores}))
                record.status = "done"
                write_record(folder, record)
        self.print_fn(f"{name}: {result_line(scores, Metrics())}")
        return [folder]

    def _base_pairs(self, data: Data, target: str, text: str | None) -> tuple[list[Pair], list[str]]:
        """Return the test rows for the base, and notes about them.

        If adapters were scored on this target language and --rows is not given, the base is scored on the rows that the
        adapters were scored on. For translate-test, questions without an answer in the source language are left out.
        """
        ids = self._scored_ids(target) if self.settings.rows is None else set()
        if ids:  # these rows are all used, even if run.json of the base limits the number of rows
            data = Data(data.task, data.folder, data.source, data.translations)
        pairs, messages = data.pairs(target, "test", source_text=text)
        shared = [pair for pair in pairs if pair.target.id in ids]
        if shared and len(shared) < len(pairs):
            left_out = [pair.target.id for pair in pairs if pair.target.id not in ids]
            messages = [
                *messages,
                f"{len(left_out)} of {len(pairs)} test rows are left out: no adapter was scored on them "
                f"{some_ids(left_out)}",
            ]
            pairs = shared
        if text is not None and data.task.kind == "qa":
            pairs, more = _answered(pairs, data, target, text)
            messages = [*messages, *more]
        return pairs, messages

    def _scored_ids(self, target: str) -> set[str]:
        """Return the ids of the test rows that adapters of a target language were scored on."""
        files = [run.folder / PREDICTIONS for run in self.adapters if run.record.target_language == target]
        return {str(row["id"]) for file in files for row in read_predictions(file)}

    def _note_changed_rows(self, folder: Path, name: str, digests: dict[str, str]) -> None:
        if is_main():
            for line in note_changed_rows(folder, name, digests):
                self.print_fn(f"{line} (--no-resume scores them again)")

    # --- translate-train ------------------------------------------------------------------------------------------

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
                what = diverged(run)
                self.print_fn(
                    f"{run.folder}: not finished, skipped; run flare train again to resume it"
                    if what is None
                    else f"{run.folder}: diverged ({what}), skipped; run flare train --no-resume with a smaller --lr"
                )
                continue
            reads = run.record.method in READS_SOURCE and not run.record.settings.get("train_only_fusion")
            if run.record.settings.get("train_only_fusion"):
                ignore_missing_source()
            texts = settings.source_text if reads and settings.source_text else (run.record.source_text,)
            for text in texts:
                self._try(str(run.folder), partial(self._adapter, run, text, reads))
        return []

    def _adapter(self, run: Run, text: str | None, reads: bool) -> list[Path]:
        record, as_in_training = run.record, text == run.record.source_text
        setting = "translate-train" if as_in_training else f"translate-train/{text}"
        name = f"{record.target_language} {record.variant} seed {record.seed}" + (
            "" if as_in_training else f" ({text} source)"
        )
        # the two source texts may leave out different rows, so each score has its own digests
        split = "test" if as_in_training else f"test-{text}"
        if setting in read_metrics(run.folder).test and self.settings.resume:
            self.print_fn(f"{name}: already done, in {run.folder}")
            with contextlib.suppress(UserError):  # a finished run does not need its data
                data, _ = self._prepared(record, base_of_run(record, self.settings.output))
                pairs, _ = data.pairs(str(record.target_language), "test", source_text=text)
                self._note_changed_rows(run.folder, name, digests_of_pairs(split, pairs, text))
            return [run.folder]
        assert record.target_language is not None
        data, setup = self._prepared(record, base_of_run(record, self.settings.output))
        setup = for_method(record.method, setup)
        if isinstance(setup.form, JoinedForm) and record.settings.get("prompt") != setup.form.prompt:
            trained = record.settings.get("prompt") or "two complete prompts, one after the other"
            raise UserError(
                f"{run.folder}: this input-fusion adapter was trained on other prompts ({trained}) than "
                f"{setup.form.prompt!r}; train it again (flare train --no-resume)"
            )
        with locked(run.folder):
            # read again, because another command may have changed the run before this one got the lock
            metrics = read_metrics(run.folder)
            date, record = record.date, on_main(lambda: read_record(run.folder))
            if record.date != date or not record.done:
                raise UserError(f"{run.folder}: the run was trained again meanwhile; run flare evaluate again")
            assert record.target_language is not None
            pairs, messages = data.pairs(record.target_language, "test", source_text=text)
            self.notes(messages, record.target_language)
            set_seed(record.seed)  # weights missing from the base (a pooler) are initialised as in the training
            model, collate = load(record, setup, run.folder / ADAPTER)
            to_device(model, setup, device())
            try:
                scores, predictions = self._predict(model, collate, setup, pairs, reads, name, record)
            except DivergedError as error:
                if not has_finite_weights(model):
                    raise
                raise UserError(
                    f"{name}: logits are NaN or infinite although all weights are finite, so values overflow in the "
                    "precision of this device. No score is computed, and the run is unchanged. Score it on the kind of "
                    'device that it was trained on, or on the CPU (CUDA_VISIBLE_DEVICES=""); if they overflow there '
                    "too, train again with --no-resume and a smaller --lr"
                ) from error
            differing = self._differences(record, data, setup)
            record.data["notes"] = [
                note for note in record.data.get("notes") or [] if not str(note).startswith(f"{name}: scored with ")
            ] + self.notes([f"scored with {differing}"] if differing else [], name)
            digests = digests_of_pairs(split, pairs, text)
            record.data["digest"] = {**(record.data.get("digest") or {}), **digests}
            if is_main():
                write_record(run.folder, record)
                note_changed_rows(run.folder, name, digests)
                file = PREDICTIONS if as_in_training else PREDICTIONS.replace(".jsonl", f"-{text}.jsonl")
                write_predictions(run.folder / file, pairs, predictions)
                metrics.test[setting] = scores
                write_metrics(run.folder, metrics)
        self.print_fn(f"{name}: {result_line(scores, Metrics())}")
        return [run.folder]

    def _differences(self, record: RunRecord, data: Data, setup: Setup) -> str:
        """Return the settings of this evaluation that differ from the adapter's training, as text."""
        current = common_settings(replace(self.settings, rows=data.rows), data, setup)
        names = ("data", "text_columns", "label_column", "rows", "max_length", "padding", "dtype", "quantization")
        trained = record.settings
        return ", ".join(
            f"{name} {current[name]} (trained with {trained[name]})"
            for name in names
            if name in trained and trained[name] != current[name]
        )

    # --- shared ---------------------------------------------------------------------------------------------------

    def _prepared(self, record: RunRecord | None, base: Base) -> tuple[Data, Setup]:
        """Return the data and the setup of a run. Settings that the user did not give are read from its run.json."""
        settings = self.settings
        saved = {} if record is None else record.settings
        columns = self._columns_of(record) if settings.data is None else {}
        merged = with_run_settings(settings, record, columns)
        source = settings.source or (record.source_language if record is not None else "english")
        folder = settings.data or saved.get("data")
        task = task_of(merged, record.task if record is not None else None, saved.get("labels"))
        place = None if folder == task.hub_id else place_of(merged, folder, source)
        task = resolve_labels(task, place, source)
        setup = prepare(merged, task, base.model)
        self.notes(setup.notes)
        translations = settings.translations or saved.get("translations")
        return Data(task, place, source, None if translations is None else Path(translations), merged.rows), setup

    def _columns_of(self, record: RunRecord | None) -> dict[str, Any]:
        """Return the source and target columns if the data are one table with both languages, else an empty dict.

        run.json of a base may name only the source columns; run.json of its adapters names both.
        """
        saved = [run.settings for run in (*([record] if record else []), *(run.record for run in self.adapters))]
        columns = {name: next((one[name] for one in saved if one.get(name)), None) for name in _COLUMNS}
        return {name: tuple(value) for name, value in columns.items() if value and saved[0].get(_COLUMNS[0])}

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
        rows, messages = setup.form.eval_rows(pairs, with_source=reads)
        self.notes(messages, name)
        if record.method == "flare-mt":
            saved, target = record.settings, str(record.target_language)
            mt = latent_encoder(saved["mt_model"], target, saved["mt_language"], setup.max_length, device())
            rows = add_states(rows, target_texts(pairs), mt, self.settings.output, None)
        batch, half = batch_and_autocast(record, setup, self.settings.eval_batch_size, device())
        bar = name if self.settings.progress and is_main() else None
        scorer = Predictor(setup.form, collate, pairs, rows, batch, half, bar)
        predictions = scorer(model)
        self.notes(setup.form.prediction_notes(predictions), name)
        return scorer.scores(predictions), predictions


def _source_only(pair: Pair) -> Pair:
    """Return the pair's source row as a target row.

    A missing class label is taken from the target row. A missing answer stays missing, because the target's answer is a
    part of the target text.
    """
    assert pair.source is not None
    return Pair(replace(pair.source, label=pair.source.label or pair.target.label))


def _answered(pairs: list[Pair], data: Data, target: str, text: str) -> tuple[list[Pair], list[str]]:
    """Return the questions whose source row has an answer, and a note about the questions that are left out.

    A prediction can only be compared with an answer in the source language. A translated row has no answer if the
    translation lost the marks around the answer.

    Raises:
        UserError: no row is left.
    """
    answered = [pair for pair in pairs if pair.source is not None and pair.source.answers]
    lost = [pair.target.id for pair in pairs if pair.source is None or not pair.source.answers]
    note = (
        f"{len(lost)} of {len(pairs)} test questions have no answer in {data.source} (a translation that lost "
        f"the marks around the answer has none) and are left out of translate-test {some_ids(lost)}"
    )
    if not answered:
        raise UserError(
            f"{target} translate-test: {note}, so no row is left to score; "
            + ("translate the test split again with flare translate" if text == "mt" else "use --source-text mt")
        )
    return answered, [note] if lost else []
