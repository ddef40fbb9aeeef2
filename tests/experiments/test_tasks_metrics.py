"""Tests that compare metrics with values computed by hand."""

from __future__ import annotations

import pytest

from flare.experiments.tasks import Answer, DataError, Example, get_task, score
from flare.experiments.tasks.metrics import accuracy, exact_match, f1, macro_f1, normalize_answer

ABC = ("a", "b", "c")


def test_macro_f1_averages_over_all_labels():
    # a: precision 1, recall 1/2; b: precision 2/3, recall 1; c: all correct
    assert macro_f1(list("abbbcc"), list("aabbcc"), ABC) == pytest.approx(100 * (2 / 3 + 4 / 5 + 1) / 3)
    assert macro_f1(list("aa"), list("aa"), ABC) == pytest.approx(100 / 3), "labels that do not occur count as 0"
    # a prediction that is not a label is a miss for the row's true label and does not affect other labels
    assert macro_f1(["a", "?"], ["a", "b"], ("a", "b")) == pytest.approx(50)
    assert accuracy(list("abc?"), list("abab")) == 50


def test_macro_f1_equals_macro_f1_of_the_demo():
    import torch

    from flare.experiments.demo.experiment import macro_f1 as demo_macro_f1

    predicted, true = torch.randint(0, 3, (50,)), torch.randint(0, 3, (50,))
    names = [[ABC[i] for i in indices] for indices in (predicted, true)]
    assert macro_f1(names[0], names[1], ABC) == pytest.approx(demo_macro_f1(predicted, true, 3))


def test_squad_metrics_equal_values_computed_by_hand():
    assert normalize_answer("The  U.S., a land") == "us land"
    assert exact_match(["the Nile!", "Nile"], [["Nile"], ["Amazon", "nile"]]) == 100
    assert exact_match(["Nile river"], [["Nile"]]) == 0
    # of three predicted words, two are the words of the accepted answer: precision 2/3, recall 1
    assert f1(["blue Nile river"], [["Amazon", "Nile river"]]) == pytest.approx(80)
    assert f1(["x x"], [["x"]]) == pytest.approx(100 * 2 * 1 / 3), (
        "a repeated word counts only as often as in the accepted answer"
    )
    assert f1([""], [["x"]]) == 0
    assert exact_match(["کتاب"], [["کتاب"]]) == 100


def test_score_returns_all_metrics_and_leaves_out_rows_without_answers():
    rows = [Example("1", {}, "negative"), Example("2", {}, "neutral")]
    scores = score(get_task("nusax"), ["negative", "positive"], rows)
    assert list(scores) == ["macro_f1", "accuracy"]
    assert scores == pytest.approx({"macro_f1": 100 / 3, "accuracy": 50})
    answered = Example("1", {}, None, (Answer("x y"),))
    scores = score(get_task("qa"), ["y", "whatever"], [answered, Example("2")])
    assert scores == pytest.approx({"exact_match": 0, "f1": 100 * 2 / 3}), "a question without an answer does not count"
    with pytest.raises(DataError, match="none of 1 rows has a label or answer"):
        score(get_task("qa"), ["x"], [Example("2")])
    with pytest.raises(ValueError, match="1 predictions were given for 2 rows"):
        score(get_task("nusax"), ["x"], rows)
