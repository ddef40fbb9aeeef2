"""The README's script runs as printed, and uses its source."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch

from flare.source import source_pass

README = Path(__file__).parents[1] / "README.md"


def script() -> str:
    """The code block behind the marker."""
    found = re.search(r"<!-- tested: script -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, "the README has no tested script"
    return found.group(1)


def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> dict[str, torch.Tensor]:
    """The adapter that the code saves, run in a folder of its own from a fixed seed."""
    tmp_path.mkdir()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    return peft.utils.load_peft_weights(str(tmp_path / "out" / "adapter"), device="cpu")


def test_it_is_as_short_as_promised() -> None:
    statements = [line for line in script().splitlines() if line and not line.startswith((" ", "import", "from"))]
    assert len(statements) <= 10


def test_the_script_runs_and_its_source_reaches_the_weights(tmp_path, monkeypatch) -> None:
    passes = []
    begin = source_pass.FrozenPass.__init__
    monkeypatch.setattr(source_pass.FrozenPass, "__init__", lambda self, *a: passes.append(1) or begin(self, *a))
    weights = trained(tmp_path / "as printed", monkeypatch, script())
    assert len(passes) == 12, "one source pass in each of the 12 steps"
    # the same script with every source replaced by one token ends elsewhere
    other = trained(tmp_path / "no source", monkeypatch, script().replace("encode(p.source)", "encode('.')"))
    assert weights.keys() == other.keys()
    assert any(not torch.allclose(weights[name], other[name]) for name in weights if "lora_A" in name)
