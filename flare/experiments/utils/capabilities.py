"""What this machine can run, what it cannot, and what would change that: the second half of `flare info`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from flare_kernels import backends

#: Packages that are not needed for everything: name on the index -> name to import.
OPTIONAL = {
    "datasets": "datasets",
    "bitsandbytes": "bitsandbytes",
    "matplotlib": "matplotlib",
    "sentencepiece": "sentencepiece",
    "sacrebleu": "sacrebleu",
    "liger-kernel": "liger_kernel",
    "trl": "trl",
}

#: Formats of quantised bases beside bitsandbytes' (docs/bases.md): the format, the module and the package it needs,
#: and whether it runs on CUDA devices alone.
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
    """Something that can be run here or not, with what to know about it or what it lacks."""

    name: str
    here: bool
    reason: str

    def __str__(self) -> str:
        return ("yes" if self.here else "no") + (f": {self.reason}" if self.reason else "")


def optional_versions() -> dict[str, str]:
    """Versions of the optional packages, "not installed" where one is missing."""
    found = {}
    for name, module in OPTIONAL.items():
        found[name] = "not installed"
        if _installed(module):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "version unknown"
    return found


def capabilities() -> list[Capability]:
    """Every method and command with whether it can run here."""
    return [capability for make in _ALL for capability in make()]


def caches() -> dict[str, str]:
    """Folders that things are kept in between runs: what for -> path, and whether it is there."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folders = {
        "hub models and data": _hub_cache(home),
        "demo base, launch tables": home / "flare-kernels",
        "compiled Triton kernels": Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser(),
    }
    return {name: f"{path}" + ("" if path.is_dir() else " (not there yet)") for name, path in folders.items()}


def lines() -> list[str]:
    """All of it as lines for the screen."""
    shown = [f"{name:<15}{version}" for name, version in optional_versions().items()]
    shown.append("what runs here")
    shown += [f"  {one.name:<35}{one}" for one in capabilities()]
    shown.append("caches")
    return shown + [f"  {name:<35}{path}" for name, path in caches().items()]


# --- one function for each kind of requirement ------------------------------------------------------------------------


def _kernels() -> Iterable[Capability]:
    triton = backends()["triton"]
    reason = "" if triton.available else f"{triton.reason}; the plain PyTorch form runs instead"
    yield Capability("Triton kernels", triton.available, reason)
    if torch.cuda.is_available():
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Capability("bfloat16 training", capable, "" if capable else "the GPU has none; use --fp16, or float32")


def _methods() -> Iterable[Capability]:
    slow = "" if torch.cuda.is_available() else "no CUDA device: on a CPU, small models only"
    yield Capability("flare, lora, input-fusion, x-mixup", True, slow)
    yield Capability("flare-mt", True, "; ".join(filter(None, (slow, _sentencepiece("an MT encoder")))))


def _quantized() -> Iterable[Capability]:
    names = "qlora, qlora-int8"
    if not _installed("bitsandbytes"):
        yield Capability(names, False, "bitsandbytes is missing: pip install 'flare-kernels[bnb]'")
    elif torch.cuda.is_available():
        yield Capability(names, True, "")
    else:
        yield Capability(names, True, "no CUDA device: quantised bases work on a CPU, slowly")
    for name, module, package, needs_cuda in FORMATS:
        missing = "" if _installed(module) else f"{module} is missing: pip install {package}"
        lacking = "no CUDA device, which it needs" if needs_cuda and not torch.cuda.is_available() else ""
        yield Capability(f"base in {name}", not (missing or lacking), "; ".join(filter(None, (lacking, missing))))


def _data() -> Iterable[Capability]:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    only = "HF_HUB_OFFLINE is set: only what the cache holds" if offline else ""
    yield Capability("models from the hub", True, only)
    if _installed("datasets"):
        yield Capability("data sets from the hub", True, only)
    else:
        yield Capability("data sets from the hub", False, "datasets is missing: pip install datasets (CSV files work)")


def _commands() -> Iterable[Capability]:
    need = "needs a sequence-to-sequence MT model"
    yield Capability("flare translate", True, _sentencepiece(need) or need)
    missing = "scikit-learn is missing, which computes their metrics: pip install 'flare-kernels[experiments]'"
    scores = _installed("sklearn")
    yield Capability("flare finetune, train, evaluate", scores, "" if scores else missing)
    entities = _installed("seqeval")
    missing = "seqeval is missing, which computes entity F1: pip install 'flare-kernels[experiments]'"
    yield Capability("--task token-classification", entities, "" if entities else missing)
    plots = _installed("matplotlib")
    missing = "matplotlib is missing: pip install 'flare-kernels[experiments]' (tables are written without it)"
    yield Capability("pictures of flare report", plots, "" if plots else missing)
    if not (Path(__file__).resolve().parents[3] / "benchmarks").is_dir():
        yield Capability("flare bench", False, "the benchmarks are in the repository, not in the installed package")
    else:
        there = _installed("pytest_benchmark")
        missing = "pytest-benchmark is missing: pip install 'flare-kernels[dev]'"
        yield Capability("flare bench", there, "" if there else missing)
    cuda = torch.cuda.is_available()
    yield Capability("flare bench --tune", cuda, "" if cuda else "no CUDA device; launches follow the general rule")


_ALL: tuple[Callable[[], Iterable[Capability]], ...] = (_kernels, _methods, _quantized, _data, _commands)


def _sentencepiece(what: str) -> str:
    if _installed("sentencepiece"):
        return ""
    return f"{what}; sentencepiece is missing, which models without a tokenizer.json need: pip install sentencepiece"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _hub_cache(home: Path) -> Path:
    for variable, below in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / below
    return home / "huggingface" / "hub"
