"""Tests of flare finetune, train and evaluate on tiny data: the files they write, and how they resume a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from experiment_data import write_bert, write_data
from predicting import predicts_as_evaluated
from safetensors.torch import load_file
from torch.utils.data import BatchSampler
from transformers import AutoModelForSequenceClassification

from flare.cli import main
from flare.experiments.runs.fitting import OneKindSampler
from flare.experiments.runs.records import find_runs, read_metrics, read_record, read_run, write_record

TASK = ("--task", "classification")
QUICK = ("--max-length", "24", "--batch-size", "8", "--lr", "1e-2", "--no-progress")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with data/, a pretrained model in bert/, and a base fine-tuned from it in runs/."""
    root = tmp_path_factory.mktemp("experiment")
    write_data(root / "data")
    write_bert(root / "bert")
    words = ("--model", root / "bert", "--data", root / "data", "--output", root / "runs", "--r", 4, "--epochs", 2)
    assert flare("finetune", *TASK, *words, *QUICK) == 0
    return root


@pytest.fixture
def runs(place, tmp_path) -> Path:
    """Return a folder of runs that holds only the fine-tuned base."""
    shutil.copytree(place / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def flare(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as exit:  # argparse
        return int(exit.code or 0)


def train_words(place: Path, runs: Path, *more: object) -> list[str]:
    """Return the arguments of a flare train command."""
    words = ("train", *TASK, "--data", place / "data", "--output", runs, "--target", "vemari", *QUICK)
    return [str(word) for word in (*words, "--epochs", 2, *more)]


# --- files and scores -------------------------------------------------------------------------------------------------


def test_finetune_saves_an_ordinary_model(place):
    folder = place / "runs" / "base" / "seed-0"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    record, metrics = read_record(folder), read_metrics(folder)
    assert record.done and record.kind == "finetune" and record.r == 4 and record.data["train"] == 48
    assert tuple(record.settings["labels"]) == tuple(model.config.id2label.values())
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    before = AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=3).state_dict()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert {name.split(".")[-2] for name in changed if name.startswith("bert.encoder")} == {"query", "value"}
    assert set(metrics.valid) == {"accuracy", "macro_f1"} and set(metrics.test["source-language"]) == set(metrics.valid)
    assert not (folder / "checkpoints").exists()


def test_train_writes_files_and_scores_for_each_method_and_fusion(place, runs, capsys):
    words = train_words(
        place, runs, "--method", "lora", "input-fusion", "flare", "--r", 4, "--fusion", "add_relu", "mul"
    )
    assert flare(*words) == 0
    trained = {run.record.variant: run for run in find_runs(runs) if run.record.kind == "train"}
    assert set(trained) == {"lora-r4", "input-fusion-r4", "flare-r4", "flare-mul-r4"}
    for run in trained.values():
        metrics, record = run.metrics, run.record
        assert record.done and record.trainable_parameters and record.base == "base/seed-0"
        assert metrics.steps == 12 and metrics.best_checkpoint in (6, 12)
        assert metrics.seconds_per_step and metrics.train_seconds and metrics.peak_bytes
        lines = [json.loads(line) for line in (run.folder / "predictions-test.jsonl").read_text().splitlines()]
        correct = sum(line["truth"] == line["prediction"] for line in lines)
        assert len(lines) == 20 and metrics.test["translate-train"]["accuracy"] == pytest.approx(5 * correct)
        assert (run.folder / "log.jsonl").read_text().count("eval_accuracy") == 2
        assert (metrics.bottleneck is not None) == record.variant.startswith("flare")
    flare_run = trained["flare-r4"]
    sizes = flare_run.metrics.bottleneck
    assert len(sizes["layers"]) == len(sizes["S"]) == len(sizes["T"]) == 4 and min(sizes["S"] + sizes["T"]) > 0
    assert trained["lora-r4"].record.source_text is None and flare_run.record.source_text == "gold"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert flare(*words) == 0
    assert capsys.readouterr().out.count("already done") == 4
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == before


def test_evaluate_scores_base_and_adapter_with_gold_and_translated_sources(place, runs, tmp_path, capsys):
    assert flare(*train_words(place, runs, "--r", 4)) == 0
    translations = tmp_path / "mt"
    shutil.copytree(place / "data" / "english", translations / "vemari-english")
    translated = translations / "vemari-english" / "test.csv"  # the English rows with every "not" removed
    translated.write_text("\n".join(line.replace("not", "") for line in translated.read_text().splitlines()))
    words = ("evaluate", "--output", runs, "--translations", translations, "--no-progress")
    assert flare(*words, "--source-text", "gold", "mt") == 0
    runs_by_variant = {run.record.variant: run for run in find_runs(runs)}
    base = runs_by_variant["base"].metrics.test["source-language"]
    # the gold source texts are the English test rows, so translate-test equals the score of the base on English
    assert runs_by_variant["translate-test"].metrics.test == {"translate-test": base}
    assert runs_by_variant["translate-test-mt-source"].record.source_text == "mt"
    assert set(runs_by_variant["zero-shot"].metrics.test) == {"zero-shot"}
    adapter = runs_by_variant["flare-r4"]
    assert set(adapter.metrics.test) == {"translate-train", "translate-train/mt"}
    assert (adapter.folder / "predictions-test-mt.jsonl").is_file()
    # after the adapter is reloaded, its predictions equal those from the end of its training
    first = (adapter.folder / "predictions-test.jsonl").read_bytes()
    assert flare(*words, "--setting", "translate-train", "--no-resume") == 0
    assert (adapter.folder / "predictions-test.jsonl").read_bytes() == first
    assert read_metrics(adapter.folder).test == adapter.metrics.test


def test_training_reads_machine_translated_text(place, runs, tmp_path):
    """The training rows have a machine-translated target text, and the test rows a machine-translated source text."""
    translations = tmp_path / "mt"
    shutil.copytree(place / "data" / "vemari", translations / "english-vemari")
    shutil.copytree(place / "data" / "english", translations / "vemari-english")
    (translations / "vemari-english" / "train.csv").unlink()
    (translations / "english-vemari" / "provenance.json").write_text('{"model": "some"}')
    words = train_words(place, runs, "--r", 4, "--translations", translations, "--source-text", "mt")
    assert flare(*words, "--target-text", "mt") == 0
    folder = runs / "vemari" / "flare-r4-mt-source-mt-target" / "seed-0"
    record = read_record(folder)
    assert record.data["translation"] == {"english-vemari": {"model": "some"}}
    assert flare(*words) == 2  # gold target text needs translated training sources, and their file was removed
    # without --translations, evaluate takes the folder of translations from run.json
    again = ("evaluate", "--output", runs, "--setting", "translate-train", "--no-resume", "--no-progress")
    assert flare(*again) == 0
    # the other path leads to the same translations, so the run counts as finished with these settings
    (tmp_path / "other").symlink_to(translations)
    words[words.index(str(translations))] = str(tmp_path / "other")
    assert flare(*words, "--target-text", "mt") == 0


def test_train_only_fusion_and_flare_mt_train_and_predict(place, runs):
    """With --train-only-fusion, half of the training rows have a source, and no test row needs one."""
    assert flare(*train_words(place, runs, "--r", 4, "--train-only-fusion")) == 0
    record = read_record(runs / "vemari" / "flare-r4-train-only" / "seed-0")
    assert "vemari: 24 of 48 training rows have a source" in record.data["notes"]
    assert read_metrics(runs / "vemari" / "flare-r4-train-only" / "seed-0").bottleneck is None
    assert flare(*train_words(place, runs, "--r", 4, "--method", "flare-mt", "--mt-model", place / "bert")) == 0
    folder = runs / "vemari" / "flare-mt-r4" / "seed-0"
    assert any("latent_proj" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
    before = (folder / "predictions-test.jsonl").read_bytes()
    words = ("evaluate", "--output", runs, "--variant", "flare-mt-r4", "--setting", "translate-train", "--no-resume")
    assert flare(*words, "--no-progress") == 0
    assert (folder / "predictions-test.jsonl").read_bytes() == before
    for name in ("flare-r4-train-only", "flare-mt-r4"):  # both predict without source texts
        predicts_as_evaluated(read_run(runs / "vemari" / name / "seed-0"), place / "data", runs)


def test_all_rows_of_a_batch_have_a_source_or_none_has():
    has_source = [True] * 8 + [False] * 9
    sampler = OneKindSampler(has_source, 4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(17)) and list(sampler) == first
    for start in range(0, 17, 4):
        assert len({has_source[row] for row in first[start : start + 4]}) == 1
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("processes", [2, 3])
def test_a_step_of_several_processes_does_not_mix_rows_with_and_without_a_source(processes):
    """accelerate fills the last step of an epoch with the epoch's first rows."""
    has_source = [True] * 24 + [False] * 19
    sampler = OneKindSampler(has_source, 2 * processes, seed=0)
    for epoch in range(8):
        sampler.set_epoch(epoch)
        batches = BatchSampler(sampler, 2, drop_last=False)
        shards = [list(BatchSamplerShard(batches, processes, number)) for number in range(processes)]
        assert {row for shard in shards for batch in shard for row in batch} == set(range(43))
        for step in zip(*shards, strict=True):
            assert len({has_source[row] for batch in step for row in batch}) == 1


def test_peak_on_a_gpu_covers_only_training_steps(monkeypatch):
    from flare.experiments.runs.callbacks import PeakMemory

    allocated = [0]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.__setitem__(0, 5))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated[0])
    peak = PeakMemory(torch.device("cuda"))
    for in_step, in_evaluation in ((30, 900), (40, 900), (20, 900)):
        peak.on_step_begin(None, None, None)
        allocated[0] = max(allocated[0], in_step)
        peak.on_step_end(None, None, None)
        allocated[0] = max(allocated[0], in_evaluation)
    assert peak.bytes == 40


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(place, tmp_path):
    """The run is killed (SIGKILL) twice during training. Weights, scores and predictions are compared."""
    for name in ("whole", "killed"):
        shutil.copytree(place / "runs", tmp_path / name)
    more = ("--r", 4, "--dropout", 0.1, "--epochs", 6, "--save-steps", 4, "--fusion", "add")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "flare", *train_words(place, tmp_path / name, *more, "--threads", 1)]

    def start(name: str) -> subprocess.Popen:
        return subprocess.Popen(command(name), env=environment, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE)

    folder = tmp_path / "killed" / "vemari" / "flare-add-r4" / "seed-0"
    for step in (4, 16):
        process = start("killed")
        deadline = time.monotonic() + 300
        while not (folder / "checkpoints" / f"checkpoint-{step}").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not read_record(folder).done
    for name in ("killed", "whole"):
        process = start(name)
        assert process.wait(timeout=300) == 0, process.stderr.read()
        process.stderr.close()
    other = tmp_path / "whole" / "vemari" / "flare-add-r4" / "seed-0"
    one, two = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, other))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    a, b = read_metrics(folder), read_metrics(other)
    assert (a.valid, a.test, a.steps, a.best_checkpoint) == (b.valid, b.test, b.steps, b.best_checkpoint)
    assert a.bottleneck == b.bottleneck
    assert (folder / "predictions-test.jsonl").read_bytes() == (other / "predictions-test.jsonl").read_bytes()
    seen = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in (folder, other)]
    assert [line["step"] for line in seen[0]] == [line["step"] for line in seen[1]]


