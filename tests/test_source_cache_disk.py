"""Test SourceStateCache on disk with damaged files, files of other programs, and files of other base models.

A shard is a file with the states of several rows.
"""

from __future__ import annotations

import atexit
import json
import os
import warnings
from pathlib import Path

import pytest
import safetensors
import torch
from cached_states import (
    assert_same,
    batch_of,
    cache_in,
    fused,
    no_warnings_allowed,
    one_row_bytes,
    published,
    reopened,
    shards,
    step,
)

from flare.source_cache.fingerprint import fingerprint
from flare.source_cache.shards import FORMAT


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path) -> None:
    model = fused("bert")
    published(tmp_path, model, 0)
    (path,) = shards(tmp_path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert metadata["format"] == FORMAT and metadata["base"] == fingerprint(model.get_base_model())
        assert len(list(file.keys())) == 3
        for key in file.keys():  # noqa: SIM118
            assert file.get_tensor(key).numel() == one_row_bytes() and metadata[key].startswith("float32 32 ")
    with no_warnings_allowed():
        assert reopened(tmp_path, model, 0).stats().hits == 3


def test_without_free_host_memory_waiting_rows_are_written_and_later_rows_are_not_stored(tmp_path, monkeypatch) -> None:
    """Rows wait in host buffers until they are written together. Here only five buffers can be allocated."""
    from flare.source_cache import shards as module

    model = fused("bert")
    batches = [batch_of("bert", seed=seed) for seed in range(3)]
    expected_results = [step(model, batch) for batch in batches]
    free_buffers, host_buffer = [5], module._host_buffer

    def scarce(nbytes: int, device: torch.device) -> torch.Tensor:
        if not free_buffers[0]:
            raise RuntimeError("CUDA error: out of memory")
        free_buffers[0] -= 1
        return host_buffer(nbytes, device)

    monkeypatch.setattr(module, "_host_buffer", scarce)
    cache = cache_in("disk", tmp_path)
    model.set_source_cache(cache)
    with pytest.warns(UserWarning, match="no memory to write to") as caught:
        for _ in range(2):
            for batch, expected in zip(batches, expected_results, strict=True):
                assert_same(step(model, batch), expected, exact=False)
    assert len([one for one in caught if "source_cache" in str(one.message)]) == 1
    assert len(shards(tmp_path)) == 1, "waiting rows were not written to free their memory"
    cache.flush()
    assert len(shards(tmp_path)) == 2 and cache.stats().entries == {"disk": 5}
    assert cache.stats().hits == 5


def test_rows_of_different_sizes_and_dtypes_share_a_shard(tmp_path) -> None:
    model = fused("bert", source_padding="zero")
    batch = batch_of("bert", m=7)
    cache = cache_in("disk", tmp_path)
    model.set_source_cache(cache)
    expected_results = []
    for dtype in (torch.bfloat16, None):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            expected_results.append(model(**batch).loss)
    cache.flush()
    (path,) = shards(tmp_path)
    safetensors.safe_open(path, "pt")
    reopened_cache = cache_in("disk", tmp_path)
    model.set_source_cache(reopened_cache)
    for dtype, expected in zip((torch.bfloat16, None), expected_results, strict=True):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            assert torch.equal(model(**batch).loss, expected)
    assert reopened_cache.stats().hits == 6


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def truncated_in_its_header(path: Path) -> None:
    os.truncate(path, 40)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def flipped_in_its_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"float32") + 3] ^= 0xFF
    path.write_bytes(data)


def with_missing_fields(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"float32 32 ", b"float32_32_"))


def of_another_format(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(FORMAT.encode(), FORMAT[:-1].encode() + b"9"))


@pytest.mark.parametrize(
    "damage",
    [truncated, truncated_in_its_header, emptied, flipped_in_its_header, with_missing_fields, of_another_format],
)
def test_a_damaged_file_is_reported_and_unchanged_and_its_rows_are_recomputed(damage, tmp_path) -> None:
    model = fused("bert")
    published(tmp_path, model, 0, 1)
    intact, broken = shards(tmp_path)
    damage(broken)
    before = broken.read_bytes()
    with pytest.warns(
        UserWarning, match=rf"source_cache: files in .* not used and not changed.*{broken.name}"
    ) as caught:
        cache = reopened(tmp_path, model, 0, 1)
    assert len([one for one in caught if issubclass(one.category, UserWarning)]) == 1
    assert cache.stats().hits == 3
    cache.flush()
    assert broken.read_bytes() == before and intact.exists()
    with pytest.warns(UserWarning, match="not used and not changed"):
        assert reopened(tmp_path, model, 0, 1).stats().hits == 6, "the recomputed rows are not in another file"


