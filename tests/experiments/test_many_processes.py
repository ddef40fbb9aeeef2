"""Tests of the commands on two processes, as `accelerate launch` starts them.

Two processes share the work and give the files and scores that one process gives. An error of one process stops both.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_mt
import torch
import two_processes
from accelerate import PartialState
from accelerate.utils import DistributedType
from experiment_data import write_bert, write_data
from predicting import rows_of, texts_alone, write_jsonl
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from flare.cli import main
from flare.experiments.demo.experiment import Experiment
from flare.experiments.runs.evaluate import _Evaluation as Evaluation
from flare.experiments.runs.fitting import ExperimentTrainer, per_process_batch, training_arguments
from flare.experiments.runs.predictor import Predictor
from flare.experiments.runs.records import find_runs, read_record
from flare.experiments.translation import Translator
from flare.experiments.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--max-length", 24, "--batch-size", 8, "--lr", 0.5, "--optim", "sgd", "--threads", 1, "--no-progress")
LABELS = ("negative", "neutral", "positive")


def flare(*words: object) -> int:
    return main([str(word) for word in words])


def translate(root: Path, output: str, *more: object) -> tuple[object, ...]:
    """Return the arguments of a flare translate command."""
    words = ("--data", root / "texts", "--source", "english", "--target", "acehnese", "--splits", "train")
    return (
        *("translate", "--task", "nusax", *words, "--model", root / "nllb", "--output", root / output),
        *("--max-new-tokens", 6, "--batch-size", 2, "--threads", 1, "--no-progress", *more),
    )


def train(root: Path, output: str, *more: object) -> tuple[object, ...]:
    """Return the arguments of a flare train command."""
    words = ("--data", root / "data", "--output", root / output, "--target", "vemari", "--seeds", 0, "--r", 4)
    return ("train", "--task", "classification", *words, *QUICK, "--epochs", 2, "--keep-checkpoints", *more)


def evaluate(root: Path, output: str, *more: object) -> tuple[object, ...]:
    """Return the arguments of a flare evaluate command."""
    words = ("--output", root / output, "--translations", root / "mt", "--eval-batch-size", 8)
    return ("evaluate", *words, "--threads", 1, "--no-progress", *more)


def predict(root: Path, output: str, *more: object) -> tuple[object, ...]:
    """Return the arguments of a flare predict command that also translates."""
    adapter = root / "one" / "vemari" / "flare-r4" / "seed-0"
    codes = ("--translator", root / "nllb", "--source-code", "eng_Latn", "--target-code", "ace_Latn")
    words = ("--adapter", adapter, "--input", root / "new.jsonl", "--output", root / output, *codes)
    return ("predict", *words, "--batch-size", 4, "--threads", 1, "--no-progress", *more)


@contextlib.contextmanager
def after(calls: int, owner: Any, name: str, error: BaseException) -> Any:
    """Within the context, let the first `calls` calls of a method run, and raise an error in every later call.

    Yields a list that gets one item per call.
    """
    original, seen = getattr(owner, name), []

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        seen.append(1)
        if len(seen) > calls:
            raise error
        return original(self, *arguments, **keywords)

    setattr(owner, name, counted)
    try:
        yield seen
    finally:
        setattr(owner, name, original)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder with texts, a translator, data, a base without dropout, and results of one process.

    Finished results are in one/ (runs), one-mt/ (translations) and one.jsonl (predictions). Unfinished results are in
    resumed/ (runs), stopped-by-one/ (translations) and stopped.jsonl.partial (predictions). two/ and sharded/ hold only
    the base.
    """
    root = tmp_path_factory.mktemp("processes")
    tiny_mt.save_nllb(root / "nllb")
    (root / "texts" / "english").mkdir(parents=True)
    lines = [f"{number},{text},{LABELS[number % 3]}" for number, text in enumerate(tiny_mt.SENTENCES[:13])]
    (root / "texts" / "english" / "train.csv").write_text("\n".join(["id,text,label", *lines]) + "\n")
    write_data(root / "data")
    write_bert(root / "bert")
    config = json.loads((root / "bert" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (root / "bert" / "config.json").write_text(json.dumps(config))
    words = ("--model", root / "bert", "--data", root / "data", "--output", root / "one", "--r", 4, "--epochs", 2)
    assert flare("finetune", "--task", "classification", *words, *QUICK) == 0
    shutil.copytree(root / "data" / "english", root / "mt" / "vemari-english")
    test = root / "mt" / "vemari-english" / "test.csv"
    test.write_text(test.read_text().replace("not", ""))
    for name in ("two", "resumed", "sharded"):
        shutil.copytree(root / "one", root / name)
    assert flare(*train(root, "one")) == 0
    assert flare(*translate(root, "one-mt")) == 0
    write_jsonl(root / "new.jsonl", texts_alone(rows_of(root / "data", "vemari")))
    assert flare(*predict(root, "one.jsonl")) == 0
    # interrupt each command (run by one process), so that it leaves unfinished results
    with after(2, Predictor, "_read", KeyboardInterrupt()):
        assert flare(*predict(root, "stopped.jsonl")) == 130
    with after(8, ExperimentTrainer, "training_step", KeyboardInterrupt()):
        assert flare(*train(root, "resumed")) == 130
    with after(3, Translator, "translate_batch", KeyboardInterrupt()):
        assert flare(*translate(root, "stopped-by-one")) == 130
    return root


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob(pattern))}


