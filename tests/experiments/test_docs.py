"""Tests of the code blocks in the documentation.

Python blocks are run, except on three pages that other tests cover. Both sides of a diff are parsed as Python. `flare`
commands and YAML configurations are parsed into settings, but not run.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import tomllib
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from experiment_data import write_bert, write_data, write_llama
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_mt import save_nllb
from trained import arguments, flare_model
from two_streams import rows, task_model, tokenizer

import flare
from flare.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_TEXTS = {"text": ["mangat that", "hana mangat"]}
_SMALL = {"optim": "adamw_torch", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
#: Options that replace "..." in a command, by the name of the command.
OPTIONS_FOR_DOTS = {
    "finetune": "--task nusax --source english",
    "train": "--task nusax --source english --target acehnese",
}
NLLB, LLAMA = "facebook/nllb-200-distilled-600M", "meta-llama/Llama-3.1-8B"


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def test_every_block_has_a_known_language() -> None:
    kinds = {kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert kinds == {"python", "bash", "yaml", "diff", "bibtex", ""}


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, one finished experiment, and tiny models under the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    data = write_data(folder / "DATA")
    (data / "vemari").rename(data / "acehnese")
    save_nllb(folder / NLLB)
    write_llama(folder / LLAMA)
    write_bert(folder / "model")
    (folder / "tasks").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        common = ["--task", "nusax", "--data", "DATA", "--no-progress", "--max-length", "48"]
        assert main(["finetune", *common, "--model", "model", "--epochs", "1"]) == 0
        assert main(["train", *common, "--target", "acehnese", "--method", "flare", "--epochs", "1"]) == 0
    return folder


def _distributed() -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = flare_model("bert")
    model.peft_config["default"].base_model_name_or_path = "model"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.distributed.init_device_mesh("cpu", (1,))
    return {
        "flare": flare,
        "model": model,
        "blocks": model.base_model.model.bert.encoder.layer,
        "fully_shard": fully_shard,
        "rank": 0,
    }


def _generation() -> dict[str, Any]:
    prompts = [{name: row[name] for name in ("input_ids", "source_input_ids")} for row in rows("llama", 3)]
    return {"flare": flare, "tokenizer": tokenizer(), "rows": prompts, "model": flare_model("llama").eval()}


def _kernels() -> dict[str, Any]:
    x, base = torch.randn(2, 5, 16), [torch.randn(2, 5, 12) for _ in range(4)]
    names = dict(zip(("base_output", "q", "k", "v"), base, strict=True))
    a, b = torch.randn(4, 16), torch.randn(12, 4)
    return (
        {"x": x, "x_source": torch.randn_like(x), "lora_A": a, "lora_B": b, "A": a, "B": b}
        | names
        | {
            "alpha": 8,
            "r": 4,
            "s": 2.0,
        }
    )


def _predicting() -> dict[str, Any]:
    return {"texts": ["Nyo beutoi.", "mangat that"], "sources": ["Yeah, that is right.", None]}


def _recipes() -> dict[str, Any]:
    for folder in ("english", "lora"):
        get_peft_model(task_model("bert"), LoraConfig(r=4, target_modules=["query", "value"])).save_pretrained(folder)
    return {"flare": flare, "PeftModel": PeftModel, "rows": rows("llama", 4), "dataset": Dataset.from_dict(_TEXTS)}


def _trainer() -> dict[str, Any]:
    model = flare_model("bert")
    return {
        "flare": flare,
        "torch": torch,
        "TrainingArguments": transformers.TrainingArguments,
        "model": model,
        "args": arguments(Path("out"), max_steps=2),
        "rows": rows("bert", 4),
        "tokenizer": tokenizer(),
    }


def _training() -> dict[str, Any]:
    names = _trainer()
    batch = flare.FlareDataCollator(names["tokenizer"])(rows("bert", 3))
    return names | {"loader": [batch], "optimizer": torch.optim.SGD(names["model"].parameters(), lr=1e-3)}


def _source_states() -> dict[str, Any]:
    names = _trainer()
    batch = flare.FlareDataCollator(names["tokenizer"])(rows("bert", 4))
    return names | {"batch": batch, "to_device": lambda batch: batch}


def _tasks() -> dict[str, Any]:
    columns = {"title": ["one", "two"] * 12, "body": ["a", "b"] * 12, "topic": ["eco", "sport"] * 12}
    os.chdir("tasks")
    for language in ("english", "acehnese"):
        folder = Path("DATA", language)
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            Dataset.from_dict({"id": [f"n{i}" for i in range(24)], **columns}).to_csv(str(folder / f"{split}.csv"))
    with_end = tokenizer()
    with_end.eos_token = "[SEP]"
    return {"tokenizer": with_end}


def _check_distributed(names: dict[str, Any]) -> None:
    from peft.utils import load_peft_weights

    torch.distributed.destroy_process_group()
    assert any("lora_A" in name for name in load_peft_weights("adapter")), "the adapter is saved"


def _check_kernels(names: dict[str, Any]) -> None:
    assert names["y"].shape == (2, 5, 12) and set(names["ys"]) == {"q", "k", "v"}


def _check_recipes(names: dict[str, Any]) -> None:
    assert Path("out/adapter/adapter_model.safetensors").is_file()


def _check_report(names: dict[str, Any]) -> None:
    assert Path("report/report.md").is_file() and list(Path("report").rglob("*.pdf"))


def _check_tasks(names: dict[str, Any]) -> None:
    assert names["rows"] and all("source_input_ids" in row for row in names["rows"])


#: Page -> function that checks the results of the page's blocks, given the variables that the blocks defined.
CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "distributed.md": _check_distributed,
    "kernels.md": _check_kernels,
    "recipes.md": _check_recipes,
    "report.md": _check_report,
    "tasks.md": _check_tasks,
}
#: Page -> function that returns the variables that the page's blocks use but do not define.
SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "distributed.md": _distributed,
    "generation.md": _generation,
    "kernels.md": _kernels,
    "predicting.md": _predicting,
    "recipes.md": _recipes,
    "source-states.md": _source_states,
    "tasks.md": _tasks,
    "training.md": _training,
}


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_python_blocks_run(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, in one namespace."""
    if page.name == "README.md":
        pytest.skip("tests/test_readme.py runs the README")
    if page.name == "kernels-hub.md":
        pytest.skip("the page needs the hub; tests/kernels/test_hub.py loads the kernels that the page builds")
    if page.name == "harness.md":
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `harness`)")
        pytest.skip("tests/experiments/test_harness.py calls lm_eval on a tiny task instead")
    monkeypatch.chdir(place)
    if not torch.cuda.is_available():
        on_cpu = partialmethod(flare.Recipe.training_arguments, use_cpu=True, bf16=False, **_SMALL)
        monkeypatch.setattr(flare.Recipe, "training_arguments", on_cpu)
    names = {"__name__": "__main__", **SETUPS.get(page.name, dict)()}
    for number, code in enumerate(blocks(page, "python"), 1):
        names |= {"base": task_model("bert"), "model": task_model("bert")} if page.name == "recipes.md" else {}
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)
    CHECKS.get(page.name, lambda names: None)(names)


