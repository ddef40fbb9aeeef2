"""Tests of the `flare` command line: help, options and error messages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flare_kernels
from flare.cli import main
from flare.experiments.demo.demo_settings import DemoError, DemoSettings


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run `flare` and return its exit status, standard output and standard error."""
    try:
        status = main(arguments)
    except SystemExit as exit:  # argparse
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


def test_help_lists_the_commands(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in ("finetune", "translate", "train", "evaluate", "predict", "report", "demo", "bench", "info"):
        assert re.search(rf"^    {command}\s", out, re.MULTILINE), command


def test_version_option_prints_the_version(capsys):
    status, out, _ = run(capsys, "--version")
    assert status == 0 and out == f"flare-kernels {flare_kernels.__version__}\n"


def test_no_command_is_an_error(capsys):
    status, _, err = run(capsys)
    assert status == 2
    assert "COMMAND" in err


def test_info_prints_versions_device_and_backends(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for word in ("torch", "transformers", "peft", "device", "triton", "reference", "available"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tune", "--shapes", "gpt-9"], ["--shapes gpt-9", "llama-3.1-8b", "xlm-r-large"]),
        (["--tune", "--tokens", "0"], ["--tokens [0]", "1 or more"]),
        (["--tune", "--", "-k", "x"], ["-k x", "no arguments for pytest"]),
        (["--ranks", "8"], ["--ranks", "only with --tune"]),
        pytest.param(
            ["--tune"],
            ["CUDA device", "general rule"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device, this starts tuning"),
        ),
    ],
    ids=["shape", "tokens", "pytest", "no-tune", "no-gpu"],
)
def test_bench_errors_name_the_option(capsys, tmp_path, arguments, words):
    status, _, err = run(capsys, "bench", *arguments)
    assert status == 2
    for word in ("flare bench: error:", *words):
        assert word in err


def test_bench_finds_the_benchmarks_of_the_checkout(capfd):
    status, out, _ = run(capfd, "bench", "--", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert status == 0
    assert "test_projection.py" in out


def test_bench_tune_keeps_an_existing_table_without_overwrite(capsys, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text("mine")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "Some GPU")
    status, _, err = run(capsys, "bench", "--tune", "--output", str(path))
    assert status == 2 and "exists already" in err and "--overwrite" in err
    assert path.read_text() == "mine"


def test_python_m_flare_runs_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "flare", "demo", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    for option in (
        "--output",
        "--seeds",
        "--model",
        "--data",
        "--source",
        "--target",
        "--fusion",
        "--noise",
        "--threads",
    ):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "0"], ["--seeds", "1 or more", "got 0"]),
        (["--seeds", "many"], ["--seeds", "invalid int"]),
        (["--fusion", "concat"], ["--fusion", "add_relu", "concat"]),
        (["--noise", "1"], ["--noise", "0 up to"]),
        (["--lr", "0"], ["--lr", "greater than 0"]),
        (["--max-length", "3"], ["--max-length", "4 or more"]),
        (["--max-length", "65", "--pretrain-steps", "1"], ["--max-length", "64 or less"]),
        (["--threads", "-1"], ["--threads"]),
        (["--target", "acehnese"], ["--target", "--data"]),
        (["--model", "somewhere"], ["--model", "--data"]),
        (["--data", "somewhere"], ["--data", "--model"]),
        (["--model", "m", "--data", "d", "--source", "english"], ["--target"]),
        (["--model", "m", "--data", "d", "--source", "english", "--target", "english"], ["--source", "--target"]),
        (["--model", "m", "--data", "/no/such", "--source", "a", "--target", "b"], ["--data", "/no/such"]),
        (
            ["--model", "m", "--data", "d", "--source", "a", "--target", "b", "--pretrain-steps", "1"],
            ["--pretrain-steps", "embedded"],
        ),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_demo_errors_name_the_option(capsys, tmp_path, arguments, words):
    status, _, err = run(
        capsys,
        "demo",
        "--output",
        str(tmp_path / "out"),
        "--cache-dir",
        str(tmp_path / "cache"),
        "--no-progress",
        *arguments,
    )
    assert status == 2
    for word in words:
        assert word in err, err
    assert "Traceback" not in err


def test_demo_refuses_an_output_that_is_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, err = run(capsys, "demo", "--output", str(tmp_path / "file"))
    assert status == 2
    assert "--output" in err and "another folder" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_every_option_of_demo_reaches_its_settings(monkeypatch):
    seen = {}
    monkeypatch.setattr("flare.experiments.demo.run_demo", lambda settings, print_fn: seen.update(settings=settings))
    text = (
        "--output o --seeds 2 --rows 9 --threads 1 --cache-dir c --model m --data d --source s --target t --fusion mul "
        "--noise 0.3 --r 4 --alpha 8 --epochs 2 --batch-size 5 --lr 0.1 --max-length 12 --finetune-epochs 1 "
        "--finetune-batch-size 6 --finetune-lr 0.2 --pretrain-steps 7"
    )
    words = text.split()
    assert main(["demo", "--overwrite", "--no-progress", *words]) == 0
    settings = seen["settings"]
    for flag, value in zip(words[::2], words[1::2], strict=True):
        setting = getattr(settings, flag[2:].replace("-", "_"))
        assert str(setting) in (value, f"{value}.0"), flag
    assert settings.overwrite is True and settings.progress is False


def test_demo_defaults():
    embedded = DemoSettings().resolved()
    assert (embedded.r, embedded.epochs, embedded.seeds) == (16, 10, 3)
    real = DemoSettings(model="m", data="d", source="english", target="acehnese").resolved()
    assert (real.r, real.alpha, real.epochs, real.batch_size, real.lr, real.max_length) == (64, 128, 8, 32, 1e-3, 64)
    assert DemoSettings(r=3).resolved().r == 3
    with pytest.raises(DemoError, match="--r "):
        DemoSettings(r=0).resolved()


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupted(settings, print_fn):
        raise KeyboardInterrupt

    monkeypatch.setattr("flare.experiments.demo.run_demo", interrupted)
    status, _, err = run(capsys, "demo")
    assert status == 130
    assert "Traceback" not in err
