"""Tests of the forms for decoders and encoder-decoders.

A form turns pairs (a target row with its source row) into the tokens of prompts and answers, and generated tokens into
predictions.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from small_tasks import byte_tokenizer

import flare
from flare.experiments.tasks import Answer, DataError, Example, JoinedForm, Pair, get_task, joined_task, make_form
from flare.experiments.tasks.forms.prompts import fill
from flare.experiments.utils.errors import UserError

NUSAX = get_task("nusax", prompt="{text}\nis:", verbalizer={"negative": "bad", "positive": "badly good"})
QA = get_task("qa")


def sentiment(row_id: str, text: str, label: str = "negative") -> Example:
    return Example(row_id, {"text": text}, label)


def question(row_id: str, text: str, context: str, *answers: str) -> Example:
    return Example(row_id, {"question": text, "context": context}, None, tuple(map(Answer, answers)))


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_of_the_papers_tasks():
    assert fill(get_task("xnli"), {"premise": "{hypothesis}", "hypothesis": "b"}) == (
        "Premise: {hypothesis}\nHypothesis: b\nRelation (entailment, neutral or contradiction):"
    )
    assert fill(QA, {"question": "q", "context": "c"}) == "Context: c\nQuestion: q\nAnswer:"


def test_prompt_and_answer_are_tokenized_separately():
    tokenizer = byte_tokenizer(merges=[(":", "Ġ"), ("b", "a"), ("ba", "d")])
    form = make_form(NUSAX, tokenizer, "causal")
    assert tokenizer.tokenize("is: bad")[-2:] == [":Ġ", "bad"], "tokenized together, one token would span both"
    (row,), notes = form.train_rows([Pair(sentiment("1", "x"), sentiment("1", "yz"))], with_source=True)
    assert notes == []
    answer = tokenizer.convert_tokens_to_ids(["Ġ", "bad", "</s>"])
    prompt = tokenizer("x\nis:")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    assert row["input_ids"] == prompt + answer and row["labels"] == [-100] * len(prompt) + answer
    assert row["source_input_ids"] == tokenizer("yz\nis:")["input_ids"] + answer
    assert row["source_labels"] == [-100] * (len(prompt) + 1) + answer
    batch = flare.FlareDataCollator(tokenizer, layout="causal")([row])
    begins = (batch["labels"][0] != -100).nonzero()[0].item()
    assert batch["source_input_ids"][0, begins:].tolist() == answer, "answers start at the same index in both streams"


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_labels_are_tokenized_once(family, monkeypatch):
    choices = get_task("multiple-choice", text_columns=["q"], choice_columns=["a", "b"])
    form, several = (make_form(task, byte_tokenizer(), family) for task in (NUSAX, choices))
    expected = several.answer_ids("A")
    monkeypatch.setattr(type(form), "answer_ids", lambda self, text: pytest.fail(f"{text!r} is tokenized again"))
    rows, _ = form.train_rows(
        [Pair(sentiment(str(i), "x"), sentiment(str(i), "y")) for i in range(2)], with_source=True
    )
    assert rows[0]["labels"] == rows[1]["labels"] and rows[0]["labels"] is not rows[1]["labels"]
    assert expected[0] in several.next_tokens([])


def test_evaluation_rows_contain_no_answer():
    tokenizer = byte_tokenizer()
    form = make_form(NUSAX, tokenizer, "causal")
    (row,), _ = form.eval_rows([Pair(sentiment("1", "x"), sentiment("1", "yz"))], with_source=True)
    assert row == {name: tokenizer(text)["input_ids"] for name, text in
                   (("input_ids", "x\nis:"), ("source_input_ids", "yz\nis:"))}  # fmt: skip
    form = make_form(NUSAX, byte_tokenizer(ends=True), "seq2seq")
    (row,), _ = form.eval_rows([Pair(sentiment("1", "x"), sentiment("1", "yz"))], with_source=True)
    assert row["source_labels"] == [2], "the decoder fuses if source_labels are present; their content is not read"
    assert "labels" not in row


def test_seq2seq_rows_hold_the_prompts_and_the_answers():
    tokenizer = byte_tokenizer(ends=True)
    form = make_form(NUSAX, tokenizer, "seq2seq")
    assert (form.layout, form.auto_class) == ("seq2seq", "AutoModelForSeq2SeqLM")
    (row,), _ = form.train_rows([Pair(sentiment("1", "x"), sentiment("1", "yz"))], with_source=True)
    assert {name: tokenizer.decode(ids) for name, ids in row.items()} == {
        "input_ids": "x\nis:</s>", "labels": "bad</s>", "source_input_ids": "yz\nis:</s>", "source_labels": "bad</s>",
    }  # fmt: skip


# --- texts that are too long ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_only_the_context_is_truncated(family):
    tokenizer = byte_tokenizer(ends=family == "seq2seq")
    form = make_form(QA, tokenizer, family, 64)
    assert form.max_new_tokens == 16
    pairs = [
        Pair(question("1", "who?", "é" * 50, "me"), question("1", "who?", "me", "me")),
        Pair(question("2", "who?", "me", "somebody who has a long name"), question("2", "who?", "me", "me")),
        Pair(question("3", "who?", "me"), question("3", "who?", "me", "me")),
        Pair(question("4", "who?", "me", "me"), question("4", "who?", "me")),
    ]
    rows, notes = form.train_rows(pairs, with_source=True)
    assert form.trainable(pairs) == [pairs[0], pairs[3]] and len(rows) == 2
    most = 48 if family == "causal" else 64
    assert notes == [
        "1 of 4 rows left out because they have no answer (id 3)",
        "1 of 4 rows left out because their answer has more than 16 tokens (id 2)",
        "1 of 4 rows have no answer in the source; an end token takes its place (id 4)",
        f"1 of 2 texts cut to prompts of {most} tokens (id 1)",
    ]
    prompt = tokenizer.decode(rows[0]["input_ids"], skip_special_tokens=True)
    assert prompt.startswith("Context: éééé") and "\nQuestion: who?\nAnswer:" in prompt
    longest = len(rows[0]["input_ids"]) - (len(form.answer_ids("me")) if family == "causal" else 0)
    assert most - 1 <= longest <= most, "the prompt is as long as possible"
    assert rows[1]["source_labels"][-2:] == ([-100, 2] if family == "causal" else [2])
    rows, notes = form.eval_rows(pairs, with_source=False)
    assert len(rows) == 4 and notes[0].startswith("1 of 4 texts cut")
    # no batch is wider than max_length, even if the longest prompt and the longest answer are in different rows
    rows = form.train_rows([pairs[0], Pair(question("5", "who?", "me", "x" * 14))], with_source=False)[0]
    batch = flare.FlareDataCollator(tokenizer, layout=form.layout, max_length=64, require_source=False)(rows)
    assert batch["input_ids"].shape[1] <= 64
    with pytest.raises(DataError, match=r"never cut \(the instruction and the question\) have more tokens"):
        form.eval_rows([Pair(question("9", "who? " * 20, "me"))], with_source=False)


def test_too_short_lengths_and_missing_special_tokens_are_reported():
    with pytest.raises(UserError, match="--max-length 10 leaves no room for a prompt: an answer may have 12 tokens"):
        make_form(NUSAX, byte_tokenizer(), "causal", 10)
    tokenizer = byte_tokenizer(eos_token=None)
    with pytest.raises(UserError, match="has no end token"):
        make_form(NUSAX, tokenizer, "causal")
    tokenizer = byte_tokenizer(pad_token=None)
    notes = make_form(NUSAX, tokenizer, "causal").train_rows([Pair(sentiment("1", "x"))], with_source=False)[1]
    assert "no pad token" in notes[0] and tokenizer.pad_token == "</s>"


# --- predictions ------------------------------------------------------------------------------------------------------


def test_labels_are_predicted_from_generated_text():
    tokenizer = byte_tokenizer()
    form = make_form(NUSAX, tokenizer, "causal")
    texts = ["badly good", "bad", "Bad!", "badly good it is", "neutral", "positive", "so-so", ""]
    pairs = [Pair(sentiment(str(i), "x")) for i in range(len(texts))]
    output = [[*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], 2, 0, 0, -100] for text in texts]
    predictions = form.predictions(output, pairs)
    assert predictions == ["positive", "negative", "negative", "positive", "neutral", "positive", "so-so", ""]
    assert form.prediction_notes(predictions) == [
        "2 of 8 predictions are not a label and count as wrong, such as 'so-so', ''"
    ]
    assert form.scores(predictions, pairs)["accuracy"] == 25
    with pytest.raises(ValueError, match="8 generated rows were given for 1 pairs"):
        form.predictions(output, pairs[:1])


def test_tokens_after_the_end_token_are_ignored():
    tokenizer = byte_tokenizer(ends=True)
    form = make_form(QA, tokenizer, "seq2seq", 64)
    ids = tokenizer("me")["input_ids"] + tokenizer("you")["input_ids"]
    assert form.predictions(torch.tensor([[0, *ids]]), [Pair(question("1", "q", "c", "me"))]) == ["me"]
    assert form.prediction_notes(["me"]) == []


# --- training and generation fit together -----------------------------------------------------------------------------


ROWS = [("aaa", "negative"), ("bbb", "positive"), ("ccc", "neutral"), ("ddd", "negative")]
PAIRS = [
    Pair(sentiment(str(i), text.upper() + "?", label), sentiment(str(i), text, label))
    for i, (text, label) in enumerate(ROWS)
]


def tiny(family: str, vocabulary: int):
    torch.manual_seed(0)
    size = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 2}
    if family == "causal":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     bos_token_id=1, **size)
        )  # fmt: skip
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
                              dropout_rate=0.0, tie_word_embeddings=False, **size)
    )  # fmt: skip


def train(model, batch, steps: int, lr: float) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_generation_reproduces_the_training_rows(family):
    """A tiny model memorizes four English rows; then adapters memorize target rows with the English text as source."""
    tokenizer = byte_tokenizer(ends=family == "seq2seq")
    form = make_form(NUSAX, tokenizer, family, 48)
    collator = flare.FlareDataCollator(tokenizer, layout=form.layout, require_source=False)
    english = [Pair(pair.source) for pair in PAIRS if pair.source]
    model = tiny(family, len(tokenizer))
    assert train(model, collator(form.train_rows(english, with_source=False)[0]), 120, 3e-3) < 0.05

    def predicted(model, pairs, with_source):
        batch = collator(form.eval_rows(pairs, with_source)[0])
        output = model.eval().generate(**batch, max_new_tokens=form.max_new_tokens, do_sample=False)
        new = output[:, batch["input_ids"].shape[1] :] if family == "causal" else output
        return form.predictions(new, pairs)

    truth = [label for _, label in ROWS]
    assert predicted(model, english, with_source=False) == truth
    adapted = flare.fast_lora(model, r=8, lora_alpha=16)
    assert train(adapted, collator(form.train_rows(PAIRS, with_source=True)[0]), 100, 1e-2) < 0.05
    assert predicted(adapted, PAIRS, with_source=True) == truth


# --- input-level fusion -----------------------------------------------------------------------------------------------


def test_joined_prompts_hold_both_texts_and_ask_once():
    prompts = {name: joined_task(get_task(name)).prompt for name in ("nusax", "xnli", "qa")}
    assert prompts["nusax"] == "Text: {source:text}\nText: {text}\nSentiment:"
    assert prompts["xnli"].count("Relation (") == 1 and prompts["qa"].count("Answer:") == 1
    headed = get_task("nusax", prompt="Which sentiment?\nText: {text}. It is")
    assert joined_task(headed).prompt == "Which sentiment?\nText: {source:text}\nText: {text}. It is"


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_joined_rows_truncate_both_texts_equally(family: str):
    tokenizer = byte_tokenizer(ends=family == "seq2seq")
    form = make_form(QA, tokenizer, family, 48)
    joined = JoinedForm(form)
    pair = Pair(question("7", "wo", "B" * 60, "BB"), question("7", "where", "A" * 60, "AA"))
    (row,), notes = joined.train_rows([pair], with_source=True)
    (asked,), _ = joined.eval_rows([pair], with_source=True)
    text = tokenizer.decode(asked["input_ids"], skip_special_tokens=True)
    source, target = text.count("A") - text.count("Answer:"), text.count("B")
    assert source == target > 0, "both texts are cut to the same length"
    assert text == f"Context: {'A' * source}\nQuestion: where\nContext: {'B' * target}\nQuestion: wo\nAnswer:"
    assert len(asked["input_ids"]) <= 2 * form.longest_prompt and len(notes) == 1 and "1 of 1 texts cut" in notes[0]
    assert set(row) == {"input_ids", "labels"} and joined.max_new_tokens == form.max_new_tokens == 12
    assert [token for token in row["labels"] if token != -100] == form.answer_ids("BB")
    assert joined.trainable([pair]) == [pair] and joined.layout == family
    with pytest.raises(ValueError, match="needs the source of every pair"):
        joined.eval_rows([Pair(pair.target)], with_source=True)
