"""Tests of `flare demo`: a whole run on a few sentences, its base model, its scores, and data of the user."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from flare.cli import main
from flare.experiments.demo import DemoError, DemoSettings, report, run_demo
from flare.experiments.demo.base_model import BaseConfig, base_key, cache_folder, pretrained_base
from flare.experiments.demo.corpus import make_corpus
from flare.experiments.demo.experiment import macro_f1
from flare.experiments.demo.real_data import LabelledText, align, load_parallel

METHODS = ["zero-shot", "lora", "input-fusion", "input-fusion", "flare", "flare"]
TINY = ["--seeds", "1", "--rows", "9", "--epochs", "2", "--batch-size", "4", "--finetune-epochs", "1"]
TINY += ["--pretrain-steps", "2", "--r", "4", "--threads", "1", "--no-progress"]
CONFIG = BaseConfig(layers=1, width=16, heads=2, steps=2, batch_size=4)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the output folder and the cache folder of one tiny run."""
    folder = tmp_path_factory.mktemp("demo")
    status = main(["demo", "--output", str(folder / "out"), "--cache-dir", str(folder / "cache"), *TINY])
    assert status == 0
    return folder / "out", folder / "cache"


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_results_are_a_list_of_rows(demo):
    rows = json.loads((demo[0] / "results.json").read_text())
    assert [row["method"] for row in rows] == METHODS
    assert [row["source"] for row in rows] == [None, None, "gold", "noisy", "gold", "noisy"]
    for row in rows:
        assert set(row) == {
            "method", "seed", "macro_f1", "seconds_per_step", "peak_bytes", "saved_bytes", "source", "fusion",
        }  # fmt: skip
        assert row["seed"] == 0
        assert 0 <= row["macro_f1"] <= 100
        costs = [row["seconds_per_step"], row["peak_bytes"], row["saved_bytes"]]
        if row["method"] == "zero-shot":
            assert costs == [None, None, None]
        else:
            assert all(cost > 0 for cost in costs)
            assert row["peak_bytes"] > row["saved_bytes"]
        assert row["fusion"] == ("add_relu" if row["method"] == "flare" else None)


def test_flare_keeps_more_bytes_for_backward_than_lora_and_fewer_than_input_fusion(demo):
    rows = json.loads((demo[0] / "results.json").read_text())
    saved = {(row["method"], row["source"]): row["saved_bytes"] for row in rows}
    assert saved["flare", "gold"] == saved["flare", "noisy"], "both sources have equal shapes"
    assert saved["lora", None] < saved["flare", "gold"] < saved["input-fusion", "gold"]


