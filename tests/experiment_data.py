"""Files of a tiny experiment: parallel data from the demo's corpus, and tiny random models with a tokenizer."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
import transformers

from flare.experiments.demo.base_model import build_tokenizer
from flare.experiments.demo.corpus import make_corpus

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS = {"train": (0, 48), "valid": (48, 64), "test": (64, 84)}


def write_data(folder: Path, valid: bool = True, rows: dict[str, tuple[int, int]] = ROWS) -> Path:
    """Write the demo's corpus: in folder/english and in folder/vemari, one CSV file per split.

    A row of the English file and the same row of the Vemari file are translations of each other. Vemari is the demo's
    made-up language. `rows` holds the first row of each split and the row after its last.
    """
    pairs = make_corpus(train=90).train
    for language, text in (("english", "source"), ("vemari", "target")):
        (folder / language).mkdir(parents=True)
        for split, (first, end) in rows.items():
            if split == "valid" and not valid:
                continue
            with (folder / language / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "text", "label"])
                writer.writerows([pair.id, getattr(pair, text), pair.label] for pair in pairs[first:end])
    return folder


def write_bert(folder: Path) -> Path:
    """Save a tiny random BERT without a head."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZE)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_llama(folder: Path) -> Path:
    """Save a tiny random Llama."""
    tokenizer = _tokenizer_with_end_token()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **SIZE,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_t5(folder: Path) -> Path:
    """Save a tiny random mT5."""
    tokenizer = _tokenizer_with_end_token()
    torch.manual_seed(0)
    config = transformers.MT5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    transformers.MT5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer_with_end_token() -> transformers.PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = tokenizer.sep_token
    return tokenizer
