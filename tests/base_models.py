"""Tiny random models of the tested families. ``BASES`` describes the classes, blocks and projections of each family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB, HIDDEN, LAYERS, HEADS, M = 64, 32, 3, 4, 9  # M: padded length of the texts in tokens
LORA = {"r": 4, "lora_alpha": 8}

_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "initializer_range": 0.2,
    **_TOKENS,
}


def thirds(n: int) -> Tensor:
    """Return a mask (n,) of the key's rows, for a weight with all query rows, then all key rows, then value rows."""
    return torch.arange(n) // (n // 3) == 1


def by_head(n: int) -> Tensor:
    """Return a mask (n,) of the key's rows, for a weight with the query, key and value rows of each head in turn."""
    return (torch.arange(n) // (n // (3 * HEADS))) % 3 == 1


def last_but_one(width: int, group: int) -> Callable[[int], Tensor]:
    """Return a function of n that returns a mask (n,) of the key's rows, for a weight that consists of groups.

    A group has ``group`` parts of ``width`` rows each: first all parts of the query, then one of the key, then one of
    the value.
    """
    return lambda n: (torch.arange(n) // width) % group == group - 2


@dataclass
class Base:
    """A family of models.

    Attributes:
        model: name of the model class.
        config: name of the config class.
        stack: path of the stack of blocks.
        names: names of the query and value projections, or of the layer that computes query, key and value.
        changes: fields of the config that differ from the common ones.
        key_rows: function that returns a mask (n,) of the key's rows in a layer with n outputs that computes query, key
            and value; None if the family has no such layer.
        causal: whether the model is a causal language model.
    """

    model: str
    config: str
    stack: str
    names: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    key_rows: Callable[[int], Tensor] | None = None
    causal: bool = False

    def make(self) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**_COMMON, **self.changes}, attn_implementation="eager")
        base_model = getattr(transformers, self.model)(config)
        for module in base_model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            for parameter in base_model.parameters():  # so that biases are not zero and norms not one
                parameter.add_(0.05 * torch.randn(parameter.shape))
        return base_model.to(torch.float64).train()

    def batch(self) -> dict[str, Tensor]:
        """Return three rows, padded on the right. Source and target of a row have different lengths."""
        generator = torch.Generator().manual_seed(4)
        inputs = {}
        for prefix, lengths in (("", (M, M - 1, M - 2)), ("source_", (M - 2, M, M - 1))):
            ids = torch.randint(3, VOCAB, (3, M), generator=generator)
            mask = (torch.arange(M) < torch.tensor(lengths)[:, None]).long()
            inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"] = ids.where(mask.bool(), 1), mask
        if self.causal:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        else:
            inputs["labels"] = torch.tensor([0, 1, 1])
        return inputs


DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
MDEBERTA = {**DEBERTA, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
NO_DROP = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
BASES = {
    # blocks that do not pass on keyword arguments
    "mdeberta": Base(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        "deberta.encoder.layer",
        ("query_proj", "value_proj"),
        MDEBERTA,
    ),
    "deberta-v2-conv": Base(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        "deberta.encoder.layer",
        ("query_proj", "value_proj"),
        {**DEBERTA, "conv_kernel_size": 3},
    ),
    "deberta": Base(
        "DebertaForSequenceClassification", "DebertaConfig", "deberta.encoder.layer", ("in_proj",), DEBERTA, by_head
    ),
    # one layer computes query, key and value
    "modernbert": Base(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        "model.layers",
        ("Wqkv",),
        {"local_attention": 6, "global_attn_every_n_layers": 2},
        thirds,
    ),
    "gpt2": Base(
        "GPT2LMHeadModel", "GPT2Config", "transformer.h", ("c_attn",), {"attn_pdrop": 0, "resid_pdrop": 0}, thirds, True
    ),
    "gpt_neox": Base(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", "gpt_neox.layers", ("query_key_value",), NO_DROP, by_head, True
    ),
    "bloom": Base(
        "BloomForCausalLM",
        "BloomConfig",
        "transformer.h",
        ("query_key_value",),
        {"n_head": HEADS, **NO_DROP},
        by_head,
        True,
    ),
    "mpt": Base(
        "MptForCausalLM",
        "MptConfig",
        "transformer.blocks",
        ("Wqkv",),
        {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "expansion_ratio": 2},
        thirds,
        True,
    ),
    "falcon": Base(
        "FalconForCausalLM",
        "FalconConfig",
        "transformer.h",
        ("query_key_value",),
        {"multi_query": False, "alibi": False, **NO_DROP},
        by_head,
        True,
    ),
    "falcon-mqa": Base(
        "FalconForCausalLM",
        "FalconConfig",
        "transformer.h",
        ("query_key_value",),
        {"multi_query": True, "alibi": False, **NO_DROP},
        last_but_one(HIDDEN // HEADS, HEADS + 2),
        True,
    ),
    "falcon-gqa": Base(
        "FalconForCausalLM",
        "FalconConfig",
        "transformer.h",
        ("query_key_value",),
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, **NO_DROP},
        last_but_one(HIDDEN // HEADS, HEADS // 2 + 2),
        True,
    ),
    "phi3": Base(
        "Phi3ForCausalLM",
        "Phi3Config",
        "model.layers",
        ("qkv_proj",),
        {"num_key_value_heads": 2},
        lambda n: (torch.arange(n) // 16).eq(2),  # 32 query rows, 16 key rows, 16 value rows
        True,
    ),
    "persimmon": Base(
        "PersimmonForCausalLM", "PersimmonConfig", "model.layers", ("query_key_value",), NO_DROP, by_head, True
    ),
    # separate query, key and value projections; the families differ in embeddings, head widths or attention windows
    "xlm-r (AfroXLM-R)": Base(
        "XLMRobertaForSequenceClassification", "XLMRobertaConfig", "roberta.encoder.layer", ("query", "value")
    ),
    "rembert": Base(
        "RemBertForSequenceClassification",
        "RemBertConfig",
        "rembert.encoder.layer",
        ("query", "value"),
        {"input_embedding_size": 16, "output_embedding_size": 16},
    ),
    "llama 3": Base(
        "LlamaForCausalLM",
        "LlamaConfig",
        "model.layers",
        ("q_proj", "v_proj"),
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        causal=True,
    ),
    "qwen 3": Base(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        "model.layers",
        ("q_proj", "v_proj"),
        {"num_key_value_heads": 2, "head_dim": 8},
        causal=True,
    ),
    "gemma 3": Base(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        "model.layers",
        ("q_proj", "v_proj"),
        {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "layer_types": WINDOWS},
        causal=True,
    ),
}
