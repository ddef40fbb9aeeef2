"""Tests of errors that a user can make with flare finetune, train and evaluate, and of options in YAML files.

An error gives a clear message and does not change the files of earlier runs.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiment_data import write_bert, write_data

from flare.cli import main
from flare.experiments.runs.fitting import ExperimentTrainer, training_arguments
from flare.experiments.runs.records import find_runs, read_record, write_record
from flare.experiments.runs.run_folder import locked, nothing_to_resume, open_run
from flare.experiments.runs.run_settings import EvaluateSettings, FinetuneSettings, TrainSettings
from flare.experiments.utils.errors import UserError
from flare.experiments.utils.options import read_settings

TASK = ("--task", "classification")
QUICK = ("--max-length", "24", "--batch-size", "8", "--lr", "1e-2", "--no-progress", "--epochs", "1", "--r", "4")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with data/, a pretrained model in bert/, and a base fine-tuned from it in runs/."""
    root = tmp_path_factory.mktemp("experiment")
    write_data(root / "data", valid=False)
    write_bert(root / "bert")
    words = ("--model", root / "bert", "--data", root / "data", "--output", root / "runs")
    assert main([str(word) for word in ("finetune", *TASK, *words, *QUICK)]) == 0
    return root


@pytest.fixture
def runs(place, tmp_path) -> Path:
    """Return a folder of runs that holds only the fine-tuned base."""
    shutil.copytree(place / "runs", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def train(place, runs, capsys):
    """Return a function that runs flare train and returns (status, stdout, stderr)."""

    def call(*words: object, data: Path | None = None, target: str = "vemari"):
        options = ("--data", data or place / "data", "--output", runs, "--target", target)
        capsys.readouterr()
        try:
            status = main([str(word) for word in ("train", *TASK, *options, *QUICK, *words)])
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return call


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_a_valid_split_the_last_checkpoint_is_used_with_a_note(train, runs):
    status, out, _ = train("--method", "lora")
    assert status == 0 and "vemari has no valid split, so the last checkpoint is used" in out
    run = next(run for run in find_runs(runs) if run.record.kind == "train")
    assert run.metrics.valid == {} and run.metrics.best_checkpoint == run.metrics.steps == 6


def test_a_folder_of_another_run_is_refused_and_unchanged(train, runs):
    assert train("--method", "lora")[0] == 0
    before = files(runs)
    status, _, err = train("--method", "lora", "--lr", "1e-3", "--alpha", "2", "--rows", "30")
    assert status == 2
    for word in ("other settings", "learning_rate was 0.01 and is now 0.001", "rows was not given", "adapter"):
        assert word in err, err
    assert "--name" in err and "--output" in err and "--no-resume" in err
    assert files(runs) == before


def test_a_run_without_a_checkpoint_does_not_block_its_folder(train, runs, place, tmp_path):
    broken, folder = tmp_path / "broken", runs / "vemari" / "lora-r4" / "seed-0"
    shutil.copytree(place / "data", broken)
    (broken / "vemari" / "train.csv").write_text("id,text\n1,a\n")
    assert train("--method", "lora", data=broken)[0] == 2
    assert not list(folder.iterdir())  # the failed run leaves no file
    assert train("--method", "lora")[0] == 0
    # a run killed before its first checkpoint has nothing to keep
    record = read_record(folder)
    record.status = "running"
    shutil.rmtree(folder)
    write_record(folder, record)
    status, out, err = train("--method", "lora", "--lr", "1e-3")
    assert status == 0 and "ended before its first checkpoint; it is restarted" in out, err
    # a folder with a trained adapter is kept, even if its run.json says that the run is unfinished
    record = read_record(folder)
    record.status = "running"
    write_record(folder, record)
    status, _, err = train("--method", "lora")
    assert status == 2 and "other settings" in err


def test_files_of_a_logger_survive_the_training_and_do_not_count_as_checkpoints(train, runs, monkeypatch):
    """With --report_to tensorboard, transformers writes its events next to the checkpoints."""
    folder = runs / "vemari" / "lora-r4" / "seed-0"
    train_as_usual = ExperimentTrainer.train

    def training(trainer, **options):
        events = Path(trainer.args.output_dir) / "runs" / "events"
        events.parent.mkdir(parents=True, exist_ok=True)
        events.write_text("loss")
        return train_as_usual(trainer, **options)

    monkeypatch.setattr(ExperimentTrainer, "train", training)
    assert train("--method", "lora")[0] == 0
    assert [path.name for path in (folder / "checkpoints").rglob("*")] == ["runs", "events"]
    # a run that was killed before its first checkpoint
    record = read_record(folder)
    record.status = "running"
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    shutil.rmtree(folder / "adapter")
    write_record(folder, record)
    assert nothing_to_resume(folder)
    with pytest.raises(UserError, match="no rows"), locked(folder):
        raise UserError("no rows")
    assert not list(folder.iterdir())


def test_foreign_files_are_not_touched(train, runs):
    folder = runs / "vemari" / "lora-r4" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    before = files(runs)
    status, _, err = train("--method", "lora")
    assert status == 2 and "thesis.tex" in err and "none of its files was changed" in err
    assert {path: text for path, text in files(runs).items() if path.name != ".lock"} == before


def test_a_file_in_place_of_a_run_folder_is_refused(train, runs):
    (runs / "vemari").write_text("mine")
    status, _, err = train("--method", "lora")
    assert status == 2 and "cannot be written to" in err and (runs / "vemari").read_text() == "mine"


def test_a_run_that_another_process_works_on_is_refused(train, runs):
    with locked(runs / "vemari" / "lora-r4" / "seed-0"):
        status, _, err = train("--method", "lora")
    assert status == 2 and "another process" in err


@pytest.mark.parametrize(("status", "resume"), [("done", False), ("diverged", True)])
def test_a_finished_run_is_moved_aside_and_its_folder_stays_locked(train, runs, status, resume):
    """A finished run gets the status "diverged" if flare evaluate finds a weight that is not finite."""
    assert train("--method", "lora")[0] == 0
    folder = runs / "vemari" / "lora-r4" / "seed-0"
    record = read_record(folder)
    record.status = status
    write_record(folder, record)
    before = {path.relative_to(folder): text for path, text in files(folder).items()}
    with locked(folder):
        assert open_run(folder, replace(record, status="running"), resume, print) == "new"
        assert {path.name for path in folder.iterdir()} == {".lock", "run.json"}
        moved = folder.parent / "earlier-1" / "seed-0"
        assert {path.relative_to(moved): text for path, text in files(moved).items()} == before
        assert "another process" in train("--method", "lora")[2]


def test_a_lock_whose_holder_was_killed_is_free(tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        from flare.experiments.runs.run_folder import locked
        with locked(Path({str(tmp_path)!r})):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -signal.SIGKILL
    with locked(tmp_path):
        pass


def test_locking_is_repeated_if_the_lock_file_was_removed_meanwhile(tmp_path, monkeypatch):
    import fcntl

    from flare.experiments.runs import run_folder

    path, plain, calls = tmp_path / run_folder.LOCK_FILE, fcntl.flock, []

    def flock(descriptor, operation):
        plain(descriptor, operation)
        if operation == fcntl.LOCK_UN:
            return
        calls.append(path.stat().st_ino)
        # the first lock file is removed by its holder; the second is removed and created again by another process
        if len(calls) < 3:
            path.unlink()
        if len(calls) == 2:
            path.touch()

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_folder.locked(tmp_path):
        assert len(calls) == 3
        with pytest.raises(UserError, match="another process is working"), run_folder.locked(tmp_path):
            pass
    assert not path.exists()


def test_a_damaged_run_json_is_refused(train, runs):
    assert train("--method", "lora")[0] == 0
    path = runs / "vemari" / "lora-r4" / "seed-0" / "run.json"
    path.write_text('{"kind": "tra')
    status, _, err = train("--method", "lora")
    assert status == 2 and str(path) in err and "cannot be read" in err


def test_bases_that_are_missing_unfinished_or_of_another_task_are_refused(train, runs, place):
    status, _, err = train("--seeds", "0", "3")
    assert status == 2 and "no base for seed 3, only seed-0" in err and "--base" in err
    status, _, err = train("--base", runs / "nowhere")
    assert status == 2 and "nowhere" in err
    folder = runs / "base" / "seed-0"
    record = read_record(folder)
    record.task = "nusax"
    write_record(folder, record)
    status, _, err = train()
    assert status == 2 and "fine-tuned with --task nusax" in err
    record.task, record.status = "classification", "running"
    write_record(folder, record)
    status, _, err = train()
    assert status == 2 and "not finished" in err and "flare finetune" in err
    shutil.rmtree(runs / "base")
    status, _, err = train()
    assert status == 2 and "flare finetune" in err and "--base" in err


def test_bases_with_different_orders_of_labels_are_refused(train, runs):
    shutil.copytree(runs / "base" / "seed-0", runs / "base" / "seed-1")
    record = read_record(runs / "base" / "seed-1")
    record.seed, record.settings["labels"] = 1, record.settings["labels"][::-1]
    write_record(runs / "base" / "seed-1", record)
    status, _, err = train("--method", "lora", "--seeds", "0", "1")
    assert status == 2 and "seed-1 was fine-tuned on the labels" in err and "separate commands (--seeds)" in err


def test_an_adapter_is_refused_if_its_base_was_fine_tuned_again(train, runs):
    assert train("--method", "lora")[0] == 0
    record = read_record(runs / "base" / "seed-0")
    record.date = "2001-01-01T00:00:00+00:00"
    write_record(runs / "base" / "seed-0", record)
    status, _, err = train("--method", "lora")
    assert status == 2 and "base_date" in err
    words = ("evaluate", "--output", runs, "--setting", "translate-train", "--no-resume", "--no-progress")
    assert main([str(word) for word in words]) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--output_dir", "x"), ("--output-dir cannot be given", "--output")),
        (("--seed", "3"), ("--seed", "--seeds")),
        (("--do_train", "true"), ("--do-train", "command decides")),
        (("--weight-decya", "0.1"), ("--weight-decya", "did you mean --weight-decay")),
        (("--weight_decay", "much"), ("--weight_decay", "invalid float")),
        (("--lr_scheduler_type", "zigzag"), ("zigzag",)),
        (("--eval_steps", "5"), ("valid split",)),
        (("--method", "magic"), ("magic", "input-fusion")),
        (("--fusion", "concat"), ("concat", "add_relu")),
        (("--r", "0"), ("--r must be 1 or more", "got 0")),
        (("--mixup-layer", "-1"), ("--mixup-layer must be 0 or more", "got -1")),
        (("--seeds", "0", "0"), ("--seeds", "twice")),
        (("--source-text", "mt"), ("--translations",)),
        (("--name", "a/b"), ("--name",)),
        (("--name", "mine", "--method", "lora", "flare"), ("--name", "share the folder")),
        (("--train-only-fusion", "--method", "lora"), ("--train-only-fusion", "flare")),
        (("--train-only-fusion", "--batch-size", "60"), ("two batches of 60",)),
        (("--adapter", "colour=red"), ("colour", "FlareConfig")),
        (("--adapter", "source_layer_ofset=0"), ("source_layer_offset?",)),
        (("--adapter", "fusion=mul"), ("use --fusion",)),
        (("--adapter", "r=3"), ("use --r",)),
        (("--adapter", "red"), ("KEY=VALUE",)),
        (("--target-modules", "nothing"), ("--method flare", "target_modules")),
        (("--quantization", "int4"), ("int4", "nf4")),
        (("--config", "/no/such.yaml"), ("--config /no/such.yaml",)),
        (("--target", "english"), ("--source and --target",)),
        (("--target", "klingon"), ("klingon", "vemari")),
        (("--method", "flare-mt", "--mt-model", "/no/model"), ("--mt-model /no/model",)),
        (("--max-length", "60", "--method", "input-fusion"), ("input-fusion", "positions")),
        (("--max-length", "65"), ("--max-length 65", "up to 64 tokens")),
        (("--epochs", "0"), ("--epochs must be greater than 0",)),
        (("--form", "causal"), ("--form causal", "fine-tuned with --form encoder")),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_wrong_option_values_are_explained(train, runs, words, expected):
    status, _, err = train(*words)
    assert status == 2, err
    for word in expected:
        assert word in err, err
    assert not [run for run in find_runs(runs) if run.record.done and run.record.kind == "train"]


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        ({"eval_steps": 1, "save_steps": 6}, False),
        ({"eval_steps": 6}, True),
        ({"save_steps": 6}, True),
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1}, True),
    ],
    ids=str,
)
def test_every_evaluated_step_has_a_checkpoint(tmp_path, given, accepted):
    refused = pytest.raises(UserError, match="--save_steps 6 and --eval_steps 1 must be equal")
    with contextlib.nullcontext() if accepted else refused:
        training_arguments(given, tmp_path, 0, "accuracy", given)


