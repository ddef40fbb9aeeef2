"""FlarePipeline returns predictions for texts. The source texts are passed by the caller or made by translation."""

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
from .source_texts import Texts, by_column, describe_source, make_translator, translate

Prediction = dict[str, Any]


class FlarePipeline:
    """A trained adapter that predicts, with the options of `flare predict`.

    It makes the same predictions as `flare evaluate`.

        predict = flare.FlarePipeline.from_pretrained("runs/acehnese/flare/seed-0")
        predict("Nyan hana got.", "That is not good.")      # {"prediction": "negative", "probability": ..., ...}
        predict(texts, source_texts)                        # a list, one dict for each text

    Args:
        base_or_run: if ``adapter`` is given, the base model (folder or hub id); otherwise the adapter's folder.
        adapter: folder of a run of `flare train`, or of a saved adapter. None: ``base_or_run`` is this folder.
        translator: encoder-decoder that translates those texts that have no source text. Its weights are loaded on
            first use.
        print_fn: prints a line for the user, such as what is read as the source.
        **options: options of `flare predict`, with underscores: ``no_source``, ``source``, ``target``, ``task``,
            ``labels``, ``max_length``, ``batch_size``, ``device``, ...

    Attributes:
        trained: the loaded adapter: ``trained.model``, ``trained.setup.tokenizer``, ``trained.record``, ...

    Raises:
        UserError: the adapter, its base or the translator cannot be used, or information about them is missing.
        TypeError: an unknown option.
    """

    def __init__(
        self,
        base_or_run: str | Path,
        adapter: str | Path | None = None,
        translator: str | None = None,
        *,
        print_fn: Callable[[str], None] = print,
        **options: Any,
    ) -> None:
        if adapter is not None:
            options["base"] = str(base_or_run)
        folder = str(base_or_run if adapter is None else adapter)
        self._load(options_of({**options, "adapter": folder, "translator": translator}), print_fn)

    @classmethod
    def from_pretrained(
        cls, adapter: str | Path, base: str | Path | None = None, translator: str | None = None, **options: Any
    ) -> FlarePipeline:
        """Return a pipeline for ``adapter``, the folder of a run or of a saved adapter.

        ``base`` is the base model, or None for the base that the adapter names. See the class for the other arguments.
        """
        if base is None:
            return cls(adapter, None, translator, **options)
        return cls(base, adapter, translator, **options)

    @classmethod
    def of(cls, settings: PipelineSettings, print_fn: Callable[[str], None] = print) -> FlarePipeline:
        """Return a pipeline for settings that are already checked."""
        pipeline = cls.__new__(cls)
        pipeline._load(settings, print_fn)
        return pipeline

    def _load(self, settings: PipelineSettings, print_fn: Callable[[str], None]) -> None:
        self.settings, self.print_fn = settings, print_fn
        self._lock = threading.Lock()
        self._shown: set[str] = set()
        with quiet_libraries():
            self.trained = load_trained(settings)
        self.say_once(self.trained.notes)

    def __call__(self, texts: Any, source_texts: Any = None) -> Any:
        """Return the predictions for texts. Threads may share a pipeline; their calls run one after the other.

        Args:
            texts: one text or a list of texts. For a task with several columns, a text is a dict such as
                ``{"question": ..., "context": ...}``.
            source_texts: the same texts in the source language. An item is None if its text has no source text. The
                argument is None if no text has one.

        Returns:
            A list with one dict per text; for a single text, its dict. ``prediction`` is the label (multi-label: a
            tuple of labels), the number (regression), the answer, or a tuple with a tag for each word. It is None for
            an empty text. Further keys are ``probability`` (except for multi-label) and ``probabilities`` (of all
            labels) for a classification head, ``start`` and ``end`` (characters of the context) and ``probability`` for
            a span head, ``words`` for tags, ``generated`` (the text) for a generative model, and ``source`` if the
            source was translated.

        Raises:
            UserError: the adapter was trained with source texts, a text has none, there is no translator, and
                ``no_source`` is False.
            TypeError, ValueError: the texts have a wrong form, or the numbers of texts and source texts differ.
        """
        single = isinstance(texts, str | dict)
        rows = [self._texts(one, f"text {n}") for n, one in enumerate(_listed([texts] if single else texts, "texts"))]
        given_sources: list[Texts | None] = [None] * len(rows)
        if source_texts is not None:
            listed = _listed([source_texts] if single else source_texts, "source_texts")
            given_sources = [None if s is None else self._texts(s, f"source text {n}") for n, s in enumerate(listed)]
        if len(given_sources) != len(rows):
            raise ValueError(
                f"{len(given_sources)} source texts were given for {len(rows)} texts; pass None for a missing "
                "source text"
            )
        with self._lock:
            sources, translated = self.sources(rows, given_sources)
            predictions = self._predict(self.pairs(rows, sources))
        for index in translated:
            source = list((sources[index] or {}).values())
            predictions[index]["source"] = source[0] if len(source) == 1 else sources[index]
        return predictions[0] if single else predictions

    # --- also called by `flare predict` -------------------------------------------------------------------------------

    @cached_property
    def translator(self) -> Translator:
        """The translator; its weights are loaded on first use."""
        return make_translator(self.settings, self.trained, self.print_fn)

    def sources(
        self,
        rows: Sequence[Texts],
        given: Sequence[Texts | None],
        where: str | None = None,
        progress_file: Path | None = None,
        on_progress: Callable[[int, int], Any] = lambda done, total: None,
        share: bool = False,
    ) -> tuple[list[Texts | None], list[int]]:
        """Return the source of every row, and the indices of rows with a translated source.

        The source is None if no sources are read, or if the row has an empty text and no given source.

        Args:
            rows: the texts.
            given: for each row, the source texts that the user passed, or None.
            where: the file or the columns that the given sources come from. A printed line names them and says what is
                read as the source. If ``where`` is None, this line is printed only if ``given`` has sources that are
                not read.
            progress_file, on_progress, share: see :func:`.source_texts.translate`.
        """
        with_text = [index for index, row in enumerate(rows) if has_text(row)]
        sources = [None if source is None or not has_text(source) else source for source in given]
        with_source = [index for index in with_text if sources[index] is not None]
        line = describe_source(
            self.trained, self.settings, len(with_source), len(with_text), where or "the given source text"
        )
        unread = self.trained.reads != "text" or self.settings.no_source
        if where is not None or (unread and with_source):
            self.say_once([line])
        if unread:
            return [None] * len(rows), []
        missing = [index for index in with_text if sources[index] is None]
        if missing:
            with quiet_libraries():
                _ = self.translator.loaded.model  # loads the weights
            translations, notes = translate(
                self.translator, [rows[index] for index in missing], progress_file, on_progress, share
            )
            self.say_once(notes)
            for index, source in zip(missing, translations, strict=True):
                sources[index] = source
        return sources, missing

    def pairs(
        self,
        rows: Sequence[Texts],
        sources: Sequence[Texts | None],
        ids: Sequence[str] | None = None,
        words: Sequence[tuple[str, ...]] | None = None,
    ) -> list[Pair]:
        """Return one pair per row: an example with its texts, and an example with its source texts (or None).

        Args:
            rows: the texts.
            sources: for each row, the source texts, or None.
            ids: id of each row. None: its position.
            words: for each row, the words to tag (token classification). None: the texts, split at white space.
        """
        names = [str(index) for index in range(len(rows))] if ids is None else ids
        targets = [Example(name, row) for name, row in zip(names, rows, strict=True)]
        if self.trained.task.kind == "token-classification":
            column = self.trained.task.text_columns[0]
            split = [tuple(row[column].split()) for row in rows] if words is None else words
            # tags are found by the words' positions in the words joined with single spaces
            targets = [Example(n, {column: " ".join(one)}, words=one) for n, one in zip(names, split, strict=True)]
        return [
            Pair(target, None if source is None else Example(target.id, source))
            for target, source in zip(targets, sources, strict=True)
        ]

    def batches(self, pairs: Sequence[Pair], first: int = 0, share: bool = False) -> Iterator[list[Prediction]]:
        """Yield the predictions of pairs, batch by batch. `flare evaluate` makes the same predictions.

        Args:
            pairs: pairs whose target texts are not empty.
            first: index of the first pair to predict, a multiple of the batch size.
            share: whether the processes of this run divide the batches among themselves. Every process must pass the
                same pairs.
        """
        trained = self.trained
        reads = trained.reads == "text" and not self.settings.no_source
        form = _DetailedForm(trained.setup.form)
        rows, notes = form.eval_rows(pairs, with_source=reads)
        self.say_once([note for note in notes if note not in form.unanswered(pairs)])
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

    def say_once(self, notes: Sequence[str]) -> None:
        """Print every note that was not printed before."""
        for note in notes:
            if note not in self._shown:
                self._shown.add(note)
                self.print_fn(note)

    def _predict(self, pairs: Sequence[Pair]) -> list[Prediction]:
        predictions: list[Prediction] = [{"prediction": None} for _ in pairs]
        with_text = [index for index, pair in enumerate(pairs) if has_text(pair.target.texts)]
        if with_text:
            batches = self.batches([pairs[index] for index in with_text])
            for index, prediction in zip(with_text, (one for batch in batches for one in batch), strict=True):
                predictions[index] = prediction
        return predictions

    def _texts(self, texts: Any, what: str) -> Texts:
        return by_column(self.trained.task, texts, what)


class _DetailedForm:
    """A wrapper of a task's form (which makes model inputs and reads model outputs) that adds details to predictions.

    A prediction is then a dict with ``prediction`` and details such as probabilities.
    """

    def __init__(self, form: Any) -> None:
        self._form = form

    def __getattr__(self, name: str) -> Any:
        return getattr(self._form, name)

    def predictions(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[Prediction]:
        predictions = self._form.predictions(output, pairs, *more)
        details = self._form.details(output, pairs, *more)
        return [{"prediction": one, **rest} for one, rest in zip(predictions, details, strict=True)]


def has_text(row: Texts) -> bool:
    """Return whether every text of a row has characters that are not white space."""
    return all(text.strip() for text in row.values())


def _listed(texts: Any, name: str) -> Sequence[Any]:
    if isinstance(texts, str | dict) or not isinstance(texts, Sequence):
        raise TypeError(f"{name} must be one text or a list of texts; got {type(texts).__name__}")
    return texts
