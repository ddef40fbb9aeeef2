"""Tests with damaged adapters, bases and checkpoints.

A damaged adapter or base is an error and gets no score. If the newest checkpoint is damaged, training resumes from an
older one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from experiment_data import write_bert, write_data
from safetensors.torch import load_file, save_file

from flare.cli import main
from flare.experiments.runs.records import read_metrics, read_record, write_record

TASK = ("--task", "classification")
QUICK = ("--max-length", "24", "--batch-size", "8", "--lr", "1e-2", "--no-progress", "--epochs", "3", "--r", "4")


def flare(*words: object) -> int:
    return main([str(word) for word in words])


def train_words(place: Path, runs: Path) -> tuple[object, ...]:
    """Return the arguments of a flare train command that keeps its checkpoints."""
    options = ("--data", place / "data", "--output", runs, "--target", "vemari", "--save_total_limit", 5)
    return ("train", *TASK, *options, *QUICK, "--keep-checkpoints")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with data/, a pretrained model in bert/, and a base and an adapter in runs/.

    The adapter's run has three checkpoints.
    """
    root = tmp_path_factory.mktemp("experiment")
    write_data(root / "data")
    write_bert(root / "bert")
    words = ("--model", root / "bert", "--data", root / "data", "--output", root / "runs")
    assert flare("finetune", *TASK, *words, *QUICK) == 0
    assert flare(*train_words(root, root / "runs")) == 0
    return root


@pytest.fixture
def run(place, tmp_path) -> Path:
    """Copy the runs, and return the folder of the adapter's run in the copy."""
    shutil.copytree(place / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "vemari" / "flare-r4" / "seed-0"
    for state in folder.glob("checkpoints/*/trainer_state.json"):
        state.write_text(state.read_text().replace(str(place / "runs"), str(tmp_path / "runs")))
    return folder


# --- adapters ---------------------------------------------------------------------------------------------------------


def no_lora_weights(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "lora" not in name}, file)


def one_weight_less(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, file)


def another_method(adapter: Path) -> None:
    change(adapter, peft_type="LORA")


def another_fusion(adapter: Path) -> None:
    change(adapter, fusion="mul")


def nothing_fuses(adapter: Path) -> None:
    change(adapter, fusion_modules=["dense"])


def cut_weights(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def cut_config(adapter: Path) -> None:
    os.truncate(adapter / "adapter_config.json", 40)


def change(adapter: Path, **values: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_lora_weights, r"its file lacks \d+ weights, such as base_model"),
        (one_weight_less, "its file lacks 1 weights"),
        (another_method, "its peft_type is LORA, and a run of flare saves FLARE"),
        (another_fusion, "has fusion='mul', and run.json has fusion='add_relu'"),
        (nothing_fuses, "none of its modules fuses"),
        (cut_weights, "the adapter cannot be used"),
        (cut_config, "the adapter cannot be used"),
    ],
)
def test_a_damaged_adapter_is_not_scored(damage, message, run, capsys):
    damage(run / "adapter")
    metrics = read_metrics(run)
    words = ("evaluate", "--output", run.parents[2], "--setting", "translate-train", "--no-resume", "--no-progress")
    assert flare(*words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "flare train --no-resume" in error
    assert re.search(message, error), error
    assert read_metrics(run) == metrics


# --- checkpoints ------------------------------------------------------------------------------------------------------


def resume(place: Path, run: Path) -> int:
    """Mark the run as unfinished, run flare train again, and return its exit status."""
    record = read_record(run)
    record.status = "running"
    write_record(run, record)
    return flare(*train_words(place, run.parents[2]))


@pytest.mark.parametrize(
    ("name", "cut", "reason"),
    [
        ("optimizer.pt", None, "it has no optimizer state"),
        ("optimizer.pt", -100, "optimizer.pt is damaged"),
        ("scheduler.pt", None, "it has no scheduler.pt"),
        ("rng_state.pth", 50, "rng_state.pth is damaged"),
        ("adapter_model.safetensors", -100, "adapter_model.safetensors is damaged"),
        ("adapter_model.safetensors", None, "it has no weights"),
    ],
)
def test_an_older_checkpoint_is_used_if_the_newest_is_damaged(name, cut, reason, place, run, capsys):
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    newest = run / "checkpoints" / "checkpoint-18"
    file = newest / name
    if cut is None:
        file.unlink()
    else:
        os.truncate(file, cut if cut > 0 else file.stat().st_size + cut)
    assert resume(place, run) == 0
    out = capsys.readouterr().out
    assert f"checkpoint-18 is damaged ({reason}" in out and "kept as damaged-checkpoint-18" in out
    assert "resumes from step 12" in out
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert again.keys() == whole.keys() and all(torch.equal(again[key], whole[key]) for key in whole)


def test_a_checkpoint_is_skipped_if_the_best_checkpoint_so_far_is_lost(place, run, capsys):
    checkpoints = run / "checkpoints"
    for step, best in ((12, 6), (18, 12)):
        state = checkpoints / f"checkpoint-{step}" / "trainer_state.json"
        content = json.loads(state.read_text())
        content["best_model_checkpoint"] = str(checkpoints / f"checkpoint-{best}")
        state.write_text(json.dumps(content))
    os.truncate(checkpoints / "checkpoint-6" / "adapter_model.safetensors", 100)
    shutil.rmtree(checkpoints / "checkpoint-12")
    assert resume(place, run) == 0
    out = capsys.readouterr().out
    assert "checkpoint-6 is damaged" in out
    assert "checkpoint-18 is not used: checkpoint-12, the best checkpoint so far, is damaged or missing" in out
    assert "the training starts from the beginning" in out and "resumes" not in out


# --- bases ------------------------------------------------------------------------------------------------------------


def test_a_damaged_base_is_not_scored(place, tmp_path, capsys):
    shutil.copytree(place / "runs", tmp_path / "runs")
    base = tmp_path / "runs" / "base" / "seed-0"
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    words = ("evaluate", "--output", tmp_path / "runs", "--setting", "zero-shot", "--target", "vemari", "--no-progress")
    assert flare(*words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and f"model {base} cannot be loaded" in error
    assert not list((tmp_path / "runs").rglob("zero-shot/seed-0/metrics.json"))