@pytest.mark.parametrize("page", pages_with("diff"), ids=lambda page: page.name)
def test_both_sides_of_a_diff_are_python(page: Path) -> None:
    for code in blocks(page, "diff"):
        for other_side in "+-":
            lines = [line[2:] for line in code.splitlines() if not line.startswith(other_side)]
            assert lines and ast.parse("\n".join(lines))


# --- commands and files -----------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """Return each command of a page as a list of words, without comments and with "..." replaced by options."""
    lines_of_words = []
    for code in blocks(page, "bash"):
        for line in re.sub(r"\\\n", " ", code).splitlines():
            for name, options in OPTIONS_FOR_DOTS.items():
                line = re.sub(rf"^(flare {name} .*?)\.\.\.", rf"\1{options}", line)
            words = shlex.split(line, comments=True)
            if words:
                lines_of_words.append(words)
    return lines_of_words


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which each command, instead of running, appends its settings.

    `flare report` appends its folders.
    """
    seen: list[Any] = []
    for name in ("runs.train.run_train", "runs.finetune.run_finetune", "runs.evaluate.run_evaluate"):
        monkeypatch.setattr(f"flare.experiments.{name}", lambda settings, print_fn: seen.append(settings))
    monkeypatch.setattr("flare.experiments.check.run.run_check", lambda settings, print_fn: seen.append(settings))
    monkeypatch.setattr(
        "flare.experiments.prediction.run.run_predict", lambda settings, print_fn: seen.append(settings)
    )
    monkeypatch.setattr("flare.experiments.translation.run_translate", lambda settings, print_fn: seen.append(settings))
    monkeypatch.setattr("flare.experiments.report.write_report", lambda *folders, **options: seen.append(folders))
    return seen


def check_command(words: list[str], called: list[Any]) -> None:
    while "=" in words[0]:  # environment variables before the command
        words = words[1:]
    if words[:2] == ["accelerate", "launch"]:
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file() and (ROOT / words[-1]).is_file()
            return
        words = words[words.index("-m") + 1 :]
    if words[0] == "flare" and words[1] != "bench" and "news.yaml" not in words:  # test_own_data_page.py runs news.yaml
        before = len(called)
        assert main(words[1:]) == 0 and len(called) == before + 1, words
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[:2] == ["pip", "install"] or words[:3] == ["python", "-m", "pip"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words:
            assert set(re.findall(r"\w+", word.partition("[")[2])) <= set(extras), words
            assert not word.endswith(".txt") or (ROOT / word).is_file(), words
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), words
    else:
        assert words[0] in ("flare", "pytest", "curl", "uvicorn", "cd", "git", "kernel-builder"), words


@pytest.mark.parametrize("page", pages_with("bash"), ids=lambda page: page.name)
def test_commands_are_accepted(page: Path, called: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        check_command(words, called)


@pytest.mark.parametrize("page", pages_with("yaml"), ids=lambda page: page.name)
def test_configurations_are_accepted(page: Path, called: list[Any], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "yaml"):
        values = yaml.safe_load(code)
        if page.name == "harness.md":  # a task of lm-evaluation-harness, which may not be installed
            assert {"task", "dataset_path", "output_type"} <= set(values)
            continue
        Path("config.yaml").write_text(code, encoding="utf-8")
        assert main(["train", "--config", "config.yaml"]) == 0
        assert called[-1].task == values["task"]
