"""Tests of `flare report`: numbers computed by hand, tables, figures and errors.

A group holds the runs that one table compares. A line of the table shows one variant (a method with its options, such
as `flare-r8`) in all languages and with all seeds.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from report_runs import group_of, is_drawn, make_run

from flare.cli import main
from flare.experiments.report import ReportError, write_report
from flare.experiments.report.collect import collect
from flare.experiments.report.conditions import warnings
from flare.experiments.report.families import source_kind
from flare.experiments.report.figures.compare import draw_comparison, draw_costs
from flare.experiments.report.figures.layers import curves, draw_layers
from flare.experiments.report.figures.style import COLUMN, PAGE, caption_of
from flare.experiments.report.main_lines import main_lines
from flare.experiments.report.summary import costs, quality
from flare.experiments.report.tables import cost_csv, cost_table, latex, quality_csv, quality_table
from flare.experiments.runs.records import (
    Metrics,
    RecordError,
    read_metrics,
    read_record,
    write_metrics,
    write_record,
)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder of runs in the languages ace and jav.

    Zero-shot, LoRA and FLARE have two seeds in each language. X-Mixup has one seed, in ace only. There are two
    fine-tuned bases.
    """
    root = tmp_path / "runs"
    scores = {
        ("ace", "zero-shot"): [20.0, 30.0],
        ("jav", "zero-shot"): [40.0, 40.0],
        ("ace", "lora"): [60.0, 64.0],
        ("jav", "lora"): [70.0, 72.0],
        ("ace", "flare"): [80.0, 82.0],
        ("jav", "flare"): [71.0, 71.0],
        ("ace", "x-mixup"): [70.0],
    }
    costs = {"lora": (0.1, 100), "flare": (0.15, 120), "x-mixup": (0.3, 300)}
    for (language, method), values in scores.items():
        for seed, value in enumerate(values):
            measured = {}
            if method in costs:
                seconds, mebibytes = costs[method]
                measured = {
                    "seconds_per_step": seconds + 0.01 * seed,
                    "peak_bytes": mebibytes * 2**20,
                    "peak_kind": "live tensors",
                    "train_seconds": 600 * seconds,
                    "steps": 500,
                }
            extra = {"fusion": "add_relu", "source_text": "gold"} if method == "flare" else {}
            if method == "flare":
                names = [f"bert.encoder.layer.{i}.attention.self.{p}" for i in range(3) for p in ("query", "value")]
                measured["bottleneck"] = {"S": [0.1 * i + 0.1 for i in range(6)], "T": [0.5] * 6, "layers": names}
            make_run(root, language, method, seed, value, measured=measured, r=64 if method in costs else None, **extra)
    for seed, value in enumerate([84.0, 86.0]):
        make_run(root, None, "finetune", seed, value)
    return root


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_quality_equals_values_computed_by_hand(runs: Path) -> None:
    table = quality(group_of(runs), "macro_f1")
    assert [line.label for line in table.lines] == ["zero-shot", "lora", "x-mixup", "flare"]
    assert table.common == ("ace",) and table.complete == ("zero-shot", "lora", "flare")
    lora, flare, mixup = table.line("lora"), table.line("flare"), table.line("x-mixup")
    assert (lora.cells["ace"].mean, lora.cells["jav"].mean) == (62.0, 71.0)
    assert lora.cells["ace"].spread == pytest.approx(8**0.5)  # sqrt((2² + 2²) / 1)
    assert lora.average.mean == pytest.approx(66.5)
    assert lora.average.values == (65.0, 68.0)  # one average over the languages per seed
    assert lora.average.spread == pytest.approx(4.5**0.5)
    # in jav, LoRA and FLARE both have 71 and share the ranks 1 and 2
    assert (flare.rank, lora.rank, table.line("zero-shot").rank) == (1.25, 1.75, 3.0)
    assert mixup.cells["jav"] is None and mixup.rank is None
    assert (mixup.average.mean, mixup.average.languages, mixup.average.spread) == (70.0, 1, None)
    assert (lora.common.mean, lora.common.languages) == (62.0, 1)


