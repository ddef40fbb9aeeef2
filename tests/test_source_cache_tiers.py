"""Test the budgets of SourceStateCache, the order in which its tiers fill, and ``tiers="auto"``."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from cached_states import MB, SourceBlocks, assert_same, batch_of, cache_in, fused, one_row_bytes, shards, step

import flare
from flare.source_cache.memory import pinned_slab
from flare.source_cache.shards import UNFINISHED


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_full_cache_keeps_its_rows(tier, tmp_path) -> None:
    """An epoch has more rows than the budget allows. The first rows stay in the cache for all three epochs."""
    model = fused("bert")
    batches = [batch_of("bert", seed=seed) for seed in range(4)]
    budget = 5 * (one_row_bytes() + (600 if tier == "disk" else 0))
    cache = cache_in(tier, tmp_path, budget)
    expected_results = [step(model, batch) for batch in batches]
    model.set_source_cache(cache)
    with pytest.warns(UserWarning, match="the budget is spent") as caught:
        for _ in range(3):
            for batch, expected in zip(batches, expected_results, strict=True):
                assert_same(step(model, batch), expected, exact=False)
            cache.flush()
            assert cache.nbytes <= budget
    assert len([one for one in caught if "source_cache" in str(one.message)]) == 1
    stats = cache.stats()
    assert stats.entries == {tier: 5} and stats.hits == 2 * 5
    if tier == "disk":
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= budget


def test_pinned_slabs_are_powers_of_two_within_the_budget() -> None:
    """A slab is an allocation for several rows. size: bytes of a row; left: bytes that are left in the budget."""
    for size, left, expected in [
        (MB, 1 << 40, 64 * MB),
        (100 * MB, 1 << 40, 512 * MB),  # room for five rows, 12 MB are not used
        (128 * MB, 1 << 40, 512 * MB),
        (100 * MB, 300 * MB, 256 * MB),
        (100 * MB, 127 * MB, 0),  # the next power of two, 128 MB, is more than the budget
        (100, 100, 0),
        (64, 100, 64),
        (MB, 0, 0),
        (MB, -5, 0),
    ]:
        assert pinned_slab(size, left) == expected, (size, left)


def test_tiers_fill_in_order_each_within_its_budget(tmp_path) -> None:
    model = fused("bert")
    row = one_row_bytes()
    budget = {"device": row, "host": 2 * row, "disk": 10 * row}
    cache = flare.SourceStateCache(budget, directory=tmp_path)
    model.set_source_cache(cache)
    batches = [batch_of("bert", seed=seed) for seed in (0, 1)]
    expected_results = []
    for batch in batches:
        expected_results.append(step(model, batch))
    cache.flush()
    assert cache.tiers == ("device", "host", "disk")
    assert cache.stats().entries == {"device": 1, "host": 2, "disk": 3}
    for batch, expected in zip(batches, expected_results, strict=True):
        assert_same(step(model, batch), expected)
    assert cache.stats().hits == 6
    shared_budget = flare.SourceStateCache(4 * row, tiers=("host", "device"))
    model.set_source_cache(shared_budget)
    for batch in batches:
        step(model, batch)
    assert shared_budget.tiers == ("device", "host") and shared_budget.nbytes == 4 * row
    assert sum(shared_budget.stats().entries.values()) == 4


def test_a_shared_budget_leaves_memory_free_but_the_budget_of_a_tier_does_not(monkeypatch) -> None:
    from flare.source_cache import memory

    free = [1 << 30]
    # a job with 1 GiB on a machine with 1 TiB
    monkeypatch.setattr(memory, "memory_of", lambda device: 1 << 40)
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 1 << 39)
    monkeypatch.setattr(memory, "_group_bytes", lambda *paths: [(free[0], 1 << 30)])
    monkeypatch.setattr(memory, "_SLAB", 3 * one_row_bytes())
    model = fused("bert")
    for budget, entries in ((1 << 29, 3), ({"device": 1 << 29}, 9)):
        free[0] = 1 << 30
        cache = flare.SourceStateCache(budget, tiers=("device",) if isinstance(budget, dict) else ("device", "host"))
        model.set_source_cache(cache)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for seed in range(3):
                model(**batch_of("bert", seed=seed))
                free[0] = 1 << 20  # as if the training had taken the rest of the memory
        assert cache.stats().entries["device"] == entries
        assert sum("little is free" in str(one.message) for one in caught) == (2 if entries == 3 else 0), (
            "one warning per tier"
        )


def test_rows_on_disk_are_copied_into_faster_tiers(tmp_path) -> None:
    model, batch = fused("bert"), batch_of("bert")
    first = cache_in("disk", tmp_path)
    model.set_source_cache(first)
    expected = step(model, batch)
    first.flush()
    second = flare.SourceStateCache({"host": 2 * one_row_bytes(), "disk": MB}, directory=tmp_path)
    model.set_source_cache(second)
    ran = SourceBlocks(model)
    assert_same(step(model, batch), expected)
    assert ran.since() == {0} and second.stats().entries == {"host": 2, "disk": 3}
    for path in shards(tmp_path):
        path.unlink()
    assert_same(step(model, batch), expected)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_uses_a_tier_only_if_reading_is_faster_than_computing(fast, tmp_path, monkeypatch) -> None:
    from flare.source_cache import store as module

    measured = []

    def seconds_to_read(tier: str, nbytes: int, device: Any, directory: Any) -> float:
        measured.append((tier, nbytes))
        return 0.0 if fast and tier != "disk" else 1e9

    monkeypatch.setattr(module, "seconds_to_read", seconds_to_read)
    model = fused("bert")
    cache = flare.SourceStateCache(MB, tiers="auto", directory=tmp_path)
    model.set_source_cache(cache)
    batches = [batch_of("bert", seed=seed) for seed in range(3)]
    expected_results = [step(model, batch) for batch in batches]
    assert measured == [(tier, one_row_bytes()) for tier in ("device", "host", "disk")]
    ran = SourceBlocks(model)
    for batch, expected in zip(batches, expected_results, strict=True):
        assert_same(step(model, batch), expected)
    assert cache.tiers == (("device", "host") if fast else ())
    assert ran.since() == ({0} if fast else {9}), "rows of the trial passes are stored too"
    assert "reading a row" in cache.decisions["disk"] and "disk not used" in cache.summary()


def test_auto_measures_every_tier(tmp_path) -> None:
    model = fused("bert")
    cache = flare.SourceStateCache(MB, tiers="auto", directory=tmp_path)
    model.set_source_cache(cache)
    for seed in range(3):
        step(model, batch_of("bert", seed=seed))
    assert set(cache.decisions) == {"device", "host", "disk"}
    assert all(("used" in why) and " ms" in why for why in cache.decisions.values())
    assert not list(tmp_path.glob(f"*{UNFINISHED}")), "the measured file was removed"


def test_auto_warns_about_tiers_that_it_does_not_use(tmp_path, monkeypatch) -> None:
    from flare.source_cache import store as module

    measure = module.seconds_to_read
    monkeypatch.setattr(module, "seconds_to_read", lambda tier, *rest: 1e9 if tier != "disk" else measure(tier, *rest))
    model = fused("bert")
    model.set_source_cache(flare.SourceStateCache(MB, tiers="auto", directory=tmp_path / "states"))
    (tmp_path / "states").rmdir()
    with pytest.warns(UserWarning) as caught:
        for _ in range(4):
            step(model, batch_of("bert"))
    text = [str(one.message) for one in caught if "source_cache" in str(one.message)]
    assert len(text) == 2 and "does not use the disk tier" in text[0] and "uses no tier" in text[1]


def test_named_tiers_are_not_measured(monkeypatch, tmp_path) -> None:
    from flare.source_cache import store as module

    monkeypatch.setattr(module, "seconds_to_read", lambda *_: pytest.fail("a named tier was measured"))
    model = fused("bert")
    model.set_source_cache(flare.SourceStateCache(MB, directory=tmp_path))
    for seed in range(3):
        step(model, batch_of("bert", seed=seed))
