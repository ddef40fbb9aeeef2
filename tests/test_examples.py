"""Test that two scripts and the notebook in examples/ run unchanged and use their source."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import peft
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("huggingface_trainer.py", "question_answering.py")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 120


def test_the_one_line_is_marked() -> None:
    """A comment marks the line that calls flare.fast_lora, and shows the PEFT call that it replaces."""
    text = (EXAMPLES / "huggingface_trainer.py").read_text(encoding="utf-8")
    assert re.search(r"# <- the one line; it was: .*get_peft_model.*\n +model = flare\.fast_lora\(", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_uses_its_source(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    if name == SCRIPTS[0]:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def trained(folder: str, *more: str) -> dict[str, torch.Tensor]:
        output = tmp_path / folder
        monkeypatch.setattr(sys, "argv", [name, "--output", str(output), "--epochs", "1", *more])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return peft.utils.load_peft_weights(str(output / "adapter"), device="cpu")

    weights = trained("as it is")
    assert re.search(r"vemari, .* rows: \d+\.\d %", capsys.readouterr().out)
    # with the target in place of the source, the same seed gives other weights
    other = trained("no source", "--data", str(tmp_path / "as it is" / "data"), "--source", "vemari")
    assert weights.keys() == other.keys()
    assert any(not torch.allclose(weights[key], other[key]) for key in weights if "lora_A" in key)
    assert any(not torch.equal(weights[key], torch.zeros_like(weights[key])) for key in weights if "lora_B" in key)


def test_notebook_runs_and_its_adapter_uses_the_source(monkeypatch) -> None:
    pytest.importorskip("matplotlib").use("agg")
    notebook = json.loads((EXAMPLES / "from_two_texts_to_a_prediction.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    accuracies = names["results"]
    assert accuracies["FLARE"] > 90 > 60 > max(accuracies["LoRA"], accuracies["FLARE, source missing"])
    assert [one["prediction"] for one in names["predictions"]] == [pair.label for pair in names["pairs"]]
