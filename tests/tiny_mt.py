"""Tiny random translation models with real tokenizers, saved in the layout of the hub."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TAGS = ["ace_Latn", "eng_Latn", "jav_Latn"]
TEXT = "the hotel was clean and near the sea . we came late but they were kind ! is it far from here ? [ ] { }"
WORDS = TEXT.split()
SENTENCES = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]


def save_nllb(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """Save a model with NLLB's architecture (M2M100) and tokenizer; its generation_config sets beams and sampling."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=160, special_tokens=special, show_progress=False))
    vocab = bpe.get_vocab()
    tokenizer = transformers.NllbTokenizer(vocab=vocab, merges=_merges(bpe), extra_special_tokens=TAGS)
    tokenizer.model_max_length = 64
    torch.manual_seed(seed)
    model = transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(
            vocab_size=len(tokenizer),
            d_model=width,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            init_std=0.5,
        )
    )
    model.generation_config.num_beams = 4
    model.generation_config.do_sample = True
    model.generation_config.max_length = 5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """Save an encoder-decoder whose tokenizer writes no language tags."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=160, special_tokens=special, show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
