"""FlareLM extends HFLM, lm-evaluation-harness's class for transformers models, to adapters that fuse two texts.

Such an adapter reads the prompt of a request together with a source prompt, such as the same prompt in English.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from ..._compat import X_MIXUP
from ...training.collator import FlareDataCollator
from ...tuner.config import FlareConfig
from ..utils.errors import UserError
from ..utils.progress import counter
from .source_prompts import SourcePrompts

logger = logging.getLogger("lm_eval.models.flare")  # a child of lm_eval's logger
_IGNORED = -100
_SOURCE = ("source_input_ids", "source_attention_mask")


class _Prompt(str):
    """A prompt with its source prompt as an attribute.

    HFLM sorts and batches prompts, and the attribute stays with them.
    """

    source: str


@register_model("flare")
class FlareLM(HFLM):  # type: ignore[misc]
    """A causal language model with a FLARE adapter: the model ``flare`` of lm-evaluation-harness.

    If the adapter fuses two texts, it reads the prompt of each request together with a source prompt (see
    :class:`.source_prompts.SourcePrompts`). Both prompts have the layout of :class:`flare.FlareDataCollator` in
    training: they are padded on the left, and continuations are padded on the right. A continuation that is scored is
    also appended to the source prompt. If the continuation is one of the document's texts, its source text is appended
    instead.

    Without an adapter, with an adapter that does not fuse, or with ``no_source``, this class behaves like HFLM.

    Args:
        pretrained: folder or hub id of the base model, or a loaded model (also a ``PeftModel``).
        peft: folder or hub id of the adapter.
        source_file, source_columns, doc_to_source, source_id: the arguments ``file``, ``columns`` (a list, or names
            joined by "+"), ``template`` and ``id_column`` of :class:`.source_prompts.SourcePrompts`.
        no_source: run a fusing adapter as plain LoRA, which predicts worse than with a source.
        **kwargs: arguments of HFLM: ``dtype``, ``device``, ``batch_size``, ``max_length``, ...

    Raises:
        UserError: options exclude each other, ``batch_size`` is not a number although sources are read, the source file
            or the template cannot be read, or this class cannot evaluate the adapter.
    """

    def __init__(
        self,
        pretrained: Any,
        peft: str | None = None,
        source_file: str | None = None,
        source_columns: str | Sequence[str] | None = None,
        doc_to_source: str | None = None,
        source_id: str = "id",
        no_source: bool = False,
        **kwargs: Any,
    ) -> None:
        options = {"source_file": source_file, "source_columns": source_columns, "doc_to_source": doc_to_source}
        source_options = [name for name, value in options.items() if value is not None]
        if no_source and source_options:
            raise UserError(
                f"no_source=True and {', '.join(source_options)} exclude each other: with no_source, no source "
                "text is read. Leave out one of them"
            )
        columns = source_columns.split("+") if isinstance(source_columns, str) else source_columns
        sources = None if no_source else SourcePrompts(source_file, columns, doc_to_source, source_id)
        self.sources: SourcePrompts | None = None
        self._source_batch: dict[str, Tensor] = {}
        super().__init__(pretrained, peft=peft, **kwargs)
        fuses = self._fuses()
        if fuses and not no_source:
            self.sources = sources
            if not isinstance(self.batch_size, int):
                raise UserError(
                    f"batch_size={self.batch_size}: lm_eval would measure the batch size without source texts, and "
                    "it would be too large; give a number"
                )
        elif source_options:
            logger.warning(
                "%s: not read, because the model has no adapter that fuses two texts", ", ".join(source_options)
            )

    def _fuses(self) -> bool:
        """Return whether an active adapter fuses. Raise UserError for adapters that this class cannot evaluate."""
        configs = getattr(self.model, "peft_config", None) or {}
        active = [configs[name] for name in getattr(self.model, "active_adapters", ()) if name in configs]
        if any(config.peft_type == X_MIXUP for config in active):
            raise UserError("peft: an X-Mixup adapter cannot be evaluated by lm_eval; use flare evaluate")
        fusing = [config for config in active if isinstance(config, FlareConfig) and config.fusion is not None]
        if any(config.latent_dim is not None for config in fusing):
            raise UserError(
                "peft: a FLARE MT adapter reads states of an MT encoder, which lm_eval's requests do not carry; use "
                "flare evaluate or flare predict"
            )
        if fusing and self.backend != "causal":
            raise UserError("peft: only decoders can be evaluated with a source; use flare evaluate")
        return bool(fusing)

    # --- scoring ------------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding would generate it."""
        if self.sources is None:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]
        self.sources.check_choices(requests)
        rows = [self._row(request.args, self.sources.of(request)) for request in requests]
        self._warn_if_cut(rows, self.max_length)
        groups = sorted(self._equal_inputs(rows), key=lambda group: -len(rows[group[0]]["input_ids"]))
        scores: dict[int, tuple[float, bool]] = {}
        with counter(None if disable_tqdm or self.rank else "log-likelihoods", len(rows), "request") as bar:
            for begin in range(0, len(groups), self.batch_size):
                part = groups[begin : begin + self.batch_size]
                values = self._scores([[rows[index] for index in group] for group in part])
                scores |= zip([index for group in part for index in group], values, strict=True)
                bar.update(sum(map(len, part)))
        return [scores[index] for index in range(len(rows))]

    def _equal_inputs(self, rows: list[dict[str, list[int]]]) -> list[list[int]]:
        """Return groups of row indices: the logits of one row of a group give the scores of all rows of the group.

        The rows of a group have equal prompts, equal source prompts, and continuations of one token in both, because
        the logits that score a continuation of one token do not depend on this token. Every other row, and every row
        with ``logits_cache=False``, is a group of its own.
        """
        groups: dict[Any, list[int]] = {}
        for index, row in enumerate(rows):
            key: Any = index
            if self.logits_cache and all(len(_answer(row[name])) == 1 for name in ("labels", "source_labels")):
                key = tuple(row["input_ids"][:-1]), tuple(row["source_input_ids"][:-1])
            groups.setdefault(key, []).append(index)
        return list(groups.values())

    def _row(self, target: tuple[str, str], source: tuple[str, str]) -> dict[str, list[int]]:
        row = {}
        for prefix, texts in (("", target), ("source_", source)):
            prompt, answer = self._token_ids(*texts)
            row[f"{prefix}input_ids"] = prompt + answer
            row[f"{prefix}labels"] = [_IGNORED] * len(prompt) + answer
        return row

    def _token_ids(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the token ids of the context and of the continuation, computed in the same way as in HFLM."""
        if context:
            prompt, answer = self._encode_pair(context, continuation)
            return prompt, answer
        answer = self.tok_encode(continuation, add_special_tokens=False)
        if answer[0] == self.prefix_token_id:
            return answer[:1], answer[1:]
        return [self.prefix_token_id], answer

    def _scores(self, groups: list[list[dict[str, list[int]]]]) -> list[tuple[float, bool]]:
        """Return the scores of all rows, group by group, from one forward pass over the first row of every group."""
        batch = self._collator(self.max_length)([group[0] for group in groups]).to(self.device)
        start = int((batch.pop("labels") != _IGNORED).any(dim=0).nonzero()[0])  # all answers start at one index
        half = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, half, enabled=half is not None):
            logits = self.model(**batch).logits[:, start - 1 : -1]
        scores = []
        for logs, group in zip(F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype), groups, strict=True):
            for row in group:
                answer = torch.tensor(_answer(row["labels"]), device=self.device)
                answer_logs = logs[: len(answer)]
                score = answer_logs.gather(1, answer.unsqueeze(-1)).sum()
                scores.append((float(score), bool((answer_logs.argmax(dim=-1) == answer).all())))
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, computed by HFLM.

        Raises:
            UserError: sources are read. HFLM splits a long text into windows, and a window has no source text.
        """
        if self.sources is not None:
            tasks = sorted({str(request.task_name) for request in requests})
            raise UserError(
                f"task {', '.join(tasks)}: perplexity of running text (loglikelihood_rolling) is not defined with a "
                "source, because lm_eval splits the text into windows and a window has no source text; no_source=True "
                "measures the adapter as plain LoRA"
            )
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated after each context (prompt).

        If sources are read, the model also reads the source prompt.
        """
        if self.sources is not None:
            requests = [self._with_source(request) for request in requests]
        return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def _with_source(self, request: Any) -> Any:
        assert self.sources is not None
        prompt = _Prompt(request.args[0])
        prompt.source = self.sources.of(request)[0]
        return replace(request, arguments=(prompt, *request.args[1:]))

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the input ids and the attention mask of a batch.

        If no sources are read, HFLM computes both. Otherwise prompts and source prompts are padded to one length, and
        the source ids and their mask are stored for :meth:`_model_generate`.
        """
        if self.sources is None:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)  # type: ignore[no-any-return]
        rows = [
            {"input_ids": self.tok_encode(text), "source_input_ids": self.tok_encode(text.source)}  # type: ignore[attr-defined]
            for text in strings
        ]
        limit = left_truncate_len or self.max_length
        self._warn_if_cut(rows, limit)
        batch = self._collator(limit)(rows)
        self._source_batch = {name: batch[name].to(self.device) for name in _SOURCE}
        return batch["input_ids"], batch["attention_mask"]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        source, self._source_batch = self._source_batch, {}
        return super()._model_generate(context, max_length, stop, **generation_kwargs, **source)  # type: ignore[no-any-return]

    # --- scoring and generation ---------------------------------------------------------------------------------------

    def _collator(self, max_length: int) -> FlareDataCollator:
        return FlareDataCollator(self.tokenizer, layout="causal", max_length=max_length, truncation=True)

    def _warn_if_cut(self, rows: Sequence[dict[str, list[int]]], limit: int) -> None:
        cut = sum(max(len(row["input_ids"]), len(row["source_input_ids"])) > limit for row in rows)
        if cut:
            logger.warning("%d of %d prompts or their sources are cut on the left to %d tokens", cut, len(rows), limit)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Set lm_eval's cache of answers (``--use_cache``).

        Raises:
            UserError: sources are read. The cache does not distinguish requests with different sources.
        """
        if self.sources is not None:
            raise UserError(
                "--use_cache: the cache finds answers by the prompt only, so it would return answers that were "
                "computed with another source; leave --use_cache out"
            )
        super().set_cache_hook(cache_hook)


def _answer(labels: list[int]) -> list[int]:
    return [label for label in labels if label != _IGNORED]
