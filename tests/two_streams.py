"""Tiny random models and rows of two texts, for the tests of collators, trainer and baselines."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

VOCAB = 100
SPECIAL = ["<pad>", "<unk>", "[CLS]", "[SEP]", "<s>"]
PAD, UNK, CLS, SEP, BOS = range(len(SPECIAL))

_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {**_SMALL, **_NO_DROPOUT, "vocab_size": VOCAB, "pad_token_id": PAD}
_LLAMA = {**_SMALL, "vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": PAD}

FAMILIES = {
    "bert": (BertForSequenceClassification, BertConfig, {**_BERT, "max_position_embeddings": 64, "num_labels": 3}),
    "bert-tokens": (BertForTokenClassification, BertConfig, {**_BERT, "num_labels": 3}),
    "bert-spans": (BertForQuestionAnswering, BertConfig, _BERT),
    "xlmr": (
        XLMRobertaForSequenceClassification,
        XLMRobertaConfig,
        {**_BERT, "max_position_embeddings": 66, "type_vocab_size": 1, "num_labels": 3},
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, _LLAMA),
    "llama-classes": (LlamaForSequenceClassification, LlamaConfig, {**_LLAMA, "num_labels": 3}),
    "mt5": (
        MT5ForConditionalGeneration,
        MT5Config,
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 37,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "pad_token_id": PAD,
            "decoder_start_token_id": PAD,
        },
    ),
}


def tiny(family: str, seed: int = 0) -> Any:
    """A random model of a family, without dropout."""
    torch.manual_seed(seed)
    model_class, config_class, fields = FAMILIES[family]
    return model_class(config_class(**fields))


def tokenizer(padding_side: str = "right", pad: bool = True) -> PreTrainedTokenizerFast:
    """Words w5 ... w99 with ids 5 ... 99; "[CLS] text [SEP]" as BERT has it."""
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


def rows(family: str, count: int, seed: int = 0, source: bool = True) -> list[dict[str, Any]]:
    """Rows of unequal lengths (and, where labels are lists, unequal numbers of labels) for a family's task."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [draw.randrange(len(SPECIAL), VOCAB) for _ in range(draw.randint(low, high))]

    found = []
    for _ in range(count):
        ids = [CLS, *words(3, 9), SEP]
        row: dict[str, Any] = {"input_ids": ids}
        if source:
            row["source_input_ids"] = [CLS, *words(3, 9), SEP]
        if family in ("bert", "xlmr", "llama-classes"):
            row["labels"] = draw.randrange(3)
        elif family == "bert-tokens":
            labelled = draw.randint(1, len(ids) - 2)
            row["labels"] = [draw.randrange(3) if 0 < i <= labelled else -100 for i in range(len(ids))]
        elif family == "bert-spans":
            start = draw.randrange(1, len(ids) - 1)
            row |= {"start_positions": start, "end_positions": draw.randrange(start, len(ids) - 1)}
        elif family == "llama":
            prompt, answer = [BOS, *words(2, 6)], words(1, 5)
            row |= {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
            if source:
                row["source_input_ids"] = [BOS, *words(2, 6)]
        else:
            row["labels"] = words(1, 6)
            if source:
                row["source_labels"] = words(1, 6)
        found.append(row)
    return found
