"""flare info: what this machine can run, and what it says where something is missing."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from flare.cli import main
from flare.experiments.utils import capabilities


def without(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> dict[str, capabilities.Capability]:
    """The capabilities where some packages are not installed and there is no CUDA device."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else found(name, *a))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return {one.name: one for one in capabilities.capabilities()}


@pytest.mark.parametrize(
    ("package", "name", "words"),
    [
        ("bitsandbytes", "qlora, qlora-int8", "bitsandbytes is missing: pip install 'flare-kernels[bnb]'"),
        ("matplotlib", "pictures of flare report", "matplotlib is missing: pip install 'flare-kernels[experiments]'"),
        ("sklearn", "flare finetune, train, evaluate", "pip install 'flare-kernels[experiments]'"),
        ("seqeval", "--task token-classification", "pip install 'flare-kernels[experiments]'"),
        ("hqq", "base in HQQ", "hqq is missing: pip install hqq"),
        ("gptqmodel", "base in GPTQ, AWQ", "gptqmodel is missing: pip install gptqmodel"),
        ("kernels", "base in fine-grained float8", "no CUDA device, which it needs; kernels is missing"),
        ("datasets", "data sets from the hub", "datasets is missing: pip install datasets"),
        ("pytest_benchmark", "flare bench", "pytest-benchmark is missing: pip install 'flare-kernels[dev]'"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package: str, name: str, words: str) -> None:
    one = without(monkeypatch, package)[name]
    assert not one.here and words in one.reason
    assert str(one).startswith("no: ")
    if package in capabilities.OPTIONAL:
        assert capabilities.optional_versions()[package] == "not installed"


def test_without_a_device_the_plain_form_runs(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = without(monkeypatch)
    assert "no CUDA device" in found["Triton kernels"].reason and "PyTorch form runs" in found["Triton kernels"].reason
    assert not found["flare bench --tune"].here
    assert "small models" in found["flare-mt"].reason


def test_a_missing_sentencepiece_is_no_refusal(monkeypatch) -> None:
    one = without(monkeypatch, "sentencepiece")["flare-mt"]
    assert one.here and "pip install sentencepiece" in one.reason


def test_caches_follow_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = capabilities.caches()
    assert found["hub models and data"] == str(tmp_path)
    assert found["demo base, launch tables"] == f"{tmp_path / 'cache' / 'flare-kernels'} (not there yet)"


def test_info_prints_all_of_it(capsys) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for words in ("bitsandbytes", "liger-kernel", "what runs here", "qlora", "flare bench --tune", "caches"):
        assert words in out
