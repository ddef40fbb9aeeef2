"""flare info: what this machine can run, and the reasons for what it cannot run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from flare.cli import main
from flare.experiments.commands import capabilities


def without(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> dict[str, capabilities.Capability]:
    """Return the capabilities if some packages are not installed and there is no CUDA device."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else find_spec(name, *a))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return {one.name: one for one in capabilities.capabilities()}


@pytest.mark.parametrize(
    ("package", "name", "words"),
    [
        ("bitsandbytes", "qlora, qlora-int8", "bitsandbytes is missing: pip install 'flare-kernels[bnb]'"),
        ("matplotlib", "figures of flare report", "matplotlib is missing: pip install 'flare-kernels[experiments]'"),
        ("sklearn", "flare finetune, train, evaluate", "pip install 'flare-kernels[experiments]'"),
        ("seqeval", "--task token-classification", "pip install 'flare-kernels[experiments]'"),
        ("hqq", "base in HQQ", "hqq is missing: pip install hqq"),
        ("gptqmodel", "base in GPTQ, AWQ", "gptqmodel is missing: pip install gptqmodel"),
        ("kernels", "base in fine-grained float8", "it needs a CUDA device; kernels is missing"),
        ("datasets", "data sets from the hub", "datasets is missing: pip install 'flare-kernels[experiments]'"),
        (
            "datasets",
            "flare finetune, train, evaluate",
            "packages of the extra 'experiments' are missing (datasets): pip install",
        ),
        (
            "tqdm",
            "every command except flare info",
            "packages of the extra 'experiments' are missing (tqdm): pip install",
        ),
        ("pytest_benchmark", "flare bench", "pytest-benchmark is missing: pip install 'flare-kernels[dev]'"),
    ],
)
def test_a_missing_package_is_named_with_its_install_command(monkeypatch, package: str, name: str, words: str) -> None:
    one = without(monkeypatch, package)[name]
    assert not one.available and words in one.reason
    assert str(one).startswith("no: ")
    if package in capabilities.OPTIONAL:
        assert capabilities.optional_versions()[package] == "not installed"


def test_without_a_device_the_plain_form_runs(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = without(monkeypatch)
    assert "no CUDA device" in found["Triton kernels"].reason and "plain PyTorch runs" in found["Triton kernels"].reason
    assert not found["flare bench --tune"].available
    assert "small models" in found["flare-mt"].reason


def test_a_missing_sentencepiece_is_only_a_remark(monkeypatch) -> None:
    one = without(monkeypatch, "sentencepiece")["flare-mt"]
    assert one.available and "pip install sentencepiece" in one.reason


def test_caches_follow_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = capabilities.caches()
    assert found["hub models and data"] == str(tmp_path)
    assert found["demo base, launch tables"] == f"{tmp_path / 'cache' / 'flare-kernels'} (does not exist yet)"


def test_info_prints_all_of_it(capsys) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for words in ("bitsandbytes", "liger-kernel", "what runs here", "qlora", "flare bench --tune", "caches"):
        assert words in out
