"""Load the folder of a run, or of any saved adapter, into a model that predicts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...source.latent_encoder import LatentEncoder
from ..runs.latent_rows import latent_encoder
from ..runs.methods import READS_SOURCE, for_method, load
from ..runs.records import RUN_FILE, RunRecord, diverged, find_runs, read_record, read_run
from ..runs.run_settings import EvaluateSettings
from ..runs.setup import Setup, prepare
from ..runs.trained_adapter import ADAPTER, base_of_run, batch_and_autocast, to_device, with_run_settings
from ..tasks import JoinedForm, Task, get_task
from ..translation.model import resolve_device
from ..utils.errors import UserError
from .predict_settings import PipelineSettings
from .saved_adapter import CONFIG_FILE, record_of

_ADVICE = "Train it again, or name another --adapter or --base"
#: Options that are rejected for a run, because its run.json holds their values.
_SAVED_IN_RUN = ("task", "labels", "method", "prompt")


@dataclass
class TrainedAdapter:
    """A trained adapter on its base, ready to predict.

    Attributes:
        task: the task, with its labels.
        record: record of the run. For an adapter without a run, a record made from its folder and the options.
        folder: folder of the adapter.
        base: folder or hub id of the base model.
        setup: the tokenizer of the base, the recipe (with the data types), and the form (which turns texts into model
            inputs).
        model: the base with the adapter, in eval mode on its device.
        collate: collator that makes the batches of the model.
        reads: the kind of source that the adapter reads: "text", "states" (FLARE MT) or "nothing".
        batch_size: rows per step, chosen as in `flare evaluate`.
        autocast: dtype for autocast, chosen as in `flare evaluate`. None: no autocast.
        latent: encoder of the MT model whose states a FLARE MT adapter reads. None for other adapters.
        notes: lines for the user, such as what was assumed about the adapter.
    """

    task: Task
    record: RunRecord
    folder: Path
    base: str
    setup: Setup
    model: Any
    collate: Any
    reads: str
    batch_size: int
    autocast: torch.dtype | None
    latent: LatentEncoder | None
    notes: list[str]


def load_trained(settings: PipelineSettings) -> TrainedAdapter:
    """Load the adapter and its base model, which the settings name.

    Raises:
        UserError: the folder holds no adapter, its training diverged or is not finished, information about the adapter
            is missing, an option contradicts the run, or the adapter or its base cannot be loaded.
    """
    record, folder, base, notes = _described(settings)
    device = resolve_device(settings.device)
    evaluate = EvaluateSettings(
        max_length=settings.max_length, padding=settings.padding, quantization=settings.quantization
    )
    try:
        task = _task_of(record, settings)
        setup = prepare(with_run_settings(evaluate, record), task, base)
    except UserError as error:
        raise UserError(
            f"{error} (with --base, name the base model of {folder})" if settings.base is None else error
        ) from error
    setup = for_method(record.method, setup)
    if isinstance(setup.form, JoinedForm) and record.settings.get("prompt") not in (None, setup.form.prompt):
        raise UserError(
            f"{folder}: this input-fusion adapter was trained with the prompt "
            f"{record.settings['prompt']!r}, and the prompt is {setup.form.prompt!r} now; train the adapter again"
        )
    with torch.random.fork_rng(devices=[]):
        # weights that the base lacks get the same random values as in training
        torch.default_generator.manual_seed(record.seed)
        model, collate = load(record, setup, folder, _ADVICE)
    model = to_device(model, setup, device).eval()
    batch, half = batch_and_autocast(record, setup, settings.batch_size, device)
    latent = None
    if record.method == "flare-mt":
        language = settings.mt_language or record.settings.get("mt_language")
        name = settings.mt_model or record.settings["mt_model"]
        latent = latent_encoder(name, str(record.target_language), language, setup.max_length, device)
        if latent.latent_dim != (width := model.peft_config["default"].latent_dim):
            raise UserError(
                f"--mt-model {name}: its states have width {latent.latent_dim}, and the adapter was trained on states "
                f"of width {width}; name the encoder that the adapter was trained with"
            )
    reads = "nothing"
    if latent is not None:
        reads = "states"
    elif record.method in READS_SOURCE and not record.settings.get("train_only_fusion"):
        reads = "text"
    notes += setup.model_notes
    return TrainedAdapter(task, record, folder, base, setup, model, collate, reads, batch, half, latent, notes)


def _described(settings: PipelineSettings) -> tuple[RunRecord, Path, str, list[str]]:
    """Return the record of the adapter, the folder of its weights, its base model, and notes for the user."""
    assert settings.adapter is not None
    folder = Path(settings.adapter).expanduser()
    if not folder.is_dir():
        raise UserError(f"--adapter {settings.adapter}: no such folder (download an adapter from the hub first)")
    run = folder.parent if folder.name == ADAPTER and (folder.parent / RUN_FILE).is_file() else folder
    if not (run / RUN_FILE).is_file():
        if (folder / CONFIG_FILE).is_file():
            record, notes = record_of(folder, settings)
            return record, folder, record.base, notes
        runs = [str(one.folder) for one in find_runs(folder) if one.record.kind == "train"]
        raise UserError(
            f"--adapter {settings.adapter} holds neither {RUN_FILE} nor {CONFIG_FILE}; "
            + (f"name one of the runs in it: {', '.join(runs[:5])}" if runs else "name a run or a saved adapter")
        )
    record = read_record(run)
    if record.kind != "train":
        raise UserError(f"--adapter {run}: this is a run of flare {record.kind}, which saves no adapter")
    if reason := diverged(read_run(run)):
        raise UserError(
            f"--adapter {run}: its training diverged ({reason}); train it again: flare train --no-resume with a "
            "smaller --lr"
        )
    if not record.done:
        raise UserError(f"--adapter {run}: its training is not finished; repeat flare train to resume it")
    flags = [f"--{name}" for name in _SAVED_IN_RUN if getattr(settings, name) is not None]
    if flags:
        raise UserError(f"{', '.join(flags)}: this is saved in {run / RUN_FILE}; leave out the option")
    base = settings.base or base_of_run(record, (run / ".." / ".." / "..").resolve()).model
    record = replace(record, target_language=settings.target or record.target_language)
    if settings.source is not None:
        record = replace(record, source_language=settings.source)
    return record, run / ADAPTER, base, []


def _task_of(record: RunRecord, settings: PipelineSettings) -> Task:
    """Return the task with the columns, labels and prompt that it had in training."""
    saved = record.settings
    return get_task(
        record.task,
        text_columns=saved.get("text_columns"),
        choice_columns=saved.get("choice_columns"),
        label_column=saved.get("label_column"),
        id_columns=saved.get("id_column"),
        labels=saved.get("labels"),
        prompt=settings.prompt or saved.get("task_prompt"),
        verbalizer={label: str(text) for label, text in (saved.get("verbalizer") or {}).items()} or None,
        max_length=settings.max_length or saved.get("max_length"),
    )
