"""Translate texts in batches of similar length, with greedy decoding or beam search."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .batch_plan import Plan, make_plan
from .model import TranslationError, TranslationModel, check_tag, position_limit, tag_id, writes_tags

SOURCE_TOKENS = 512  # maximum length in NLLB's training
NEW_TOKENS = 512
# Fields of a model's generation_config that are kept. They name special and forbidden tokens; all search settings
# are replaced.
_KEPT_FIELDS = (
    "decoder_start_token_id",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)


@dataclass(frozen=True)
class Translated:
    """Translation of a piece: a text, or a part of a long text.

    Attributes:
        text: the translation.
        source_cut: whether the piece was truncated to the translator's `max_length`.
        unfinished: whether the translation was cut off at the translator's `max_new_tokens`.
    """

    text: str
    source_cut: bool = False
    unfinished: bool = False


class Translator:
    """Translator for one direction.

        translator = Translator("facebook/nllb-200-distilled-600M", "eng_Latn", "ace_Latn")
        translator.translate(["Good morning."])

    Args:
        model: hub id or folder of any encoder-decoder, or a `TranslationModel`, which several translators can share.
        source_tag, target_tag: the tokenizer's language tags (NLLB ``eng_Latn``, mBART ``en_XX``, M2M100 ``en``); None
            for models without tags (Marian, T5).
        device, dtype, revision: see `TranslationModel`; only used if `model` is a hub id or folder.
        prefix: text that is written before every text, for models that expect an instruction before the text (T5,
            MADLAD, some Marian models).
        max_length: maximum tokens of a piece of text. Longer texts are split at sentence ends, and longer sentences are
            truncated. Default: the model's limit, at most 512.
        max_new_tokens: maximum tokens of a piece's translation. Default: the model's limit, at most 512.
        batch_tokens: maximum tokens of a batch, counted as the number of pieces times the tokens of the longest piece.
        batch_size: maximum number of pieces in a batch; None: no maximum.
        num_beams: number of beams, used instead of the number in the model's generation_config; 1: greedy decoding.
        print_fn: called with a message when a batch does not fit into the GPU's memory.

    Raises:
        TranslationError: the model cannot be loaded, a tag is missing, unknown or not supported, or a limit is invalid.
    """

    def __init__(
        self,
        model: str | TranslationModel,
        source_tag: str | None = None,
        target_tag: str | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        prefix: str = "",
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        batch_tokens: int = 2048,
        batch_size: int | None = None,
        num_beams: int = 1,
        print_fn: Callable[[str], None] = print,
    ) -> None:
        if isinstance(model, str):
            model = TranslationModel(model, revision=revision, device=device, dtype=dtype)
        self.loaded, self.source_tag, self.target_tag, self.prefix = model, source_tag, target_tag, prefix
        self.batch_tokens, self.batch_size, self._print_fn = batch_tokens, batch_size, print_fn
        self._max_rows: int | None = None  # set after a batch did not fit into memory
        for name, value in (("batch_tokens", batch_tokens), ("batch_size", batch_size), ("num_beams", num_beams)):
            if value is not None and value < 1:
                raise TranslationError(f"--{name.replace('_', '-')} must be 1 or more; got {value}")
        self._check_tags()
        read_limit, write_limit = position_limit(model.config, model.tokenizer), position_limit(model.config)
        if write_limit is not None:
            write_limit -= 1  # the decoder's start token takes one position
        self.max_length = _limit("max-length", max_length, read_limit, SOURCE_TOKENS, minimum=8)
        self.max_new_tokens = _limit("max-new-tokens", max_new_tokens, write_limit, NEW_TOKENS, minimum=1)
        self.num_beams = num_beams

    def settings(self) -> dict[str, Any]:
        """Return the settings on which a translation depends, as JSON values for provenance."""
        return {
            "model": self.loaded.identity,
            "source_tag": self.source_tag,
            "target_tag": self.target_tag,
            "prefix": self.prefix,
            "decoding": {
                "num_beams": self.num_beams,
                "do_sample": False,
                "max_new_tokens": self.max_new_tokens,
            },
            "max_length": self.max_length,
            "batch": {"tokens": self.batch_tokens, "rows": self.batch_size},
        }

    def plan(self, texts: Sequence[str]) -> Plan:
        """Return the pieces and batches of texts; equal texts are translated once."""
        return make_plan(
            texts,
            self._lengths,
            limit=self.max_length,
            batch_tokens=self.batch_tokens,
            batch_size=self.batch_size,
        )

    def translate_batch(self, pieces: Sequence[str]) -> list[Translated]:
        """Translate pieces in one batch, or in smaller batches if the GPU's memory is too small.

        Raises:
            TranslationError: the memory is too small for a single piece.
        """
        results: list[Translated] = []
        while len(results) < len(pieces):
            rows = min(len(pieces) - len(results), self._max_rows or len(pieces))
            try:
                results += self._generate(pieces[len(results) : len(results) + rows])
                continue
            except torch.cuda.OutOfMemoryError as error:
                if rows == 1:
                    raise TranslationError(
                        "the GPU's memory is too small for one piece of text; lower --max-length, or use --dtype "
                        "bfloat16, a smaller model or --device cpu"
                    ) from error
            # this follows the except block, because inside it the exception keeps the failed batch's tensors alive
            self._max_rows = rows // 2
            self._print_fn(
                f"The GPU's memory is too small for batches of {rows} texts; continuing with {self._max_rows}."
            )
            torch.cuda.empty_cache()
        return results

    def translate(self, texts: Sequence[str], progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> list[str]:
        """Return the translations of texts in order; blank texts are unchanged.

        Args:
            texts: the texts.
            progress: wraps the iterable of batches, for a progress bar.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of texts; got a single text: {texts!r}")
        plan = self.plan(texts)
        translations = [""] * len(plan.pieces)
        for batch in progress(plan.batches):
            for piece, result in zip(batch, self.translate_batch([plan.pieces[i] for i in batch]), strict=True):
                translations[piece] = result.text
        return plan.join(translations)

    def _check_tags(self) -> None:
        tokenizer = self.loaded.tokenizer
        name = type(tokenizer).__name__
        for argument, tag in (("source_tag", self.source_tag), ("target_tag", self.target_tag)):
            if writes_tags(tokenizer):
                if tag is None:
                    raise TranslationError(f"{argument} is missing: {name} needs a language tag, e.g. eng_Latn (NLLB)")
                check_tag(tokenizer, tag, argument)
            elif tag is not None:
                raise TranslationError(
                    f"{argument} {tag!r}: {name} writes no language tag; leave the tag out (a prefix may name the "
                    "language)"
                )

    @functools.cached_property
    def _generation(self) -> Any:
        import transformers

        model = self.loaded.model
        fields = {name: getattr(model.generation_config, name, None) for name in _KEPT_FIELDS}
        if self.target_tag is not None:
            fields["forced_bos_token_id"] = tag_id(self.loaded.tokenizer, self.target_tag)
        return transformers.GenerationConfig(
            **{name: value for name, value in fields.items() if value is not None},
            do_sample=False,
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
        )

    def _tokens(self, texts: Sequence[str], **options: Any) -> Any:
        tokenizer = self.loaded.tokenizer
        if self.source_tag is not None:
            tokenizer.src_lang = self.source_tag  # set on every call: several translators share the tokenizer
        return tokenizer([self.prefix + text for text in texts], verbose=False, **options)

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        lengths: list[int] = []
        for start in range(0, len(texts), 1000):
            lengths += [len(ids) for ids in self._tokens(texts[start : start + 1000])["input_ids"]]
        return lengths

    @torch.inference_mode()
    def _generate(self, pieces: Sequence[str]) -> list[Translated]:
        model, tokenizer, limit = self.loaded.model, self.loaded.tokenizer, self.max_length
        cut = [length > limit for length in self._lengths(pieces)]
        tokens = self._tokens(
            pieces, return_tensors="pt", padding=True, padding_side="right", truncation=True, max_length=limit
        )
        inputs = {name: tokens[name].to(model.device) for name in ("input_ids", "attention_mask")}
        # generate() takes fields that its config leaves unset, such as length_penalty, from the model's config
        model.generation_config = self._generation
        generated = model.generate(**inputs, generation_config=self._generation).cpu()
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [
            Translated(text.strip(), source_cut=was_cut, unfinished=self._unfinished(row))
            for text, was_cut, row in zip(texts, cut, generated.tolist(), strict=True)
        ]

    def _unfinished(self, row: list[int]) -> bool:
        """Return whether a generated row (with the decoder's start token) reached the limit without an end token."""
        ends = self._generation.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        generated = row[1:]
        # for mBART, generate() forces an end token at the limit
        unforced = generated[:-1] if self._generation.forced_eos_token_id is not None else generated
        return len(generated) >= self.max_new_tokens and not any(end in unforced for end in ends)


def _limit(option: str, value: int | None, maximum: int | None, default: int, minimum: int) -> int:
    """Return an option's value; if it is None, the default, but at most the model's maximum.

    Raises:
        TranslationError: the value is out of range.
    """
    if value is None:
        return min(default, maximum or default)
    if value < minimum or (maximum is not None and value > maximum):
        raise TranslationError(
            f"--{option} must be {minimum} or more"
            + ("" if maximum is None else f", and at most {maximum}, the limit of this model")
            + f"; got {value}"
        )
    return value