def test_a_score_with_other_settings_is_noted(train, runs, capsys):
    assert train("--method", "flare", "--no-test")[0] == 0
    folder = runs / "vemari" / "flare-r4" / "seed-0"

    def evaluate(*words: str) -> list[str]:
        options = ("evaluate", "--output", str(runs), "--setting", "translate-train", "--no-progress", *words)
        assert main(list(options)) == 0
        return [note for note in read_record(folder).data["notes"] if "scored with" in note]

    note = "vemari flare-r4 seed 0: scored with max_length 8 (trained with 24)"
    assert evaluate("--max-length", "8") == [note] and note in capsys.readouterr().out
    assert evaluate("--no-resume") == []


def test_an_adapter_trained_on_a_gpu_can_be_scored_on_a_cpu(train, runs, monkeypatch):
    """The run.json of such an adapter has bf16=True, which TrainingArguments rejects without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train("--method", "lora")[0] == 0
    folder = runs / "vemari" / "lora-r4" / "seed-0"
    before = (folder / "predictions-test.jsonl").read_bytes()
    record = read_record(folder)
    record.training_arguments["bf16"] = True
    write_record(folder, record)
    words = ("evaluate", "--output", str(runs), "--setting", "translate-train", "--no-resume", "--no-progress")
    assert main(list(words)) == 0
    assert (folder / "predictions-test.jsonl").read_bytes() == before


def test_one_failed_evaluation_does_not_stop_the_others(place, train, runs, tmp_path, capsys):
    """Translate-test fails here, because the source has no test split."""
    assert train("--method", "lora", "--no-test")[0] == 0
    shutil.copytree(place / "data", tmp_path / "data")
    (tmp_path / "data" / "english" / "test.csv").unlink()
    words = ("--data", tmp_path / "data", "--target", "vemari", "--output", runs, "--no-progress")
    assert (
        main(
            [str(word) for word in ("evaluate", "--setting", "translate-test", "zero-shot", "translate-train", *words)]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert "vemari translate-test seed 0: " in err and "test" in err and "zero-shot" not in err
    done = {run.record.variant for run in find_runs(runs) if run.metrics.test}
    assert done >= {"zero-shot", "lora-r4"} and "translate-test" not in done


def test_missing_conflicting_and_unknown_options_are_named(capsys):
    for words, expected in (
        (("finetune", "--model", "m"), "--task is missing"),
        (("finetune", *TASK), "--model is missing"),
        (("finetune", *TASK, "--model", "m", "--full", "--r", "3"), "--full"),
        (("train", *TASK), "--target is missing"),
        (("evaluate", "--output", "/no/runs"), "--target is missing"),
        (("evaluate", "--colour", "red"), "--colour is not known"),
    ):
        assert main(list(words)) == 2
        assert expected in capsys.readouterr().err


# --- YAML -------------------------------------------------------------------------------------------------------------


def test_flags_override_the_yaml_file(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(
        "task: nusax\ntarget: [acehnese, javanese]\nmethod: lora\nseeds: [0, 1]\nmax-length: 64\nlr: 2e-5\n"
        "epochs: 3\nweight_decay: 0.1\nadapter: {source_layer_offset: 0}\nprogress: false\n"
    )
    options = {"config": str(file), "target": ["javanese"], "epochs": 5.0, "adapter": ["source_dropout=true"]}
    settings = read_settings(TrainSettings, options, ["--warmup_steps", "7", "--weight-decay", "0.3"])
    assert (settings.task, settings.target, settings.method, settings.seeds) == (
        "nusax",
        ("javanese",),
        ("lora",),
        (0, 1),
    )
    assert settings.max_length == 64 and settings.progress is False
    assert settings.adapter == {"source_layer_offset": 0, "source_dropout": True}
    expected = {"learning_rate": 2e-5, "num_train_epochs": 5.0, "weight_decay": 0.3, "warmup_steps": 7}
    assert settings.training == expected


def test_paper_sets_the_papers_values_and_given_options_override_them(tmp_path):
    settings = read_settings(TrainSettings, {"paper": True, "task": "nusax", "target": ["a"], "translations": "mt"})
    assert (settings.seeds, settings.source_text, settings.target_text) == ((0, 1, 2, 3, 4), "mt", "mt")
    assert settings.padding == "max_length"
    file = tmp_path / "paper.yaml"
    file.write_text("paper: true\nseeds: [3]\n")
    overridden = read_settings(TrainSettings, {"config": str(file), "target_text": "gold"})
    assert (overridden.seeds, overridden.source_text, overridden.target_text) == ((3,), "mt", "gold")
    assert read_settings(FinetuneSettings, {"paper": True}).seeds == (0, 1, 2, 3, 4)
    assert read_settings(EvaluateSettings, {"paper": True}).source_text == ("mt",)
    with pytest.raises(UserError, match=r"which --paper sets\) need --translations"):
        read_settings(TrainSettings, {"paper": True, "task": "nusax", "target": ["a"]}).check()
