"""Run `flare predict`: read the texts, read or translate their sources, predict, write."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..tasks import score
from ..tasks.digest import digest_of
from ..translation.provenance import digest_of_file
from ..utils.errors import UserError
from ..utils.processes import errors_reach_all, is_main, on_main, only_main
from ..utils.progress import counter
from .input import Input, read_input
from .output import FinishedBatches, check_output, write_file, write_lines
from .pipeline import FlarePipeline, has_text
from .predict_settings import PredictSettings
from .source_texts import Texts


def run_predict(settings: PredictSettings, print_fn: Callable[[str], None]) -> None:
    """Predict every row of the input and write the output.

    Several processes of one run divide the rows among themselves, and the main process reads and writes the files.

    Args:
        settings: the options.
        print_fn: prints a line for the user, for example what is read as the source, and the scores if the rows have
            labels. If predictions are written to standard output, print_fn must print elsewhere.

    Raises:
        UserError: an error that the user can fix. If the output is a file, finished batches are saved, and the next
            call resumes after them.
    """
    settings.check()
    print_fn = only_main(print_fn)
    output = on_main(lambda: check_output(settings.output, settings.overwrite))
    pipeline = FlarePipeline.of(settings, print_fn)
    trained = pipeline.trained
    data = on_main(lambda: read_input(settings, trained.task))
    pipeline.say_once(data.notes)
    _check_columns(pipeline, settings, data)
    print_fn(f"{trained.folder}: {trained.record.method} on {trained.base}, {len(data.rows)} rows")
    header = _header(pipeline, data)
    with errors_reach_all(), contextlib.ExitStack() as stack:
        progress = None
        if output is not None and is_main():
            progress = stack.enter_context(FinishedBatches(output, header))
        _predict(pipeline, data, progress, settings, print_fn)
        if progress is not None:
            progress.remove()


def _check_columns(pipeline: FlarePipeline, settings: PredictSettings, data: Input) -> None:
    """Check that the output replaces no column of the input.

    Columns of the texts may be replaced by their words, and columns of source texts by equal texts.

    Raises:
        UserError: a column of the input has the name of an output column.
    """
    task, form = pipeline.trained.task, pipeline.trained.setup.form
    names = ["prediction", *form.detail_names]
    if "probabilities" in names and Path(settings.output).suffix == ".csv":
        names += [f"probability_{label}" for label in task.labels or ()]
    texts = settings.text_columns or task.text_columns
    taken = [name for name in names if name not in texts and any(name in row for row in data.rows)]
    if settings.source_input is not None and pipeline.trained.reads == "text" and not settings.no_source:
        for column, name in data.columns.items():
            sources = (None if source is None else source[column] for source in data.sources)
            if any(row.get(name) not in (None, "", text) for row, text in zip(data.rows, sources, strict=True)):
                taken.append(name)
    if taken:
        raise UserError(f"--input has a column {', '.join(taken)}, which the output would replace; rename it")


def _predict(
    pipeline: FlarePipeline,
    data: Input,
    progress: FinishedBatches | None,
    settings: PredictSettings,
    print_fn: Callable[[str], None],
) -> None:
    trained, main = pipeline.trained, is_main()
    show_bars = settings.progress and main
    done = on_main(lambda: [one for batch in (progress.done if progress is not None else []) for one in batch])
    bars: list[Any] = []

    def on_translated(done: int, total: int) -> None:
        if not bars:
            bars.append(counter("translate" if show_bars else None, total, "text", done))
        bars[0].update(done - bars[0].n)

    translations = None if progress is None else progress.translations
    sources, _ = pipeline.sources(data.texts, data.sources, data.where, translations, on_translated, share=True)
    for bar in bars:
        bar.close()
    with_text = [index for index, row in enumerate(data.texts) if has_text(row)]
    if len(with_text) < len(data.texts):
        print_fn(
            f"{len(data.texts) - len(with_text)} of {len(data.texts)} rows have an empty text and get no prediction"
        )
    all_pairs = pipeline.pairs(data.texts, sources, data.ids, data.words)
    pairs = [all_pairs[index] for index in with_text]
    if done:
        print_fn(f"resuming after {len(done)} of {len(with_text)} rows")
    to_stdout = settings.output == "-" and main
    written = 0  # number of rows written to standard output
    with counter("predict" if show_bars else None, len(with_text), "row", len(done)) as bar:
        for batch in pipeline.batches(pairs, len(done), share=True) if len(done) < len(with_text) else ():
            done += batch
            if progress is not None:
                progress.add(batch)
            elif to_stdout:
                until = len(data.rows) if len(done) == len(with_text) else with_text[len(done)]
                write_lines(_rows(data, sources, with_text, done, written, until))
                written = until
            bar.update(len(batch))
    if progress is not None:
        write_file(Path(settings.output).expanduser(), _rows(data, sources, with_text, done, 0, len(data.rows)))
        print_fn(f"{len(data.rows)} rows in {settings.output}")
    elif to_stdout and not with_text:
        write_lines(_rows(data, sources, with_text, done, 0, len(data.rows)))
    predictions = [one["prediction"] for one in done]
    pipeline.say_once(trained.setup.form.prediction_notes(predictions))
    if data.truth is not None and with_text:
        scores = score(trained.task, predictions, [data.truth[index] for index in with_text])
        print_fn(
            "scores against the labels in the input: "
            + ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
        )


def _rows(
    data: Input, sources: list[Texts | None], with_text: list[int], done: list[dict[str, Any]], first: int, until: int
) -> list[dict[str, Any]]:
    """Return the rows `first` to `until` - 1 of the output.

    A row has the columns of the input, the source text if one was read, the prediction (None for an empty
    text) and its details, such as probabilities.
    """
    begin, end = bisect_left(with_text, first), bisect_left(with_text, until)
    predictions = dict(zip(with_text[begin:end], done[begin:end], strict=True))
    rows = []
    for index in range(first, until):
        source = sources[index]
        source_columns = {} if source is None else {data.columns[column]: text for column, text in source.items()}
        rows.append({**data.rows[index], **source_columns, **predictions.get(index, {"prediction": None})})
    return rows


def _header(pipeline: FlarePipeline, data: Input) -> dict[str, Any]:
    """Return the inputs and options that must equal the saved header, so that a call can resume from saved batches."""
    trained, settings = pipeline.trained, pipeline.settings
    weights = sorted(trained.folder.glob("adapter_model.*"))
    return {
        "rows": len(data.rows),
        "texts": digest_of(data.texts),
        **({"words": digest_of(data.words)} if any(data.words) else {}),
        "sources": digest_of(data.sources),
        "adapter": [digest_of_file(path) for path in weights],
        "base": trained.base,
        "labels": list(trained.task.labels or ()),
        "max_length": trained.setup.max_length,
        "padding": trained.setup.batches["padding"],
        "quantization": trained.setup.recipe.quantization,
        "batch_size": trained.batch_size,
        "no_source": settings.no_source,
        "translator": pipeline.translator.settings() if settings.translator is not None else None,
        "mt_model": settings.mt_model,
        "mt_language": settings.mt_language,
        "task": settings.task,
        "method": settings.method,
        "prompt": settings.prompt,
    }
