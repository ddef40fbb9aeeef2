"""Tests of damaged files and of errors of other libraries: the user gets a message that names the cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
from experiment_data import write_bert, write_data

import flare
from flare.cli import main
from flare.experiments.runs.records import Metrics, RecordError, RunRecord, read_run, write_metrics, write_record
from flare.experiments.runs.run_folder import open_run
from flare.experiments.runs.run_settings import FinetuneSettings, TrainSettings
from flare.experiments.tasks import DataError, get_task, read_split
from flare.experiments.translation.model import TranslationError, TranslationModel
from flare.experiments.utils.errors import UserError
from flare.experiments.utils.options import read_settings

QUICK = ("--max-length", "24", "--batch-size", "8", "--no-progress", "--epochs", "1", "--r", "4", "--rows", "8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with data/, a pretrained model in bert/, and a base fine-tuned from it in runs/."""
    root = tmp_path_factory.mktemp("messages")
    write_data(root / "data", valid=False)
    write_bert(root / "bert")
    words = ("finetune", "--task", "classification", "--model", root / "bert", "--data", root / "data")
    assert main([str(word) for word in (*words, "--output", root / "runs", *QUICK)]) == 0
    return root


def record(**changes: object) -> RunRecord:
    return RunRecord(**{**dict.fromkeys(("status", "task", "source_language", "method", "variant"), "x"),
                        "kind": "train", "target_language": "y", "seed": 0, **changes})  # fmt: skip


def test_advice_names_flags_that_the_command_has(tmp_path):
    for kind, has_name in (("train", True), ("finetune", False), ("evaluate", False)):
        folder = tmp_path / kind
        assert open_run(folder, record(kind=kind, status="done"), True, print) == "new"
        with pytest.raises(UserError) as error:
            open_run(folder, record(kind=kind, r=3), True, print)
        assert ("--name" in str(error.value)) is has_name and "--output" in str(error.value)
        assert hasattr(TrainSettings if has_name else FinetuneSettings, "name") is has_name


@pytest.mark.parametrize("change", [{"settings": []}, {"seed": "x"}, {"data": 3}, {"task": None}, {"r": True}], ids=str)
def test_a_run_json_with_values_of_wrong_types_is_refused(tmp_path, change):
    write_record(tmp_path, record())
    content = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(RecordError, match=f"{next(iter(change))} must be"):
        read_run(tmp_path)
    write_record(tmp_path, record())
    write_metrics(tmp_path, Metrics())
    (tmp_path / "metrics.json").write_text('{"test": [1]}')
    with pytest.raises(RecordError, match="test must be dict"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(RecordError, match="cannot be read"):
        read_run(tmp_path)


def test_yaml_that_is_nested_too_deeply_or_invalid_is_refused(tmp_path, capsys):
    file = tmp_path / "x.yaml"
    for text in ("[" * 5000, "a: \x00", "\ud800", "a: 2001-99-99"):
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        with pytest.raises(UserError, match="--config"):
            read_settings(TrainSettings, {"config": str(file)})
        assert main(["translate", "--config", str(file)]) == 2
        with pytest.raises(ValueError, match="recipe"):
            flare.recipes.Recipe.read(str(file))
    file.write_text("adapter: 3")
    with pytest.raises(UserError, match="adapter takes names and values"):
        read_settings(TrainSettings, {"config": str(file)})
    with pytest.raises(UserError, match="its value is not YAML"):
        read_settings(TrainSettings, {"adapter": ["r=[" * 5]})
    with pytest.raises(UserError, match="whole number"):
        read_settings(TrainSettings, {"seeds": [float("inf")]})
    with pytest.raises(UserError, match="--config"):
        read_settings(TrainSettings, {"config": "a\0b"})
    file.write_text("task: SEQ_CLS\ntasks: [a]")
    with pytest.raises(ValueError, match="tasks must map names"):
        flare.recipes.Recipe.read(f"{file}/a")


def test_a_reporter_that_is_not_installed_is_named(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    shutil.copytree(place / "runs", tmp_path / "runs")
    words = ("train", "--task", "classification", "--target", "vemari", "--data", place / "data", "--method", "lora")
    assert main([str(w) for w in (*words, "--output", tmp_path / "runs", *QUICK, "--report_to", "wandb")]) == 2
    assert "wandb" in capsys.readouterr().err


def test_a_truncated_adapter_file_is_refused(place, tmp_path, capsys):
    shutil.copytree(place / "runs", tmp_path / "runs")
    words = ("--output", tmp_path / "runs", "--no-progress")
    train = ("train", "--task", "classification", "--target", "vemari", "--data", place / "data", "--method", "lora")
    assert main([str(word) for word in (*train, *words, *QUICK)]) == 0
    file = tmp_path / "runs" / "vemari" / "lora-r4" / "seed-0" / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:4], b""):
        file.write_bytes(part)
        capsys.readouterr()
        evaluate = ("evaluate", *words, "--setting", "translate-train", "--no-resume")
        assert main([str(word) for word in evaluate]) == 2
        assert "the adapter cannot be used" in capsys.readouterr().err


def test_the_hub_is_queried_once_for_a_hub_id_and_never_for_a_path(monkeypatch, tmp_path):
    queried = []

    def load_dataset(*args, **options):
        queried.append(options["split"])
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = get_task("classification")
    with pytest.raises(DataError, match="no network second line"):
        read_split(task, "owner/data", "en", "valid")
    assert queried == ["validation"]
    for data in ("my/data/nusaxx", "my\\data", "a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(UserError, match="--data"):
            read_split(task, data, "en", "train")
    assert queried == ["validation"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    """The message of transformers starts with an empty line and names the package in the next line."""
    import transformers

    message = (
        "\nM2M100Tokenizer requires the SentencePiece library but it was not found in your environment.\nInstall it"
    )

    def load(*args, **options):
        raise ImportError(message)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", load)
    with pytest.raises(TranslationError, match=r"SentencePiece library but it was not found .* Install it"):
        TranslationModel(str(tmp_path))