def test_the_spread_of_an_average_is_over_the_seeds_that_all_languages_have(tmp_path: Path) -> None:
    for language, seeds in (("ace", (0, 1, 2)), ("jav", (1, 2, 7))):
        for seed in seeds:
            make_run(tmp_path, language, "lora", seed, 50.0 + seed)
    (line,) = quality(group_of(tmp_path), "macro_f1").lines
    assert line.average.mean == pytest.approx((51 + 160 / 3) / 2)
    assert line.average.values == (51.0, 52.0)
    assert line.seeds == "3"


def test_quality_table_in_markdown_and_csv(runs: Path) -> None:
    group = group_of(runs)
    table = quality_table(group, quality(group, "macro_f1"))
    lines = table.markdown().splitlines()
    assert lines[0] == "| method | Acehnese | Javanese | average | average over 1 | rank | seeds |"
    assert lines[1] == "|---|---:|---:|---:|---:|---:|---:|"
    assert lines[3] == "| LoRA | 62.0 ± 2.8 | **71.0 ± 1.4** | 66.5 ± 2.1 | 62.0 ± 2.8 | 1.75 | 2 |"
    assert lines[4] == "| X-Mixup | 70.0 | - | 70.0 (1 of 2) | 70.0 | - | 1 |"
    assert lines[5].startswith("| FLARE | **81.0 ± 1.4** | **71.0 ± 0.0** | **76.0 ± 0.7** |")
    assert any("one seed" in note for note in table.notes) and any("n - 1" in note for note in table.notes)
    rows = list(csv.DictReader(io.StringIO(quality_csv(quality(group, "macro_f1")))))
    mixup = next(row for row in rows if row["variant"] == "x-mixup")
    assert (mixup["ace_mean"], mixup["ace_std"], mixup["ace_n"]) == ("70.0", "", "1")
    assert (mixup["jav_mean"], mixup["jav_n"], mixup["rank"], mixup["average_languages"]) == ("", "0", "", "1")


def test_costs_are_medians(runs: Path) -> None:
    rows = {row[0]: row for row in cost_table(group_of(runs)).rows}
    assert "zero-shot" not in rows  # zero-shot trains nothing
    assert rows["LoRA"] == ("LoRA", "105.0 (100.0 to 110.0)", "100.0 MiB", "1 min 0 s", "500", "-", "4")
    assert rows["X-Mixup"][1:4] == ("300.0", "300.0 MiB", "3 min 0 s")


def test_costs_show_their_range(tmp_path: Path) -> None:
    for seed, seconds in enumerate((0.949, 1.834)):
        measured = {"seconds_per_step": seconds, "train_seconds": 600 * seconds, "peak_bytes": 2**20}
        make_run(tmp_path, "ace", "lora", seed, 60.0 + seed, measured=measured)
        make_run(tmp_path, "ace", "flare", seed, 70.0, measured={**measured, "seconds_per_step": 1.0 + 0.01 * seed})
    group = group_of(tmp_path)
    assert cost_table(group).rows[0][1:4] == (
        "1391.5 (949.0 to 1834.0)",
        "1.0 MiB",
        "13 min 55 s (9 min 29 s to 18 min 20 s)",
    )
    lora, _ = csv.DictReader(io.StringIO(cost_csv(costs(group))))
    assert (lora["seconds_per_step_min"], lora["seconds_per_step_max"]) == ("0.949", "1.834")
    assert [line for line in warnings(group) if "ms per step" in line] == [
        "lora: its runs took 949.0 to 1834.0 ms per step, so its costs are not reliable (was the machine shared, or do "
        "the languages' texts differ in length?)"
    ]
    pytest.importorskip("matplotlib")
    figure = draw_costs(group, "macro_f1")
    assert "smallest to largest cost" in caption_of(figure)


def test_gold_and_machine_translated_translate_test_have_separate_names(tmp_path: Path) -> None:
    for variant, text in (("translate-test", "gold"), ("translate-test-mt-source", "mt")):
        make_run(
            tmp_path, "ace", "translate-test", 0, 60.0, variant=variant, source_text=text, setting="translate-test"
        )
    assert list(group_of(tmp_path).labels.values()) == ["translate-test (gold source)", "translate-test (mt source)"]


