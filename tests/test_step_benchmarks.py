"""Test the benchmarks of whole training steps: batches, checks, methods that cannot run, Liger's kernels, the summary.

A row of results has the measurements of one method, such as "flare" or "input-fusion", at one size.
"""

from __future__ import annotations

import copy
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_modules import module

from flare_kernels import torch_ops

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


@pytest.fixture(autouse=True)
def _tiny_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLARE_BENCH_GRID", "tiny")


def step_shape(family: str, **changes: Any) -> Any:
    full = next(s for s in module("shapes").steps("tiny") if s.model.family == family and not s.padded)
    return replace(full, **changes)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_padded_texts_have_padding_on_the_right_and_masks(rows: int) -> None:
    batch = module("batches").batch_of(step_shape("llama", B=rows, m=64, padded=True), CPU)
    for prefix in ("", "source_"):
        mask = batch.pair[prefix + "attention_mask"]
        lengths = mask.sum(1)
        assert torch.equal(mask, (torch.arange(64) < lengths[:, None]).long()), "padding is on the right"
        assert lengths.max() == 64, "the longest row has no padding"
        assert rows == 1 or 0.25 <= 1 - mask.float().mean() <= 0.5
        assert (batch.pair[prefix + "input_ids"][mask == 0] == 0).all()
    assert ((batch.pair["labels"] == -100) == (batch.pair["attention_mask"] == 0)).all()
    assert batch.tokens == batch.pair["attention_mask"].sum()


def test_batches_without_padding_have_no_mask() -> None:
    batch = module("batches").batch_of(step_shape("xlmr"), CPU)
    assert set(batch.pair) == {"input_ids", "source_input_ids", "labels"}
    assert set(batch.joined) == {"input_ids", "labels"} and batch.tokens == batch.pair["input_ids"].numel()
    assert torch.equal(
        batch.joined["input_ids"], torch.cat([batch.pair["source_input_ids"], batch.pair["input_ids"]], 1)
    )


