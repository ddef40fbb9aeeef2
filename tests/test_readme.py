"""Test that the README's example runs and uses its source texts, and that links and names in the guides exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers

import flare
import flare.experiments.tasks
import flare_kernels
from flare.experiments.demo.base_model import build_tokenizer
from flare.source import source_pass

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def script() -> str:
    """Return the README's code block after the marker ``tested: script``."""
    match = re.search(r"<!-- tested: script -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert match, "the README has no tested script"
    return match.group(1)


def small_model(name: str, num_labels: int) -> transformers.PreTrainedModel:
    """Return a small random model in place of the README's pretrained model."""
    assert name == "FacebookAI/xlm-roberta-base"
    config = transformers.BertConfig(
        vocab_size=len(build_tokenizer()),
        num_labels=num_labels,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return transformers.BertForSequenceClassification(config)


def trained_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> dict[str, torch.Tensor]:
    """Run the code in a new folder from a fixed seed; return the weights of the adapter that it saves."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    return peft.utils.load_peft_weights(str(folder / "out" / "adapter"), device="cpu")


def test_the_example_runs_and_its_source_reaches_the_weights(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: build_tokenizer())
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", small_model)
    passes = []
    init = source_pass.FrozenPass.__init__
    monkeypatch.setattr(source_pass.FrozenPass, "__init__", lambda self, *a: passes.append(1) or init(self, *a))
    weights = trained_adapter(tmp_path / "as printed", monkeypatch, script())
    assert len(passes) == 11, "one source pass per step (10), and one for the prediction"
    assert re.search(r"\[[012] [012] [012]\]", capsys.readouterr().out), "a label for each of three texts is printed"
    # replacing every source by one token changes the trained weights
    without_source = script().replace("tokenizer(english)", "tokenizer('.')")
    other = trained_adapter(tmp_path / "no source", monkeypatch, without_source)
    assert weights.keys() == other.keys()
    assert any(not torch.allclose(weights[name], other[name]) for name in weights if "lora_A" in name)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= 1300
    assert len(script().splitlines()) <= 25


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing, f"{path.name} links to {missing}"


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_code_blocks_are_python_and_their_names_exist(path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    for code in blocks:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                package = {"flare": flare, "flare_kernels": flare_kernels}.get(node.value.id)
                assert package is None or hasattr(package, node.attr), f"{path.name}: {node.value.id}.{node.attr}"


def test_the_documentation_builds_without_warnings(tmp_path, monkeypatch) -> None:
    build = pytest.importorskip("mkdocs.commands.build", reason="the site needs the extra `docs`")
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)  # mkdocstrings resolves its paths from the working directory
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    build.build(config)
    reference = (tmp_path / "reference" / "index.html").read_text()
    for name in public_names():
        assert f'id="{name}"' in reference, f"{name} is not in the reference"


def public_names() -> list[str]:
    """Return the public names of both packages, of the baselines, and of the tasks."""
    packages = (flare, flare_kernels, flare.baselines, flare.experiments.tasks)
    names = [f"{package.__name__}.{name}" for package in packages for name in package.__all__ if name != "__version__"]
    return [*names, "flare.experiments.report.write_report"]


def test_the_reference_lists_every_public_name() -> None:
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(public_names()) - set(listed) == set(), "add these to docs/reference.md"
