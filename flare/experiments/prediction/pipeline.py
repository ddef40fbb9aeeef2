"""FlarePipeline: texts in, predictions out, the source given or translated first."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..runs.callbacks import ignore_missing_source, quiet_libraries
from ..runs.latent_rows import add_states, target_texts
from ..runs.predictor import Predictor
from ..tasks import Example, Pair
from ..translation import Translator
from .loading import load_trained
from .predict_settings import PipelineSettings, options_of
from .sources import Texts, make_translator, source_line, translated, with_columns

Prediction = dict[str, Any]


class FlarePipeline:
    """A trained adapter that predicts, as `flare predict` and with the numbers of `flare evaluate`.

        predict = flare.FlarePipeline.from_pretrained("runs/acehnese/flare/seed-0")
        predict("Nyan hana got.", "That is not good.")      # {"prediction": "negative", "probability": ..., ...}
        predict(texts, source_texts)                        # a list, one dict for each text

    Args:
        base_or_run: a run's folder (of `flare train`), an adapter's folder, or, with ``adapter``, the base model.
        adapter: a run's or an adapter's folder.
        translator: encoder-decoder that translates texts that come without a source; loaded when first needed.
        say: is told what a user should know, such as what is read as the source.
        **options: as `flare predict`'s, with underscores: ``no_source``, ``source``, ``target``, ``task``, ``labels``,
            ``max_length``, ``batch_size``, ``device``, ...

    Attributes:
        trained: the loaded adapter: ``trained.model``, ``trained.setup.tokenizer``, ``trained.record``, ...

    Raises:
        UserError: the adapter, its base or the translator cannot be used, or something about them is not known.
        TypeError: an unknown option.
    """

    def __init__(
        self,
        base_or_run: str | Path,
        adapter: str | Path | None = None,
        translator: str | None = None,
        *,
        say: Callable[[str], None] = print,
        **options: Any,
    ) -> None:
        if adapter is not None:
            options["base"] = str(base_or_run)
        named = str(base_or_run if adapter is None else adapter)
        self._begin(options_of({**options, "adapter": named, "translator": translator}), say)

    @classmethod
    def from_pretrained(
        cls, adapter: str | Path, base: str | Path | None = None, translator: str | None = None, **options: Any
    ) -> FlarePipeline:
        """Return a pipeline for a run's or an adapter's folder; arguments as for the class."""
        if base is None:
            return cls(adapter, None, translator, **options)
        return cls(base, adapter, translator, **options)

    @classmethod
    def of(cls, settings: PipelineSettings, say: Callable[[str], None] = print) -> FlarePipeline:
        """Return the pipeline of settings that are checked already."""
        made = cls.__new__(cls)
        made._begin(settings, say)
        return made

    def _begin(self, settings: PipelineSettings, say: Callable[[str], None]) -> None:
        self.settings, self.say = settings, say
        self._lock = threading.Lock()
        self._said: set[str] = set()
        with quiet_libraries():
            self.trained = load_trained(settings)
        self.tell(self.trained.notes)

    def __call__(self, texts: Any, source_texts: Any = None) -> Any:
        """Predict. Threads may share a pipeline: their calls run one after the other.

        Args:
            texts: one text or a list of texts; for a task with several columns dicts, such as
                ``{"question": ..., "context": ...}``.
            source_texts: the same texts in the source language; None, in the list too, where there is none.

        Returns:
            For each text a dict (one dict for one text): ``prediction``, the label or the answer, and, with a
            classification head, ``probability`` and ``probabilities`` (of all labels); with a span head ``start`` and
            ``end`` (characters of the context) and ``probability``; from models that write ``generated``, the text.
            Where a source was translated, ``source`` holds it. An empty text is predicted as None.

        Raises:
            UserError: a text has no source, an adapter was trained with one, and there is neither a translator nor
                ``no_source=True``.
            TypeError, ValueError: texts of another form, or not as many sources.
        """
        alone = isinstance(texts, str | dict)
        rows = [self._texts(one, f"text {n}") for n, one in enumerate(_listed([texts] if alone else texts, "texts"))]
        given: list[Texts | None] = [None] * len(rows)
        if source_texts is not None:
            sources_given = _listed([source_texts] if alone else source_texts, "source_texts")
            given = [None if s is None else self._texts(s, f"source text {n}") for n, s in enumerate(sources_given)]
        if len(given) != len(rows):
            raise ValueError(
                f"{len(given)} source texts were given for {len(rows)} texts; pass None where one is missing"
            )
        with self._lock:
            sources, new = self.sources(rows, given)
            found = self._all(self.pairs(rows, sources))
        for index in new:
            source = list((sources[index] or {}).values())
            found[index]["source"] = source[0] if len(source) == 1 else sources[index]
        return found[0] if alone else found

    # --- for the command ----------------------------------------------------------------------------------------------

    @cached_property
    def translator(self) -> Translator:
        """The translator; its weights are loaded when it first translates."""
        return make_translator(self.settings, self.trained, self.say)

    def sources(
        self,
        rows: Sequence[Texts],
        given: Sequence[Texts | None],
        where: str | None = None,
        kept: Path | None = None,
        done: Callable[[int, int], Any] = lambda now, total: None,
        share: bool = False,
    ) -> tuple[list[Texts | None], list[int]]:
        """Return the source of every row, where the adapter reads one, and which rows' were translated.

        Args:
            rows, given: texts, and their sources where there are some.
            where: where the given ones come from; the line about the source is said with it only, or where given
                ones are not read.
            kept, done, share: as of `translated`.
        """
        needed = [index for index, row in enumerate(rows) if has_text(row)]
        found = [None if source is None or not has_text(source) else source for source in given]
        own = [index for index in needed if found[index] is not None]
        line = source_line(self.trained, self.settings, len(own), len(needed), where or "the given source text")
        unread = self.trained.reads != "text" or self.settings.no_source
        if where is not None or (unread and own):
            self.tell([line])
        if unread:
            return [None] * len(rows), []
        lacking = [index for index in needed if found[index] is None]
        if lacking:
            with quiet_libraries():
                _ = self.translator.loaded.model  # loads the weights
            made, notes = translated(self.translator, [rows[index] for index in lacking], kept, done, share)
            self.tell(notes)
            for index, source in zip(lacking, made, strict=True):
                found[index] = source
        return found, lacking

    def pairs(
        self, rows: Sequence[Texts], sources: Sequence[Texts | None], ids: Sequence[str] | None = None
    ) -> list[Pair]:
        """Return the rows as a task's pairs."""
        names = [str(index) for index in range(len(rows))] if ids is None else ids
        tagged = self.trained.task.kind == "token-classification"  # words are what stands between spaces
        return [
            Pair(
                Example(name, row, words=tuple(" ".join(row.values()).split()) if tagged else ()),
                None if source is None else Example(name, source),
            )
            for name, row, source in zip(names, rows, sources, strict=True)
        ]

    def batches(self, pairs: Sequence[Pair], first: int = 0, share: bool = False) -> Iterator[list[Prediction]]:
        """Predict pairs, all with a text, batch after batch, as `flare evaluate` does.

        Args:
            first: the row to begin with, a multiple of the batch size.
            share: whether several processes, all with these pairs, share the batches.
        """
        trained = self.trained
        reads = trained.reads == "text" and not self.settings.no_source
        form = _Detailed(trained.setup.form)
        rows, notes = form.eval_rows(pairs, with_source=reads)
        self.tell([note for note in notes if note not in form.unanswered(pairs)])
        if trained.latent is not None:
            rows = add_states(rows, target_texts(pairs), trained.latent, Path(tempfile.gettempdir()), None)
        predictor = Predictor(
            form, trained.collate, pairs[first:], rows[first:], trained.batch_size, trained.autocast, share=share
        )
        batches = predictor.batches(trained.model)
        while True:
            with warnings.catch_warnings():
                if not reads:
                    ignore_missing_source()
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def tell(self, notes: Sequence[str]) -> None:
        """Say every note once."""
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                self.say(note)

    def _all(self, pairs: Sequence[Pair]) -> list[Prediction]:
        full = [index for index, pair in enumerate(pairs) if has_text(pair.target.texts)]
        found: list[Prediction] = [{"prediction": None} for _ in pairs]
        made = [one for batch in self.batches([pairs[index] for index in full]) for one in batch] if full else []
        for index, one in zip(full, made, strict=True):
            found[index] = one
        return found

    def _texts(self, texts: Any, what: str) -> Texts:
        return with_columns(self.trained.task, texts, what)


class _Detailed:
    """A form whose predictions are dicts, with what else the output of a batch says of each row."""

    def __init__(self, form: Any) -> None:
        self._form = form

    def __getattr__(self, name: str) -> Any:
        return getattr(self._form, name)

    def predictions(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[Prediction]:
        made = self._form.predictions(output, pairs, *more)
        details = self._form.details(output, pairs, *more)
        return [{"prediction": one, **rest} for one, rest in zip(made, details, strict=True)]


def has_text(row: Texts) -> bool:
    """Return whether all texts of a row hold something."""
    return all(text.strip() for text in row.values())


def _listed(texts: Any, name: str) -> Sequence[Any]:
    if isinstance(texts, str | dict) or not isinstance(texts, Sequence):
        raise TypeError(f"{name} must be one text or a list of texts; got {type(texts).__name__}")
    return texts
