"""Tests of names that become folders, and of escaping arbitrary text in Markdown, LaTeX, CSV and figures."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from flare.experiments.demo import DemoError, DemoSettings
from flare.experiments.report.tables import Table, csv_text
from flare.experiments.runs.evaluate import _Evaluation
from flare.experiments.runs.records import RunRecord, write_record
from flare.experiments.runs.run_settings import EvaluateSettings, FinetuneSettings, TrainSettings
from flare.experiments.tasks import get_task
from flare.experiments.tasks.reading import has_split, read_split
from flare.experiments.translation.job import Job
from flare.experiments.translation.translate_settings import TranslateSettings
from flare.experiments.utils.errors import UserError
from flare.experiments.utils.escape import csv_cell, latex, markdown
from flare.experiments.utils.options import read_settings

WRONG = (
    "../x",
    "/tmp/x",
    "a/b",
    "a\\b",
    "..",
    ".",
    ".x",
    "",
    " ",
    " a",
    "a\0b",
    "a\nb",
    "a\x1bb",
    "a\u2028b",
    "\ud800",
    "é" * 51,
)
CLASSIFICATION = get_task("classification", labels=("a", "b"))


@pytest.mark.parametrize("name", WRONG, ids=ascii)
def test_an_invalid_folder_name_is_refused_everywhere(name, tmp_path):
    (tmp_path / "data").mkdir()
    calls = (
        lambda: TrainSettings(task="nusax", target=(name,)).check(),
        lambda: TrainSettings(task="nusax", target=("jav",), source=name).check(),
        lambda: TrainSettings(task="nusax", target=("jav",), name=name).check(),
        lambda: FinetuneSettings(task="nusax", model="m", source=name).check(),
        lambda: EvaluateSettings(target=(name,)).check(),
        lambda: TranslateSettings("nusax", "english", [name], "m"),
        lambda: TranslateSettings("nusax", name, ["jav"], "m"),
        lambda: Job(CLASSIFICATION, "english", name, "train", [], tmp_path),
        lambda: read_split(CLASSIFICATION, tmp_path / "data", name, "train"),
        lambda: has_split(CLASSIFICATION, tmp_path / "data", name, "train"),
    )
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        assert "name of one folder" in str(error.value) and str(error.value).isprintable()
    if name:  # the demo treats "" as a missing target
        with pytest.raises(DemoError, match="name of one folder"):
            DemoSettings(model="m", data="d", source="english", target=name).resolved()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_valid_names_are_accepted(tmp_path):
    for name in ("toba_batak", "Toba Batak", "zh-Hans", "فارسی", "می‌خواهم", "x.y", "100%_mine", "=x"):
        TrainSettings(task="nusax", target=(name,), name=name).check()


def test_a_run_json_cannot_name_another_folder(tmp_path):
    record = RunRecord("train", "done", "nusax", "english", "../../x", "lora", "lora", 0, base="b")
    write_record(tmp_path / "jav" / "lora" / "seed-0", record)
    with pytest.raises(UserError, match=r"target_language of a run\.json '\.\./\.\./x' is a path"):
        _Evaluation(EvaluateSettings(output=tmp_path), print)._targets("zero-shot")


def test_names_of_earlier_runs_are_reserved():
    with pytest.raises(UserError, match="earlier-N"):
        TrainSettings(task="nusax", target=("jav",), name="earlier-1").check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('output: "a\\0b"', "NUL"),
        ('model: "a\\0b"', "NUL"),
        ('labels: ["a", "b\\0"]', "NUL"),
        ("output: ~nobody-of-this-name/x", "give the full path"),
    ],
)
def test_values_that_the_operating_system_rejects_are_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(FinetuneSettings, {"config": str(tmp_path / "x.yaml")})
    with pytest.raises(UserError, match="lone surrogate"):
        read_settings(FinetuneSettings, {"output": "a\udcff"})


def test_csv_cells_are_not_formulas():
    rows = [["=1+1", "+x", "-x", "@x", "\t=x", "\r\n=x"], ["a=1", -0.5, None, "x", 3, ""]]
    head, first, second = csv.reader(io.StringIO(csv_text(["=HYPERLINK()", *"abcde"], rows), newline=""))
    assert head[0] == "'=HYPERLINK()" and all(cell.startswith("'") for cell in first)
    assert second == ["a=1", "-0.5", "", "x", "3", ""]
    assert csv_cell(-1) == -1


def test_special_characters_are_escaped():
    assert markdown("a|b\n# <x> *y* `z` [l](u) _e_ a_b &amp;") == (
        "a\\|b # \\<x\\> \\*y\\* \\`z\\` \\[l\\](u) \\_e\\_ a_b \\&amp;"
    )
    assert (markdown("# x"), markdown("- x"), markdown("-"), markdown("-1.5")) == ("\\# x", "\\- x", "-", "-1.5")
    assert latex("[a]*|\n\nb") == "{[}a]{*}\\textbar{}  b"
    table = Table("a\nb", ("|", "b"), (("[x]\n\n", "*"), ("a|b", "1")), notes=("one\n\\input{two}",), best={(1, 1)})
    assert [line.replace("\\|", "").count("|") for line in table.markdown().splitlines()] == [3, 3, 3, 3]
    assert "**1**" in table.markdown()
    assert all(line.startswith("%") or "input" not in line for line in table.latex().splitlines())
    assert len(table.text().splitlines()) == 4


def test_a_dollar_sign_in_a_figure_is_shown(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from flare.experiments.report.figures.style import new_figure, save

    figure = new_figure(3, 2)
    axes = figure.add_subplot()
    axes.set_xticks([0, 1], ["$a", r"$\frac{$"])
    axes.set_yscale("log")
    axes.set_xlabel(r"$\nothing$")
    (path,) = save(figure, tmp_path / "x", ["svg"])
    assert r"$\nothing$" in path.read_text() and r"$\frac{$" in path.read_text()