def test_joined_texts_are_source_then_target_without_padding_between() -> None:
    batch = module("batches").batch_of(step_shape("llama", B=4, m=32, padded=True), CPU)
    pair, joined = batch.pair, batch.joined
    longest = 0
    for row in range(4):
        source = pair["source_input_ids"][row][pair["source_attention_mask"][row] == 1]
        target = pair["input_ids"][row][pair["attention_mask"][row] == 1]
        length = len(source) + len(target)
        longest = max(longest, length)
        assert torch.equal(joined["input_ids"][row, :length], torch.cat([source, target]))
        assert joined["attention_mask"][row].tolist() == [1] * length + [0] * (joined["input_ids"].shape[1] - length)
        labels = joined["labels"][row]
        assert torch.equal(labels[len(source) : length], target)
        assert (labels[: len(source)] == -100).all() and (labels[length:] == -100).all()
    assert joined["input_ids"].shape[1] == longest < 64, "padded to the longest row only"


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_check_on_two_blocks_detects_a_wrong_kernel(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_ops.grad_weight
    monkeypatch.setattr(torch_ops, "grad_weight", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    shape = step_shape("llama", depth=3, padded=padded)
    errors = module("step_gate").small_errors(shape, ("peft-lora", "input-fusion", "flare", "authors"), CPU)
    wrong = {method for method, error in errors.items() if isinstance(error, module("gate").WrongResult)}
    assert wrong == {"input-fusion", "flare"}, errors
    assert all(0 <= errors[method] < 1e-5 for method in ("peft-lora", "authors")), errors


def test_a_step_is_checked_at_full_size_with_the_initial_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """``count`` runs optimizer steps, which change the adapters. A later ``check`` must use the initial adapters."""
    steps = module("steps")
    monkeypatch.setattr(steps, "methods_of", lambda shape: ("frozen", "lora", "flare"))
    variants = steps.build(step_shape("xlmr"), CPU)
    variants["lora"].check()
    counters = variants["frozen"].count()
    assert counters["frozen_block_s"] > 0 and counters["block_executions"] == 2
    assert variants["lora"].count()["block_executions"] == 2
    variants["flare"].check()
    errors = variants["flare"].facts["gradient_error"]
    assert set(errors) == {"two_blocks", "full_size"} and max(errors.values()) < 1e-5
    right = torch_ops.grad_weight
    monkeypatch.setattr(torch_ops, "grad_weight", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    with pytest.raises(module("gate").WrongResult, match="relative error"):
        variants["flare"].check()


def test_a_method_that_cannot_run_is_skipped() -> None:
    cases, timing = module("cases"), module("timing")

    def too_large() -> None:
        raise cases.CannotRun("not enough memory")

    variants = {"a": cases.Variant(lambda: None, too_large), "b": cases.Variant(lambda: None, lambda: None)}
    how = timing.Effort(budget_s=0.0, least=2, most=2, warmup=1)
    rows = cases.measure(step_shape("xlmr"), lambda: variants, "", False, how, CPU).rows
    assert (rows["a"]["status"], rows["a"]["reason"]) == ("skipped", "not enough memory")
    assert rows["b"]["status"] == "timed" and 0 < rows["b"]["host_median_s"] <= rows["b"]["wall_median_s"]


def test_a_graph_is_captured_only_if_the_largest_eager_row_still_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_steps = module("fast_steps")
    fast = fast_steps.FastSteps(None)
    fast.eager_bytes = {"flare": 3 << 30, "input-fusion": 5 << 30}
    for free, fits in ((9 << 30, True), (8 << 30, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 16 << 30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 7)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2)
        if fits:
            assert fast._make_room("flare-captured") == 5
        else:
            with pytest.raises(module("cases").CannotRun, match=r"8 GiB; 8 of 16 GiB are free"):
                fast._make_room("flare-captured")


def test_ligers_functions_are_installed_only_during_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger replaces functions of transformers in the whole process. Other rows must call the original functions."""
    from transformers.models.llama import modeling_llama

    original, calls = modeling_llama.apply_rotary_pos_emb, []

    def ligers(*args: Any, **kwargs: Any) -> Any:
        calls.append("liger")
        return original(*args, **kwargs)

    def apply_liger_kernel_to_llama(model: Any) -> None:
        modeling_llama.apply_rotary_pos_emb = ligers

    fake = types.ModuleType("liger_kernel.transformers")
    fake.apply_liger_kernel_to_llama = apply_liger_kernel_to_llama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    monkeypatch.setattr(module("liger"), "refusal", lambda device: None)
    shape = step_shape("llama")
    models, batch = module("step_gate").models_of(shape, 2, CPU), module("batches").batch_of(shape, CPU)
    assert modeling_llama.apply_rotary_pos_emb is original
    for row, method in module("liger").ROWS.items():
        calls.clear()
        loss = models.loss(row, batch)
        assert len(calls) == (4 if method == "flare" else 2), row
        assert modeling_llama.apply_rotary_pos_emb is original
        torch.testing.assert_close(loss, models.loss(method, batch))
        assert len(calls) == (4 if method == "flare" else 2), "the row without Liger called Liger's function"


def test_the_main_grid_has_the_rows_that_the_summary_reads() -> None:
    shapes, methods_of = module("shapes"), module("steps").methods_of
    rows = {(s.model.family, s.padded): set(methods_of(s)) for s in shapes.steps("main")}
    assert set(rows) == {(family, padded) for family in ("xlmr", "llama") for padded in (False, True)}
    for (family, padded), methods in rows.items():
        assert methods >= {"peft-lora", "lora", "input-fusion", "flare", "flare-warm"}
        if not padded:
            assert methods >= {"frozen", "authors", "flare-recompute", "flare-captured", "lora-captured"}
        assert ("flare-liger" in methods) == (family == "llama" and not padded)


# --- numbers of the summary -------------------------------------------------------------------------------------------


@pytest.fixture
def recorded() -> dict[str, Any]:
    """Return the results of a benchmark run on a CPU, with a few rows."""
    result: dict[str, Any] = module("results").load(Path(__file__).with_name("recorded_benchmarks.json"))
    return result


def row_of(result: dict[str, Any], question: str, variant: str, padded: bool = False) -> dict[str, Any]:
    (row,) = [
        row
        for row in result["cases"]
        if (row["question"], row["variant"], row["family"]) == (question, variant, "xlmr")
        and bool(row["shape"].get("padded")) == padded
    ]
    return row


def test_adapter_share_of_frozen_step_is_computed_per_token(recorded: dict[str, Any]) -> None:
    block = row_of(recorded, "step", "frozen")["counters"]["frozen_block_s"] / (4 * 32)  # tokens of the recorded step
    joint, frozen = (row_of(recorded, "projection", name)["median_s"] for name in ("flare-joint", "frozen"))
    share = (block + (joint - frozen) / 512) / block  # tokens of the recorded projection
    summary = module("summary").summarise([recorded])
    assert share > 1.0 and summary["adapter_share_of_frozen_step"]["xlmr"] == pytest.approx(share, rel=1e-3)
    assert list(summary["targets"]["adapter_share_of_frozen_step"]) == ["llama"], "XLM-R has no target"
    assert summary["targets"]["adapter_share_of_frozen_step"]["llama"]["target"] == "<= 1.025"


def test_a_padded_step_is_compared_with_padded_steps(recorded: dict[str, Any]) -> None:
    ratios = {
        padded: row_of(recorded, "step", "flare", padded)["median_s"]
        / row_of(recorded, "step", "input-fusion", padded)["median_s"]
        for padded in (False, True)
    }
    assert abs(ratios[True] / ratios[False] - 1) > 2e-3, "with these rows the test could not distinguish the two"
    summary = module("summary").summarise([recorded])
    assert summary["padded_step_vs_input_fusion"]["xlmr"] == pytest.approx(ratios[True], rel=1e-3)
    assert summary["step_vs_input_fusion"]["xlmr"] == pytest.approx(ratios[False], rel=1e-3)


def test_wall_over_device_prefers_the_captured_step_to_the_eager_step(recorded: dict[str, Any]) -> None:
    summarise = module("summary").summarise
    assert summarise([recorded])["step_wall_over_device"]["xlmr"] is None, "a CPU has no device-busy time"
    result = copy.deepcopy(recorded)
    result["run"]["device"] = "a GPU"
    for row in result["cases"]:
        row["stand_in"] = False
    seconds = {"flare": (3.0, 2.0), "flare-captured": (2.3, 2.1), "lora-captured": (1.6, 1.5)}
    for variant, (wall, busy) in seconds.items():
        row_of(result, "step", variant)["counters"]["device_busy_s"] = busy
        row_of(result, "step", variant).update(median_s=wall - 0.1, wall_median_s=wall)
    summary = summarise([result])
    assert summary["step_wall_over_device"]["xlmr"] == 1.5, "without a captured step, the ratio of the eager step"
    assert summary["graphed_step_vs_lora"]["xlmr"] is None
    for variant in ("flare-captured", "lora-captured"):
        row_of(result, "step", variant).update(status="timed", q25_s=1.0, q75_s=1.0, depth=2)
    summary = summarise([result])
    assert summary["step_wall_over_device"]["xlmr"] == pytest.approx(2.3 / 2.1, rel=1e-3)
    assert summary["targets"]["step_wall_over_device"]["xlmr"] == {"target": "<= 1.15", "met": True}
    assert summary["graphed_step_vs_lora"]["xlmr"] == pytest.approx(2.2 / 1.5, rel=1e-3)
    row_of(result, "step", "flare-captured")["wall_median_s"] = 2.5
    assert summarise([result])["targets"]["step_wall_over_device"]["xlmr"]["met"] is False


def test_numbers_of_the_step_have_an_explanation(recorded: dict[str, Any]) -> None:
    summary = module("summary").summarise([recorded])
    names = {"step_wall_over_device", "adapter_share_of_frozen_step", "padded_step_vs_input_fusion"}
    for name in names | {"graphed_step_vs_lora"}:
        assert set(summary[name]) == {"llama", "xlmr"} and summary["meaning"][name]
