"""Tests of `flare report` over several tasks and data sets: averages, ranks, ablations, and activations by position."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from report_runs import group_of, is_drawn, make_run

from flare.experiments.report import write_report
from flare.experiments.report.collect import collect
from flare.experiments.report.cross_task import ABLATIONS, ablation_table, overview_csv, overview_table, overviews
from flare.experiments.report.display import language_names, model_name, task_name
from flare.experiments.report.figures.ablations import draw_translators
from flare.experiments.report.figures.compare import draw_comparison
from flare.experiments.report.figures.overview import draw_average_ranks, draw_tasks
from flare.experiments.runs.activations import (
    ACTIVATIONS_FILE,
    Activations,
    Instance,
    RowCollector,
    read_activations,
    write_activations,
)
from flare.experiments.runs.records import RecordError


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Return a folder of runs with two seeds, on NusaX in two languages and on XNLI in one language.

    X-Mixup has no run in the second language of NusaX.
    """
    scores = {
        "nusax": {
            "zero-shot": (20, 30),
            "lora": (60, 70),
            "x-mixup": (62,),
            "input-fusion": (80, 80),
            "flare": (80, 90),
        },
        "xnli": {"zero-shot": (50,), "lora": (82,), "x-mixup": (81,), "input-fusion": (70,), "flare": (80,)},
    }
    for task, methods in scores.items():
        for method, means in methods.items():
            for language, mean in zip(
                ("acehnese", "javanese") if task == "nusax" else ("swahili",), means, strict=False
            ):
                for seed in (0, 1):
                    make_run(tmp_path / task, language, method, seed, mean - 1 + 2 * seed, task=task)
        for seed in (0, 1):
            make_run(tmp_path / task, None, "finetune", seed, 90.0, task=task)
    return tmp_path


def overview_of(root: Path):
    """Return one overview for each base model: its methods with their scores on all tasks."""
    groups = collect([root]).groups
    return overviews(groups, {group.slug: "macro_f1" for group in groups})


def test_averages_and_ranks_over_tasks(tasks: Path) -> None:
    (overview,) = overview_of(tasks)
    assert overview.model == "tiny-bert" and list(overview.tasks) == ["NusaX", "XNLI"]
    lines = {line.label: line for line in overview.lines}
    # Only LoRA, input-level fusion and FLARE are trained in every language. Their mean scores, in this order, are 65,
    # 80 and 85 on NusaX, and 82, 70 and 80 on XNLI.
    assert {label: line.rank for label, line in lines.items()} == {
        "zero-shot": None,
        "lora": (3 + 1) / 2,
        "x-mixup": None,
        "input-fusion": (2 + 3) / 2,
        "flare": (1 + 2) / 2,
    }
    assert lines["lora"].average.mean == pytest.approx((65 + 82) / 2)
    assert lines["lora"].average.values == pytest.approx((72.5, 74.5))  # one average over the tasks per seed
    assert lines["zero-shot"].average.mean == pytest.approx((25 + 50) / 2)
    assert lines["x-mixup"].average is None and lines["x-mixup"].cells["NusaX"] is None
    table = overview_table([overview])
    assert table.head == ("model", "method", "NusaX (macro F1)", "XNLI (macro F1)", "average", "rank")
    assert table.rows[-1] == ("", "FLARE", "85.0 ± 1.4", "80.0 ± 1.4", "82.5 ± 1.4", "1.50")
    assert {
        (len(overview.lines) - 1, 2),
        (len(overview.lines) - 1, 4),
        (len(overview.lines) - 1, 5),
        (1, 3),
    } == table.best
    assert "tiny-bert,flare,FLARE,average,,82.5," in overview_csv([overview])


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (
            [("classification", "/A/polarity"), ("classification", "/A/topics")],
            ["polarity", "topics"],
        ),
        (
            [("classification", "/A/data"), ("classification", "/B/data"), ("multi-label", "/C/data")],
            ["A/data", "B/data", "C/data"],
        ),
        (
            [("classification", "/A/data"), ("regression", "/A/data")],
            ["data (classification)", "data (regression)"],
        ),
        ([("nusax", "/A/NusaX"), ("classification", "/B/NusaX")], ["NusaX", "NusaX (classification)"]),
    ],
    ids=("two names", "same name", "one folder", "name of a task"),
)
def test_data_sets_of_the_user_are_separate_groups_with_different_names(
    tmp_path: Path, data: list[tuple[str, str]], names: list[str]
) -> None:
    for number, (task, path) in enumerate(data):
        for language, method in ((None, "finetune"), ("ace", "lora")):
            make_run(tmp_path / str(number), language, method, 0, 50.0, task=task, settings={"data": path})
    groups = sorted(collect([tmp_path]).groups, key=lambda group: group.shown_task)
    assert [group.shown_task for group in groups] == names and len({group.slug for group in groups}) == len(groups)
    assert [len(group.bases) for group in groups] == [1] * len(groups)
    (overview,) = overview_of(tmp_path)
    assert sorted(overview.tasks) == names


