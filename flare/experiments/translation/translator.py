"""Translating texts: greedy, in batches of about one length, with results in the order of the texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .model import TranslationError, TranslationModel, check_tag, position_limit, tag_id, writes_tags
from .pieces import Plan, make_plan

SOURCE_TOKENS = 512  # NLLB was trained on no more
NEW_TOKENS = 512
# What of a model's own generation settings says how it writes, and not how it searches.
_KEPT = (
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
    """A translated piece.

    text: the translation.
    source_cut: whether the piece was longer than the model reads, so that its end was left out.
    unfinished: whether the translation reached the limit of its length.
    """

    text: str
    source_cut: bool = False
    unfinished: bool = False


class Translator:
    """A translation model for one direction.

        translator = Translator("facebook/nllb-200-distilled-600M", "eng_Latn", "ace_Latn")
        translator.translate(["Good morning."])

    Args:
        model: hub id or folder of any encoder-decoder, or a `TranslationModel` (one load for many directions).
        source_tag, target_tag: as the tokenizer writes the languages (NLLB ``eng_Latn``, mBART ``en_XX``, M2M100
            ``en``); None for models that write none (Marian, T5).
        device, dtype, revision: as in `TranslationModel`; only where the model is given by name.
        prefix: written before every text, for models that are told so what to do (T5, MADLAD, some of Marian's).
        max_length: tokens of one piece of text; longer texts are divided into sentences, and a sentence that is longer
            is cut. Default: what the model takes, at most 512.
        max_new_tokens: tokens of the translation of a piece. Default: what the model takes, at most 512.
        batch_tokens: rows times longest row of a batch. batch_size: rows of a batch at most.
        num_beams: 1 is greedy, whatever the model's own generation settings say.
        say: is told when a batch does not fit into the GPU's memory.

    Raises:
        TranslationError: the model cannot be loaded, a tag is missing, unknown or not wanted, a limit makes no sense.
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
        say: Callable[[str], None] = print,
    ) -> None:
        if isinstance(model, str):
            model = TranslationModel(model, revision=revision, device=device, dtype=dtype)
        self.loaded, self.source_tag, self.target_tag, self.prefix = model, source_tag, target_tag, prefix
        self.batch_tokens, self.batch_size, self._say = batch_tokens, batch_size, say
        self._rows: int | None = None  # rows that fitted into memory, once a batch did not
        for name, value in (("batch_tokens", batch_tokens), ("batch_size", batch_size), ("num_beams", num_beams)):
            if value is not None and value < 1:
                raise TranslationError(f"--{name.replace('_', '-')} must be 1 or more; got {value}")
        self._check_tags()
        reads, writes = position_limit(model.config, model.tokenizer), position_limit(model.config)
        self.max_length = _limit("max-length", max_length, reads, SOURCE_TOKENS, least=8)
        # one position is the decoder's first token
        self.max_new_tokens = _limit("max-new-tokens", max_new_tokens, writes and writes - 1, NEW_TOKENS, least=1)
        self.num_beams = num_beams

    def settings(self) -> dict[str, Any]:
        """Everything a translation depends on beside the text, for provenance; JSON."""
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
        """Pieces and batches of some texts; equal texts are translated once."""
        return make_plan(
            texts,
            self._lengths,
            limit=self.max_length,
            batch_tokens=self.batch_tokens,
            batch_size=self.batch_size,
        )

    def translate_batch(self, pieces: Sequence[str]) -> list[Translated]:
        """Translate some pieces at once; on a GPU whose memory is too small for it, in smaller batches.

        Raises:
            TranslationError: the memory is too small for a single piece.
        """
        results: list[Translated] = []
        while len(results) < len(pieces):
            rows = min(len(pieces) - len(results), self._rows or len(pieces))
            try:
                results += self._generate(pieces[len(results) : len(results) + rows])
                continue
            except torch.cuda.OutOfMemoryError as error:
                if rows == 1:
                    raise TranslationError(
                        "the GPU's memory is too small for one piece of text; lower --max-length, or take --dtype "
                        "bfloat16, a smaller model or --device cpu"
                    ) from error
            # behind the except, whose error holds on to what the failed batch had allocated
            self._rows = rows // 2
            self._say(f"The GPU's memory is too small for {rows} texts at once; going on with {self._rows}.")
            torch.cuda.empty_cache()
        return results

    def translate(self, texts: Sequence[str], progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> list[str]:
        """Translate texts; results are in their order, and empty texts stay empty.

        Args:
            progress: wraps the batches, for a progress bar.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of texts, got one: {texts!r}")
        plan = self.plan(texts)
        done = [""] * len(plan.pieces)
        for batch in progress(plan.batches):
            for piece, result in zip(batch, self.translate_batch([plan.pieces[i] for i in batch]), strict=True):
                done[piece] = result.text
        return plan.join(done)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check_tags(self) -> None:
        tokenizer = self.loaded.tokenizer
        name = type(tokenizer).__name__
        for what, tag in (("source_tag", self.source_tag), ("target_tag", self.target_tag)):
            if writes_tags(tokenizer):
                if tag is None:
                    raise TranslationError(f"{what} is missing: {name} writes a language tag, e.g. eng_Latn (NLLB)")
                check_tag(tokenizer, tag, what)
            elif tag is not None:
                raise TranslationError(
                    f"{what} {tag!r}: {name} writes no language tag; leave it out (a prefix may name the language)"
                )

    @functools.cached_property
    def _generation(self) -> Any:
        import transformers

        model = self.loaded.model
        kept = {name: getattr(model.generation_config, name, None) for name in _KEPT}
        if self.target_tag is not None:
            kept["forced_bos_token_id"] = tag_id(self.loaded.tokenizer, self.target_tag)
        return transformers.GenerationConfig(
            **{name: value for name, value in kept.items() if value is not None},
            do_sample=False,
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
        )

    def _tokens(self, texts: Sequence[str], **options: Any) -> Any:
        tokenizer = self.loaded.tokenizer
        if self.source_tag is not None:
            tokenizer.src_lang = self.source_tag  # translators of several directions share it
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
        # generate() fills in what a config leaves open from the model's own, beams and sampling included
        model.generation_config = self._generation
        made = model.generate(**inputs, generation_config=self._generation).cpu()
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        return [
            Translated(text.strip(), source_cut=was_cut, unfinished=self._unfinished(row))
            for text, was_cut, row in zip(texts, cut, made.tolist(), strict=True)
        ]

    def _unfinished(self, row: list[int]) -> bool:
        """Whether a generated row (decoder start first) ran to the limit without an end of its own."""
        ends = self._generation.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        written = row[1:]
        # mBART's last token at the limit is an end that generate() forces
        own = written[:-1] if self._generation.forced_eos_token_id is not None else written
        return len(written) >= self.max_new_tokens and not any(end in own for end in ends)


def _limit(option: str, given: int | None, most: int | None, default: int, least: int) -> int:
    if given is None:
        return min(default, most or default)
    if given < least or (most is not None and given > most):
        raise TranslationError(
            f"--{option} must be from {least} up to {most or 'any number'} for this model; got {given}"
        )
    return given