# --- on two processes -------------------------------------------------------------------------------------------------


def on_two(rank: int, root: Path) -> dict[str, Any]:
    """Run flare translate, train, predict and evaluate in one of two processes.

    Returns:
        A dictionary. Under the name of each call of `run`, it has the exit status, standard output and standard error.
        "batches", "predicted" and "read" are the numbers of batches that this process read in the calls "translate",
        "predict" and "evaluate". "shards" are the numbers of sharded weights among the trained and among the frozen
        weights.
    """
    world = str(two_processes.WORLD)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    results: dict[str, Any] = {}

    def run(name: str, *words: object) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            results[name] = (flare(*words), out.getvalue(), err.getvalue())

    with after(99, Translator, "translate_batch", KeyboardInterrupt()) as calls:
        run("translate", *translate(root, "two-mt"))
    results["batches"] = len(calls)
    with after(2, Translator, "translate_batch", KeyboardInterrupt()):
        run("stopped", *translate(root, "stopped-by-two"))
    run("continued", *translate(root, "stopped-by-one"))
    run("train", *train(root, "two"))
    run("train again", *train(root, "two"))
    run("resumed", *train(root, "resumed"))
    run("not shared", *train(root, "two", "--name", "nine", "--batch-size", 9))
    with after(99, Predictor, "_read", UserError("")) as calls:
        run("predict", *predict(root, "two.jsonl"))
    results["predicted"] = len(calls)
    run("predict on", *predict(root, "stopped.jsonl"))
    # The second process fails twice: on its share of the zero-shot rows, and before the rows of translate-test are
    # shared.
    unread = after(0 if rank else 99, Predictor, "_read", UserError("no zero-shot"))
    with unread, after(1 if rank else 99, Evaluation, "_base_pairs", UserError("no rows")):
        run("failing", *evaluate(root, "two", "--setting", "zero-shot", "translate-test"))
    with after(99, Predictor, "_read", UserError("")) as calls:
        run("evaluate", *evaluate(root, "two", "--source-text", "gold", "mt"))
    results["read"] = len(calls)
    # accelerate shards only on GPUs, so it is made to treat the CPU processes as GPU processes
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState._reset_state()
    original_train = ExperimentTrainer.train

    def counts(self: ExperimentTrainer, *arguments: Any, **keywords: Any) -> Any:
        result = original_train(self, *arguments, **keywords)
        weights = list(self.model.parameters())
        results["shards"] = [
            sum(isinstance(p, DTensor) for p in weights if p.requires_grad == trainable) for trainable in (True, False)
        ]
        return result

    ExperimentTrainer.train = counts
    run("sharded", *train(root, "sharded"))
    return results


@pytest.fixture(scope="module")
def two(root, tmp_path_factory) -> list[dict[str, Any]]:
    return two_processes.run(tmp_path_factory.mktemp("two"), on_two, root, timeout=240)


def test_only_the_first_process_prints(two) -> None:
    first, second = two
    for name in ("translate", "continued", "train", "train again", "resumed", "evaluate", "predict", "sharded"):
        assert first[name][0] == second[name][0] == 0, (name, first[name], second[name])
        assert first[name][1] and second[name][1] == "", name


def test_translations_are_shared_and_equal_those_of_one_process(root, two) -> None:
    expected = files(root / "one-mt", "*.jsonl")
    batches = [one["batches"] for one in two]
    assert sum(batches) == 7 and max(batches) == 4  # 13 texts, two per batch
    assert files(root / "two-mt", "*.jsonl") == expected
    assert files(root / "stopped-by-one", "*.jsonl") == expected and "after 3 of 7 batches" in two[0]["continued"][1]
    assert [one["stopped"][0] for one in two] == [130, 130]
    unfinished = files(root / "stopped-by-two", "*.jsonl")
    assert (
        list(unfinished) == ["english-acehnese/train.partial.jsonl"]
        and next(iter(unfinished.values())).count(b"batch") == 4
    )
    with after(99, Translator, "translate_batch", KeyboardInterrupt()) as calls:
        assert flare(*translate(root, "stopped-by-two")) == 0
    assert len(calls) == 3 and files(root / "stopped-by-two", "*.jsonl") == expected


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "vemari" / "flare-r4" / "seed-0" / "adapter" / "adapter_model.safetensors")