def test_moved_data_with_the_same_test_rows_are_one_data_set(tmp_path: Path) -> None:
    for seed, path in enumerate(("/home/me/polarity", "/scratch/polarity")):
        folder = make_run(tmp_path, "ace", "lora", seed, 50.0, task="classification", settings={"data": path})
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**record, "data": {"digest": {"test": "d1"}}}))
        make_run(tmp_path, None, "finetune", seed, 90.0, task="classification", settings={"data": "/old/polarity"})
    group = group_of(tmp_path)
    assert (group.shown_task, len(group.entries), len(group.bases)) == ("polarity", 2, 2)


def test_ablation_table_over_ranks(tasks: Path, tmp_path: Path) -> None:
    for task, languages in (("nusax", ("acehnese", "javanese")), ("xnli", ("swahili",))):
        for r, score in ((8, 60.0), (16, 66.0)):
            for language in languages:
                make_run(tasks / task, language, "flare", 0, score, variant=f"flare-r{r}", r=r, task=task)
    groups = collect([tasks]).groups
    table = ablation_table(groups, {group.slug: "macro_f1" for group in groups}, *ABLATIONS["ranks"])
    assert table.head == ("model", "method", "r", "NusaX", "XNLI", "average")
    assert table.rows == (
        ("tiny-bert", "FLARE", "8", "60.0", "60.0", "60.0"),
        ("tiny-bert", "FLARE", "16", "66.0", "66.0", "66.0"),
    )
    assert table.best == {(1, 3), (1, 4)}


def test_ablation_table_has_separate_rows_for_each_source_language(tmp_path: Path) -> None:
    for source, scores in (("english", (50.0, 40.0)), ("indonesian", (70.0, 60.0))):
        make_run(tmp_path / source, None, "finetune", 0, 90.0, source=source)
        for r, score in zip((8, 16), scores, strict=True):
            make_run(tmp_path / source, "ace", "flare", 0, score, source=source, variant=f"flare-r{r}", r=r)
    groups = collect([tmp_path]).groups
    table = ablation_table(groups, {group.slug: "macro_f1" for group in groups}, *ABLATIONS["ranks"])
    assert [(row[0], *row[2:]) for row in table.rows] == [
        ("tiny-bert from english", "8", "50.0"),
        ("tiny-bert from english", "16", "40.0"),
        ("tiny-bert from indonesian", "8", "70.0"),
        ("tiny-bert from indonesian", "16", "60.0"),
    ]


def test_display_names_of_tasks_models_and_languages() -> None:
    assert task_name("nusax") == "NusaX" and task_name("my-task") == "my-task"
    assert [
        model_name(name) for name in ("FacebookAI/xlm-roberta-large", "google/mt5-xl", "meta-llama/Llama-3.1-8B")
    ] == [
        "XLM-R Large",
        "mT5-XL",
        "Llama 3.1 8B",
    ]
    assert model_name("/home/me/minilm/model") == "minilm"
    assert language_names(["ace", "jav", "my_dialect"]) == {
        "ace": "Acehnese",
        "jav": "Javanese",
        "my_dialect": "my_dialect",
    }
    assert language_names(["ace", "acehnese"]) == {"ace": "ace", "acehnese": "acehnese"}


# --- activations ------------------------------------------------------------------------------------------------------


