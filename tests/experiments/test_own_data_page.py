"""Run the recipe of docs/own-data.md as printed, and its commands with options that make them quick.

The table of the page is filled with rows of the demo's corpus, and `flare report` is not run.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml
from experiment_data import write_bert

from flare.cli import main
from flare.experiments.demo.corpus import make_corpus
from flare.experiments.runs.records import find_runs

PAGE = Path(__file__).parents[2] / "docs" / "own-data.md"


def block(name: str) -> str:
    """Return the code block of the page that follows the comment `<!-- tested: NAME -->`."""
    match = re.search(rf"<!-- tested: {name} -->\n```\w*\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert match, f"the page has no code block after <!-- tested: {name} -->"
    return match[1]


def test_recipe_and_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    head, *rows = block("table").splitlines()
    assert all(row.count("\t") == head.count("\t") for row in rows)
    pairs, lines = make_corpus(train=44).train, [head]
    topics = dict(zip(sorted({pair.label for pair in pairs}), ("sport", "politics", "health"), strict=True))
    for number, pair in enumerate(pairs):
        split = "train" if number < 24 else "valid" if number < 32 else "test"
        cells = {"uid": pair.id, "english": pair.source, "hausa": pair.target, "topic": topics[pair.label]}
        lines.append("\t".join({**cells, "split": split}[name] for name in head.split("\t")))
    Path("news.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_bert(tmp_path / "model")
    recipe = block("recipe")
    Path("news.yaml").write_text(recipe, encoding="utf-8")
    quick = {
        "check": ["--model", "model", "--epochs", "1", "--steps", "1", "--seeds", "0"],
        "finetune": ["--model", "model", "--epochs", "1", "--seeds", "0", "--no-progress"],
        "train": ["--epochs", "1", "--seeds", "0", "--no-progress"],
        "evaluate": ["--seeds", "0", "--no-progress"],
    }
    for line in block("commands").splitlines():
        name, *words = shlex.split(line)[1:]
        if name != "report":
            assert main([name, *words, *quick[name]]) == 0, capsys.readouterr().err
    runs = {str(run.folder.relative_to("runs-news")): run for run in find_runs(Path("runs-news"))}
    assert set(runs) == {
        "base/seed-0",
        *(f"hausa/{name}/seed-0" for name in ("lora-r16", "flare-r16", "zero-shot", "translate-test")),
    }
    settings, recipe_options = runs["hausa/flare-r16/seed-0"].record.settings, yaml.safe_load(recipe)
    assert settings["metric"] == recipe_options["metric"] and settings["task_prompt"] == recipe_options["prompt"]
    assert settings["labels"] == ["health", "politics", "sport"] and settings["verbalizer"] == {"sport": "sports"}
    # an unknown option in the recipe file is an error
    Path("odd.yaml").write_text(recipe + "lable_column: topic\n", encoding="utf-8")
    for name in ("finetune", "evaluate"):
        assert main([name, "--config", "odd.yaml"]) == 2
        assert "lable_column is not known; did you mean label_column" in capsys.readouterr().err
