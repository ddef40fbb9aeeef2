"""`flare finetune`: fine-tune the base on the task in the source language.

By default, an adapter is trained and merged into the base. With --full, all weights are trained.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import set_seed

from ...baselines import plain_lora
from ...recipes import set_pad_token
from ..tasks import Pair
from ..tasks.digest import digests_of_pairs
from ..tasks.reading import shown_labels
from ..utils.environment import environment, now
from ..utils.errors import UserError
from ..utils.processes import is_main, on_main, only_main, wait
from .callbacks import quiet_libraries
from .chance import chance_notes
from .data_digests import note_changed_rows, record_digests
from .fitting import add_cost, autocast_of, batch_size, fit, save, training_arguments, training_values
from .methods import collator
from .predictor import PREDICTIONS, Predictor, write_predictions
from .recorded_settings import adapter_fields, common_settings, location
from .records import RunRecord, result_line, write_metrics, write_record
from .run_folder import delete_checkpoints, locked, open_run
from .run_settings import BASE, FinetuneSettings
from .setup import Data, Notes, Setup, place_of, prepare, task_of

ADAPTER = "source-adapter"


def run_finetune(settings: FinetuneSettings, print_fn: Callable[[str], None] = print) -> list[Path]:
    """Fine-tune one base for each seed, in OUTPUT/base/seed-N.

    With `settings.resume` (the default), finished bases are skipped and unfinished fine-tunings are resumed. Without
    it, all of them are restarted.

    Returns:
        The bases' folders.

    Raises:
        UserError: an error the user can fix.
    """
    settings.check()
    assert settings.model is not None
    print_fn = only_main(print_fn)
    with quiet_libraries():
        source = settings.source or "english"
        place = place_of(settings, settings.data, source)
        task, table = shown_labels(task_of(settings), place, source)
        data = Data(task, place, source, rows=settings.rows)
        notes = Notes(print_fn)
        notes(table)
        setup = prepare(settings, task, settings.model, settings.training)
        notes(setup.notes)
        return [_one(settings, seed, data, setup, notes, print_fn) for seed in settings.seeds]


def _one(
    settings: FinetuneSettings, seed: int, data: Data, setup: Setup, notes: Notes, print_fn: Callable[[str], None]
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
    with locked(folder):
        done = on_main(lambda: open_run(folder, record, settings.resume, print_fn)) == "done"
        if done and is_main():
            print_fn(f"{name}: already done, in {folder}")
            with contextlib.suppress(UserError):  # a finished run does not need its data
                for line in note_changed_rows(folder, name, _digests(data)):
                    print_fn(f"{line} (--no-resume fine-tunes again)")
        if done:
            return folder
        metric = data.task.metrics[0]
        (train, messages), (valid, more) = _rows(data, "train"), _rows(data, "valid")
        assert train is not None
        digests = _digests(data)
        on_main(lambda: record_digests(folder, digests))
        rows, form_messages = setup.form.train_rows(train, with_source=False)
        record.data = {"train": len(rows), "valid": len(valid or ()), "test": 0, "digest": digests}
        record.data["notes"] = notes([*messages, *more], data.source)
        record.data["notes"] += notes(form_messages, f"{data.source} train")
        if not valid:
            record.data["notes"] += notes([f"{data.source} has no valid split, so the last checkpoint is used"])
        set_seed(seed)
        model = setup.load_model()
        if not settings.full:
            record.data["notes"] += notes(setup.model_notes)
            model = plain_lora(model, **adapter)
        record.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        arguments = training_arguments(values, folder, seed, metric if valid else None, settings.training)
        batch = settings.eval_batch_size or 2 * batch_size(values)
        collate = collator("lora", setup, model)

        def predictor(pairs: list[Pair], shown: str) -> Predictor:
            rows, messages = setup.form.eval_rows(pairs, with_source=False)
            record.data["notes"] += notes(messages, f"{data.source} {shown}")
            bar = f"{name} {shown}" if settings.progress and is_main() else None
            return Predictor(setup.form, collate, pairs, rows, batch, autocast_of(values), bar)

        fitted = fit(
            model,
            collate,
            rows,
            arguments,
            folder,
            name=name,
            progress=settings.progress,
            print_fn=print_fn,
            predictor=predictor(valid, "valid") if valid else None,
        )
        device = fitted.trainer.args.device
        save(fitted.trainer, folder if settings.full else folder / ADAPTER)
        add_cost(fitted)
        metrics = fitted.metrics
        del fitted, model  # frees memory for the merged model
        wait()
        if not settings.full:
            on_main(lambda: _merge(setup, folder, seed))
        test, messages = _rows(data, "test", needed=False)
        record.data["notes"] += notes(messages, data.source)
        if test:
            scorer = predictor(test, "test")
            predictions = scorer(_reload(setup, folder).to(device))
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
                delete_checkpoints(folder)
            notes(chance_notes(folder))
            print_fn(f"{name}: {result_line(metrics.test.get('source-language') or metrics.valid, metrics)}")
        wait()
    return folder


def _merge(setup: Setup, folder: Path, seed: int) -> None:
    """Merge the adapter into the unquantised base, and save the result as an ordinary transformers model."""
    set_seed(seed)  # weights missing from the checkpoint (a pooler) are initialised as in the training
    base = setup.load_model(quantized=False)
    PeftModel.from_pretrained(base, str(folder / ADAPTER)).merge_and_unload().save_pretrained(folder)


def _reload(setup: Setup, folder: Path) -> Any:
    """Return the saved model, on which the adapters will be trained."""
    import transformers

    auto_class = getattr(transformers, setup.form.auto_class)
    model = auto_class.from_pretrained(folder, dtype=setup.recipe.dtype, trust_remote_code=False)
    set_pad_token(model, setup.tokenizer)
    return model


def _digests(data: Data) -> dict[str, str]:
    """Return the digests of the source language's existing splits."""
    digests: dict[str, str] = {}
    for split in ("train", "valid", "test"):
        pairs, _ = _rows(data, split, needed=split == "train")
        digests |= digests_of_pairs(split, pairs, None) if pairs else {}
    return digests


def _rows(data: Data, split: str, needed: bool = True) -> tuple[list[Pair] | None, list[str]]:
    """Return the source language's rows of a split, and notes about them.

    Return None for the rows if the split is missing and optional ("valid", or any split with ``needed=False``).
    """
    if (split == "valid" or not needed) and not data.has(data.source, split):
        return None, []
    return data.pairs(data.source, split)
