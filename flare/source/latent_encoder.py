"""The MT encoder of FLARE MT: target-language text in, latent states and their mask out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LatentEncoder:
    """The encoder of NLLB, or of any seq2seq or encoder model, as the source of an adapter with ``latent_dim``.

        mt = flare.LatentEncoder("facebook/nllb-200-distilled-600M", language="ace_Latn")
        model = flare.fast_lora(base, latent_dim=mt.latent_dim)
        rows = dataset.map(lambda rows: mt.rows(rows["text"]), batched=True)    # for FlareDataCollator
        model(**batch, **mt(texts, length=m))                                   # or by hand

    The text is the target's own, so the tokenizer's tag has to be the target language's.

    Args:
        model: a name or folder, or a transformers model; of an encoder-decoder only the encoder is kept.
        tokenizer: the MT model's tokenizer; default: that of the name.
        language: the tag of the target language, for tokenizers that write one (``src_lang``: NLLB, M2M100, mBART).
        max_length: longer texts are cut; default: ``length``, or the tokenizer's own limit.
        device: where a model that is given by name runs.
        dtype: in which dtype it runs.
        trust_remote_code: whether Python code of the model's folder may run; it does not unless asked for here.

    Raises:
        TypeError, ValueError: a language that is missing, not wanted or unknown to the tokenizer, a model without
            tokenizer.
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

            # False, not left out: transformers would ask at the terminal whether to run the folder's code
            options: Any = {"trust_remote_code": trust_remote_code}
            tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(model, **options)
            model = transformers.AutoModel.from_pretrained(model, dtype=dtype, **options).to(device)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a name or a transformers model, got {type(model).__name__}")
        if tokenizer is None:
            raise ValueError("tokenizer is missing: pass the MT model's own beside a model that is not given by name")
        made: Any = model
        paired = getattr(made.config, "is_encoder_decoder", False)
        # of an encoder model the backbone: get_encoder() of BERT has no embeddings
        self.encoder: Any = made.get_encoder() if paired else getattr(made, "base_model", made)
        self.encoder = self.encoder.eval().requires_grad_(False)
        self.tokenizer, self.language, self.max_length = tokenizer, language, max_length
        self._check_language()

    @property
    def latent_dim(self) -> int:
        """Width of the states: what ``fast_lora``'s ``latent_dim`` has to be."""
        return int(self.encoder.config.hidden_size)

    def __call__(
        self, texts: Sequence[str], length: int | None = None, padding_side: str = "right"
    ) -> dict[str, Tensor]:
        """Latent states of a batch of texts.

        Args:
            texts: B texts of the target language.
            length: m, the width of the target's batch; longer texts are cut to it. Default: the longest text.
            padding_side: "right", or "left" as the prompts of causal models are padded.

        Returns:
            ``source_states`` (B, m, latent_dim) and ``source_attention_mask`` (B, m), for the model.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of texts, got one: {texts!r}")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side={padding_side!r} is not accepted; one of: 'right', 'left'")
        limits = [one for one in (length, self.max_length, self.tokenizer.model_max_length) if one is not None]
        limit = min(limits) if min(limits) < 2**31 else None  # a tokenizer without a limit names a huge one
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
            places = (torch.arange(width, device=mask.device) + mask.sum(1, keepdim=True)) % width
            states, mask = states.gather(1, places.unsqueeze(-1).expand_as(states)), mask.gather(1, places)
        return {"source_states": states, "source_attention_mask": mask}

    def rows(self, texts: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of a data set: each text's states (its length, latent_dim), without padding, in float32."""
        batch = self(texts)
        counts = batch["source_attention_mask"].sum(1).tolist()
        states = batch["source_states"].float().cpu().numpy()
        return {"source_states": [row[:count] for row, count in zip(states, counts, strict=True)]}

    def _tokens(self, texts: list[str], **options: Any) -> Any:
        """Right-padded tokens with the language's tag; the tokenizer keeps the tag it had."""
        tagged = self.language is not None
        before = self.tokenizer.src_lang if tagged else None
        try:
            if tagged:
                self.tokenizer.src_lang = self.language
            return self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", **options)
        finally:
            if tagged and before is not None:
                self.tokenizer.src_lang = before

    def _check_language(self) -> None:
        """A tag the tokenizer does not know becomes <unk> in NLLB's, in silence."""
        name = type(self.tokenizer).__name__
        writes = hasattr(self.tokenizer, "src_lang")
        if writes and self.language is None:
            raise ValueError(
                f"language is missing: {name} writes a language tag (now {self.tokenizer.src_lang!r}); pass the target "
                "language's, e.g. language='ace_Latn'"
            )
        if not writes and self.language is not None:
            raise ValueError(f"language={self.language!r}: {name} writes no language tag; leave it out")
        if not writes:
            return
        try:
            known = self.tokenizer.unk_token_id not in self._tokens([""])["input_ids"][0].tolist()
        except KeyError:
            known = False
        if not known:
            raise ValueError(
                f"language={self.language!r}: {name} has no such tag; e.g. NLLB's are written ace_Latn, M2M100's id"
            )
