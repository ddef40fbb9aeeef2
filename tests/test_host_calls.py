"""Count Python's work in a training step: calls per block compared with PEFT's layers, and the files that run.

The step runs on a CPU. It takes the code path of the Triton kernels but leaves out their launches
(benchmarks/host_calls.py).
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
#: The first versions for which the counts hold. Older versions make a different number of calls.
COUNTS_HOLD_FROM = {"torch": (2, 13), "transformers": (5, 23)}
#: Launches in one block: (launches of stack_kernel, launches of each of OTHER_KERNELS). A self-attention stacks A and
#: B, and runs each of OTHER_KERNELS once for query and value together. For mT5, a block is an encoder block together
#: with a decoder block: two self-attentions, and a cross-attention that stacks nothing and runs each of OTHER_KERNELS
#: once for the query and once for the value.
LAUNCHES = {"xlmr": (2, 1), "llama": (2, 1), "mt5": (4, 4)}
OTHER_KERNELS = ("shrink_kernel", "expand_kernel", "grad_bottleneck_kernel", "grad_weight_kernel")
#: Files that run or replace the kernels.
PRIMITIVES = ("flare_kernels/triton_ops/", "flare_kernels/torch_ops.py")
#: Maximum number of files that run between the batch and the gradient of A (dA), without the primitives.
MAX_FILES = 10


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import benchmarks/host_calls.py; benchmarks/ is not a package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("host_calls")


def shape_of(family: str) -> Any:
    shapes = importlib.import_module("shapes")
    return replace(next(s for s in shapes.host("tiny") if s.model.family == family), depth=12)


@pytest.mark.parametrize("family", LAUNCHES)
def test_calls_per_block_stay_within_limits_relative_to_peft(host: Any, family: str) -> None:
    """Plain LoRA makes at most as many calls as PEFT.

    FLARE makes at most as many calls as PEFT and a frozen forward pass together. With a warm cache, it makes at most
    ten calls more than PEFT.
    """
    for name, least in COUNTS_HOLD_FROM.items():
        if tuple(int(part) for part in version(name).split(".")[:2]) < least:
            pytest.skip(f"the counts hold for {name} {least[0]}.{least[1]} or newer; this is {version(name)}")
    with launches_left_out() as names:
        shape = shape_of(family)
        blocks = {v: host.per_block(v, shape, names) for v in ("frozen", "peft", "lora", "flare", "flare-warm")}
    calls = {variant: each.calls for variant, each in blocks.items()}
    assert 0 < calls["frozen"] < calls["peft"], calls
    assert blocks["frozen"].kernels == blocks["peft"].kernels == {}
    stacked, others = LAUNCHES[family]
    for variant in ("lora", "flare", "flare-warm"):
        kernels = {"stack_kernel": stacked, **dict.fromkeys(OTHER_KERNELS, others)}
        assert blocks[variant].kernels == kernels, f"{variant}: the launches differ from those of the training kernels"
    assert calls["lora"] <= calls["peft"], calls
    assert calls["flare"] <= calls["peft"] + calls["frozen"], calls
    assert calls["flare-warm"] <= calls["peft"] + 10, calls


def test_the_counter_sees_python_and_c_calls_and_names_the_files(host: Any) -> None:
    from flare_kernels import fusion

    def two() -> int:
        return len("a")

    before = sys.getprofile()
    with host.watching_host() as nothing:
        pass
    with host.watching_host() as seen:
        two()
        two()
    assert seen.calls - nothing.calls == 4 and seen.files == []
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


def files_in_contributing() -> tuple[list[str], list[str]]:
    """Return the files of a step as CONTRIBUTING.md numbers them, and the further files of a step with a warm cache."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = re.search(r"^## The path of a training step\n(.*?)^## ", text, re.M | re.S)
    assert section is not None, "CONTRIBUTING.md has no section on the path of a training step"
    numbered = re.findall(r"^\d+\. `([^`]+)`: \w", section[1], re.M)
    return numbered, re.findall(r"^- `([^`]+)`: \w", section[1], re.M)


def test_contributing_lists_the_files_of_a_step_in_order(host: Any) -> None:
    path, of_cache = files_in_contributing()
    assert files_of(host, "flare") == path
    lora = files_of(host, "lora")
    assert lora == [name for name in path if name in lora], "plain LoRA runs a part of the same path"
    warm = files_of(host, "flare-warm")
    assert [name for name in warm if name not in path] == of_cache
    assert [name for name in warm if name in path] == [name for name in path if name in warm]


@pytest.mark.parametrize("variant", ["lora", "flare"])
def test_a_step_runs_few_files(host: Any, variant: str) -> None:
    files = files_of(host, variant)
    assert len(files) <= MAX_FILES, f"{len(files)} files run between the batch and dA: {', '.join(files)}"