def test_an_incomplete_checkpoint_is_not_used(place, runs, capsys):
    """If the writing of the newest checkpoint was interrupted, training resumes from the previous checkpoint."""
    words = train_words(place, runs, "--r", 4, "--method", "lora", "--keep-checkpoints")
    assert flare(*words) == 0
    folder = runs / "vemari" / "lora-r4" / "seed-0"
    adapter = folder / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    (folder / "checkpoints" / "checkpoint-12" / "trainer_state.json").write_text('{"epo')
    record = read_record(folder)
    record.status = "running"
    write_record(folder, record)
    capsys.readouterr()
    assert flare(*words) == 0
    out = capsys.readouterr().out
    assert "checkpoint-12 was cut off" in out and "resumes from step 6" in out
    assert adapter.read_bytes() == before


def test_a_resumed_run_logs_the_loss_of_all_steps(place, runs):
    """The logged mean loss covers all steps even if the checkpoint lies between two lines of the log."""
    words = train_words(place, runs, "--r", 4, "--method", "lora", "--keep-checkpoints", "--save_steps", 4)
    assert flare(*words) == 0
    folder = runs / "vemari" / "lora-r4" / "seed-0"
    log = folder / "log.jsonl"
    whole = json.loads(log.read_text().splitlines()[-1])
    for step in (12, 8):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}", ignore_errors=True)
    record = read_record(folder)
    record.status = "running"
    write_record(folder, record)
    assert flare(*words) == 0
    resumed = json.loads(log.read_text().splitlines()[-1])
    assert resumed["step"] == whole["step"] == 12
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)


