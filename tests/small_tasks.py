"""Small tokenizers and data for the tests of tasks: every word or character is a token, nothing is downloaded."""

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
    """BERT's form: [<s> a </s>], [<s> a </s> b </s>] with types 0 and 1; a token is a word or a punctuation mark."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *words.split()]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **{**names, **options})


def byte_tokenizer(*, merges: Sequence[tuple[str, str]] = (), ends: bool = False, **options: Any) -> Any:
    """Byte-level BPE: a text begins with <s> (Llama's form) or, with ``ends``, is closed with </s> (T5's)."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *_ALPHABET, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(vocabulary, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>" if ends else "<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": None if ends else "<s>"}
    chosen = {name: value for name, value in {**names, **options}.items() if value is not None}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=["input_ids", "attention_mask"], **chosen)


def write_csv(path: Path, rows: Sequence[Sequence[Any]], head: Sequence[str], encoding: str = "utf-8") -> Path:
    """A CSV file with a head line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([head, *rows])
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
