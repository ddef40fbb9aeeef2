"""Check the data for `flare check`: pairs, lengths, labels, vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..runs.setup import Setup
from ..tasks import Example, Pair, Task, make_form
from ..tasks.forms.generative import GenerativeForm
from ..tasks.registry import METRICS

#: Maximum number of rows that are tokenised: per split and language to measure lengths, per language to count words.
#: The tokenised rows are evenly spaced over all rows.
SAMPLE = 5000
_LONG = 10**6  # a maximum length, in tokens, that cuts no text

_CUT_SHARE = 0.05  # warn above this share of cut texts
_SAME_TEXT_SHARE = 0.05  # warn above this share of rows with the same text in both languages
_UNKNOWN_SHARE = 0.01  # warn above this share of unknown tokens
_SPLIT_RATIO = 1.5  # warn if the target has more than 1.5 times as many tokens per word as the source
_FEW = 10  # warn if a label has fewer training rows than this
_MAJORITY = 0.8  # warn if one label has more than this share of the training rows
_PADDING = 0.6  # warn if the longest text fills less than this share of the fixed width of the batches


@dataclass
class Lengths:
    """Tokens per text in one split of a language.

    language, split: the language and the split.
    texts: number of tokenised texts.
    mean: mean number of tokens.
    most_of: 95th percentile of the number of tokens.
    longest: tokens of the longest text.
    limit: number of tokens to which texts are cut.
    cut: number of texts longer than `limit`.
    """

    language: str
    split: str
    texts: int
    mean: float
    most_of: int
    longest: int
    limit: int
    cut: int


@dataclass
class Vocabulary:
    """Numbers of words and tokens in a language's texts.

    language: name of the language.
    words: number of words, split at white space.
    tokens: number of tokens of these words.
    unknown: how many of these tokens are the tokenizer's unknown token.
    """

    language: str
    words: int
    tokens: int
    unknown: int

    @property
    def per_word(self) -> float:
        """Tokens per word."""
        return self.tokens / max(self.words, 1)

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that are the tokenizer's unknown token."""
        return self.unknown / max(self.tokens, 1)


@dataclass
class DataCheck:
    """Results for the data of one target language.

    target: name of the language.
    pairs: split -> number of rows used.
    left_out: notes of `load_pairs`, for example about rows that are not used.
    examples: the first training rows, each {"id", "target", "source", "label"}.
    labels: split -> label -> number of rows (of words in token classification).
    lengths: tokens per text of each split and language.
    vocabulary: word and token counts of the target, and of the source if there are source texts.
    warnings: warnings about the data, in words.
    """

    target: str
    pairs: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: list[Lengths] = field(default_factory=list)
    vocabulary: list[Vocabulary] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_data(
    target: str, source: str, splits: dict[str, list[Pair]], notes: Sequence[str], setup: Setup, shown: int
) -> DataCheck:
    """Check the pairs of every split of a target language.

    Args:
        target, source: names of the languages.
        splits: split -> its pairs.
        notes: notes of `load_pairs` about the pairs, for example how many rows were dropped.
        setup: tokenizer, maximum length, and the form, which converts rows of the task for the model.
        shown: the first `shown` training pairs are copied into `examples`.
    """
    task = setup.form.task
    check = DataCheck(target, {split: len(pairs) for split, pairs in splits.items()}, list(notes))
    check.examples = [_shown(pair) for pair in splits["train"][:shown]]
    for split, pairs in splits.items():
        counts = Counter(label for pair in pairs for label in _labels(pair.target))
        if counts:
            check.labels[split] = {label: counts.get(label, 0) for label in _order(task, counts)}
        check.lengths += _lengths(target, source, split, pairs, setup)
    every = {target: [pair.target for pairs in splits.values() for pair in pairs]}
    sources = [pair.source for pairs in splits.values() for pair in pairs if pair.source is not None]
    if sources:
        every[source] = sources
    check.vocabulary = [_vocabulary(name, rows, task, setup.tokenizer) for name, rows in every.items()]
    check.warnings = [
        *(line for line in notes if "dropped" in line or "position" in line),
        *_warn_of_pairs(target, source, splits),
        *_warn_of_labels(target, check.labels, task.kind, len(splits.get("train", ()))),
        *_warn_of_lengths(check.lengths, setup),
        *_warn_of_vocabulary(check.vocabulary),
    ]
    return check


# --- counting ---------------------------------------------------------------------------------------------------------


def _shown(pair: Pair) -> dict[str, Any]:
    label = pair.target.label if pair.target.label is not None else [answer.text for answer in pair.target.answers]
    source = None if pair.source is None else pair.source.texts
    return {"id": pair.target.id, "target": pair.target.texts, "source": source, "label": label}


def _labels(row: Example) -> list[str]:
    if isinstance(row.label, tuple):
        return list(row.label)
    return [row.label] if isinstance(row.label, str) else []


def _order(task: Task, counts: Counter[str]) -> list[str]:
    return list(task.labels or sorted(counts))


