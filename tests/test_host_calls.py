"""Python's work in a training step: calls per block compared with PEFT's, and the files that run.

Both are counted on a CPU, on the kernels' path without the launches (benchmarks/host_calls.py).
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="counting on the kernels' path needs the package triton")

from flare_kernels.testing import launches_left_out

ROOT = Path(__file__).resolve().parents[1]
#: The versions for which the counts hold; other versions make other calls.
NEWEST = {"torch": (2, 13), "transformers": (5, 23)}
#: Launches of one block: (of stack_kernel, of each other kernel). Query and value: A and B are stacked, then one for
#: each step of both. mT5: an encoder's and a decoder's self-attention, and its cross-attention's query and value apart.
LAUNCHES = {"xlmr": (2, 1), "llama": (2, 1), "mt5": (4, 4)}
OTHERS = ("shrink_kernel", "expand_kernel", "grad_bottleneck_kernel", "grad_weight_kernel")
PRIMITIVES = ("flare_kernels/triton_ops/", "flare_kernels/torch_ops.py")
#: Files between the batch and dA, next to the primitives.
MOST_FILES = 10


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import benchmarks/host_calls.py; benchmarks/ is not a package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("host_calls")


def shape_of(family: str) -> Any:
    shapes = importlib.import_module("shapes")
    return replace(next(s for s in shapes.host("tiny") if s.model.family == family), depth=12)


@pytest.mark.parametrize("family", LAUNCHES)
def test_calls_per_block_are_at_most_pefts(host: Any, family: str) -> None:
    """Plain LoRA makes at most PEFT's calls; FLARE also those of a frozen forward; with a warm cache, ten more."""
    for name, least in NEWEST.items():
        if tuple(int(part) for part in version(name).split(".")[:2]) < least:
            pytest.skip(f"counts are settled for {name} {least[0]}.{least[1]} or newer, this is {version(name)}")
    with launches_left_out() as names:
        shape = shape_of(family)
        found = {v: host.per_block(v, shape, names) for v in ("frozen", "peft", "lora", "flare", "flare-warm")}
    calls = {variant: each.calls for variant, each in found.items()}
    assert 0 < calls["frozen"] < calls["peft"], calls
    assert found["frozen"].kernels == found["peft"].kernels == {}
    stacked, others = LAUNCHES[family]
    for variant in ("lora", "flare", "flare-warm"):
        kernels = {"stack_kernel": stacked, **dict.fromkeys(OTHERS, others)}
        assert found[variant].kernels == kernels, f"{variant}: other launches than those of the training kernels"
    assert calls["lora"] <= calls["peft"], calls
    assert calls["flare"] <= calls["peft"] + calls["frozen"], calls
    assert calls["flare-warm"] <= calls["peft"] + 10, calls


def test_the_counter_sees_python_and_c_calls_and_names_the_files(host: Any) -> None:
    from flare_kernels import fusion

    def two() -> int:
        return len("a")

    before = sys.getprofile()
    with host.watching_host() as none:
        pass
    with host.watching_host() as seen:
        two()
        two()
    assert seen.calls - none.calls == 4 and seen.files == []
    with host.watching_host() as seen:
        fusion.get_fusion("add_relu")
    assert seen.files == ["flare_kernels/fusion.py"]
    assert sys.getprofile() is before


# --- files ------------------------------------------------------------------------------------------------------------


def files_of(host: Any, variant: str) -> list[str]:
    """Return the files that run between the collator's batch and dA in a warm step, in order of their first call."""
    with launches_left_out():
        step = host.steps_of(shape_of("xlmr"), torch.device("cpu"), (variant,))[variant].warm_up()
        with host.watching_host() as seen:
            step.run()
    assert any(name.startswith(PRIMITIVES) for name in seen.files), "the step ran no primitive"
    return [name for name in seen.files if not name.startswith(PRIMITIVES)]


def listed() -> tuple[list[str], list[str]]:
    """Return the numbered files in CONTRIBUTING.md's section on a step, and those of a warm cache."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = re.search(r"^## The path of a training step\n(.*?)^## ", text, re.M | re.S)
    assert section is not None, "CONTRIBUTING.md has no section on the path of a training step"
    numbered = re.findall(r"^\d+\. `([^`]+)`: \w", section[1], re.M)
    return numbered, re.findall(r"^- `([^`]+)`: \w", section[1], re.M)


def test_contributing_lists_the_files_of_a_step_in_order(host: Any) -> None:
    path, of_cache = listed()
    assert files_of(host, "flare") == path
    lora = files_of(host, "lora")
    assert lora == [name for name in path if name in lora], "plain LoRA runs a part of the same path"
    warm = files_of(host, "flare-warm")
    assert [name for name in warm if name not in path] == of_cache
    assert [name for name in warm if name in path] == [name for name in path if name in warm]


@pytest.mark.parametrize("variant", ["lora", "flare"])
def test_a_step_runs_few_files(host: Any, variant: str) -> None:
    files = files_of(host, variant)
    assert len(files) <= MOST_FILES, f"{len(files)} files run between the batch and dA: {', '.join(files)}"
