"""Test that several threads can use one model."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import tiny
import torch
from site_models import fused, is_empty, plain

from flare.source.context import THREAD
from flare.source.source_pass import ModuleSwitches


def in_threads(*runs: Callable[[], None]) -> None:
    """Run functions in concurrent threads, and raise the first error of a thread."""
    barrier, errors = threading.Barrier(len(runs)), []

    def run(one: Callable[[], None]) -> None:
        try:
            barrier.wait()
            one()
            assert is_empty(THREAD.slot)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def frequent_switches(monkeypatch) -> None:
    """Make Python switch threads every microsecond instead of every five milliseconds."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("fusion", [None, "add_relu"])
def test_threads_share_a_model_in_eval_mode(family, fusion, frequent_switches) -> None:
    """Each thread has two batches, and the first batch again without its source. BERT also has a trained head."""
    model = fused(family, fusion=fusion, dtype=torch.float64).eval()
    if family == "bert":
        assert any(type(m).__name__ == "ModulesToSaveWrapper" for m in model.modules())
        torch.nn.init.normal_(model.get_submodule("base_model.model.classifier.modules_to_save.default").weight)
    state = {path: module.training for path, module in model.named_modules()}

    def forwards(seed: int) -> Callable[[], None]:
        batches = [tiny.batch(family, m=9 + seed, seed=10 * seed + i, source=fusion is not None) for i in range(2)]
        batches.append(plain(batches[0]))
        with torch.no_grad():
            expected = [model(**inputs).logits for inputs in batches]

        def run() -> None:
            with torch.no_grad():
                for _ in range(21):
                    for inputs, logits in zip(batches, expected, strict=True):
                        assert torch.equal(model(**inputs).logits, logits)

        return run

    in_threads(*map(forwards, range(3)))
    assert is_empty(THREAD.slot)
    assert {path: module.training for path, module in model.named_modules()} == state
    assert not any(getattr(module, "_disable_adapters", False) for module in model.modules())
    assert not any(one._passes for m in model.modules() for one in vars(m).values() if isinstance(one, ModuleSwitches))


@pytest.mark.parametrize("fusion", [None, "add_relu"])
def test_threads_compute_gradients_in_train_mode(fusion, frequent_switches) -> None:
    model = fused("llama", fusion=fusion, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def steps(seed: int) -> Callable[[], None]:
        inputs = tiny.batch("llama", m=9 + seed, seed=seed, source=fusion is not None)
        expected = torch.autograd.grad(model(**inputs).loss, parameters)

        def run() -> None:
            for _ in range(20):
                actual = torch.autograd.grad(model(**inputs).loss, parameters)
                assert all(map(torch.equal, actual, expected))

        return run

    in_threads(steps(0), steps(1))
    assert is_empty(THREAD.slot) and all(module.training for module in model.modules())
    assert not any(getattr(module, "_disable_adapters", False) for module in model.modules())