def test_flipped_bits_of_entries_are_detected(tmp_path) -> None:
    """Only the damaged row is computed again; the other rows are used."""
    model = fused("bert")
    published(tmp_path, model, 0)
    (path,) = shards(tmp_path)
    intact = path.read_bytes()
    start = 8 + int.from_bytes(intact[:8], "little")  # offset of the entries, which follow the header
    header = json.loads(intact[8:start])
    header.pop("__metadata__")
    for place in header.values():
        begin, end = place["data_offsets"]
        for at in (begin, (begin + end) // 2, end - 1):
            data = bytearray(intact)
            data[start + at] ^= 0x10
            path.write_bytes(data)
            with pytest.warns(UserWarning, match="checksum of an entry does not match") as caught:
                cache = reopened(tmp_path, model, 0)
            assert cache.stats().hits == 2 and len(caught) == 1
            del cache
    path.write_bytes(intact)
    with no_warnings_allowed():
        assert reopened(tmp_path, model, 0).stats().hits == 3


def test_two_flipped_signs_of_an_entry_are_detected(tmp_path) -> None:
    model = fused("bert")
    published(tmp_path, model, 0)
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for word in (2, 5):
        data[start + 8 * word + 7] ^= 0x80
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="checksum of an entry does not match"):
        assert reopened(tmp_path, model, 0).stats().hits == 2


def test_a_file_of_an_earlier_format_is_reported_with_both_formats(tmp_path) -> None:
    model = fused("bert")
    published(tmp_path, model, 0)
    (path,) = shards(tmp_path)
    old = FORMAT[:-1] + "1"
    path.write_bytes(path.read_bytes().replace(FORMAT.encode(), old.encode()))
    with pytest.warns(UserWarning, match=f"{path.name}: written in format {old} .*reads {FORMAT}.*computed again"):
        assert reopened(tmp_path, model, 0).stats().hits == 0


def test_a_fifo_in_the_folder_is_not_opened(tmp_path) -> None:
    fifo = tmp_path / "source-states-0.unfinished"
    os.mkfifo(fifo)
    os.utime(fifo, (1, 1))
    writer = os.open(fifo, os.O_RDWR)  # without a writer, a cache that opened the FIFO would block this test
    try:
        published(tmp_path, fused("bert"), 0)
    finally:
        os.close(writer)
    assert fifo.exists() and len(shards(tmp_path)) == 1


def test_caches_do_not_add_exit_callbacks(tmp_path) -> None:
    before = atexit._ncallbacks()
    caches = [cache_in("disk", tmp_path) for _ in range(3)]
    assert atexit._ncallbacks() == before and len(caches) == 3


def test_a_file_truncated_while_in_use_does_not_kill_the_process(tmp_path) -> None:
    model = fused("bert")
    published(tmp_path, model, 0)
    cache = reopened(tmp_path, model, 0)
    assert cache.stats().hits == 3
    os.truncate(shards(tmp_path)[0], 100)
    expected = step(model, batch_of("bert", seed=1))
    with pytest.warns(UserWarning, match="truncated"):
        step(model, batch_of("bert", seed=0))
    assert cache.stats().hits == 3
    assert_same(step(model, batch_of("bert", seed=1)), expected)


def test_other_files_and_shards_of_another_model_are_not_changed(tmp_path) -> None:
    model, other = fused("bert"), fused("bert", seed=1)
    published(tmp_path, other, 0)
    other_files = {"notes.txt": b"my notes", "model.safetensors": b"\x02\0\0\0\0\0\0\0{}", "huge.bin": b"\xff" * 64}
    for name, content in other_files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    with pytest.warns(UserWarning) as caught:
        cache = reopened(tmp_path, model, 0)
    texts = " ".join(str(one.message) for one in caught)
    assert all(name in texts for name in other_files) and "of another base model" in texts
    assert cache.stats().hits == 0
    cache.flush()
    assert all((tmp_path / name).read_bytes() == content for name, content in other_files.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert reopened(tmp_path, model, 0).stats().hits == 3
        assert reopened(tmp_path, other, 0).stats().hits == 3, "two base models cannot share a folder"