def test_trained_weights_and_predictions_equal_those_of_one_process(root, two) -> None:
    """Two processes train three times: from the start, resuming a training of one process, and with FSDP2.

    FSDP2 shards the base but not the adapters.
    """
    assert [one["shards"][0] for one in two] == [0, 0] and min(one["shards"][1] for one in two) > 20
    expected = weights(root / "one")
    for name in ("two", "resumed", "sharded"):
        for parameter, weight in weights(root / name).items():
            torch.testing.assert_close(weight, expected[parameter], rtol=1e-4, atol=1e-6, msg=f"{name}: {parameter}")
        from_one, from_two = (root / runs / "vemari/flare-r4/seed-0/predictions-test.jsonl" for runs in ("one", name))
        assert from_two.read_bytes() == from_one.read_bytes()
    records = {
        name: read_record(root / name / "vemari" / "flare-r4" / "seed-0")
        for name in ("one", "two", "resumed", "sharded")
    }
    assert [one.settings["processes"] for one in records.values()] == [1, 2, 2, 2]
    assert "resumed with 2" in two[0]["resumed"][1] and "already done" in two[0]["train again"][1]
    status, _, error = two[0]["not shared"]
    assert status == 2 and "2 processes cannot share the 9 rows of a step" in error


def test_scores_equal_those_of_one_process(root, two) -> None:
    assert flare(*evaluate(root, "one", "--source-text", "gold", "mt")) == 0
    pattern = "predictions-*.jsonl"
    assert files(root / "two" / "vemari", pattern) == files(root / "one" / "vemari", pattern)
    scores = {name: {run.record.variant: run.metrics.test for run in find_runs(root / name)} for name in ("one", "two")}
    assert scores["one"] == scores["two"] and len(scores["one"]) == 5
    # 20 rows make 3 batches, which the processes share as 2 and 1. There are 4 evaluations: zero-shot, translate-test
    # with two kinds of source text, and the adapter with the translated source text.
    assert [one["read"] for one in two] == [4 * 2, 4 * 1]
    # one process finds all evaluations of the two processes finished, and changes no file
    before = files(root / "two", "*.json*")
    assert flare(*evaluate(root, "two", "--source-text", "gold", "mt")) == 0
    assert files(root / "two", "*.json*") == before


def test_predictions_are_shared_and_equal_those_of_one_process(root, two) -> None:
    assert [one["predict"][0] for one in two] == [one["predict on"][0] for one in two] == [0, 0]
    assert [one["predicted"] for one in two] == [3, 2]  # 20 rows, 4 per batch
    expected = (root / "one.jsonl").read_bytes()
    assert (root / "two.jsonl").read_bytes() == expected and (root / "stopped.jsonl").read_bytes() == expected
    assert "resuming after 8 of 20 rows" in two[0]["predict on"][1]
    assert not list(root.glob("*.partial"))


def test_an_error_of_one_process_is_raised_in_all(two) -> None:
    errors = [one["failing"][2].splitlines()[-1] for one in two]
    assert [one["failing"][0] for one in two] == [2, 2] and errors[0] == errors[1]
    assert "zero-shot" in errors[0] and "no zero-shot" in errors[0] and "no rows" in errors[0]


@pytest.mark.parametrize(
    ("size", "batches", "processes", "share"),
    [
        (64, 1, 4, (16, 1)),
        (8, 8, 4, (8, 2)),
        (8, 8, 8, (8, 1)),
        (8, 8, 16, (4, 1)),
        (6, 2, 3, (4, 1)),
        (8, 1, 1, (8, 1)),
    ],
)
def test_the_rows_of_a_step_are_divided_among_processes(size, batches, processes, share) -> None:
    values = {"per_device_train_batch_size": size, "gradient_accumulation_steps": batches}
    assert per_process_batch(values, processes) == share and share[0] * share[1] * processes == size * batches


@pytest.mark.parametrize("make", [training_arguments, Experiment._arguments], ids=["run", "demo"])
def test_a_process_uses_one_of_several_gpus(tmp_path, monkeypatch, make):
    """transformers would use torch.nn.DataParallel and multiply the rows of a step by the number of GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    values = {"per_device_train_batch_size": 8}
    of_run = make is training_arguments
    arguments = make(values, tmp_path, 0, None, {}) if of_run else make(None, str(tmp_path), 0, 1, 8, 1e-3)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 8


FAILING = """
import os, sys
from flare.cli import main
from flare.experiments.translation import TranslationError, Translator

status = main(sys.argv[1:])
if os.environ["RANK"] == "1":  # fail in the second process, while the first waits for it
    def fails(self, texts):
        raise TranslationError("only here")
    Translator.plan = fails
sys.exit(status or main([*sys.argv[1:], "--splits", "valid"]))
"""


def test_a_process_that_fails_ends_the_others(root, tmp_path) -> None:
    """Under accelerate launch, both processes translate the first split, and one process fails in the second split.

    One error is printed, and the other process ends instead of waiting.
    """
    shutil.copy(root / "texts" / "english" / "train.csv", root / "texts" / "english" / "valid.csv")
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "examples" / "ddp.yaml")]
    words = [str(word) for word in (*launch, "--main_process_port", 0, script, *translate(root, "launched"))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode != 0
    assert out.count("13 of 13 rows in") == 1, (out, err)
    errors = [line for line in err.splitlines() if line.startswith("flare translate: error: ")]
    assert errors == ["flare translate: error: only here"], err
    written = files(root / "launched", "*.jsonl")
    assert written["english-acehnese/train.jsonl"] and "english-acehnese/valid.jsonl" not in written