def _sampled(pairs: Sequence[Pair]) -> list[Pair]:
    every = -(-len(pairs) // SAMPLE)
    return list(pairs[:: max(every, 1)])


def _lengths(target: str, source: str, split: str, pairs: Sequence[Pair], setup: Setup) -> list[Lengths]:
    uncut_form = make_form(setup.form.task, setup.tokenizer, setup.family, _LONG)
    sample = _sampled(pairs)
    limit = setup.form.longest_prompt if isinstance(setup.form, GenerativeForm) else setup.max_length
    with_source = all(pair.source is not None for pair in sample)
    rows, _ = uncut_form.eval_rows(sample, with_source=with_source)
    lengths = []
    for language, column in ((target, "input_ids"), (source, "source_input_ids")):
        if not rows or column not in rows[0]:
            continue
        sizes = np.array([_size(row[column]) for row in rows])
        lengths.append(
            Lengths(
                language,
                split,
                len(sizes),
                float(sizes.mean()),
                int(np.percentile(sizes, 95, method="higher")),
                int(sizes.max()),
                limit,
                int((sizes > limit).sum()),
            )
        )
    return lengths


def _size(ids: Any) -> int:
    return max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)


def _vocabulary(language: str, rows: Sequence[Example], task: Task, tokenizer: Any) -> Vocabulary:
    texts = [row.texts[column] for row in rows[:: -(-len(rows) // SAMPLE)] for column in task.text_columns]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    return Vocabulary(
        language,
        sum(len(text.split()) for text in texts),
        sum(map(len, encoded)),
        0 if unknown is None else sum(ids.count(unknown) for ids in encoded),
    )


# --- warnings ---------------------------------------------------------------------------------------------------------


def _warn_of_pairs(target: str, source: str, splits: dict[str, list[Pair]]) -> Iterable[str]:
    for split, pairs in splits.items():
        same = [p.target.id for p in pairs if p.source is not None and p.target.texts == p.source.texts]
        if len(same) > _SAME_TEXT_SHARE * len(pairs):
            yield (
                f"{target} {split}: {len(same)} of {len(pairs)} rows have the same text in {source}; check that "
                "each column or folder is the right one"
            )
    known = {tuple(pair.target.texts.values()) for pair in splits.get("train", ())}
    repeated = [pair.target.id for pair in splits.get("test", ()) if tuple(pair.target.texts.values()) in known]
    if repeated:
        yield f"{target}: {len(repeated)} test texts are also training texts, so the test score may be too high"


def _warn_of_labels(target: str, labels: dict[str, dict[str, int]], kind: str, rows: int) -> Iterable[str]:
    """Yield warnings of rare and of frequent labels.

    labels: split -> label -> number of rows (of words, for tags). rows: number of training rows.
    """
    unit = "word" if kind == "token-classification" else "row"
    train, test = labels.get("train"), labels.get("test", {})
    for label, count in (train or {}).items():
        if count == 0 and test.get(label):
            yield f"{target}: no training {unit} has the label {label!r}, and {test[label]} test {unit}s have it"
        elif count < _FEW and label != "O":
            yield f"{target}: {count} training {unit}s have the label {label!r}"
    total = rows if kind == "multi-label" else sum((train or {}).values())
    for label, count in (train or {}).items():
        if count > _MAJORITY * total and label != "O":
            advice = "; choose checkpoints by macro F1 (--metric macro_f1)" if "macro_f1" in METRICS[kind] else ""
            share = f"{100 * count / total:.0f} % of the training {unit}s"
            yield f"{target}: {share} have the label {label!r}, so predicting it always gives a high accuracy{advice}"


def _warn_of_lengths(lengths: Sequence[Lengths], setup: Setup) -> Iterable[str]:
    for language in dict.fromkeys(one.language for one in lengths):
        splits = [one for one in lengths if one.language == language]
        cut, texts = sum(one.cut for one in splits), sum(one.texts for one in splits)
        if cut > _CUT_SHARE * texts:
            # a generating model reserves max_length - limit tokens for its answer
            enough = max(one.most_of for one in splits) + setup.max_length - splits[0].limit
            yield (
                f"{language}: {100 * cut / texts:.0f} % of the texts are cut to {splits[0].limit} tokens; "
                f"--max-length {enough} would leave 95 % of every split uncut"
            )
    longest = max((one.longest for one in lengths), default=0)
    limit = max((one.limit for one in lengths), default=0)
    if setup.batches["padding"] == "max_length" and 0 < longest < _PADDING * limit:
        answer = setup.max_length - limit  # tokens that a generating model reserves for its answer
        yield (
            f"every batch is padded to {setup.max_length} tokens, and the longest text has {longest} tokens"
            + (f" ({answer} more are reserved for the answer)" if answer else "")
            + f"; --padding longest or --max-length {longest + answer} trains faster with the same result"
        )


def _warn_of_vocabulary(vocabulary: Sequence[Vocabulary]) -> Iterable[str]:
    for one in vocabulary:
        if one.unknown_share > _UNKNOWN_SHARE:
            yield (
                f"{one.language}: {100 * one.unknown_share:.1f} % of the tokens are unknown to the tokenizer, so the "
                "model cannot read them; use a model whose vocabulary covers the language's script"
            )
    if len(vocabulary) == 2 and vocabulary[0].per_word > _SPLIT_RATIO * vocabulary[1].per_word:
        target, source = vocabulary
        yield (
            f"{target.language} words are split into {target.per_word:.1f} tokens and {source.language} words into "
            f"{source.per_word:.1f}: the tokenizer covers {target.language} poorly, so texts in it become longer"
        )
