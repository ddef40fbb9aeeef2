"""Tests of damaged or unusual input files and options: the command prints a message without a traceback.

The last tests check that messages name only flags that exist.
"""

from __future__ import annotations

import argparse
import ast
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from experiment_data import write_bert, write_data
from safetensors import SafetensorError
from transformers import HfArgumentParser, TrainingArguments

import flare.cli
from flare.cli import main
from flare.experiments.runs.predictor import PREDICTIONS, read_predictions
from flare.experiments.runs.run_settings import TrainSettings
from flare.experiments.translation.provenance import read_provenance
from flare.experiments.utils.errors import UserError
from flare.experiments.utils.options import REFUSED, read_settings

ROOT = Path(flare.cli.__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with data/ and a pretrained model in bert/."""
    root = tmp_path_factory.mktemp("hostile")
    write_data(root / "data", valid=False)
    write_bert(root / "bert")
    return root


@pytest.fixture
def run(place, tmp_path, capsys):
    """Return a function that copies data and model, damages the copy, and runs a command on it.

    Its arguments are a function that damages the copy, and the command, in which {0} stands for the folder of the copy.
    Its result is the exit status and standard error.
    """

    def call(spoil: Callable[[Path], object], command: str) -> tuple[object, str]:
        shutil.copytree(place, tmp_path, dirs_exist_ok=True)
        spoil(tmp_path)
        try:
            status: object = main([word.format(tmp_path) for word in command.split(" ")])
        except SystemExit as exit:  # argparse
            status = exit.code
        err = capsys.readouterr().err
        assert "Traceback" not in err and "This is a defect" not in err, err
        return status, err

    return call


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Return a function that writes a file of this name into the copy."""
    return lambda root: (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a function that replaces a file of the copy by what `make` creates at its path."""

    def spoil(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return spoil


def jsonl(line: str) -> Callable[[Path], object]:
    """Return a function that replaces the English training rows by a JSON lines file with one line."""

    def spoil(root: Path) -> None:
        (root / "data/english/train.csv").unlink()
        (root / "data/english/train.jsonl").write_text(line + "\n")

    return spoil


def config(**changes: object) -> Callable[[Path], object]:
    """Return a function that changes fields of the model's config.json."""

    def spoil(root: Path) -> None:
        path = root / "bert/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


FINETUNE = "finetune --task classification --model {0}/bert --data {0}/data --output {0}/runs --rows 8 --no-progress"
DEMO = "demo --model {0}/bert --data {0}/data --source english --target vemari --output {0}/demo --rows 8"
TRANSLATE = "translate --task classification --model {0}/bert --data {0}/data --source english --target vemari"
DEEP = "[" * 100_000
_TRAIN = "data/english/train.csv"

#: Name of the case -> (function that damages the copy, command, pattern that the command's message must match).
#: Half a character is a lone surrogate, which UTF-8 cannot encode.
CASES = {
    "a folder": (in_place_of(_TRAIN, Path.mkdir), FINETUNE, "train.csv is not a file"),
    "a FIFO": (in_place_of(_TRAIN, os.mkfifo), FINETUNE, "train.csv is not a file"),
    "a dangling link": (in_place_of(_TRAIN, lambda path: path.symlink_to("gone")), DEMO, "train.csv is not a file"),
    "data that are a file": (write("file", ""), FINETUNE.replace("0}/data", "0}/file"), "this is one file"),
    "half a character": (jsonl(r'{"id": 1, "text": "a\ud800", "label": "x"}'), FINETUNE, "row 0: text holds half a"),
    "half a label": (jsonl(r'{"id": 1, "text": "a", "label": "\ud800"}'), FINETUNE, "label holds half a character"),
    "half an id": (jsonl(r'{"id": "\ud800", "text": "a", "label": "x"}'), FINETUNE, "id holds half a character"),
    "deep rows": (jsonl(DEEP), FINETUNE, "line 1: .*nested too deeply"),
    "a long text": (write(_TRAIN, f"id,text,label\n1,{'a' * 200_000},x\n"), FINETUNE, "as JSON lines"),
    "a deep configuration": (write("bert/config.json", DEEP), FINETUNE, "configuration cannot be read .Recursion"),
    "a configuration that is a list": (write("bert/config.json", "[]"), DEMO, "--model .*bert: its tokenizer"),
    "sizes that are texts": (config(hidden_size="x"), FINETUNE, "configuration cannot be read .*'hidden_size'"),
    "other sizes": (config(hidden_size=64), FINETUNE, "other shapes than its config.json says"),
    "a model folder with code": (config(auto_map={"AutoConfig": "x.Y"}, model_type="x"), TRANSLATE, "its own code"),
    "a deep tokenizer": (write("bert/tokenizer.json", DEEP), DEMO, "its tokenizer cannot be loaded .Recursion"),
    "a tokenizer that is null": (write("bert/tokenizer.json", "null"), FINETUNE, "its tokenizer cannot be loaded"),
    "tokenizer settings that are a list": (
        write("bert/tokenizer_config.json", "[]"),
        FINETUNE,
        "its tokenizer cannot be loaded",
    ),
    "weights cut off": (write("bert/model.safetensors", b"abc"), DEMO, "it cannot be loaded for classification"),
    "a translator without a decoder": (write("x", ""), TRANSLATE, "not an encoder-decoder"),
    "an empty model": (write("x", ""), FINETUNE.replace("{0}/bert", ""), "--model is empty"),
    "an empty output": (write("x", ""), FINETUNE.replace("{0}/runs", ""), "--output is empty"),
    "an empty model of the demo": (write("x", ""), DEMO.replace("{0}/bert", ""), "--model is empty"),
    "an empty language": (write("x", ""), DEMO.replace("english", ""), "--source is empty"),
    "an empty --config": (write("x", ""), "train --config ", "--config is empty"),
    "no threads": (write("x", ""), f"{FINETUNE} --threads 0", "--threads must be from 1 to 1024; got 0"),
    "too many threads": (write("x", ""), f"{DEMO} --threads 9999999", "--threads must be from 1 to 1024"),
    "a prefix of half a character": (write("x", ""), f"{TRANSLATE} --prefix \udcff", "--prefix .*lone surrogate"),
    "a mistyped path": (write("x", ""), FINETUNE.replace("{0}/bert", "models/xlmr/base"), "no such folder"),
    "a column name for which the demo has no option": (
        write(_TRAIN, "id,sentence,label\n1,a,x\n"),
        DEMO,
        "the demo does not have",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damaged_and_odd_input_is_explained(run, name):
    spoil, command, words = CASES[name]
    status, err = run(spoil, command)
    assert status == 2 and re.search(words, err), err


# --- unexpected errors ------------------------------------------------------------------------------------------------


UNEXPECTED = [
    (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "the disk is full .*repeat the command"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
    (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed"), 2, "disk is"),
    (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "runs/x: Permission denied.*you may access it"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "the device is out of memory .*smaller --batch-size"),
    (MemoryError(), 2, ": out of memory .MemoryError."),
    (ModuleNotFoundError("No module named 'foo'"), 2, "a package is missing .*'foo'.*Install it"),
    (KeyError("foo"), 1, "unexpected KeyError: 'foo'. This is a defect: .*traceback in (.*)"),
]


@pytest.mark.parametrize(("error", "status", "words"), UNEXPECTED, ids=lambda value: type(value).__name__)
def test_an_unexpected_error_is_explained(monkeypatch, capsys, tmp_path, error, status, words):
    def fails(settings, print_fn):
        raise error

    monkeypatch.setattr("flare.experiments.demo.run_demo", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["demo"]) == status
    err = capsys.readouterr().err
    match = re.search(words, err)
    assert err.startswith("flare demo: error: ") and match and "Traceback" not in err, err
    if status == 1:
        assert "KeyError: 'foo'" in Path(match[1]).read_text()
    else:
        assert not list(tmp_path.iterdir())


def test_a_closed_standard_output_is_not_reported_as_an_error(monkeypatch):
    """`flare info | head -1` prints no error."""

    def closed() -> int:
        raise BrokenPipeError

    redirected = []
    monkeypatch.setattr(flare.cli.info, "run", closed)
    monkeypatch.setattr("os.dup2", lambda *args: redirected.append(args))
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
    assert main(["info"]) == 1 and len(redirected) == 1


# --- damaged files of flare -------------------------------------------------------------------------------------------


def test_damaged_predictions_and_provenance_are_refused(tmp_path):
    path = tmp_path / PREDICTIONS
    assert read_predictions(path) == []
    line = {"id": "1", "truth": "a\u2028b", "prediction": "x"}  # U+2028 does not end a line of JSON
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_predictions(path) == [line]
    for damage in ("[]", "{}", "[" * 100_000, '{"id": 1'):
        path.write_text(json.dumps(line) + "\n" + damage)
        with pytest.raises(UserError, match=r"line 2: not a prediction .*move the file away"):
            read_predictions(path)
    for damage in ("[]", DEEP, "\0"):
        (tmp_path / "provenance.json").write_text(damage)
        with pytest.raises(UserError, match=r"provenance\.json cannot be read"):
            read_provenance(tmp_path)


# --- flags in messages ------------------------------------------------------------------------------------------------


def _flags() -> dict[str, set[str]]:
    """Return the flags of each command. The flags of finetune and train include the flags of TrainingArguments."""
    subparsers = next(
        action for action in flare.cli._parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    flags = {name: set(parser._option_string_actions) for name, parser in subparsers.choices.items()}
    training = set(HfArgumentParser(TrainingArguments)._option_string_actions)
    return {name: flags[name] | (training if name in ("finetune", "train") else set()) for name in flags}


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each string constant except docstrings, with {} in place of formatted values."""
    tree = ast.parse(path.read_text())
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)]
    skipped = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield node.lineno, "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def test_messages_name_existing_flags():
    """A flag that follows `flare COMMAND` in a message must be a flag of that command.

    All other flags must be flags of a command that uses the message's module. In a module of runs/, a flag that follows
    `flare COMMAND` may also be a flag of another command that uses the module.
    """
    flags = _flags()
    every = set().union(*flags.values())
    commands = {"translation": ("translate",), "demo": ("demo",), "report": ("report",)}
    commands |= {"runs": ("finetune", "train", "evaluate", "check"), "prediction": ("predict",)}
    wrong, seen = [], 0
    for path in sorted(ROOT.rglob("*.py")):
        if path.name == "environment.py":  # its flags are options of git
            continue
        parts = path.relative_to(ROOT).parts
        part = parts[1] if parts[0] == "experiments" else ""
        flags_here = set().union(*(flags[name] for name in commands[part])) if part in commands else every
        for line, text in _texts(path):
            accepted = flags_here
            for word in re.findall(rf"flare (?:{'|'.join(flags)})\b|(?<![\w-])--[a-z][\w-]*", text):
                if word.startswith("flare"):
                    accepted = flags[word.removeprefix("flare ")] | (flags_here if part == "runs" else set())
                    continue
                seen += 1
                # a text that is only a flag, or a pair of flags, gives no advice
                if word not in accepted and text not in (word, "--source-code or --target-code"):
                    wrong.append(f"{path}:{line}: {word} in {text[:80]!r}")
    assert seen > 150 and not wrong, "\n".join(wrong)


def test_refused_names_are_not_suggested():
    for word in ("do_trian", "resume_from_checkpoin", "disable_tqd"):
        with pytest.raises(UserError) as error:
            read_settings(TrainSettings, {}, [f"--{word}", "1"])
        assert not any(name in str(error.value) for name in REFUSED), error.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("taks: nusax", "taks is not known; did you mean task"),
        ("seeds: many", "seeds must be a whole number; got 'many'"),
        ("method: [lora, magic]", "method must be one of lora"),
        ("output_dir: x", "output_dir cannot be given"),
        ("progress: 3", "progress must be true or false"),
        ("task: [a, b]", "task takes one value"),
        ("output:", "output is empty; give a value, or remove the line"),
        ("- nusax", "must map names to values"),
        ("task: [", "cannot be read"),
    ],
)
def test_wrong_yaml_is_explained(tmp_path, text, expected):
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"experiment\.yaml") as error:
        read_settings(TrainSettings, {"config": str(file)})
    assert expected in str(error.value)
