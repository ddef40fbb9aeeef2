"""A small generated parallel corpus: English and a made-up second language, three labels, no download.

**English.** The grammar has about sixty words for guests, cooks, hotels, films and the like. A clause describes either
an action ("my friend praised the old hotel") or a property ("the soup was really awful"). Its verb or adjective has a
polarity: negative, neutral or positive. The polarity is the label of the clause. 12 % of the clauses are negated, and
then negative and positive are swapped ("the soup was not awful" is positive). A negated neutral clause stays neutral.
15 % of the sentences contrast two clauses of different labels with "but", and the second clause determines the label of
the sentence. Another 15 % join two clauses of the same label with "and".

**The second language ("Vemari").** Every English word is translated by one made-up word (`vemari_word`: three syllables
derived from a hash of the English word), except "was", "not" and "never". The two languages share only the full stop.
Rules of the grammar:

* The verb comes last: subject, object, adverb, verb.
* The adjective follows its noun, and the determiner comes last in its phrase.
* The object has the case suffix "-ul", on the noun and on its adjective.
* Negation is the suffix "-ik" on the verb or the predicate adjective; there are no words for "not" and "never".
* There is no word for "was": the predicate adjective has the suffix "-em" and the position of the verb.
* "But" and "and" come after the first word of the second clause.

A sentence and its translation therefore have the same label and meaning, but different words and word order. The corpus
is deterministic: the same arguments give the same sentences on every machine.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import NamedTuple

CORPUS_VERSION = 1
LABELS = ("negative", "neutral", "positive")
SOURCE_LANGUAGE = "English"
TARGET_LANGUAGE = "Vemari"

DETERMINERS = ("the", "my", "this")
PEOPLE = ("cook", "waiter", "guest", "teacher", "friend", "neighbour")
THINGS = ("hotel", "room", "soup", "book", "film", "garden", "train", "song")
ATTRIBUTES = ("old", "new", "small", "big", "red", "quiet")
VERBS = {
    "negative": ("hated", "disliked", "criticised", "regretted", "avoided"),
    "neutral": ("saw", "described", "mentioned", "passed", "noticed"),
    "positive": ("loved", "enjoyed", "praised", "admired", "recommended"),
}
ADJECTIVES = {
    "negative": ("awful", "boring", "ugly", "terrible", "dirty"),
    "neutral": ("wooden", "round", "local", "square", "distant"),
    "positive": ("wonderful", "lovely", "excellent", "pleasant", "charming"),
}
DEGREES = ("really", "very", "quite")
TIMES = ("yesterday", "today", "again")
FUNCTION_WORDS = ("was", "not", "never", "but", "and")

NEGATION_SHARE = 0.12
CONTRAST_SHARE = 0.15
ADDITION_SHARE = 0.15

CASE_SUFFIX = "ul"
NEGATION_SUFFIX = "ik"
PREDICATE_SUFFIX = "em"
SUFFIXES = (CASE_SUFFIX, NEGATION_SUFFIX, PREDICATE_SUFFIX)

_FLIPPED = {"negative": "positive", "neutral": "neutral", "positive": "negative"}
_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


class SentencePair(NamedTuple):
    """A sentence in English (`source`) and in the second language (`target`), and its label.

    For real data (`.real_data`), `source` and `target` are texts in the two languages that the user chose.
    """

    id: str
    source: str
    target: str
    label: str


@dataclass(frozen=True)
class NounPhrase:
    """Determiner, noun and an optional attribute: "my old hotel"."""

    determiner: str
    noun: str
    attribute: str | None = None


@dataclass(frozen=True)
class Clause:
    """The meaning of a clause, from which the clause is generated in both languages.

    ``predicate`` is the verb of an action, or the adjective of a property. ``item`` is the object of an action, and
    None for a property.
    """

    subject: NounPhrase
    predicate: str
    polarity: str
    item: NounPhrase | None = None
    adverb: str | None = None
    negated: bool = False

    @property
    def label(self) -> str:
        """The polarity of the predicate, with negative and positive swapped if the clause is negated."""
        return _FLIPPED[self.polarity] if self.negated else self.polarity


def english_words() -> tuple[str, ...]:
    """Return every word of the English grammar, in a fixed order."""
    groups = (DETERMINERS, PEOPLE, THINGS, ATTRIBUTES, *VERBS.values(), *ADJECTIVES.values(), DEGREES, TIMES)
    return tuple(word for group in groups for word in group) + FUNCTION_WORDS


def vemari_word(stem: str) -> str:
    """Return the second language's word for an English word: three syllables derived from a hash of the English word.

    >>> vemari_word("soup") == vemari_word("soup")
    True
    """
    digest = hashlib.sha256(f"vemari:{CORPUS_VERSION}:{stem}".encode()).digest()
    syllables = [
        _CONSONANTS[digest[2 * i] % len(_CONSONANTS)] + _VOWELS[digest[2 * i + 1] % len(_VOWELS)] for i in range(3)
    ]
    return "".join(syllables)


def _english_phrase(phrase: NounPhrase) -> list[str]:
    return [word for word in (phrase.determiner, phrase.attribute, phrase.noun) if word]


@dataclass(frozen=True)
class Sentence:
    """One clause, or two clauses joined by "but" or "and"; the last clause determines the label."""

    clauses: tuple[Clause, ...]
    joint: str = ""


def english(sentence: Sentence) -> str:
    """Return a sentence in English."""
    parts = []
    for clause in sentence.clauses:
        words = _english_phrase(clause.subject)
        if clause.item is None:
            words += ["was", *(["not"] if clause.negated else []), *([clause.adverb] if clause.adverb else [])]
            words.append(clause.predicate)
        else:
            words += [*(["never"] if clause.negated else []), clause.predicate, *_english_phrase(clause.item)]
            words += [clause.adverb] if clause.adverb else []
        parts.append(" ".join(words))
    return f" {sentence.joint} ".join(parts) + " ."


def _vemari_phrase(phrase: NounPhrase, case: str = "") -> list[str]:
    words = [vemari_word(phrase.noun) + case]
    if phrase.attribute:
        words.append(vemari_word(phrase.attribute) + case)
    return [*words, vemari_word(phrase.determiner)]


def vemari(sentence: Sentence) -> str:
    """Return a sentence in the second language."""
    words: list[str] = []
    for position, clause in enumerate(sentence.clauses):
        part = _vemari_phrase(clause.subject)
        if clause.item is not None:
            part += _vemari_phrase(clause.item, CASE_SUFFIX)
        if clause.adverb:
            part.append(vemari_word(clause.adverb))
        ending = (PREDICATE_SUFFIX if clause.item is None else "") + (NEGATION_SUFFIX if clause.negated else "")
        part.append(vemari_word(clause.predicate) + ending)
        if position:
            part.insert(1, vemari_word(sentence.joint))
        words += part
    return " ".join([*words, "."])


def _noun_phrase(rng: random.Random, nouns: tuple[str, ...]) -> NounPhrase:
    attribute = rng.choice(ATTRIBUTES) if rng.random() < 0.3 else None
    return NounPhrase(rng.choice(DETERMINERS), rng.choice(nouns), attribute)


def _clause(rng: random.Random, label: str) -> Clause:
    negated = rng.random() < NEGATION_SHARE
    polarity = _FLIPPED[label] if negated else label
    if rng.random() < 0.5:
        adverb = rng.choice(TIMES) if rng.random() < 0.3 else None
        subject, item = _noun_phrase(rng, PEOPLE), _noun_phrase(rng, THINGS)
        return Clause(subject, rng.choice(VERBS[polarity]), polarity, item, adverb, negated)
    adverb = rng.choice(DEGREES) if rng.random() < 0.3 else None
    subject = _noun_phrase(rng, THINGS)
    return Clause(subject, rng.choice(ADJECTIVES[polarity]), polarity, None, adverb, negated)


def _sentence(rng: random.Random, label: str) -> Sentence:
    last = _clause(rng, label)
    draw = rng.random()
    if draw < CONTRAST_SHARE:
        return Sentence((_clause(rng, rng.choice([other for other in LABELS if other != label])), last), "but")
    if draw < CONTRAST_SHARE + ADDITION_SHARE:
        return Sentence((_clause(rng, label), last), "and")
    return Sentence((last,))


class Corpus(NamedTuple):
    """The parts of the generated corpus. No sentence occurs in two parts.

    Attributes:
        finetune: labelled sentences to fine-tune the base model on; only their English side is used.
        train: labelled pairs to train the adapters on.
        test: labelled pairs to evaluate on.
        pretrain_source: unlabelled English sentences to pre-train the base model on.
        pretrain_target: unlabelled sentences in the second language, also for the pre-training.
    """

    finetune: list[SentencePair]
    train: list[SentencePair]
    test: list[SentencePair]
    pretrain_source: list[str]
    pretrain_target: list[str]


def make_corpus(
    finetune: int = 900,
    train: int = 300,
    test: int = 300,
    pretrain: int = 4000,
    target_share: float = 0.05,
    seed: int = 0,
) -> Corpus:
    """Generate the corpus.

    Args:
        finetune, train, test: number of pairs in these parts of :class:`Corpus`.
        pretrain: number of sentences for the pre-training, each of which is in one language only.
        target_share: share of `pretrain` that is in the second language.
        seed: seed of the grammar's choices.

    The three labels are equally frequent in every labelled part. If the size of a part is not a multiple of three, the
    counts of the labels differ by at most one.
    """
    for name, size in (("finetune", finetune), ("train", train), ("test", test), ("pretrain", pretrain)):
        if size < 0:
            raise ValueError(f"{name} must be a number of sentences, 0 or more; got {size}")
    if not 0.0 <= target_share <= 1.0:
        raise ValueError(f"target_share must lie between 0 and 1; got {target_share}")
    rng = random.Random(seed)
    seen: set[str] = set()

    def pairs(prefix: str, count: int) -> list[SentencePair]:
        rows: list[SentencePair] = []
        while len(rows) < count:
            label = LABELS[len(rows) % len(LABELS)]
            sentence = _sentence(rng, label)
            text = english(sentence)
            if text not in seen:
                seen.add(text)
                rows.append(SentencePair(f"{prefix}-{len(rows):05d}", text, vemari(sentence), label))
        rng.shuffle(rows)
        return rows

    # The test part is drawn first, so that it does not depend on the sizes of the other parts.
    held_out = pairs("test", test)
    labelled = pairs("train", train)
    english_only = pairs("finetune", finetune)
    unlabelled = pairs("pretrain", pretrain)
    in_target = round(pretrain * target_share)
    return Corpus(
        finetune=english_only,
        train=labelled,
        test=held_out,
        pretrain_source=[row.source for row in unlabelled[in_target:]],
        pretrain_target=[row.target for row in unlabelled[:in_target]],
    )


def add_noise(texts: list[str], rate: float, seed: int) -> list[str]:
    """Damage texts as machine translation does: some words are lost, some are replaced.

    Each word is damaged with probability `rate`. A damaged word is either dropped or, with equal probability, replaced
    with a word drawn at random from all words of `texts`, where frequent words are drawn more often. A text that would
    become empty is left unchanged.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"noise must be a share of words from 0 up to, but not including, 1; got {rate}")
    if rate == 0.0:
        return list(texts)
    rng = random.Random(seed)
    vocabulary = [word for text in texts for word in text.split()]
    noisy = []
    for text in texts:
        words = []
        for word in text.split():
            draw = rng.random()
            if draw >= rate:
                words.append(word)
            elif draw >= rate / 2:
                words.append(rng.choice(vocabulary))
        noisy.append(" ".join(words) or text)
    return noisy
