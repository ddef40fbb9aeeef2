"""Tests of Translator, of translation models, and of batch plans.

A batch plan splits long texts into pieces and sorts the pieces into batches.
"""

from pathlib import Path

import pytest
import tiny_mt
import torch

from flare.experiments.translation import TranslationError, TranslationModel, Translator
from flare.experiments.translation.batch_plan import make_plan, sentences
from flare.experiments.translation.model import fingerprint, known_tags

TEXTS = [tiny_mt.SENTENCES[0], "", "the sea", "  ", "it is far . we came", "the sea"]


def word_counts(texts):
    return [len(text.split()) for text in texts]


@pytest.fixture(scope="module")
def nllb(tmp_path_factory) -> TranslationModel:
    return TranslationModel(str(tiny_mt.save_nllb(tmp_path_factory.mktemp("mt") / "nllb")))


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_makes_batches_by_length_and_joins_the_pieces():
    texts = ["a b c", "a", "", "a b c d e f", "a b", "a", "c b a"]
    plan = make_plan(texts, word_counts, limit=None, batch_tokens=6)
    assert [[plan.pieces[i] for i in batch] for batch in plan.batches] == [
        ["a b c d e f"],
        ["a b c", "c b a"],
        ["a b", "a"],
    ]
    assert plan.join([piece.upper() for piece in plan.pieces]) == [text.upper() for text in texts]
    rows = make_plan(texts, word_counts, limit=None, batch_tokens=100, batch_size=2).batches
    assert [len(batch) for batch in rows] == [2, 2, 1]


def test_a_long_text_is_split_at_sentence_ends():
    text = 'One two three. "Four five!"\n\nSix seven eight nine? 十。十一。Ten'
    assert [sentence for sentence, _ in sentences(text)] == [
        "One two three.",
        '"Four five!"',
        "Six seven eight nine?",
        "十。",
        "十一。",
        "Ten",
    ]
    assert "".join(sentence + space for sentence, space in sentences(text)) == text
    plan = make_plan([text, "short"], word_counts, limit=5, batch_tokens=100)
    # A piece holds as many sentences as fit. If two sentences without a space between them are in different pieces,
    # join puts a space between them.
    assert plan.pieces == ('One two three. "Four five!"', "Six seven eight nine? 十。", "十一。Ten", "short")
    assert plan.join(plan.pieces) == [text.replace("十。十", "十。 十"), "short"]


def test_a_sentence_longer_than_the_limit_is_not_split():
    plan = make_plan(["a b c d e f. g h"], word_counts, limit=4, batch_tokens=100)
    assert plan.pieces == ("a b c d e f.", "g h")


# --- translating ------------------------------------------------------------------------------------------------------


def test_translations_keep_the_order_and_blank_texts(nllb):
    translator = Translator(nllb, "eng_Latn", "ace_Latn", max_new_tokens=8, batch_tokens=40)
    together = translator.translate(TEXTS)
    assert together[1] == "" and together[3] == "  " and together[2] == together[5]
    assert together == [translator.translate([text])[0] for text in TEXTS]
    assert all(together[index] for index in (0, 2, 4))


