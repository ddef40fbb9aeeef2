"""For tests of the collator, the trainer and the baselines: a model of every task, and rows with two texts each."""

from __future__ import annotations

import random
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

VOCAB = tiny.VOCAB
SPECIAL = ["<pad>", "<unk>", "[CLS]", "[SEP]", "<s>"]
PAD, UNK, CLS, SEP, BOS = range(len(SPECIAL))

# task -> (family of tests/tiny.py, model class, changes of its config)
TASKS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "bert": ("bert", tiny.CLASSES["bert"], {}),
    "bert-tokens": ("bert", BertForTokenClassification, {}),
    "bert-spans": ("bert", BertForQuestionAnswering, {"num_labels": 2}),
    "xlmr": ("xlmr", tiny.CLASSES["xlmr"], {"type_vocab_size": 1}),
    "llama": ("llama", tiny.CLASSES["llama"], {}),
    "llama-text": ("llama", tiny.CLASSES["llama"], {}),  # no prompt: every token is a label
    "llama-classes": ("llama", LlamaForSequenceClassification, {"num_labels": 3}),
    "mt5": ("mt5", tiny.CLASSES["mt5"], {}),
}
_NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "xlmr": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "llama": {},
    "mt5": {"dropout_rate": 0.0},
}


def task_model(task: str, seed: int = 0) -> Any:
    """Return a random model for a task, without dropout and with the pad token of :func:`tokenizer`."""
    family, model_class, changes = TASKS[task]
    torch.manual_seed(seed)
    return model_class(tiny.config(family, pad_token_id=PAD, **_NO_DROPOUT[family], **changes))


def tokenizer(padding_side: str = "right", pad: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w5 ... w63 (ids 5 ... 63) that adds BERT's [CLS] and [SEP]."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCAB))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = {"unk_token": "<unk>", "cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "<s>"}
    if pad:
        names["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side=padding_side, **names)


def rows(task: str, count: int, seed: int = 0, source: bool = True) -> list[dict[str, Any]]:
    """Return ``count`` rows of a task. The lengths of texts and of label lists differ between rows."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [draw.randrange(len(SPECIAL), VOCAB) for _ in range(draw.randint(low, high))]

    task_rows = []
    for _ in range(count):
        ids = [CLS, *words(3, 9), SEP]
        row: dict[str, Any] = {"input_ids": ids}
        if source:
            row["source_input_ids"] = [CLS, *words(3, 9), SEP]
        if task in ("bert", "xlmr", "llama-classes"):
            row["labels"] = draw.randrange(3)
        elif task == "bert-tokens":
            labelled = draw.randint(1, len(ids) - 2)
            row["labels"] = [draw.randrange(3) if 0 < i <= labelled else -100 for i in range(len(ids))]
        elif task == "bert-spans":
            start = draw.randrange(1, len(ids) - 1)
            row |= {"start_positions": start, "end_positions": draw.randrange(start, len(ids) - 1)}
        elif task == "llama-text":
            row["labels"] = list(ids)
        elif task == "llama":
            prompt, answer = [BOS, *words(2, 6)], words(1, 5)
            row |= {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
            if source:
                row["source_input_ids"] = [BOS, *words(2, 6)]
        else:
            row["labels"] = words(1, 6)
            if source:
                row["source_labels"] = words(1, 6)
        task_rows.append(row)
    return task_rows
