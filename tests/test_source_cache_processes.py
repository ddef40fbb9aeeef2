"""Test SourceStateCache with full disks, with processes that are killed at any step, and with shared directories."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from cached_states import (
    MB,
    SourceBlocks,
    assert_same,
    batch_of,
    cache_in,
    fused,
    no_warnings_allowed,
    published,
    reopened,
    shards,
    step,
)

from flare.source_cache.shards import UNFINISHED


def in_child(work: Any) -> int:
    """Fork a process that runs ``work`` and exits with 0, or with 1 after printing its error; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        work()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(status)


def succeeded(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


def test_a_full_disk_warns_once_and_training_continues(tmp_path) -> None:
    """Files are limited to 8 KiB: one row fits, a shard of three rows does not."""
    model = fused("bert")
    batches = [batch_of("bert", seed=seed) for seed in range(4)]
    expected_results = [step(model, batch) for batch in batches]
    published(tmp_path, model, 7)
    before = shards(tmp_path)

    def train() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        cache = cache_in("disk", tmp_path, 2 * MB)
        model.set_source_cache(cache)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                for batch, expected in zip(batches, expected_results, strict=True):
                    assert_same(step(model, batch), expected, exact=False)
                cache.flush()
            model(**batch_of("bert", seed=7))
        messages = [str(one.message) for one in caught if "source_cache" in str(one.message)]
        assert (
            len(messages) == 1 and "takes no more source states" in messages[0] and "File too large" in messages[0]
        ), messages
        assert cache.stats().hits == 3, cache.stats()

    assert succeeded(in_child(train))
    assert shards(tmp_path) == before and not list(tmp_path.glob(f"*{UNFINISHED}"))
    with no_warnings_allowed():
        assert reopened(tmp_path, model, 7).stats().hits == 3


def mounted(folder: Path, nbytes: int) -> str:
    """Mount a small file system in a user namespace of this process; return why that failed, or an empty text."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, mounts, id_maps = 0x10000000, 0x00020000, {"uid_map": os.getuid(), "gid_map": os.getgid()}
    if libc.unshare(user | mounts):
        return f"no user namespace: {os.strerror(ctypes.get_errno())}"
    try:
        Path("/proc/self/setgroups").write_text("deny")
        for name, value in id_maps.items():  # a user that is not mapped cannot create files in the namespace
            Path("/proc/self", name).write_text(f"0 {value} 1")
    except OSError as error:
        return f"no user namespace: {error}"
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={nbytes}".encode()):
        return f"no tmpfs: {os.strerror(ctypes.get_errno())}"
    return ""


def test_a_full_filesystem_warns_once_and_stored_rows_are_read(tmp_path) -> None:
    """A tmpfs of 16 KiB: one shard of three rows fits, a second one does not."""
    model, folder = fused("bert"), tmp_path / "small"
    folder.mkdir()
    reason_file = tmp_path / "reason"
    batches = [batch_of("bert", seed=seed) for seed in range(4)]
    expected_results = [step(model, batch) for batch in batches]

    def train() -> None:
        reason_file.write_text(mounted(folder, 16 * 1024))
        if reason_file.read_text():
            return
        cache = cache_in("disk", folder)
        model.set_source_cache(cache)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                for batch, expected in zip(batches, expected_results, strict=True):
                    assert_same(step(model, batch), expected, exact=False)
                    cache.flush()
        messages = [str(one.message) for one in caught if "source_cache" in str(one.message)]
        assert len(messages) == 1 and "No space left on device" in messages[0], messages
        assert cache.stats().hits == 3 and len(shards(folder)) == 1
        assert not list(folder.glob(f"*{UNFINISHED}"))
        with no_warnings_allowed():
            assert reopened(folder, model, 0).stats().hits == 3

    assert succeeded(in_child(train))
    if reason_file.read_text():
        pytest.skip(reason_file.read_text())
    assert not list(folder.iterdir()), "the file system must be visible only in the child process"


def test_a_directory_opens_after_a_kill_at_any_time(tmp_path) -> None:
    """12 processes write shards, one after another, and each is killed after its first new shard.

    The time between this shard and the kill grows from process to process.
    """
    model = fused("bert")
    batches = [batch_of("bert", seed=seed) for seed in range(40)]

    def write() -> None:
        cache = cache_in("disk", tmp_path, 200 * MB)
        model.set_source_cache(cache)
        for batch in batches:
            model(**batch)
            cache.flush()
        time.sleep(600)

    entry_counts, last = [], 0
    for attempt in range(12):
        shards_before = len(shards(tmp_path))
        pid = in_child(write)
        while len(shards(tmp_path)) == shards_before < len(batches):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the process has failed"
            time.sleep(0.001)
        time.sleep(0.001 * attempt)
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the process must still run when it is killed"
        for path in shards(tmp_path):
            safetensors.safe_open(path, "pt")
        with no_warnings_allowed():
            cache = cache_in("disk", tmp_path, 200 * MB)
            cache.bind(model.get_base_model())
        entries = cache.stats().entries["disk"]
        assert entries >= last and entries % 3 == 0, "published rows are never lost or incomplete"
        entry_counts.append(entries)
        last = entries
    assert entry_counts[-1] > 0
    with no_warnings_allowed():
        done = entry_counts[-1] // 3
        assert reopened(tmp_path, model, *range(min(done, 5))).stats().hits == 3 * min(done, 5)


@pytest.mark.parametrize("stage", ["just created", "half written", "not synced", "not renamed"])
def test_a_directory_opens_after_a_kill_at_each_step_of_writing(stage, tmp_path, monkeypatch) -> None:
    from flare.source_cache import shards as module

    model = fused("bert")
    published(tmp_path, model, 0)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        if stage == "just created":
            monkeypatch.setattr(module.fcntl, "flock", die)
        elif stage == "half written":
            monkeypatch.setattr(module, "bytes", die, raising=False)  # bytes() makes the padding after the first entry
        elif stage == "not synced":
            monkeypatch.setattr(module.os, "fsync", die)
        else:
            monkeypatch.setattr(module.Path, "rename", die)
        published(tmp_path, model, 1)

    assert os.waitpid(in_child(write), 0)[1] == signal.SIGKILL
    assert len(shards(tmp_path)) == 1 and len(list(tmp_path.glob(f"*{UNFINISHED}"))) == 1
    with no_warnings_allowed():
        assert reopened(tmp_path, model, 0, 1).stats().hits == 3


def test_unfinished_files_of_killed_processes_are_removed(tmp_path) -> None:
    import fcntl

    model = fused("bert")
    dead, alive = (tmp_path / f"source-states-{name}{UNFINISHED}" for name in ("dead", "alive"))
    for path in (dead, alive):
        path.write_bytes(b"half")
        os.utime(path, (1, 1))
    with alive.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with no_warnings_allowed():
            reopened(tmp_path, model, 0)
        assert alive.exists() and not dead.exists()


def test_two_processes_share_a_directory(tmp_path) -> None:
    model = fused("bert")
    shared, own_seeds = range(3), {"a": range(3, 8), "b": range(8, 13)}

    def worker(name: str) -> Any:
        def work() -> None:
            cache = cache_in("disk", tmp_path, 10 * MB)
            model.set_source_cache(cache)
            with no_warnings_allowed():
                for seed in (*shared, *own_seeds[name]):
                    model(**batch_of("bert", seed=seed))
                    cache.flush()

        return work

    pids = [in_child(worker(name)) for name in own_seeds]
    assert [succeeded(pid) for pid in pids] == [True, True]
    with no_warnings_allowed():
        cache = reopened(tmp_path, model, *range(13), budget=10 * MB)
    assert cache.stats().hits == 39


def test_refresh_finds_rows_of_another_process(tmp_path) -> None:
    model = fused("bert")
    here = cache_in("disk", tmp_path)
    model.set_source_cache(here)
    step(model, batch_of("bert", seed=1))
    pid = in_child(lambda: published(tmp_path, model, 5))
    assert succeeded(pid)
    here.refresh()
    ran = SourceBlocks(model)
    step(model, batch_of("bert", seed=5))
    assert ran.since() == {0} and here.stats().hits == 3


@pytest.mark.parametrize("budget", [MB, 30_000])  # with the smaller budget, each row is written to its own file
def test_a_deleted_directory_warns_once(budget, tmp_path) -> None:
    import shutil

    model, folder = fused("bert"), tmp_path / "states"
    expected = step(model, batch_of("bert"))
    cache = cache_in("disk", folder, budget)
    model.set_source_cache(cache)
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="takes no more source states") as caught:
        assert_same(step(model, batch_of("bert")), expected)
        cache.flush()
        assert_same(step(model, batch_of("bert")), expected)
        cache.flush()
    assert len(caught) == 1


def test_a_relative_directory_is_resolved_when_the_cache_is_created(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = cache_in("disk", Path("states"))
    model = fused("bert")
    model.set_source_cache(cache)
    step(model, batch_of("bert"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cache.flush()
    assert shards(tmp_path / "states")
    step(model, batch_of("bert"))
    assert cache.stats().hits == 3