def test_decoding_is_greedy_regardless_of_generation_config(nllb):
    """The generation_config in the model's folder asks for sampling, four beams and five tokens."""
    translator = Translator(nllb, "eng_Latn", "ace_Latn", max_new_tokens=9)
    tokens = nllb.tokenizer(TEXTS[0], return_tensors="pt")
    ids = [nllb.model.config.decoder_start_token_id, nllb.tokenizer.convert_tokens_to_ids("ace_Latn")]
    assert tokens["input_ids"][0, 0] == nllb.tokenizer.convert_tokens_to_ids("eng_Latn")
    with torch.no_grad():
        while len(ids) < 10 and ids[-1] != 2:
            logits = nllb.model(**tokens, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
    assert translator.translate(TEXTS[:1]) == [nllb.tokenizer.decode(ids, skip_special_tokens=True).strip()]
    assert translator.settings()["decoding"] == {"num_beams": 1, "do_sample": False, "max_new_tokens": 9}


def test_two_directions_share_one_model(nllb):
    forth, back = Translator(nllb, "eng_Latn", "ace_Latn"), Translator(nllb, "ace_Latn", "eng_Latn")
    first = forth.translate(TEXTS[:1])
    back.translate(TEXTS[:1])
    assert forth.translate(TEXTS[:1]) == first
    assert forth.loaded.model is back.loaded.model


def test_truncation_is_reported(nllb):
    translator = Translator(nllb, "eng_Latn", "ace_Latn", max_length=8, max_new_tokens=3)
    long, short = translator.translate_batch(["the sea the sea the sea the sea", "sea"])
    assert long.source_cut and not short.source_cut
    assert long.unfinished and len(nllb.tokenizer.tokenize(long.text)) <= 3


def test_a_model_without_tags_takes_a_prefix(tmp_path):
    folder = str(tiny_mt.save_t5(tmp_path / "t5"))
    plain, prefixed = Translator(folder, max_new_tokens=8), Translator(folder, prefix="it is : ", max_new_tokens=8)
    assert prefixed.translate(["sea"]) == plain.translate(["it is : sea"]) != plain.translate(["sea"])
    with pytest.raises(TranslationError, match="writes no language tag; leave the tag out"):
        Translator(folder, "eng_Latn", "ace_Latn")


def test_out_of_memory_halves_the_batch(nllb, monkeypatch):
    messages: list[str] = []
    translator = Translator(nllb, "eng_Latn", "ace_Latn", max_new_tokens=4, print_fn=messages.append)
    texts = tiny_mt.SENTENCES[:7]
    expected, generate, fits = translator.translate_batch(texts), translator._generate, 2

    def small(pieces):
        if len(pieces) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return generate(pieces)

    monkeypatch.setattr(translator, "_generate", small)
    assert translator.translate_batch(texts) == expected
    assert [line.rpartition("continuing with ")[2] for line in messages] == ["3.", "1."]
    fits = 0
    with pytest.raises(TranslationError, match="too small for one piece"):
        translator.translate_batch(texts)


# --- errors and fingerprints ------------------------------------------------------------------------------------------


def test_an_unknown_tag_is_an_error_before_weights_are_loaded(tmp_path):
    folder = tiny_mt.save_nllb(tmp_path / "nllb")
    (folder / "model.safetensors").unlink()
    model = TranslationModel(str(folder))
    assert known_tags(model.tokenizer) == tiny_mt.TAGS
    with pytest.raises(TranslationError, match=r"target_tag 'ace_Latin'.*did you mean ace_Latn"):
        Translator(model, "eng_Latn", "ace_Latin")
    with pytest.raises(TranslationError, match="source_tag is missing"):
        Translator(model)
    with pytest.raises(TranslationError, match="its weights could not be loaded"):
        Translator(model, "eng_Latn", "ace_Latn").translate(["the sea"])


def test_invalid_models_dtypes_and_limits_are_refused(tmp_path, nllb, minilm):
    with pytest.raises(TranslationError, match="no such folder"):
        TranslationModel(str(tmp_path / "absent"))
    with pytest.raises(TranslationError, match="bert is not an encoder-decoder"):
        TranslationModel(str(minilm))
    with pytest.raises(TranslationError, match="--dtype must be one of"):
        TranslationModel(nllb.name, dtype="float8")
    with pytest.raises(
        TranslationError, match=r"--max-length must be 8 or more, and at most 64, the limit of this model; got 500"
    ):
        Translator(nllb, "eng_Latn", "ace_Latn", max_length=500)


def test_fingerprint_depends_only_on_the_model_files(tmp_path):
    one, two = tiny_mt.save_nllb(tmp_path / "one"), tiny_mt.save_nllb(tmp_path / "two")
    other = tiny_mt.save_nllb(tmp_path / "other", seed=1)
    (two / "README.md").write_text("made twice")
    assert fingerprint(one) == fingerprint(two) != fingerprint(other)
    assert set(TranslationModel(str(one)).identity) == {"name", "fingerprint", "dtype"}
    assert Path(TranslationModel(str(one)).name) == one
