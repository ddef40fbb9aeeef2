"""Tests of `flare train --source-cache`, which keeps source states of the first epoch for later epochs.

Source states are the hidden states of the source texts in the frozen model. Scores do not change, the size of the cache
is predicted, and the mode "auto" can turn the cache off.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from experiment_data import write_bert, write_data, write_t5
from safetensors.torch import load_file

from flare.cli import main
from flare.experiments.runs.activations import read_activations
from flare.experiments.runs.records import read_metrics, read_record
from flare.experiments.runs.run_settings import TrainSettings
from flare.experiments.utils.errors import UserError
from flare.experiments.utils.options import parse_bytes, read_settings
from flare.source_cache.memory import _group_bytes


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with data/ and a pretrained model in bert/."""
    root = tmp_path_factory.mktemp("cache")
    write_data(root / "data", rows={"train": (0, 24), "valid": (24, 32), "test": (32, 44)})
    write_bert(root / "bert")
    return root


def train(place: Path, name: str, *more: object) -> Path:
    words = ("train", "--task", "classification", "--data", place / "data", "--output", place / name, "--r", 4)
    words += ("--target", "vemari", "--base", place / "bert", "--max-length", 24, "--batch-size", 8, "--lr", 1e-2)
    assert main([str(word) for word in (*words, "--no-progress", *more)]) == 0
    return place / name / "vemari" / "flare-r4" / "seed-0"


def test_scores_are_equal_with_and_without_the_cache(place, capsys):
    cached, uncached = train(place, "auto", "--epochs", 3), train(place, "off", "--epochs", 3, "--source-cache", "off")
    facts, metrics = read_record(cached).data["source_cache"], read_metrics(cached)
    assert facts["on"] and facts["mode"] == "auto" and facts["rows"] == 32
    # hits: all 24 training and 8 validation rows in epochs 2 and 3, then the 8 validation rows for the best weights
    assert metrics.source_cache["hits"] == 2 * 32 + 8 and metrics.source_cache["rows"] == 3 * 32 + 8
    assert read_record(uncached).data["source_cache"] == {"mode": "off", "on": False}
    assert read_metrics(uncached).source_cache is None
    assert (metrics.test, metrics.valid) == (read_metrics(uncached).test, read_metrics(uncached).valid)
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (cached, uncached))
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), two[name].numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
    texts = [(folder / "predictions-test.jsonl").read_text() for folder in (cached, uncached)]
    assert texts[0] == texts[1]
    out = capsys.readouterr().out
    assert "source cache on: " in out and "rows, in host memory" in out

    # 32 different sources, 2 blocks, 24 positions, width 32, float32
    assert facts["bytes_needed"] == 32 * 2 * 24 * 32 * 4
    assert metrics.source_cache["bytes"] == facts["bytes_needed"]

    # |x| = 2 relu(x) - x, so the averages per position before and after the ReLU give the layer's mean |S| and mean |T|
    positions, sizes = read_activations(cached), metrics.bottleneck
    assert positions.layer == sizes["layers"][0] and positions.layer.endswith("query")
    for stream in ("S", "T"):
        averages = getattr(positions, stream)
        weights = averages.counts / averages.counts.sum()
        mean = float((weights[:, None] * (2 * averages.after - averages.before)).sum(axis=0).mean())
        assert mean == pytest.approx(sizes[stream][0], rel=1e-5)
    first = positions.instances[0]
    rows = [json.loads(line) for line in texts[0].splitlines()]
    assert first.id == rows[0]["id"] and first.source_tokens[0] == "[CLS]" and len(first.target_tokens) == len(first.T)


def test_an_encoder_decoder_caches_the_states_of_both_stacks(place, tmp_path):
    write_t5(tmp_path / "t5")
    words = ("--base", tmp_path / "t5", "--rows", 8, "--epochs", 2, "--max-length", 40)
    folders = [train(place, tmp_path / mode, *words, "--source-cache", mode) for mode in ("auto", "off")]
    facts, metrics = read_record(folders[0]).data["source_cache"], read_metrics(folders[0])
    # hits are training rows only, because generation does not use the cache
    assert facts["on"] and metrics.source_cache["hits"] == 8
    assert metrics.source_cache["bytes"] == facts["bytes_needed"]
    assert metrics.test == read_metrics(folders[1]).test
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), two[name].numpy(), rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "words, reason",
    [
        (("--epochs", 1), "one epoch"),
        (("--epochs", 2, "--padding", "longest"), "padded to their longest text"),
        (("--epochs", 2, "--adapter", "source_dropout=true"), "source_dropout=True"),
        (("--epochs", 2, "--source-cache-budget", "50KB"), "more than --source-cache-budget (48.8 KiB)"),
    ],
)
def test_source_cache_auto_is_off_with_a_reason(place, tmp_path, capsys, words, reason):
    folder = train(place, tmp_path / "runs", "--rows", 8, "--no-test", *words)
    facts = read_record(folder).data["source_cache"]
    assert not facts["on"] and reason in facts["reason"]
    assert "source cache off: " in capsys.readouterr().out


def test_source_cache_on_is_an_error_if_source_states_change(place, tmp_path, capsys):
    words = ("train", "--task", "classification", "--data", place / "data", "--output", tmp_path, "--target", "vemari")
    words += ("--base", place / "bert", "--max-length", 24, "--epochs", 2, "--source-cache", "on", "--no-progress")
    assert main([str(word) for word in (*words, "--adapter", "source_dropout=true")]) == 2
    assert "--source-cache on: " in capsys.readouterr().err


def test_cache_options_are_read_from_flags_and_yaml(tmp_path):
    file = tmp_path / "train.yaml"
    options = {"task": "nusax", "target": "ace"}
    for text, mode in (("off", "off"), ("on", "on"), ("auto", "auto")):
        file.write_text(f"source_cache: {text}\n")
        assert read_settings(TrainSettings, {"config": str(file), **options}).source_cache == mode
    assert parse_bytes("8GiB", "--x") == 8 << 30 and parse_bytes("1.5 mb", "--x") == 1_500_000
    assert parse_bytes("1000", "--x") == 1000 and parse_bytes(None, "--x") is None
    for wrong in ("lots", "8XiB", "0", "-1GiB", "1.2.3MB"):
        with pytest.raises(UserError, match="--source-cache-budget"):
            read_settings(TrainSettings, {"source_cache_budget": wrong, **options}).check()
    with pytest.raises(UserError, match="--source-cache off"):
        read_settings(TrainSettings, {"source_cache_budget": "1GB", "source_cache": "off", **options}).check()


def test_free_memory_respects_control_group_limits(tmp_path):
    job = tmp_path / "cgroup" / "slurm" / "job"
    job.mkdir(parents=True)
    for folder, limit, used, pages in ((job, "max", 0, 0), (job.parent, 1000, 700, 200)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {pages}\n")
    (tmp_path / "self").write_text("0::/slurm/job\n")
    # limit 1000, 700 in use, and 200 of these can be reclaimed
    assert _group_bytes(tmp_path / "cgroup", tmp_path / "self") == [(500, 1000)]
    assert _group_bytes(tmp_path / "cgroup", tmp_path / "nothing") == []
