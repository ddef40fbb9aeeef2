"""From the folder of a run, or of any saved adapter, to a model that predicts."""

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
from .plain import CONFIG_FILE, record_of
from .predict_settings import PipelineSettings

_ADVICE = "Train it again, or name another --adapter or --base"
_RUNS_OWN = ("task", "labels", "method", "prompt")


@dataclass
class Trained:
    """A trained adapter on its base, ready to predict.

    task: with its labels.
    record: of the run, or what is known of an adapter that is not a run's.
    folder: of the adapter.
    base: folder or hub id.
    reads: what it reads of a source: "text", "states" (FLARE MT) or "nothing".
    batch_size, autocast: as `flare evaluate` has them.
    notes: what a user should know.
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


def load_trained(settings: PipelineSettings) -> Trained:
    """Load the adapter that the settings name.

    Raises:
        UserError: there is none, its run is not finished, something about it is not known, or it cannot be loaded.
    """
    record, folder, base, notes = _described(settings)
    device = resolve_device(settings.device)
    wanted = EvaluateSettings(
        max_length=settings.max_length, padding=settings.padding, quantization=settings.quantization
    )
    try:
        task = _task_of(record, settings)
        setup = prepare(with_run_settings(wanted, record), task, base)
    except UserError as error:
        raise UserError(
            f"{error} (--base names the base model of {folder})" if settings.base is None else error
        ) from error
    setup = for_method(record.method, setup)
    if isinstance(setup.form, JoinedForm) and record.settings.get("prompt") not in (None, setup.form.prompt):
        raise UserError(
            f"{folder}: this input-fusion adapter was trained on other prompts ({record.settings['prompt']}) than "
            f"{setup.form.prompt!r}; train it anew"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(record.seed)  # what a base lacks is drawn as it was for the training
        model, collate = load(record, setup, folder, _ADVICE)
    model = to_device(model, setup, device).eval()
    batch, half = batch_and_autocast(record, setup, settings.batch_size, device)
    latent = None
    if record.method == "flare-mt":
        there = record.settings
        language = settings.mt_language or there.get("mt_language")
        name = settings.mt_model or there["mt_model"]
        latent = latent_encoder(name, str(record.target_language), language, setup.max_length, device)
        if latent.latent_dim != (needed := model.peft_config["default"].latent_dim):
            raise UserError(
                f"--mt-model {name}: its states are {latent.latent_dim} wide, and the adapter was trained on {needed}"
            )
    reads = "nothing"
    if latent is not None:
        reads = "states"
    elif record.method in READS_SOURCE and not record.settings.get("train_only_fusion"):
        reads = "text"
    notes += setup.model_notes
    return Trained(task, record, folder, base, setup, model, collate, reads, batch, half, latent, notes)


def _described(settings: PipelineSettings) -> tuple[RunRecord, Path, str, list[str]]:
    """What is known of the adapter, its folder, its base, and notes."""
    assert settings.adapter is not None
    folder = Path(settings.adapter).expanduser()
    if not folder.is_dir():
        raise UserError(f"--adapter {settings.adapter}: no such folder (an adapter of the hub is downloaded first)")
    run = folder.parent if folder.name == ADAPTER and (folder.parent / RUN_FILE).is_file() else folder
    if not (run / RUN_FILE).is_file():
        if (folder / CONFIG_FILE).is_file():
            record, notes = record_of(folder, settings)
            return record, folder, record.base, notes
        inside = [str(one.folder) for one in find_runs(folder) if one.record.kind == "train"]
        raise UserError(
            f"--adapter {settings.adapter} holds neither {RUN_FILE} nor {CONFIG_FILE}; "
            + (f"name one of the runs in it: {', '.join(inside[:5])}" if inside else "name a run or a saved adapter")
        )
    record = read_record(run)
    if record.kind != "train":
        raise UserError(f"--adapter {run}: this is a run of flare {record.kind}, which has no adapter")
    if what := diverged(read_run(run)):
        raise UserError(
            f"--adapter {run}: its training diverged ({what}); train it again: flare train --no-resume with a "
            "smaller --lr"
        )
    if not record.done:
        raise UserError(f"--adapter {run}: its training is not finished; run flare train again, it goes on")
    given = [f"--{name}" for name in _RUNS_OWN if getattr(settings, name) is not None]
    if given:
        raise UserError(f"{', '.join(given)}: {run / RUN_FILE} says this of the adapter; leave it out")
    base = settings.base or base_of_run(record, (run / ".." / ".." / "..").resolve()).model
    record = replace(record, target_language=settings.target or record.target_language)
    if settings.source is not None:
        record = replace(record, source_language=settings.source)
    return record, run / ADAPTER, base, []


def _task_of(record: RunRecord, settings: PipelineSettings) -> Task:
    there = record.settings
    return get_task(
        record.task,
        text_columns=there.get("text_columns"),
        label_column=there.get("label_column") if there.get("labels") else None,
        labels=there.get("labels"),
        prompt=settings.prompt,
        max_length=settings.max_length or there.get("max_length"),
    )
