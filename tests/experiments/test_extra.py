"""Tests without the extra `experiments`: FlareTrainer and FlarePipeline work, and commands say what to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flare.cli import main
from flare.experiments.utils import extra

ROOT = Path(__file__).parents[2]
SCRIPT = """
import contextlib, io, json, sys

class Hides:
    # A finder that does not find the packages of the extra. tqdm is always installed: huggingface_hub requires it.
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datasets", "matplotlib", "seqeval", "sklearn"):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hides(finder) for finder in sys.meta_path]
folder = sys.argv[1]
import transformers
from experiment_data import write_bert

import flare
from flare.cli import main

write_bert(folder + "/bert")
base = transformers.BertForSequenceClassification.from_pretrained(folder + "/bert", num_labels=2)
model = flare.fast_lora(base, r=4)
rows = [{"input_ids": [2, 7, 8, 3], "source_input_ids": [2, 9, 3], "labels": n} for n in (0, 1)]
args = transformers.TrainingArguments(folder + "/out", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder + "/bert")
flare.FlareTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
model.save_pretrained(folder + "/adapter")
predict = flare.FlarePipeline(folder + "/bert", folder + "/adapter", labels=["a", "b"], max_length=24, print_fn=print)
outcomes = {"prediction": predict("soup", "soup")["prediction"]}
commands = [["--version"], ["--help"], ["info"], ["finetune"], ["check"], ["train"], ["evaluate"], ["predict"]]
for words in [*commands, ["translate"], ["report", "runs"], ["demo"], ["bench"]]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as exit:
            status = exit.code
    outcomes[words[0]] = [status, out.getvalue(), err.getvalue()]
print(json.dumps(outcomes))
"""


@pytest.mark.slow
def test_without_the_extra_training_works_and_commands_name_the_extra(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.pop("prediction") in ("a", "b")
    for words, shown in (("--version", "flare-kernels "), ("--help", "translate"), ("info", extra.INSTALL)):
        status, out, err = outcomes.pop(words)
        assert (status, err) == (0, "") and shown in out, words
    assert len(outcomes) == 9
    for name, (status, out, err) in outcomes.items():
        assert (status, out) == (2, ""), name
        assert err == (
            f"flare {name}: error: flare {name} needs datasets and tqdm, and datasets is not installed. Install the "
            "extra: pip install 'flare-kernels[experiments]'\n"
        )


def test_all_missing_packages_are_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(extra, "installed", lambda module: False)
    assert main(["report", "runs"]) == 2
    assert "and datasets and tqdm are not installed. Install the extra" in capsys.readouterr().err
    assert main(["info"]) == 0
