"""`flare finetune`: the task is learned in the source language, and the adapter is merged into the base."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import set_seed

from ...baselines import plain_lora
from ..tasks import Pair
from ..tasks.digest import digests_of_pairs
from ..tasks.reading import shown_labels
from ..utils.environment import environment, now
from ..utils.errors import UserError
from ..utils.processes import is_main, on_main, only_main, wait
from .callbacks import quiet_libraries
from .chance import chance_notes
from .fitting import add_cost, autocast_of, batch_size, fit, save, training_arguments, training_values
from .known_data import mark, remember
from .methods import collator
from .predictor import PREDICTIONS, Predictor, write_predictions
from .recorded_settings import adapter_fields, claimed, common_settings, location, summary
from .records import RunRecord, write_metrics, write_record
from .run_folder import CHECKPOINTS, open_run
from .run_settings import BASE, FinetuneSettings
from .setup import Data, Notes, Setup, place_of, prepare, task_of

ADAPTER = "source-adapter"


def run_finetune(settings: FinetuneSettings, say: Callable[[str], None] = print) -> list[Path]:
    """Fine-tune one base per seed into OUTPUT/base/seed-N; finished ones are skipped.

    Returns:
        The bases' folders.

    Raises:
        UserError: something the user can mend.
    """
    settings.check()
    assert settings.model is not None
    say = only_main(say)
    with quiet_libraries():
        source = settings.source or "english"
        place = place_of(settings, settings.data, source)
        task, table = shown_labels(task_of(settings), place, source)
        data = Data(task, place, source, rows=settings.rows)
        notes = Notes(say)
        notes(table)
        setup = prepare(settings, task, settings.model, settings.training)
        notes(setup.notes)
        return [_one(settings, seed, data, setup, notes, say) for seed in settings.seeds]


def _one(
    settings: FinetuneSettings, seed: int, data: Data, setup: Setup, notes: Notes, say: Callable[[str], None]
) -> Path:
    folder = settings.output / BASE / f"seed-{seed}"
    adapter = adapter_fields(setup, settings.r, settings.alpha, settings.dropout, settings.target_modules)
    values = training_values(setup.recipe.training, settings.training)
    record = RunRecord(
        kind="finetune",
        status="running",
        task=data.task.name,
        source_language=data.source,
        target_language=None,
        method="finetune",
        variant=BASE,
        seed=seed,
        r=None if settings.full else adapter["r"],
        settings={**common_settings(settings, data, setup), "full": settings.full}
        | ({} if settings.full else {"adapter": adapter}),
        training_arguments=values,
        base=location(settings.model or ""),
        environment=environment(bool(values.get("use_cpu"))),
        date=now(),
    )
    name = f"{data.source} base seed {seed}"
    with claimed(folder) as claim:
        done = claim(lambda: open_run(folder, record, settings.resume, say)) == "done"
        if done and is_main():
            say(f"{name}: done before, in {folder}")
            with contextlib.suppress(UserError):  # data that are gone change nothing about it
                for line in mark(folder, name, _digests(data)):
                    say(f"{line} (--no-resume fine-tunes anew)")
        if done:
            return folder
        metric = data.task.metrics[0]
        (train, said), (valid, more) = _rows(data, "train"), _rows(data, "valid")
        assert train is not None
        digests = _digests(data)
        claim(lambda: remember(folder, digests))
        rows, news = setup.form.train_rows(train, with_source=False)
        record.data = {"train": len(rows), "valid": len(valid or ()), "test": 0, "digest": digests}
        record.data["notes"] = notes([*said, *more], data.source) + notes(news, f"{data.source} train")
        if not valid:
            record.data["notes"] += notes([f"{data.source} has no valid split: the last checkpoint is used"])
        set_seed(seed)
        model = setup.load_model()
        if not settings.full:
            record.data["notes"] += notes(setup.drawn_notes)
            model = plain_lora(model, **adapter)
        record.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        arguments = training_arguments(values, folder, seed, metric if valid else None, settings.training)
        batch = settings.eval_batch_size or 2 * batch_size(values)
        collate = collator("lora", setup, model)

        def predictor(pairs: list[Pair], shown: str) -> Predictor:
            made, news = setup.form.eval_rows(pairs, with_source=False)
            record.data["notes"] += notes(news, f"{data.source} {shown}")
            bar = f"{name} {shown}" if settings.progress and is_main() else None
            return Predictor(setup.form, collate, pairs, made, batch, autocast_of(values), bar)

        fitted = fit(
            model,
            collate,
            rows,
            arguments,
            folder,
            name=name,
            progress=settings.progress,
            say=say,
            predictor=predictor(valid, "valid") if valid else None,
        )
        device = fitted.trainer.args.device
        save(fitted.trainer, folder if settings.full else folder / ADAPTER)
        add_cost(fitted)
        metrics = fitted.metrics
        del fitted, model  # room for the merged model
        wait()
        if not settings.full:
            on_main(lambda: _merge(setup, folder, seed))
        test, said = _rows(data, "test", needed=False)
        record.data["notes"] += notes(said, data.source)
        if test:
            scorer = predictor(test, "test")
            predictions = scorer(_read_back(setup, folder).to(device))
            metrics.test["source-language"] = scorer.scores(predictions)
            record.data["notes"] += notes(setup.form.prediction_notes(predictions), f"{name} test")
            record.data["test"] = len(test)
        if is_main():
            if test:
                write_predictions(folder / PREDICTIONS, test, predictions)
            setup.tokenizer.save_pretrained(folder)
            write_metrics(folder, metrics)
            record.status = "done"
            write_record(folder, record)
            shutil.rmtree(folder / ADAPTER, ignore_errors=True)
            if not settings.keep_checkpoints:
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            notes(chance_notes(folder))
            say(f"{name}: {summary(metrics.test.get('source-language') or metrics.valid, metrics)}")
        wait()
    return folder


def _merge(setup: Setup, folder: Path, seed: int) -> None:
    """Merge the adapter into the base, unquantised, and save an ordinary transformers model."""
    set_seed(seed)  # what the checkpoint lacks beside the head (a pooler) is drawn as it was for the training
    base = setup.load_model(quantized=False)
    PeftModel.from_pretrained(base, str(folder / ADAPTER)).merge_and_unload().save_pretrained(folder)


def _read_back(setup: Setup, folder: Path) -> Any:
    """The model that the adapters will begin with, as it was saved."""
    import transformers

    auto_class = getattr(transformers, setup.form.auto_class)
    model = auto_class.from_pretrained(folder, dtype=setup.recipe.dtype, trust_remote_code=False)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = setup.tokenizer.pad_token_id
    return model


def _digests(data: Data) -> dict[str, str]:
    """Digests of the splits that there are."""
    found: dict[str, str] = {}
    for split in ("train", "valid", "test"):
        pairs, _ = _rows(data, split, needed=split == "train")
        found |= digests_of_pairs(split, pairs, None) if pairs else {}
    return found


def _rows(data: Data, split: str, needed: bool = True) -> tuple[list[Pair] | None, list[str]]:
    """The source language's own rows of a split and notes; None where there are none and none are needed."""
    if (split == "valid" or not needed) and not data.has(data.source, split):
        return None, []
    return data.pairs(data.source, split)