def test_latex_is_escaped_and_balanced(tmp_path: Path) -> None:
    assert latex("50% of_a & b#c ~^{x}\\ $") == (
        r"50\% of\_a \& b\#c \textasciitilde{}\textasciicircum{}\{x\}\textbackslash{} \$"
    )
    make_run(tmp_path, "my_dialect", "lora", 0, 50.0, variant="100%_mine")
    make_run(tmp_path, "my_dialect", "flare", 0, 60.0)
    make_run(tmp_path, "my_dialect", "flare", 1, 62.0)
    group = group_of(tmp_path)
    text = quality_table(group, quality(group, "macro_f1")).latex()
    assert r"100\%\_mine & 50.0 & 1 \\" in text
    assert r"FLARE & \textbf{61.0 $\pm$ 1.4} & 2 \\" in text
    assert r"method & my\_dialect & seeds \\" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert not re.search(r"(?<!\\)[_%#]", code)


# --- comparability ----------------------------------------------------------------------------------------------------


def test_mixed_settings_under_one_name_cause_a_warning(runs: Path, tmp_path: Path) -> None:
    assert warnings(group_of(runs)) == []
    other = tmp_path / "other"
    make_run(other, "ace", "lora", 0, 50.0, settings={"num_train_epochs": 8, "adapter": {"lora_alpha": 16}})
    make_run(other, "ace", "lora", 1, 50.0, settings={"num_train_epochs": 3, "adapter": {"lora_alpha": 16}})
    assert warnings(group_of(other)) == [
        "lora: num_train_epochs differs between its runs: 8 in ace/seed-0; 3 in ace/seed-1"
    ]


def test_lines_scored_on_different_rows_cause_a_warning(runs: Path) -> None:
    for seed in (0, 1):
        folder = runs / "ace" / "flare" / f"seed-{seed}"
        record = read_record(folder)
        record.data = {"train": 10, "test": 4}
        write_record(folder, record)
    (line,) = warnings(group_of(runs))
    assert line == "ace: its lines were scored on different numbers of rows: 4: FLARE; 5: LoRA, X-Mixup, zero-shot"


def test_scores_with_other_settings_than_in_training_cause_a_warning(runs: Path) -> None:
    record = read_record(runs / "ace" / "flare" / "seed-0")
    record.data["notes"] = ["ace flare seed 0: scored with rows 5 (trained with None)"]
    write_record(runs / "ace" / "flare" / "seed-0", record)
    assert warnings(group_of(runs)) == record.data["notes"]


def test_a_second_evaluation_of_a_run_has_a_separate_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "ace", "flare", 0, 80.0, source_text="gold")
    test = {"translate-train": {"macro_f1": 80.0}, "translate-train/mt": {"macro_f1": 75.0}}
    write_metrics(folder, Metrics(test=test))
    assert list(group_of(tmp_path).labels.values()) == ["FLARE", "FLARE (mt source at test)"]


def test_source_texts_are_named_by_their_translator(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "ace", "flare", 0, 80.0, variant="flare-mt-source", source_text="mt")
    record = json.loads((folder / "run.json").read_text())
    record["data"]["translation"] = {
        "english-ace": {"settings": {"model": {"name": "x/other"}}},
        "ace-english": {"settings": {"model": {"name": "facebook/nllb-200-3.3B"}}},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (entry,) = group_of(tmp_path).entries
    assert (entry.name, source_kind(entry)) == ("FLARE (mt source)", "mt: NLLB 3.3B")


def test_runs_are_grouped_by_task_and_model(runs: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "xnli", "swahili", "lora", 0, 50.0, task="xnli")
    other = tmp_path / "big"
    make_run(other, None, "finetune", 0, 90.0)
    record = json.loads((other / "base" / "seed-0" / "run.json").read_text())
    (other / "base" / "seed-0" / "run.json").write_text(json.dumps({**record, "base": "org/big-bert"}))
    make_run(other, "ace", "lora", 0, 99.0)
    collection = collect([tmp_path, runs])  # the folders overlap, but no run counts twice
    assert [group.slug for group in collection.groups] == ["nusax-big-bert", "nusax-tiny-bert", "xnli"]
    assert collection.runs == 13 + 2 + 1 + 2
    # if the folder of all runs was moved, a run still finds its base, in the new folder
    moved = tmp_path / "moved"
    (tmp_path / "big").rename(moved)
    assert "org/big-bert" in {group.model for group in collect([moved]).groups}


def test_bottleneck_curves_are_by_projection_and_block(runs: Path) -> None:
    curves_by_projection = curves(group_of(runs).of("flare", "ace")[0])
    assert list(curves_by_projection) == ["query", "value"]
    assert curves_by_projection["query"]["S"] == pytest.approx({1: 0.1, 2: 0.3, 3: 0.5})
    assert curves_by_projection["value"]["S"] == pytest.approx({1: 0.2, 2: 0.4, 3: 0.6})


def test_figures_show_whole_curves_and_fit_a_column_or_a_page(runs: Path) -> None:
    pytest.importorskip("matplotlib")
    path = runs / "jav" / "flare" / "seed-0"
    metrics = read_metrics(path)
    metrics.bottleneck["S"] = [10.0] * 6  # the curve in the second panel is higher than the curve in the first
    write_metrics(path, metrics)
    group = group_of(runs)
    figure = draw_layers(group, "flare")
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 5 for axes in figure.axes)
    figure = draw_comparison(group, "macro_f1")
    figure.draw_without_rendering()
    assert figure.get_figwidth() in (COLUMN, PAGE) and "English as the source" in caption_of(figure)
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    numbers = {text.get_text() for text in figure.axes[0].texts}
    assert {"62.0", "81.0", "71.0"} <= numbers, "means are written on their bars"


