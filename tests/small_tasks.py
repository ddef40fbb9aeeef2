"""Small tokenizers of words or bytes, and data files, for the tests of tasks. Nothing is downloaded."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def word_tokenizer(words: str, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with BERT's layout ([<s> a </s>], [<s> a </s> b </s>] with types 0 and 1) and word tokens."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *words.split()]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **{**names, **options})


def byte_tokenizer(*, merges: Sequence[tuple[str, str]] = (), ends: bool = False, **options: Any) -> Any:
    """Return a byte-level BPE tokenizer that adds <s> before a text, as in Llama. ``ends``: </s> after it, as in T5."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *_ALPHABET, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>" if ends else "<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": None if ends else "<s>"}
    special = {name: value for name, value in {**names, **options}.items() if value is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
    )


def write_csv(path: Path, rows: Sequence[Sequence[Any]], head: Sequence[str], encoding: str = "utf-8") -> Path:
    """Write a CSV file whose first line is ``head``, the names of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([head, *rows])
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
