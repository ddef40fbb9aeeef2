"""For `flare info`: list optional packages, features (and whether this machine can run them), and cache folders."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from flare_kernels import backends

from ..utils.extra import INSTALL, installed, missing

#: Optional packages: name on the package index -> name to import.
OPTIONAL = {
    "datasets": "datasets",
    "tqdm": "tqdm",
    "bitsandbytes": "bitsandbytes",
    "matplotlib": "matplotlib",
    "seqeval": "seqeval",
    "sentencepiece": "sentencepiece",
    "sacrebleu": "sacrebleu",
    "liger-kernel": "liger_kernel",
    "trl": "trl",
}

#: Formats of quantised bases in addition to bitsandbytes (docs/bases.md), as (name, module that the format needs,
#: package to install for this module, whether the format needs a CUDA device).
FORMATS = (
    ("GPTQ, AWQ", "gptqmodel", "gptqmodel", False),
    ("AQLM", "aqlm", "'aqlm[gpu]'", True),
    ("EETQ", "eetq", "eetq", True),
    ("HQQ", "hqq", "hqq", False),
    ("torchao int8, int4, float8", "torchao", "torchao", False),
    ("INC float8 (Gaudi)", "neural_compressor", "'neural-compressor[pt]'", False),
    ("fine-grained float8", "kernels", "kernels", True),
    ("TransformerEngine", "transformer_engine", "'transformer-engine[pytorch]'", True),
)


class Capability(NamedTuple):
    """A feature of this package.

    name: name of the feature.
    available: whether it can run on this machine.
    reason: why it cannot run, or a remark about how it runs; may be empty.
    """

    name: str
    available: bool
    reason: str

    def __str__(self) -> str:
        return ("yes" if self.available else "no") + (f": {self.reason}" if self.reason else "")


def optional_versions() -> dict[str, str]:
    """Return package -> version of the optional packages.

    The version is "not installed" if the package is missing, and "version unknown" if it has no metadata.
    """
    versions = {}
    for name, module in OPTIONAL.items():
        versions[name] = "not installed"
        if installed(module):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "version unknown"
    return versions


def capabilities() -> list[Capability]:
    """Return every feature, with whether it can run on this machine."""
    groups = (_kernels, _methods, _quantized, _data, _commands)
    return [capability for group in groups for capability in group()]


def caches() -> dict[str, str]:
    """Return purpose -> path of the cache folders, with a remark after a path that does not exist yet."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folders = {
        "hub models and data": _hub_cache(home),
        "demo base, launch tables": home / "flare-kernels",
        "compiled Triton kernels": Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser(),
    }
    return {name: f"{path}" + ("" if path.is_dir() else " (does not exist yet)") for name, path in folders.items()}


def lines() -> list[str]:
    """Return optional versions, features and cache folders as lines to print."""
    shown = [f"{name:<15}{version}" for name, version in optional_versions().items()]
    shown.append("what runs here")
    shown += [f"  {one.name:<35}{one}" for one in capabilities()]
    shown.append("caches")
    return shown + [f"  {name:<35}{path}" for name, path in caches().items()]


# --- features, one function per group ---------------------------------------------------------------------------------


def _kernels() -> Iterable[Capability]:
    triton = backends()["triton"]
    reason = "" if triton.available else f"{triton.reason}; plain PyTorch runs instead"
    yield Capability("Triton kernels", triton.available, reason)
    if torch.cuda.is_available():
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Capability(
            "bfloat16 training", capable, "" if capable else "the GPU does not support bfloat16; use --fp16 or float32"
        )


def _methods() -> Iterable[Capability]:
    slow = "" if torch.cuda.is_available() else "there is no CUDA device, so only small models are fast enough"
    yield Capability("flare, lora, input-fusion, x-mixup", True, slow)
    yield Capability("flare-mt", True, "; ".join(filter(None, (slow, _sentencepiece("needs an MT encoder")))))


def _quantized() -> Iterable[Capability]:
    names = "qlora, qlora-int8"
    if not installed("bitsandbytes"):
        yield Capability(names, False, "bitsandbytes is missing: pip install 'flare-kernels[bnb]'")
    elif torch.cuda.is_available():
        yield Capability(names, True, "")
    else:
        yield Capability(names, True, "there is no CUDA device, and quantised bases are slow on a CPU")
    for name, module, package, needs_cuda in FORMATS:
        reasons = ["it needs a CUDA device"] if needs_cuda and not torch.cuda.is_available() else []
        reasons += [] if installed(module) else [f"{module} is missing: pip install {package}"]
        yield Capability(f"base in {name}", not reasons, "; ".join(reasons))


def _data() -> Iterable[Capability]:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    remark = "HF_HUB_OFFLINE is set, so only models and data in the cache can be used" if offline else ""
    yield Capability("models from the hub", True, remark)
    without = "" if installed("datasets") else f"datasets is missing: {INSTALL}"
    yield Capability("data sets from the hub", not without, without or remark)


def _commands() -> Iterable[Capability]:
    absent = f"packages of the extra 'experiments' are missing ({', '.join(missing())}): {INSTALL}" if missing() else ""
    yield Capability("every command except flare info", not absent, absent)
    need = "needs a sequence-to-sequence MT model"
    yield Capability("flare translate", not absent, absent or _sentencepiece(need) or need)
    without = "" if installed("sklearn") else f"scikit-learn, which computes the metrics, is missing: {INSTALL}"
    yield Capability("flare finetune, train, evaluate", not (absent or without), absent or without)
    without = "" if installed("seqeval") else f"seqeval, which computes entity F1, is missing: {INSTALL}"
    yield Capability("--task token-classification", not (absent or without), absent or without)
    without = "" if installed("matplotlib") else f"matplotlib is missing: {INSTALL} (tables are written without it)"
    yield Capability("figures of flare report", not (absent or without), absent or without)
    if not (Path(__file__).resolve().parents[3] / "benchmarks").is_dir():
        without = "the benchmarks are in the repository, not in the installed package"
    else:
        without = (
            "" if installed("pytest_benchmark") else "pytest-benchmark is missing: pip install 'flare-kernels[dev]'"
        )
    yield Capability("flare bench", not (absent or without), absent or without)
    triton = backends()["triton"]
    without = "" if triton else str(triton)
    if not torch.cuda.is_available():
        without = "there is no CUDA device to tune for"
    yield Capability("flare bench --tune", not (absent or without), absent or without)


def _sentencepiece(need: str) -> str:
    """Return what a feature needs (`need`) and how to install sentencepiece, or "" if sentencepiece is installed."""
    if installed("sentencepiece"):
        return ""
    return f"{need}; sentencepiece, which models without a tokenizer.json need, is missing: pip install sentencepiece"


def _hub_cache(home: Path) -> Path:
    for variable, below in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / below
    return home / "huggingface" / "hub"
