"""Tests of the forms for encoders, on classification and question answering.

A form turns rows of data (each a target with its source) into rows for a model, and the model's output into
predictions.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from small_tasks import byte_tokenizer, word_tokenizer

import flare
from flare.baselines import InputFusionCollator
from flare.experiments.tasks import Answer, Example, Pair, get_task, make_form
from flare.experiments.tasks.forms.spans import best_span, locate, token_span
from flare.experiments.utils.errors import UserError

XNLI, NUSAX, QA = get_task("xnli"), get_task("nusax"), get_task("qa")


def nli(row_id: str, premise: str, hypothesis: str, label: str | None = "neutral") -> Example:
    return Example(row_id, {"premise": premise, "hypothesis": hypothesis}, label)


# --- classification ---------------------------------------------------------------------------------------------------


def test_premise_and_hypothesis_are_one_sequence_in_both_streams():
    tokenizer = word_tokenizer("a b c d e f g h")
    form = make_form(XNLI, tokenizer, "encoder", 8)
    pairs = [
        Pair(nli("1", "a b", "c"), nli("1", "d", "e f")),
        Pair(nli("2", "a b c d e", "f", "contradiction"), nli("2", "a", "b")),
    ]
    rows, notes = form.train_rows(pairs, with_source=True)
    words = [" ".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) for row in rows]
    assert words == ["<s> a b </s> c </s>", "<s> a b c d </s> f </s>"], "the longer text is truncated"
    assert rows[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert tokenizer.decode(rows[0]["source_input_ids"]) == "<s> d </s> e f </s>"
    assert [row["labels"] for row in rows] == [1, 2]
    assert notes == ["1 of 2 texts cut to 8 tokens (id 2)"]
    batch = flare.FlareDataCollator(tokenizer, layout=form.layout, max_length=8)(rows)
    assert batch["source_token_type_ids"].shape == batch["input_ids"].shape == (2, 8)
    plain, _ = form.eval_rows(pairs, with_source=False)
    assert not [name for row in plain for name in row if name.startswith("source")]
    with pytest.raises(ValueError, match="1 of 1 pairs have no source"):
        form.eval_rows([Pair(nli("1", "a", "b"))], with_source=True)


def test_labels_are_predicted_from_logits():
    form = make_form(NUSAX, word_tokenizer("a"), "encoder")
    assert (form.layout, form.auto_class) == ("encoder", "AutoModelForSequenceClassification")
    assert form.model_options["id2label"] == {0: "negative", 1: "neutral", 2: "positive"}
    pairs = [Pair(Example(str(i), {"text": "a"}, "positive")) for i in range(2)]
    logits = torch.tensor([[0.0, 1.0, 5.0], [3.0, 1.0, 2.0]], dtype=torch.bfloat16)
    assert form.predictions(logits, pairs) == ["positive", "negative"]
    assert form.predictions((logits.float().numpy(), "hidden states"), pairs) == ["positive", "negative"]
    assert form.scores(["positive", "negative"], pairs)["accuracy"] == 50
    with pytest.raises(ValueError, match="2 rows of logits were given for 1 pairs"):
        form.predictions(logits, pairs[:1])


def test_a_tokenizer_without_pad_token_pads_with_its_end_token():
    tokenizer = word_tokenizer("a", pad_token=None, eos_token="</s>")
    form = make_form(NUSAX, tokenizer, "encoder")
    assert tokenizer.pad_token == "</s>" and form.model_options["pad_token_id"] == 2
    _, notes = form.train_rows([Pair(Example("1", {"text": "a"}, "neutral"))], with_source=False)
    assert "has no pad token; its end token '</s>' is used for padding" in notes[0]
    with pytest.raises(UserError, match="has neither a pad token nor an end token to pad with; set one"):
        make_form(NUSAX, word_tokenizer("a", pad_token=None), "encoder")


def test_unsupported_forms_are_errors():
    tokenizer = word_tokenizer("a")
    with pytest.raises(UserError, match="'bert' is not known; accepted: encoder, causal, seq2seq"):
        make_form(NUSAX, tokenizer, "bert")
    with pytest.raises(UserError, match="its labels are not known yet"):
        make_form(get_task("classification"), tokenizer, "encoder")
    three = get_task("classification", text_columns=["a", "b", "c"], labels=["x", "y"])
    with pytest.raises(UserError, match="an encoder reads one text or a pair, but there are 3"):
        make_form(three, tokenizer, "encoder")
    slow = type("Slow", (), {"is_fast": False, "pad_token_id": 0})()
    with pytest.raises(UserError, match=r"\(Slow\) cannot map tokens to characters"):
        make_form(QA, slow, "encoder")


# --- spans ------------------------------------------------------------------------------------------------------------


def test_the_occurrence_nearest_to_the_answers_start_is_found():
    context = "to be or not to be"
    assert locate(context, Answer("to be", 13)) == 13
    assert locate(context, Answer("to be", 11)) == 13
    assert locate(context, Answer("to be")) == 0
    assert locate(context, Answer("BE", 3)) is None


def test_token_spans_cover_the_characters():
    offsets = [(0, 0), (0, 3), (0, 0), (0, 4), (5, 9), (9, 10), (0, 0)]
    inside = [False, False, False, True, True, True, False]
    assert token_span(offsets, inside, 0, 4) == (3, 3)
    assert token_span(offsets, inside, 6, 10) == (4, 5), "an answer that starts inside a token includes the whole token"
    assert token_span(offsets, inside, 5, 14) is None


def test_best_span_equals_brute_force():
    generator = np.random.default_rng(0)
    for _ in range(20):
        start, end = generator.normal(size=(2, 12))
        candidates = [(start[i] + end[j], i, j) for i in range(12) for j in range(i, min(i + 4, 12))]
        assert best_span(start, end, 4) == max(candidates)[1:]
    assert best_span(start[:0], end[:0], 4) is None


WORDS = "who where lives in the north of big Sumatra Java near a lake with Ana and Budi today ? ."


def qa(row_id: str, question: str, context: str, *answers: str) -> Example:
    accepted = tuple(Answer(text, context.find(text)) for text in answers)
    return Example(row_id, {"question": question, "context": context}, None, accepted)


PAIRS = [
    Pair(
        qa("1", "who lives in the north ?", "Ana lives in the north .", "Ana"), qa("1", "who ?", "Ana lives .", "Ana")
    ),
    Pair(
        qa("2", "where ?", "today Budi lives near a big lake of Java .", "big lake"),
        qa("2", "where lives Budi ?", "Budi lives near a lake .", "lake"),
    ),
    Pair(qa("3", "where ?", "Java .", "Java"), qa("3", "where in the north of Sumatra ?", "today in Java .", "Java")),
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("joined", [False, True])
def test_logits_at_the_answer_positions_give_the_answers(side, joined):
    """Within the target, the logits are highest at the collated start and end positions, so the answers are predicted.

    Both padding sides are tested, and `joined` rows, in which input-level fusion puts the source before the target.
    """
    tokenizer = word_tokenizer(WORDS, padding_side=side)
    form = make_form(QA, tokenizer, "encoder", 32)
    rows, notes = form.train_rows(PAIRS, with_source=True)
    assert notes == [] and len(rows) == 3
    assert tokenizer.decode(rows[0]["input_ids"]) == "<s> who lives in the north ? </s> Ana lives in the north . </s>"
    collator_class = InputFusionCollator if joined else flare.FlareDataCollator
    collator = collator_class(tokenizer, layout="encoder", padding="longest")
    batch = collator(rows)
    width = batch["input_ids"].shape[1]
    # Logits are 1.5 at the answer, 1 at other tokens, and 2 at padding. Before the target of a joined row they are 9.
    # The logits above 1.5 must have no effect.
    output = [2.0 - batch["attention_mask"] + torch.nn.functional.one_hot(batch[name], width) / 2
              for name in ("start_positions", "end_positions")]  # fmt: skip
    starts = collator([{**row, "start_positions": 0, "end_positions": 0} for row in rows])["start_positions"]
    if joined:
        for one in output:
            for row, first in zip(one, starts.tolist(), strict=True):
                row[:first] = 9.0
    predicted = form.predictions(output, PAIRS, None if side == "right" and not joined else starts)
    assert predicted == ["Ana", "big lake", "Java"]
    assert form.scores(predicted, PAIRS) == {"exact_match": 100, "f1": 100}


def test_truncated_and_left_out_rows_are_counted():
    tokenizer = word_tokenizer(WORDS)
    form = make_form(QA, tokenizer, "encoder", 12)
    long = "who lives in the north of Sumatra near a lake with Ana ?"
    pairs = [
        Pair(qa("1", "where ?", "Ana lives in the north of big Sumatra .", "Sumatra")),
        Pair(qa("2", "where ?", "Java .", "Bali")),
        Pair(Example("3", {"question": "where ?", "context": "in Java ."}, None, (Answer("Java", 0),))),
        Pair(qa("4", long, "Budi .", "Budi")),
    ]
    rows, notes = form.train_rows(pairs, with_source=False)
    assert [pair.target.id for pair in form.trainable(pairs)] == ["3", "4"] and len(rows) == 2
    assert notes == [
        "2 of 4 contexts cut to 12 tokens with the question (ids 1, 4)",
        "1 of 4 rows left out because they have no answer or their context does not contain it (id 2)",
        "1 of 4 rows left out because their answer is not within the first 12 tokens (id 1)",
        "1 of 4 rows have no answer at answer_start: the nearest occurrence is used (id 3)",
    ]
    assert all(len(row["input_ids"]) <= 12 for row in rows)
    everything, notes = form.eval_rows([*pairs, Pair(qa("5", "who ?", "Ana ."))], with_source=False)
    assert len(everything) == 5, "evaluation keeps every row"
    assert notes[-1] == "1 of 5 questions have no answer to compare with and do not count (id 5)"
    assert tokenizer.decode(everything[3]["input_ids"]) == "<s> who lives in the north of </s> Budi . </s>"


def test_logits_narrower_than_the_rows_are_refused():
    form = make_form(QA, word_tokenizer(WORDS), "encoder", 32)
    with pytest.raises(
        ValueError, match=re.escape("row 0 has 15 tokens from position 0 on, but the logits are 5 wide")
    ):
        form.predictions((torch.zeros(3, 5), torch.zeros(3, 5)), PAIRS)


def test_spans_work_with_the_byte_tokenizer_of_a_decoder():
    form = make_form(QA, byte_tokenizer(), "encoder", 64)
    (row,), notes = form.train_rows([Pair(qa("1", "who?", "Ana é here", "é"))], with_source=False)
    assert notes == [] and row["input_ids"][0] == 1
    # the answer is one character of two bytes, so it has two tokens
    assert row["end_positions"] - row["start_positions"] == 1