def random_activations() -> tuple[Activations, list[np.ndarray]]:
    """Return activations, and the three random bottlenecks of shape (tokens, r) that are used both as S and as T."""
    generator = np.random.default_rng(0)
    rows = [generator.standard_normal((length, 4)).astype(np.float32) for length in (3, 5, 2)]
    sums = RowCollector()
    for row in rows:
        sums.add(row)
    instance = Instance("7", ("a", "b", "c"), ("x", "y"), rows[0], rows[2])
    return Activations("layer.0.query", "add_relu", sums.averages(), sums.averages(), (instance,)), rows


def test_averages_by_position_are_computed_written_and_read(tmp_path: Path) -> None:
    activations, rows = random_activations()
    padded = np.full((3, 5, 4), np.nan)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    source = activations.S
    np.testing.assert_allclose(source.before, np.nanmean(padded, axis=0), rtol=1e-6)
    np.testing.assert_allclose(source.after, np.nanmean(np.maximum(padded, 0), axis=0), rtol=1e-6)
    np.testing.assert_allclose(source.before_spread, np.nanstd(padded.mean(axis=2), axis=0), rtol=1e-5, atol=1e-7)
    assert source.counts.tolist() == [3, 3, 2, 1, 1]
    write_activations(tmp_path, activations)
    loaded = read_activations(tmp_path)
    assert (loaded.layer, loaded.fusion, loaded.instances[0].id) == ("layer.0.query", "add_relu", "7")
    assert loaded.instances[0].source_tokens == ("a", "b", "c")
    np.testing.assert_array_equal(loaded.instances[0].T, rows[2])
    np.testing.assert_allclose(loaded.T.after, activations.T.after, rtol=1e-6)
    path = tmp_path / ACTIVATIONS_FILE
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RecordError, match="cannot be read"):
        read_activations(tmp_path)


def test_figures_over_tasks_translators_and_positions(tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for translator, score in (("facebook/nllb-200-distilled-600M", 70.0), ("facebook/nllb-200-3.3B", 75.0)):
        for language in ("acehnese", "javanese"):
            data = {"translation": {f"{language}-english": {"settings": {"model": {"name": translator}}}}}
            variant = f"flare-{translator[-4:]}"
            folder = make_run(tasks / "nusax", language, "flare", 0, score, variant=variant, source_text="mt")
            record = json.loads((folder / "run.json").read_text())
            (folder / "run.json").write_text(json.dumps({**record, "data": {**record["data"], **data}}))
            write_activations(tasks / "nusax" / language / "flare" / "seed-0", random_activations()[0])
    output = tmp_path / "report"
    write_report([tasks], output, print_fn=lambda line: None)
    for name in ("average-rank", "tasks", "nusax-activations", "nusax-activations-row-1", "nusax-translators"):
        assert is_drawn(output / "pictures" / f"{name}.png"), name
        assert (output / "pictures" / f"{name}.pdf").read_bytes().startswith(b"%PDF"), name
    for name in ("overview", "source-texts"):
        assert (output / "tables" / f"{name}.tex").read_text().count(r"\toprule") == 1, name
    text = (output / "report.md").read_text()
    assert (
        "Average over tasks and average rank" in text and "Average rank of the trained methods over NusaX, XNLI" in text
    )
    bars = draw_average_ranks(overview_of(tasks)).axes[0]
    assert bars.get_ylim()[0] == 0 and {"1.50", "2.00", "2.50"} == {text.get_text() for text in bars.texts}
    axes = draw_translators(group_of(tasks / "nusax"), "macro_f1").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["NLLB 600M", "NLLB 3.3B"]


def test_bars_of_negative_scores_are_inside_the_axes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for task in ("nusax", "xnli"):
        for method, score in (("lora", -30.0), ("flare", -5.0)):
            for seed in (0, 1):
                make_run(tmp_path / task, "ace", method, seed, score - seed, task=task)
        for seed in (0, 1):
            make_run(tmp_path / task, None, "finetune", seed, -20.0, task=task)
    figure = draw_comparison(group_of(tmp_path / "nusax"), "macro_f1")
    low, high = figure.axes[0].get_ylim()
    assert low < -31 and high > 0
    assert {"-30.5", "-5.5"} == {text.get_text() for text in figure.axes[0].texts}
    assert all(text.xy[1] >= 0 for text in figure.axes[0].texts), "the numbers are above the zero line"
    assert all(axes.get_xlim()[0] < -30.5 for axes in draw_tasks(overview_of(tmp_path)).axes)