def test_a_run_killed_after_its_last_step_can_be_finished(place, runs):
    """All steps are done, but the scores are missing. Resuming trains no step, and still reports the peak memory."""
    words = train_words(place, runs, "--r", 4, "--keep-checkpoints")
    assert flare(*words) == 0
    folder = runs / "vemari" / "flare-r4" / "seed-0"
    whole, log = read_metrics(folder), (folder / "log.jsonl").read_text().splitlines()
    (folder / "metrics.json").unlink()
    record = read_record(folder)
    record.status = "running"
    write_record(folder, record)
    assert flare(*words) == 0
    again = read_metrics(folder)
    assert (again.test, again.best_checkpoint, again.peak_bytes) == (
        whole.test,
        whole.best_checkpoint,
        whole.peak_bytes,
    )
    assert len((folder / "log.jsonl").read_text().splitlines()) == len(log)


def test_no_resume_moves_the_old_run_to_another_folder(place, runs):
    words = train_words(place, runs, "--r", 4, "--method", "lora")
    assert flare(*words) == 0
    folder = runs / "vemari" / "lora-r4" / "seed-0"
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert flare(*words, "--no-resume") == 0
    earlier = runs / "vemari" / "lora-r4" / "earlier-1" / "seed-0"
    assert (earlier / "adapter" / "adapter_model.safetensors").read_bytes() == before
    # the new run has the same settings and seed, so its weights are equal
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert [run.folder for run in find_runs(runs) if run.record.kind == "train"] == [folder]
