"""Tests of the marks, such as square brackets, that carry an answer through a translation.

The translations keep the marks, lose them, or change them. If the marks are lost, so is the answer's span (its position
in the translated text).
"""

import json

import pytest

from flare.experiments.tasks import Answer, Example, get_task
from flare.experiments.translation import Job, Translated, TranslationError, translate_split
from flare.experiments.translation.answer_marks import MarksLost, mark, recover, remove
from flare.experiments.translation.batch_plan import make_plan

CONTEXT = "The tower stands in Paris."
PARIS = Answer("Paris", 20)


def test_marks_differ_from_the_characters_of_the_text():
    assert mark(CONTEXT, PARIS).text == "The tower stands in [ Paris ]."
    assert mark("[1] in Paris", Answer("Paris", 7)).text == "[1] in { Paris }"
    assert mark("《a》 Paris", Answer("Paris", 4)).pair == ("{", "}")  # 《》 count as square brackets
    assert mark(CONTEXT, Answer("Paris")).text == "The tower stands in [ Paris ]."  # a single occurrence needs no start


@pytest.mark.parametrize(
    ("context", "answer", "reason"),
    [
        (CONTEXT, Answer("Paris", 19), "not at its place"),
        ("Paris, Paris", Answer("Paris"), "not at its place"),
        (CONTEXT, Answer("", 3), "not at its place"),
        ("[]{}<>«» Paris", Answer("Paris", 9), "every kind of mark"),
    ],
)
def test_answers_that_cannot_be_marked_have_a_reason(context, answer, reason):
    with pytest.raises(MarksLost, match=reason):
        mark(context, answer)


@pytest.mark.parametrize(
    ("translation", "plain", "answer"),
    [
        ("La tour est à [ Paris ].", "La tour est à Paris.", "Paris"),
        ("La tour est à [ Paris ] .", "La tour est à Paris.", "Paris"),
        ("La tour est à[ Paris ]en", "La tour est à Paris en", "Paris"),
        ("[ Paris ] a la tour", "Paris a la tour", "Paris"),
        ("a [[ Paris ]]", "a Paris", "Paris"),
        ("塔在【巴黎】。", "塔在巴黎。", "巴黎"),
        ("塔在[ 巴黎 ]里", "塔在巴黎里", "巴黎"),
        ("人々[ 東京 ]に", "人々東京に", "東京"),
        ("อยู่ใน[ ปารีส ]ครับ", "อยู่ในปารีสครับ", "ปารีส"),
        ("ማማው[ ፓሪስ ]ውስጥ", "ማማው ፓሪስ ውስጥ", "ፓሪስ"),
        ("탑은 [ 파리 ]에", "탑은 파리에", "파리"),
        ("e l'[Hôtel de ville], là", "e l'Hôtel de ville, là", "Hôtel de ville"),
    ],
)
def test_the_answer_is_recovered_from_its_marks(translation, plain, answer):
    text, recovered = recover(translation, ("[", "]"))
    assert (text, recovered.text) == (plain, answer)
    assert text[recovered.start : recovered.start + len(recovered.text)] == answer


@pytest.mark.parametrize(
    ("translation", "reason", "left"),
    [
        ("La tour est à Paris.", "marks lost", "La tour est à Paris."),
        ("La tour est à [ Paris.", "marks lost", "La tour est à Paris."),
        ("[ La tour ] est à [ Paris ].", "marks doubled", "La tour est à Paris."),
        ("La tour ] est à [ Paris.", "marks out of order", "La tour est à Paris."),
        ("La tour est à [ ] Paris.", "nothing between the marks", "La tour est à Paris."),
    ],
)
def test_unusable_marks_raise_with_a_reason_and_can_be_removed(translation, reason, left):
    with pytest.raises(MarksLost, match=reason):
        recover(translation, ("[", "]"))
    assert remove(translation, ("[", "]")) == left


# --- a whole split ----------------------------------------------------------------------------------------------------


class Mangling:
    """Fake translator that returns a text in upper case.

    The word "lose", "double" or "turn" in the text makes the translator lose, double or reorder the marks.
    """

    def settings(self):
        return {"model": "mangling"}

    def plan(self, texts):
        return make_plan(texts, lambda some: [len(text) for text in some], limit=None, batch_tokens=60)

    def translate_batch(self, pieces):
        results = []
        for piece in pieces:
            text = piece.upper()
            for word, change in (
                ("LOSE", lambda t: t.replace("]", "")),
                ("DOUBLE", lambda t: "[ A ] " + t),
                ("TURN", lambda t: t.replace("[", "#").replace("]", "[").replace("#", "]")),
            ):
                if word in text:
                    text = change(text)
            results.append(Translated(text))
        return results


def row(name: str, context: str, *answers: Answer) -> Example:
    return Example(name, {"question": f"where is {name}?", "context": context}, answers=answers)


ROWS = [
    row("1", CONTEXT, PARIS, Answer("tower", 4)),
    row("2", "lose it in Paris", Answer("Paris", 11)),
    row("3", "double it in Paris", Answer("Paris", 13)),
    row("4", "turn it in Paris", Answer("Paris", 11)),
    row("5", CONTEXT, Answer("Rome", 20)),
    row("6", CONTEXT),
    row("7", "in Paris it is", Answer("Paris", 3)),
]


def job_of(tmp_path, split, policy, rows=ROWS):
    return Job(get_task("qa"), "english", "loud", split, rows, tmp_path, lost_marks=policy, data="made here")


def test_policy_drop_leaves_out_rows_without_a_span(tmp_path):
    job = job_of(tmp_path, "train", "drop")
    outcome = translate_split(job, Mangling(), print_fn=print)
    rows = [json.loads(line) for line in job.path.read_text(encoding="utf-8").splitlines()]
    assert [one["id"] for one in rows] == ["1", "7"]
    for one in rows:
        (text,), (start,) = one["answers"]["text"], one["answers"]["answer_start"]
        assert text == "PARIS" and one["context"][start : start + 5] == "PARIS"
    assert rows[0]["question"] == "WHERE IS 1?" and rows[0]["context"] == CONTEXT.upper()
    assert outcome.counts["dropped"] == {
        "marks doubled": 1,
        "marks lost": 1,
        "marks out of order": 1,
        "no answer": 1,
        "the answer is not at its place in the text": 1,
    }
    assert (outcome.counts["rows"], outcome.counts["written"], outcome.counts["other_answers"]) == (7, 2, 1)
    entry = json.loads((job.folder / "provenance.json").read_text())["splits"]["train"]
    assert entry["counts"] == outcome.counts and entry["lost_marks"] == "drop" and entry["data"] == "made here"


def test_policy_keep_writes_rows_without_a_span(tmp_path):
    job = job_of(tmp_path, "test", "keep")
    outcome = translate_split(job, Mangling())
    rows = [json.loads(line) for line in job.path.read_text(encoding="utf-8").splitlines()]
    assert [one["id"] for one in rows] == [one.id for one in ROWS]
    assert [len(one["answers"]["text"]) for one in rows] == [1, 0, 0, 0, 0, 0, 1]
    assert not any(mark in one["context"] for one in rows for mark in "[]")
    assert rows[1]["context"] == "LOSE IT IN PARIS"
    assert outcome.counts["dropped"] == {} and sum(outcome.counts["without_span"].values()) == 4


def test_an_empty_result_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(TranslationError, match=r"no rows are left to write; dropped: 1 \(marks lost\)"):
        translate_split(job_of(tmp_path, "train", "drop", ROWS[1:2]), Mangling())
