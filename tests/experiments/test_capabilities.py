"""Tests of `flare info`, which lists what this machine can run, and why it cannot run the rest."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from flare.cli import main
from flare.experiments.commands import capabilities


def without(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> dict[str, capabilities.Capability]:
    """Return the capabilities by name, as if the hidden packages were not installed and there were no CUDA device."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else find_spec(name, *a))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return {capability.name: capability for capability in capabilities.capabilities()}


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
    capability = without(monkeypatch, package)[name]
    assert not capability.available and words in capability.reason
    assert str(capability).startswith("no: ")
    if package in capabilities.OPTIONAL:
        assert capabilities.optional_versions()[package] == "not installed"


def test_without_a_cuda_device_the_reasons_say_what_runs_instead(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    by_name = without(monkeypatch)
    reason = by_name["Triton kernels"].reason
    assert "no CUDA device" in reason and "plain PyTorch runs" in reason
    assert not by_name["flare bench --tune"].available
    assert "small models" in by_name["flare-mt"].reason


def test_flare_mt_is_available_without_sentencepiece(monkeypatch) -> None:
    capability = without(monkeypatch, "sentencepiece")["flare-mt"]
    assert capability.available and "pip install sentencepiece" in capability.reason


def test_cache_folders_follow_environment_variables(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = capabilities.caches()
    assert folders["hub models and data"] == str(tmp_path)
    assert folders["demo base, launch tables"] == f"{tmp_path / 'cache' / 'flare-kernels'} (does not exist yet)"


def test_info_prints_packages_capabilities_and_cache_folders(capsys) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for words in ("bitsandbytes", "liger-kernel", "what runs here", "qlora", "flare bench --tune", "caches"):
        assert words in out
