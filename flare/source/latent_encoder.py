"""The machine translation (MT) encoder of FLARE MT: maps target-language text to latent states and their mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LatentEncoder:
    """Encoder of NLLB, or of any seq2seq or encoder model, as the source of an adapter with ``latent_dim``.

    Example:

        mt = flare.LatentEncoder("facebook/nllb-200-distilled-600M", language="ace_Latn")
        model = flare.fast_lora(base, latent_dim=mt.latent_dim)
        rows = dataset.map(lambda rows: mt.rows(rows["text"]), batched=True)    # for FlareDataCollator
        model(**batch, **mt(texts, length=m))                                   # or without a data set

    The encoder reads the target text, so the language tag must be the target language's tag.

    Args:
        model: a name or folder, or a transformers model. Only the encoder of an encoder-decoder is kept.
        tokenizer: the MT model's tokenizer. Default: the tokenizer of the same name or folder as ``model``.
        language: tag of the target language, for tokenizers that write one (``src_lang``: NLLB, M2M100, mBART).
        max_length: maximum number of tokens of a text; longer texts are truncated. None: only the tokenizer's limit and
            the ``length`` of a call apply.
        device: device of a model that is given by name.
        dtype: dtype of a model that is given by name.
        trust_remote_code: whether Python code in the model's folder may run. Default: it may not.

    Raises:
        TypeError: ``model`` is not a name or a model.
        ValueError: the language is missing, unknown to the tokenizer, or given to a tokenizer without language tags; or
            the tokenizer is missing.
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        *,
        language: str | None = None,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        if isinstance(model, str):
            import transformers

            # An explicit False, because transformers would otherwise ask at the terminal whether to run the code.
            options: Any = {"trust_remote_code": trust_remote_code}
            tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(model, **options)
            model = transformers.AutoModel.from_pretrained(model, dtype=dtype, **options).to(device)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a name or a transformers model, got {type(model).__name__}")
        if tokenizer is None:
            raise ValueError(
                "tokenizer is missing: pass the MT model's tokenizer with a model that is not given by name"
            )
        whole_model: Any = model
        is_encoder_decoder = getattr(whole_model.config, "is_encoder_decoder", False)
        # An encoder model's get_encoder() may lack the embeddings (BERT), so its backbone is used.
        self.encoder: Any = (
            whole_model.get_encoder() if is_encoder_decoder else getattr(whole_model, "base_model", whole_model)
        )
        self.encoder = self.encoder.eval().requires_grad_(False)
        self.tokenizer, self.language, self.max_length = tokenizer, language, max_length
        self._check_language()

    @property
    def latent_dim(self) -> int:
        """Width of the states, to pass as ``fast_lora``'s ``latent_dim``."""
        return int(self.encoder.config.hidden_size)

    def __call__(
        self, texts: Sequence[str], length: int | None = None, padding_side: str = "right"
    ) -> dict[str, Tensor]:
        """Return the latent states of a batch of texts.

        Args:
            texts: B texts of the target language.
            length: m, the length of the target's batch. Longer texts are truncated. Default: the longest text.
            padding_side: "right", or "left" for prompts of causal models.

        Returns:
            ``source_states`` (B, m, latent_dim) and ``source_attention_mask`` (B, m), for the model.

        Raises:
            TypeError: ``texts`` is a single string.
            ValueError: ``padding_side`` is not accepted.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of strings, got a single string: {texts!r}")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side={padding_side!r} is not accepted; one of: 'right', 'left'")
        limits = [n for n in (length, self.max_length, self.tokenizer.model_max_length) if n is not None]
        limit = min(limits) if min(limits) < 2**31 else None  # tokenizers without a limit have a huge model_max_length
        tokens = self._tokens(list(texts), truncation=limit is not None, max_length=limit)
        ids, mask = (tokens[name].to(self.encoder.device) for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        states = states * mask.unsqueeze(-1)
        if length is not None and length > mask.shape[1]:
            states = nn.functional.pad(states, (0, 0, 0, length - mask.shape[1]))
            mask = nn.functional.pad(mask, (0, length - mask.shape[1]))
        if padding_side == "left":
            width = mask.shape[1]
            index = (torch.arange(width, device=mask.device) + mask.sum(1, keepdim=True)) % width
            states, mask = states.gather(1, index.unsqueeze(-1).expand_as(states)), mask.gather(1, index)
        return {"source_states": states, "source_attention_mask": mask}

    def rows(self, texts: Sequence[str]) -> dict[str, list[Any]]:
        """Return a data set's column ``source_states``: an array (tokens, latent_dim) in float32 for each text."""
        batch = self(texts)
        counts = batch["source_attention_mask"].sum(1).tolist()
        states = batch["source_states"].float().cpu().numpy()
        return {"source_states": [row[:count] for row, count in zip(states, counts, strict=True)]}

    def _tokens(self, texts: list[str], **options: Any) -> Any:
        """Return right-padded tokens with the language's tag, and restore the tokenizer's previous tag."""
        has_tag = self.language is not None
        previous = self.tokenizer.src_lang if has_tag else None
        try:
            if has_tag:
                self.tokenizer.src_lang = self.language
            return self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", **options)
        finally:
            if has_tag and previous is not None:
                self.tokenizer.src_lang = previous

    def _check_language(self) -> None:
        """Raise ValueError if the language tag is missing, unknown or not supported.

        NLLB's tokenizer silently turns an unknown tag into <unk>.
        """
        name = type(self.tokenizer).__name__
        writes_tag = hasattr(self.tokenizer, "src_lang")
        if writes_tag and self.language is None:
            raise ValueError(
                f"language is missing: {name} writes a language tag (now {self.tokenizer.src_lang!r}); pass the tag of "
                "the target language, e.g. language='ace_Latn'"
            )
        if not writes_tag and self.language is not None:
            raise ValueError(f"language={self.language!r}: {name} writes no language tag; leave it out")
        if not writes_tag:
            return
        try:
            is_known = self.tokenizer.unk_token_id not in self._tokens([""])["input_ids"][0].tolist()
        except KeyError:
            is_known = False
        if not is_known:
            raise ValueError(
                f"language={self.language!r}: {name} has no such tag; tags look like 'ace_Latn' (NLLB) or 'id' (M2M100)"
            )
