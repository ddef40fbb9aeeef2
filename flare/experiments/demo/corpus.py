"""A small parallel corpus made by rule: English and a second language, three labels, no download.

**English.** A grammar of some sixty words about guests, cooks, hotels and films. A clause either tells what somebody
did ("my friend praised the old hotel") or what something was like ("the soup was really awful"). The verb or the
adjective carries the label: negative, neutral or positive. 12 % of the clauses are negated, which turns the polarity
around ("the soup was not awful" is positive; a neutral clause stays neutral). 15 % of the sentences contrast two
clauses with "but"; the label is that of the second clause, and the first one says something else. Another 15 % join
two clauses of one label with "and".

**The second language ("Vemari").** Every English stem has its own made-up word (`vemari_word`: three syllables spelled
from a hash of the stem, so nothing is shared with English but the full stop). Grammar, by rule:

* the verb stands last: subject, object, adverb, verb;
* the adjective follows its noun and the determiner comes last in its phrase;
* the object carries the case suffix "-ul", on the noun and on its adjective;
* negation is the suffix "-ik" on the verb or the predicate adjective, which takes the place of "not" and "never";
* there is no word for "was": the predicate adjective takes the verb's place and the suffix "-em";
* "but" and "and" stand after the first word of the second clause, not before the clause.

A sentence and its translation therefore share label and meaning, but neither words nor word order. Everything here is
deterministic: the same arguments give the same sentences on every machine.
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


class Pair(NamedTuple):
    """One sentence in both languages, with the label they share."""

    id: str
    source: str
    target: str
    label: str


@dataclass(frozen=True)
class NounPhrase:
    """Determiner, noun and perhaps an attribute: "my old hotel"."""

    determiner: str
    noun: str
    attribute: str | None = None


@dataclass(frozen=True)
class Clause:
    """What both languages are spelled from: who, did or was what, to whom, how, and whether it is negated."""

    subject: NounPhrase
    predicate: str
    polarity: str
    item: NounPhrase | None = None
    adverb: str | None = None
    negated: bool = False

    @property
    def label(self) -> str:
        """The polarity of the predicate, turned around by a negation."""
        return _FLIPPED[self.polarity] if self.negated else self.polarity


def english_words() -> tuple[str, ...]:
    """Every word the English grammar can use, in a fixed order."""
    groups = (DETERMINERS, PEOPLE, THINGS, ATTRIBUTES, *VERBS.values(), *ADJECTIVES.values(), DEGREES, TIMES)
    return tuple(word for group in groups for word in group) + FUNCTION_WORDS


def vemari_word(stem: str) -> str:
    """The second language's word for an English stem: three syllables spelled from the stem's hash.

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
    """One clause, or two joined by "but" or "and"; the last one carries the label."""

    clauses: tuple[Clause, ...]
    joint: str = ""


def english(sentence: Sentence) -> str:
    """Spell a sentence in English."""
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
    """Spell a sentence in the second language."""
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
    """All parts of the embedded corpus; no sentence occurs in two of them."""

    finetune: list[Pair]
    train: list[Pair]
    test: list[Pair]
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
    """Write the corpus.

    Args:
        finetune: labelled sentences of which only the English side is used, to teach the base the task.
        train: labelled pairs for the adapters.
        test: labelled pairs held out for the evaluation.
        pretrain: unlabelled sentences for masked-language modelling, each in one language only.
        target_share: share of `pretrain` that is in the second language.
        seed: seed of the grammar's choices.

    The three labels are equally frequent in every labelled part (sizes that are no multiple of three differ by one).
    """
    for name, size in (("finetune", finetune), ("train", train), ("test", test), ("pretrain", pretrain)):
        if size < 0:
            raise ValueError(f"{name} must be a number of sentences, 0 or more; got {size}")
    if not 0.0 <= target_share <= 1.0:
        raise ValueError(f"target_share must lie between 0 and 1; got {target_share}")
    rng = random.Random(seed)
    seen: set[str] = set()

    def pairs(prefix: str, count: int) -> list[Pair]:
        rows: list[Pair] = []
        while len(rows) < count:
            label = LABELS[len(rows) % len(LABELS)]
            sentence = _sentence(rng, label)
            text = english(sentence)
            if text not in seen:
                seen.add(text)
                rows.append(Pair(f"{prefix}-{len(rows):05d}", text, vemari(sentence), label))
        rng.shuffle(rows)
        return rows

    # Test first, so that the held-out sentences stay the same when the other parts change their size.
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
    """Damage texts the way machine translation does: words get lost or come out as other words.

    Each word is hit with probability `rate`; half of the hits drop it and half replace it by a word drawn from all the
    words of `texts`, frequent ones more often. At least one word of every text stays.
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
            hit = rng.random()
            if hit >= rate:
                words.append(word)
            elif hit >= rate / 2:
                words.append(rng.choice(vocabulary))
        noisy.append(" ".join(words) or text)
    return noisy
