"""All of `flare predict`: read, find or translate the sources, predict, write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..tasks import score
from ..tasks.digest import digest_of
from ..translation.provenance import digest_of_file
from ..utils.errors import UserError
from ..utils.processes import errors_reach_all, is_main, on_main, only_main
from ..utils.progress import counter
from .input_rows import Input, read_input
from .output import Progress, check_output, write_file, write_lines
from .pipeline import FlarePipeline, has_text
from .predict_settings import PredictSettings
from .sources import Texts


def run_predict(settings: PredictSettings, say: Callable[[str], None]) -> None:
    """Predict every row of the input into the output. Several processes share the rows; one reads and writes.

    Args:
        say: is told what is done for a source, what was cut, progress, and the scores where rows have labels; with
            the output on standard output it has to write elsewhere.

    Raises:
        UserError: something the user can fix; finished batches are kept for the next call.
    """
    settings.check()
    say = only_main(say)
    output = on_main(lambda: check_output(settings.output, settings.overwrite))
    pipeline = FlarePipeline.of(settings, say)
    trained = pipeline.trained
    given = on_main(lambda: read_input(settings, trained.task))
    pipeline.tell(given.notes)
    own = sorted({"prediction"} & {name for row in given.rows for name in row})
    if own:
        raise UserError(f"--input has a column {own[0]}, which the output would replace; rename it")
    say(f"{trained.folder}: {trained.record.method} on {trained.base}, {len(given.rows)} rows")
    header = _header(pipeline, given)
    with errors_reach_all(), contextlib.ExitStack() as stack:
        progress = None
        if output is not None and is_main():
            progress = stack.enter_context(Progress(output, header))
        _predict(pipeline, given, progress, settings, say)
        if progress is not None:
            progress.remove()


def _predict(
    pipeline: FlarePipeline,
    given: Input,
    progress: Progress | None,
    settings: PredictSettings,
    say: Callable[[str], None],
) -> None:
    trained, main = pipeline.trained, is_main()
    shows = settings.progress and main
    done = on_main(lambda: [one for batch in (progress.done if progress is not None else []) for one in batch])
    bars: list[Any] = []

    def translating(now: int, total: int) -> None:
        if not bars:
            bars.append(counter("translate" if shows else None, total, "text", now))
        bars[0].update(now - bars[0].n)

    kept = None if progress is None else progress.translations
    sources, _ = pipeline.sources(given.texts, given.sources, given.where, kept, translating, share=True)
    for bar in bars:
        bar.close()
    full = [index for index, row in enumerate(given.texts) if has_text(row)]
    if len(full) < len(given.texts):
        say(f"{len(given.texts) - len(full)} of {len(given.texts)} rows have an empty text and get no prediction")
    pairs = pipeline.pairs(given.texts, sources, given.ids)
    if done:
        say(f"resuming after {len(done)} of {len(full)} rows")
    to_screen = settings.output == "-" and main
    shown = 0  # rows on standard output
    left = [pairs[index] for index in full]
    with counter("predict" if shows else None, len(full), "row", len(done)) as bar:
        for batch in pipeline.batches(left, len(done), share=True) if len(done) < len(full) else ():
            done += batch
            if progress is not None:
                progress.add(batch)
            elif to_screen:
                until = len(given.rows) if len(done) == len(full) else full[len(done)]
                write_lines(_rows(given, sources, full, done, shown, until))
                shown = until
            bar.update(len(batch))
    if progress is not None:
        write_file(Path(settings.output).expanduser(), _rows(given, sources, full, done, 0, len(given.rows)))
        say(f"{len(given.rows)} rows in {settings.output}")
    elif to_screen and not full:
        write_lines(_rows(given, sources, full, done, 0, len(given.rows)))
    predictions = [one["prediction"] for one in done]
    pipeline.tell(trained.setup.form.prediction_notes(predictions))
    if given.truth is not None and full:
        scores = score(trained.task, predictions, [given.truth[index] for index in full])
        say("scores of the rows' own labels: " + ", ".join(f"{name} {value:.1f}" for name, value in scores.items()))


def _rows(
    given: Input, sources: list[Texts | None], full: list[int], done: list[dict[str, Any]], first: int, until: int
) -> list[dict[str, Any]]:
    """Rows of the output: what came, the source that was read, and the prediction."""
    at = dict(zip(full, done, strict=False))
    found = []
    for index in range(first, until):
        source = sources[index]
        read = {} if source is None else {given.columns[column]: text for column, text in source.items()}
        found.append({**given.rows[index], **read, **at.get(index, {"prediction": None})})
    return found


def _header(pipeline: FlarePipeline, given: Input) -> dict[str, Any]:
    """Everything that decides about the predictions, for a later call that goes on."""
    trained, settings = pipeline.trained, pipeline.settings
    weights = sorted(trained.folder.glob("adapter_model.*"))
    return {
        "rows": len(given.rows),
        "texts": digest_of(given.texts),
        "sources": digest_of(given.sources),
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
    }