# --- the whole report -------------------------------------------------------------------------------------------------


def test_with_many_lines_the_comparison_shows_only_the_main_lines(tmp_path: Path) -> None:
    """The main lines are, for each method, the line closest to its defaults, and all lines that the user named.

    Here every variant has its rank in its name or is named by the user, so no line has only the name of its method.
    """
    for language in ("ace", "jav"):
        for method in ("lora", "input-fusion", "x-mixup"):
            make_run(tmp_path, language, method, 0, 50, variant=f"{method}-r8", r=8)
        for r in (4, 8, 16, 32):
            make_run(tmp_path, language, "flare", 0, 60, variant=f"flare-r{r}", r=r, fusion="add_relu")
        make_run(tmp_path, language, "flare", 0, 40, variant="flare-mul-r8", r=8, fusion="mul")
        make_run(tmp_path, language, "flare", 0, 70, variant="mine", r=8, fusion="add_relu")
    for fusion in ("add", "matmul"):
        make_run(tmp_path, "ace", "flare", 0, 60, variant=f"flare-{fusion}-r8", r=8, fusion=fusion)
    group = group_of(tmp_path)
    shown = {line.label for line in main_lines(group, quality(group, "macro_f1"))}
    assert shown == {"lora-r8", "input-fusion-r8", "x-mixup-r8", "flare-r8", "mine"}