def test_run_json_holds_settings_and_environment(demo):
    run = json.loads((demo[0] / "run.json").read_text())
    assert run["settings"]["r"] == 4 and run["settings"]["lr"] == 5e-3
    assert run["seeds"] == [0]
    assert run["environment"]["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert {"date", "duration_s", "source_macro_f1", "sizes", "languages", "units"} <= set(run)


def test_figure_and_table_are_written(demo):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the demo draws no figure")
    from matplotlib.image import imread

    figure = imread(demo[0] / "results.png")
    assert figure.shape[0] > 300 and figure.shape[1] > 800
    table = (demo[0] / "table.md").read_text()
    assert "| FLARE (add_relu) | gold |" in table and "| LoRA | - |" in table


def test_second_run_takes_the_base_from_the_cache_and_keeps_earlier_results(demo, capsys):
    output, cache = demo
    before = (output / "results.json").read_bytes()
    stamp = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert main(["demo", "--output", str(output), "--cache-dir", str(cache), *TINY]) == 0
    out = capsys.readouterr().out
    assert "taken from" in out
    assert "earlier-1" in out
    assert (output / "earlier-1" / "results.json").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == stamp
    for word in ("macro F1", "ms/step", "peak memory", "saved for backward", "zero-shot", "LoRA", "input-level fusion"):
        assert word in out
    scores = [[row["macro_f1"] for row in json.loads(text)] for text in (before, (output / "results.json").read_text())]
    assert scores[0] == scores[1], "the same seed gives the same numbers"


def test_overwrite_replaces_results_and_zero_noise_skips_the_noisy_source(demo, tmp_path):
    (tmp_path / "results.json").write_text("[]")
    rows = run_demo(
        DemoSettings(output=tmp_path, cache_dir=demo[1], seeds=1, rows=3, epochs=1, finetune_epochs=0, pretrain_steps=2,
                     noise=0.0, overwrite=True, progress=False),
        print_fn=lambda line: None,
    )  # fmt: skip
    assert [row["method"] for row in rows] == ["zero-shot", "lora", "input-fusion", "flare"]
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert not (tmp_path / "earlier-1").exists()


def test_without_matplotlib_the_install_command_is_printed(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(report, "draw", missing)
    lines: list[str] = []
    report.finish(tmp_path, [ROW], RUN_INFO, lines.append)
    assert sum("pip install" in line for line in lines) == 1
    assert (tmp_path / "results.json").exists() and not (tmp_path / "results.png").exists()


# --- the base model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(finetune=0, train=0, test=0, pretrain=40)


def test_base_is_built_once_and_rebuilt_when_damaged(corpus, tmp_path):
    lines: list[str] = []
    folder = pretrained_base(CONFIG, corpus, tmp_path, lines.append, progress=False)
    weights = (folder / "model.safetensors").read_bytes()
    assert pretrained_base(CONFIG, corpus, tmp_path, lines.append, progress=False) == folder
    assert "taken from" in lines[-1]
    (folder / "model.safetensors").write_bytes(weights[:-100])
    pretrained_base(CONFIG, corpus, tmp_path, lines.append, progress=False)
    assert any("damaged (model.safetensors" in line for line in lines)
    assert (folder / "model.safetensors").read_bytes() == weights, "pre-training is deterministic"
    (folder / "config.json").unlink()
    pretrained_base(CONFIG, corpus, tmp_path, lines.append, progress=False)
    (folder / "manifest.json").write_text("{")
    pretrained_base(CONFIG, corpus, tmp_path, lines.append, progress=False)
    assert sum("pre-trained again" in line for line in lines) == 3
    assert [path.name for path in tmp_path.iterdir()] == [folder.name], "no temporary folder is left"


def test_an_interrupted_build_of_the_base_leaves_no_file(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flare.experiments.demo.base_model.pretrain", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        pretrained_base(CONFIG, corpus, tmp_path, lambda line: None, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_key_depends_on_config_and_text(corpus):
    other = make_corpus(finetune=0, train=0, test=0, pretrain=40, seed=1)
    keys = {base_key(CONFIG, corpus), base_key(BaseConfig(), corpus), base_key(CONFIG, other)}
    assert len(keys) == 3
    assert base_key(CONFIG, corpus) in keys


def test_cache_folder_follows_xdg_cache_home_and_the_argument(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "flare-kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "flare-kernels"
    assert cache_folder(tmp_path / "mine") == tmp_path / "mine"


# --- numbers ----------------------------------------------------------------------------------------------------------

ROW = {"method": "flare", "seed": 0, "macro_f1": 90.0, "seconds_per_step": 0.02, "peak_bytes": 3 << 20,
       "saved_bytes": 1 << 20, "source": "gold", "fusion": "add_relu"}  # fmt: skip
RUN_INFO = {
    "settings": {"r": 4, "alpha": 8, "epochs": 1, "batch_size": 2, "lr": 0.1, "max_length": 8, "noise": 0.1},
    "languages": {"source": "English", "target": "Vemari"},
    "sizes": {"finetune": 1, "train": 2, "test": 3},
    "source_macro_f1": [99.0],
    "seeds": [0],
    "environment": {"device": "cpu"},
    "duration_s": 1.0,
}


def test_macro_f1_equals_values_computed_by_hand():
    truth = torch.tensor([0, 0, 1, 1, 2, 2])
    assert macro_f1(truth, truth, 3) == 100
    assert math.isclose(macro_f1(torch.zeros(6, dtype=torch.long), truth, 3), 100 * 0.5 / 3)
    # F1 of class 0: 2/3 (precision 1, recall 1/2), of class 1: 4/5 (precision 2/3, recall 1), of class 2: 1
    assert math.isclose(macro_f1(torch.tensor([0, 1, 1, 1, 2, 2]), truth, 3), 100 * (2 / 3 + 4 / 5 + 1) / 3)


def test_summary_has_the_mean_and_deviation_of_scores_and_the_median_time():
    rows = [{**ROW, "seed": seed, "macro_f1": score, "seconds_per_step": 0.01 * (seed + 1)}
            for seed, score in enumerate((80.0, 90.0, 100.0))]  # fmt: skip
    (line,) = report.summarize(rows)
    assert (line["mean"], line["spread"], line["seconds_per_step"]) == (90.0, 10.0, 0.02)
    assert "90.0 ± 10.0" in report.text_table(rows)
    assert "±" not in report.text_table(rows[:1]), "one seed has no spread"


# --- real data --------------------------------------------------------------------------------------------------------


def write(
    folder: Path, language: str, split: str, rows: list[tuple[str, str, str]], head=("id", "text", "label")
) -> None:
    (folder / language).mkdir(exist_ok=True)
    with (folder / language / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


@pytest.fixture
def folder(tmp_path):
    english = [(str(i), f"good, text {i}\nsecond line", ("bad", "good")[i % 2]) for i in range(8)]
    other = [(str(i), f"vema {i}", ("bad", "good")[i % 2]) for i in (7, 5, 3, 1, 0, 2, 4)]
    for split in ("train", "test"):
        write(tmp_path, "english", split, english)
        write(tmp_path, "vemari", split, [*other, ("99", "nobody", "bad")])
    return tmp_path


def test_rows_are_aligned_by_id_and_drops_are_counted(folder):
    data = load_parallel(str(folder), "english", "vemari")
    assert [pair.id for pair in data.train] == ["7", "5", "3", "1", "0", "2", "4"]
    assert data.train[0] == ("7", "good, text 7\nsecond line", "vema 7", "good")
    assert data.labels == ("bad", "good")
    assert len(data.finetune) == 8, "the base is fine-tuned on all source rows, even on the row without a target row"
    assert data.notes == [
        f"{split}: 1 rows of {one} dropped because no remaining row of {two} has their id"
        for split in ("train", "test")
        for one, two in (("vemari", "english"), ("english", "vemari"))
    ]


def test_rows_that_do_not_match_are_dropped_with_a_reason():
    source = [
        LabelledText("1", "a", "x"),
        LabelledText("1", "b", "x"),
        LabelledText("2", "c", "x"),
        LabelledText("3", "d", "x"),
        LabelledText("4", " ", "x"),
    ]
    target = [
        LabelledText("1", "A", "x"),
        LabelledText("2", "C", "y"),
        LabelledText("3", "D", "x"),
        LabelledText("4", "E", "x"),
    ]
    pairs, notes = align(source, target)
    assert [pair.id for pair in pairs] == ["3"]
    text = "\n".join(notes)
    assert "2 rows of source dropped because their ids occur more than once" in text
    assert "1 rows of target dropped because no remaining row of source has their id" in text
    assert "1 pairs dropped because their labels differ" in text
    assert "1 pairs dropped because a text is empty" in text


def test_errors_in_the_data_are_explained(folder):
    with pytest.raises(DemoError, match=r"no folder 'klingon'; its folders: english, vemari"):
        load_parallel(str(folder), "english", "klingon")
    (folder / "vemari" / "test.csv").unlink()
    with pytest.raises(DemoError, match=r"test\.csv is missing"):
        load_parallel(str(folder), "english", "vemari")
    write(folder, "vemari", "test", [("0", "a")], head=("id", "text"))
    with pytest.raises(DemoError, match="no column label; it has id, text"):
        load_parallel(str(folder), "english", "vemari")
    message = r"no row of english/test \(8 rows\) can be paired with a row of vemari/test \(1 rows\)"
    for row, reason in (
        (("x", "a", "bad"), "no remaining row of english has their id"),
        (("0", "a", "good"), "labels differ"),
    ):
        write(folder, "vemari", "test", [row])
        with pytest.raises(DemoError, match=f"{message}.*{reason}"):
            load_parallel(str(folder), "english", "vemari")
    write(folder, "vemari", "test", [("0", "a", "so-so"), ("1", "b", "good")])
    write(folder, "english", "test", [("0", "a", "so-so"), ("1", "b", "good")])
    with pytest.raises(DemoError, match="labels that english/train lacks: so-so"):
        load_parallel(str(folder), "english", "vemari")


def test_data_sets_are_loaded_from_the_hub(folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, language, split):
        calls.append((name, language, split))
        rows = {"id": [1, 2], "text": [f"{language} 1", f"{language} 2"], "label": [1, 0]}
        features = {"id": datasets.Value("int64"), "text": datasets.Value("string")}
        features["label"] = datasets.ClassLabel(names=["bad", "good"])
        return datasets.Dataset.from_dict(rows, features=datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_parallel("someone/parallel", "english", "vemari")
    assert data.train[0] == ("1", "english 1", "vemari 1", "good")
    assert ("someone/parallel", "vemari", "test") in calls

    def script(name, language, split, revision="main"):
        if revision == "main":
            raise RuntimeError("Dataset scripts are no longer supported, but found parallel.py")
        assert revision == "refs/convert/parquet"
        return load_dataset(name, language, split)

    monkeypatch.setattr(datasets, "load_dataset", script)
    assert load_parallel("someone/parallel", "english", "vemari").train == data.train

    def fails(*_, **__):
        raise RuntimeError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DemoError, match=r"--data someone/parallel: .*no such data set"):
        load_parallel("someone/parallel", "english", "vemari")


def test_demo_runs_with_the_users_model_and_data(folder, corpus, tmp_path, capsys):
    model = pretrained_base(CONFIG, corpus, tmp_path / "cache", lambda line: None, progress=False)
    arguments = ["--model", str(model), "--data", str(folder), "--source", "english", "--target", "vemari"]
    tiny = ["--seeds", "1", "--epochs", "1", "--finetune-epochs", "1", "--max-length", "16", "--no-progress"]
    assert main(["demo", "--output", str(tmp_path / "out"), *arguments, *tiny]) == 0
    assert "no remaining row of english has their id" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in rows] == METHODS
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["languages"] == {"source": "english", "target": "vemari"} and len(run["notes"]) == 4


def test_error_for_a_missing_model_names_the_option(folder, tmp_path, capsys):
    arguments = [
        "--model",
        str(tmp_path / "nothing"),
        "--data",
        str(folder),
        "--source",
        "english",
        "--target",
        "vemari",
    ]
    assert main(["demo", "--output", str(tmp_path / "out"), *arguments]) == 2
    assert "--model" in capsys.readouterr().err


def test_nusax_is_read_and_aligned(nusax):
    data = load_parallel(str(nusax), "english", "acehnese")
    assert data.labels == ("negative", "neutral", "positive")
    assert (len(data.finetune), len(data.train), len(data.test)) == (500, 500, 400)
    assert all(pair.source != pair.target for pair in data.test)
