"""Tests of the demo's corpus of English and Vemari, a made-up language.

The corpus is deterministic and balanced, its sentences are aligned, and they follow the grammar.
"""

from __future__ import annotations

from collections import Counter

import pytest

from flare.experiments.demo.base_model import build_tokenizer
from flare.experiments.demo.corpus import (
    ADJECTIVES,
    LABELS,
    VERBS,
    Clause,
    NounPhrase,
    Sentence,
    add_noise,
    english,
    english_words,
    make_corpus,
    vemari,
    vemari_word,
)


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


def test_equal_arguments_give_equal_sentences(corpus):
    assert make_corpus() == corpus
    assert make_corpus(seed=1) != corpus


def test_known_words_do_not_change(corpus):
    # If the words change, increase CORPUS_VERSION.
    assert [vemari_word(word) for word in ("soup", "hated", "but")] == ["kenabo", "gonune", "zovora"]


def test_sizes_and_shares_of_conjunctions_and_negations(corpus):
    assert [len(part) for part in corpus] == [900, 300, 300, 3800, 200]
    labelled = [*corpus.finetune, *corpus.train, *corpus.test]
    words = [row.source.split() for row in labelled]
    assert 0.12 < sum("but" in row for row in words) / len(words) < 0.18
    clauses = sum(1 + ("but" in row) + ("and" in row) for row in words)
    assert 0.09 < sum(row.count("not") + row.count("never") for row in words) / clauses < 0.15


def test_labels_are_balanced(corpus):
    for part in (corpus.finetune, corpus.train, corpus.test):
        assert set(Counter(row.label for row in part).values()) == {len(part) // 3}


def test_no_sentence_is_in_two_parts(corpus):
    sources = [row.source for row in (*corpus.finetune, *corpus.train, *corpus.test)]
    assert len(set(sources)) == len(sources)
    assert not set(sources) & set(corpus.pretrain_source)
    targets = [row.target for row in (*corpus.finetune, *corpus.train, *corpus.test)]
    assert len(set(targets)) == len(targets)
    assert not set(targets) & set(corpus.pretrain_target)


def test_the_test_part_does_not_depend_on_the_sizes_of_other_parts(corpus):
    assert make_corpus(train=30, finetune=0, pretrain=10).test == corpus.test


def test_the_two_languages_share_only_the_full_stop():
    words = english_words()
    other = {vemari_word(word) for word in words}
    assert len(other) == len(words) == len(set(words))
    assert not other & set(words)
    assert 55 <= len(words) <= 70


def test_the_words_of_a_sentence_pair_correspond(corpus):
    """The Vemari sentence has one word for each word of the English sentence except "was", "not" and "never"."""
    ending = ("ul", "ik", "em")
    for row in corpus.train:
        stems = Counter(vemari_word(word) for word in row.source.split() if word not in ("was", "not", "never", "."))
        words: Counter[str] = Counter()
        for word in row.target.split():
            if word != ".":
                assert all(word[i : i + 2] in ending for i in range(6, len(word), 2)), word
                words[word[:6]] += 1
        assert words == stems


def phrase(determiner: str, noun: str, attribute: str | None = None) -> NounPhrase:
    return NounPhrase(determiner, noun, attribute)


def test_sentences_follow_the_grammar_of_each_language():
    w = vemari_word
    act = Clause(phrase("my", "friend"), "praised", "positive", phrase("the", "hotel", "old"), "yesterday")
    assert english(Sentence((act,))) == "my friend praised the old hotel yesterday ."
    assert vemari(Sentence((act,))) == (
        f"{w('friend')} {w('my')} {w('hotel')}ul {w('old')}ul {w('the')} {w('yesterday')} {w('praised')} ."
    )
    never = Clause(phrase("the", "cook"), "hated", "negative", phrase("this", "song"), negated=True)
    assert english(Sentence((never,))) == "the cook never hated this song ."
    assert vemari(Sentence((never,))).split()[-2] == w("hated") + "ik"
    state = Clause(phrase("the", "soup"), "awful", "negative", adverb="really", negated=True)
    assert english(Sentence((state,))) == "the soup was not really awful ."
    assert vemari(Sentence((state,))) == f"{w('soup')} {w('the')} {w('really')} {w('awful')}emik ."
    joined = Sentence((act, state), "but")
    assert english(joined) == "my friend praised the old hotel yesterday but the soup was not really awful ."
    assert f"{w('praised')} {w('soup')} {w('but')} {w('the')} " in vemari(joined)


def test_labels_follow_the_polarity_of_the_last_clause(corpus):
    polarity = {word: label for group in (VERBS, ADJECTIVES) for label, words in group.items() for word in words}
    flipped = {"negative": "positive", "neutral": "neutral", "positive": "negative"}
    for row in corpus.test:
        last = row.source.replace(" and ", " but ").split(" but ")[-1].split()
        (label,) = [polarity[word] for word in last if word in polarity]
        assert row.label == (flipped[label] if {"not", "never"} & set(last) else label)
    assert set(LABELS) == set(flipped)


def test_the_tokenizer_encodes_and_decodes_every_word(corpus):
    tokenizer = build_tokenizer()
    for row in corpus.train[:50]:
        for text in (row.source, row.target):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            read_back = tokenizer.decode(ids, skip_special_tokens=True).replace(" ##", "")
            assert read_back.replace(" .", ".") == text.replace(" .", ".")
            assert len(ids) <= 24, "the demo pads to 24 tokens"


def test_noise_damages_the_given_share_of_words(corpus):
    texts = [row.source for row in corpus.train]
    noisy = add_noise(texts, 0.2, seed=3)
    assert noisy == add_noise(texts, 0.2, seed=3) != add_noise(texts, 0.2, seed=4)
    before, after = sum(len(text.split()) for text in texts), sum(len(text.split()) for text in noisy)
    assert 0.08 < 1 - after / before < 0.12, "half of the damaged words are dropped"
    assert all(noisy)
    assert {word for text in noisy for word in text.split()} <= {word for text in texts for word in text.split()}
    assert add_noise(texts, 0.0, seed=3) == texts
    assert all(add_noise(["one two"] * 200, 0.99, seed=0)), "no text becomes empty"


def test_values_out_of_range_raise():
    with pytest.raises(ValueError, match="noise"):
        add_noise(["a"], 1.0, 0)
    with pytest.raises(ValueError, match="target_share"):
        make_corpus(target_share=1.5)
    with pytest.raises(ValueError, match="train"):
        make_corpus(train=-1)