def test_the_command_writes_tables_figures_and_a_list_of_files(runs: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    for r, score in ((8, 78.0), (16, 79.0)):
        for language in ("ace", "jav"):
            make_run(
                runs, language, "flare", 0, score, variant=f"flare-r{r}", r=r, fusion="add_relu", source_text="gold"
            )
    for fusion in ("add", "mul"):
        make_run(runs, "ace", "flare", 0, 74.0, variant=f"flare-{fusion}", r=64, fusion=fusion, source_text="gold")
    make_run(runs, "jav", "lora", 9, None, status="running", r=64)
    output = tmp_path / "report"
    assert main(["report", str(runs), "--output", str(output), "--title", "Mine", "--formats", "svg"]) == 0
    out = capsys.readouterr().out
    assert "FLARE (r8)" in out and "Not in the tables" in out and "'running'" in out
    report = json.loads((output / "report.json").read_text())
    assert sorted(report["files"]) == sorted(
        str(path.relative_to(output)) for path in output.rglob("*") if path.is_file() and path.name != "report.json"
    )
    for name in ("comparison", "costs", "layers", "rank", "fusion"):
        assert is_drawn(output / "pictures" / f"nusax-{name}.png"), name
        assert (output / "pictures" / f"nusax-{name}.svg").stat().st_size > 2000
    (group,) = report["groups"]
    assert list(group["pictures_left_out"]) == ["activations", "source-text", "translators"]
    text = (output / "report.md").read_text()
    assert text.startswith("# Mine\n")
    for words in (
        "pictures/nusax-comparison.png",
        "c0ffee",
        "tiny-bert",
        "macro F1 85.0 ± 1.4",
        "seed-9: not finished",
    ):
        assert words in text, words
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (output / link).is_file(), link
    raw = list(csv.DictReader((output / "runs.csv").open()))
    assert len(raw) == 13 + 6
    assert {row["percent"] for row in raw if row["variant"] == "lora" and row["target_language"] == "ace"} == {
        "60.0",
        "64.0",
    }


def test_without_matplotlib_the_tables_are_written(runs: Path, tmp_path: Path, monkeypatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("matplotlib")

    monkeypatch.setattr("flare.experiments.report.figures.bars.new_figure", missing)
    messages: list[str] = []
    write_report([runs], tmp_path / "report", print_fn=messages.append)
    assert any("flare-kernels[experiments]" in line for line in messages)
    assert (tmp_path / "report" / "tables" / "nusax-macro_f1.tex").is_file()
    assert not (tmp_path / "report" / "pictures").exists()


@pytest.fixture
def small(tmp_path: Path, monkeypatch) -> Path:
    """Return a folder with one run, and turn off the drawing of figures."""
    monkeypatch.setattr("flare.experiments.report.write.draw_figures", lambda *_: [])
    make_run(tmp_path / "small", "ace", "lora", 0, 50.0)
    return tmp_path / "small"


def test_an_earlier_report_is_kept_without_overwrite(small: Path, tmp_path: Path) -> None:
    output, messages = tmp_path / "report", []
    write_report([small], output, title="first", print_fn=messages.append)
    (output / "tables" / "mine.txt").write_text("mine")
    write_report([small], output, title="second", print_fn=messages.append)
    assert (output / "earlier-1" / "report.md").read_text().startswith("# first")
    assert (output / "earlier-1" / "tables" / "mine.txt").read_text() == "mine"
    assert any("earlier-1" in line for line in messages)
    (output / "notes.txt").write_text("mine")
    write_report([small], output, title="third", overwrite=True, print_fn=messages.append)
    assert (output / "report.md").read_text().startswith("# third")
    assert (output / "notes.txt").read_text() == "mine" and not (output / "earlier-2").exists()


def test_a_failure_keeps_the_earlier_report(small: Path, tmp_path: Path, monkeypatch) -> None:
    output = write_report([small], tmp_path / "report", title="first", print_fn=lambda line: None).parent
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("flare.experiments.report.write._report_json", full)
    with pytest.raises(OSError, match="disk full"):
        write_report([small], output, overwrite=True, print_fn=lambda line: None)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_not_a_report_is_refused(small: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "report.md").write_text("my thesis")
    assert main(["report", str(small), "--output", str(output), "--overwrite"]) == 2
    assert "did not write" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["report.md"]
    assert (output / "report.md").read_text() == "my thesis"


def test_errors_name_what_cannot_be_reported(small: Path, tmp_path: Path) -> None:
    def refused(*words: str, runs: list[Path], kind: type[Exception] = ReportError, **options: object) -> None:
        with pytest.raises(kind) as caught:
            write_report(runs, tmp_path / "never", print_fn=lambda line: None, **options)
        assert all(word in str(caught.value) for word in words), caught.value
        assert not (tmp_path / "never").exists()

    refused("this folder does not exist", runs=[tmp_path / "nowhere"], kind=RecordError)
    (tmp_path / "empty").mkdir()
    refused("no runs found", "flare finetune", runs=[tmp_path / "empty"])
    make_run(tmp_path / "begun", "ace", "lora", 0, None, status="running")
    refused("nothing to report", "unfinished", "'running'", runs=[tmp_path / "begun"])
    refused("--metric bleu", "macro_f1", runs=[small], metrics=["bleu"])
    refused("--formats gif", "png", runs=[small], formats=["gif"])
    make_run(tmp_path / "again", "ace", "lora", 0, 51.0)
    (tmp_path / "again").rename(tmp_path / "copy")
    for folder in (small, tmp_path / "copy"):  # runs with the same base belong in one table
        path = folder / "ace" / "lora" / "seed-0" / "run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base": "org/model"}))
    refused("two runs of lora on ace with seed 0", "--name", runs=[small, tmp_path / "copy"])
    odd = make_run(tmp_path / "odd", "ace", "lora", 0, 50.0)
    write_metrics(odd, Metrics(test={"translate-train": {"macro_f1": float("nan")}}))
    refused("metrics.json", "nan", "finite number", runs=[tmp_path / "odd"])
    (odd / "run.json").write_text('{"kind": "train", ')
    refused("run.json", "cannot be read", runs=[tmp_path / "odd"], kind=RecordError)
