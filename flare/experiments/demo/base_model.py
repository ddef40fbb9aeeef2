"""The demo's base model: a tiny BERT, pre-trained once on the embedded corpus and kept in the user's cache folder.

Real multilingual models have read very little text in most of their languages. To imitate this, 95 % of the
pre-training text is English, and 5 % is in the made-up second language of the corpus (`.corpus`). Pre-training takes
less than a minute on one CPU core.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, set_seed

from ..utils.progress import counter
from .corpus import CORPUS_VERSION, SUFFIXES, Corpus, english_words, vemari_word

# Part of the hash that names a saved model (`base_key`). Increase this number when the code of the pre-training
# changes, so that old copies are not used.
RECIPE_VERSION = 1
_MANIFEST = "manifest.json"
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class BaseConfig:
    """Size of the tiny BERT, and hyper-parameters of its pre-training.

    Attributes:
        layers, width, heads, positions: number of blocks, hidden size, number of attention heads, maximum length
            in tokens.
        steps, batch_size, lr: number of optimizer steps, sentences per step, peak learning rate.
        masked_share: share of the tokens (without special tokens) that the model must predict.
        init_range: standard deviation of the initial weights.
        seed: seed of the initial weights, of the order of the sentences and of the masking.
    """

    layers: int = 4
    width: int = 96
    heads: int = 4
    positions: int = 128
    steps: int = 500
    batch_size: int = 64
    lr: float = 1.5e-3
    masked_share: float = 0.15
    init_range: float = 0.05
    seed: int = 0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer for both languages.

    Its vocabulary lists the words of both languages without suffixes, and the suffixes as ``##suffix``.
    """
    words = english_words()
    pieces = [*_SPECIAL_TOKENS, ".", *words, *map(vemari_word, words), *(f"##{suffix}" for suffix in SUFFIXES)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls_id, sep_id = pieces.index("[CLS]"), pieces.index("[SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder that keeps base models.

    It is `cache_dir` if given, otherwise $XDG_CACHE_HOME/flare-kernels, or ~/.cache/flare-kernels if that
    variable is not set.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "flare-kernels"


def base_key(config: BaseConfig, corpus: Corpus) -> str:
    """Return a hash of everything that determines the weights of the base model."""
    ingredients = {
        "recipe": RECIPE_VERSION,
        "corpus": CORPUS_VERSION,
        "config": asdict(config),
        "text": [corpus.pretrain_source, corpus.pretrain_target],
        "tokenizer": build_tokenizer().backend_tokenizer.to_str(),
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]


def pretrained_base(
    config: BaseConfig,
    corpus: Corpus,
    cache_dir: str | os.PathLike[str] | None = None,
    print_fn: Callable[[str], None] = print,
    progress: bool = True,
) -> Path:
    """Return the folder of the pre-trained base model. Pre-train the model if the folder is missing or damaged.

    Args:
        config: size and pre-training of the model.
        corpus: corpus whose `pretrain_source` and `pretrain_target` the model is pre-trained on.
        cache_dir: folder that keeps base models, or None for the default of `cache_folder`.
        print_fn: prints a line for the user.
        progress: show a progress bar while pre-training.
    """
    folder = cache_folder(cache_dir) / f"demo-base-{base_key(config, corpus)}"
    if folder.exists():
        damage = _damage(folder)
        if damage is None:
            print_fn(f"Base model: taken from {folder}")
            return folder
        print_fn(f"Base model: the copy in {folder} is damaged ({damage}); the model will be pre-trained again.")
        shutil.rmtree(folder)
    print_fn(f"Base model: pre-training a {config.layers}-layer BERT of width {config.width}, to be saved in {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Build in a temporary folder and rename it, so that an interrupted run leaves nothing that looks finished.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as building:
        inner = Path(building) / folder.name
        tokenizer = build_tokenizer()
        pretrain(config, corpus, tokenizer, progress).save_pretrained(inner)
        tokenizer.save_pretrained(inner)
        digests = {path.name: _digest(path) for path in sorted(inner.iterdir())}
        (inner / _MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
        try:
            inner.rename(folder)
        except OSError:
            # Another process may have saved the same model in the meantime. Use its copy, if that is not damaged.
            if _damage(folder) is not None:
                raise
    return folder


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _damage(folder: Path) -> str | None:
    """Return what is wrong with the base model in a folder, or None if it is undamaged."""
    try:
        digests = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        changed = [name for name, digest in digests.items() if _digest(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(changed)} changed since it was written" if changed else None


def pretrain(
    config: BaseConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, progress: bool = True
) -> BertForMaskedLM:
    """Train a BERT from scratch by masked-language modelling on the sentences of both languages, shuffled together."""
    set_seed(config.seed)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=config.positions,
            type_vocab_size=2,
            initializer_range=config.init_range,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = tokenizer([*corpus.pretrain_source, *corpus.pretrain_target])["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=max(config.steps, 1), pct_start=0.1
    )
    generator = torch.Generator().manual_seed(config.seed)
    model.train()
    order = torch.empty(0, dtype=torch.long)
    bar = counter("pre-training" if progress else None, config.steps, "step")
    for _ in range(config.steps):
        if len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        batch = tokenizer.pad({"input_ids": [rows[i] for i in chosen.tolist()]}, return_tensors="pt")
        input_ids, labels = _mask(batch["input_ids"], tokenizer, config.masked_share, generator)
        loss = model(input_ids=input_ids, attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update(1)
    bar.close()
    return model.eval()


def _mask(
    input_ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input ids and the labels for masked-language modelling.

    A random `share` of the tokens, except special tokens, is chosen. As in BERT, 80 % of the chosen tokens become
    [MASK], 10 % become a random token, and 10 % stay. The label of a token that is not chosen is -100.
    """
    special = torch.tensor(tokenizer.all_special_ids)
    draw = torch.rand(input_ids.shape, generator=generator)
    chosen = (draw < share) & ~torch.isin(input_ids, special)
    labels = input_ids.masked_fill(~chosen, -100)
    replacement = torch.rand(input_ids.shape, generator=generator)
    random_ids = torch.randint(len(special), len(tokenizer), input_ids.shape, generator=generator)
    masked = input_ids.masked_fill(chosen & (replacement < 0.8), tokenizer.mask_token_id)
    return torch.where(chosen & (replacement >= 0.9), random_ids, masked), labels
