"""What `flare predict` and `FlarePipeline` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..runs.options import flag, option
from ..runs.run_settings import QUANTIZATIONS
from ..utils.errors import UserError

PADDINGS = ("max_length", "longest")


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """Options that the command and the pipeline have in common."""

    adapter: str | None = option("str", "a run's folder of flare train, or a saved adapter's folder")
    base: str | None = option("str", "the base model, where it lies elsewhere than the adapter says", metavar="MODEL")
    translator: str | None = option(
        "str", "encoder-decoder that translates texts without a source (as flare translate --model)", metavar="MODEL"
    )
    no_source: bool = option("bool", "predict without a source: the adapter is then plain LoRA, and worse", False)
    source: str | None = option("str", "language to translate into (default: the run's)", metavar="LANGUAGE")
    target: str | None = option("str", "language of the texts (default: the run's)", metavar="LANGUAGE")
    source_code: str | None = option("str", "the translator's tag of the source language", metavar="TAG")
    target_code: str | None = option("str", "the translator's tag of the texts' language", metavar="TAG")
    prefix: str = option("str", "before every text to translate, with {source} and {target} (T5, MADLAD)", "")
    beams: int = option("int", "beams of the translator (default: 1, greedy)", 1)
    batch_tokens: int = option("int", "tokens of a batch of the translator (default: 2048)", 2048)
    task: str | None = option("str", "of an adapter that is not a run's: nusax, xnli, tydiqa, classification, qa")
    labels: tuple[str, ...] | None = option("strs", "of an adapter that is not a run's: the classes, by their index")
    method: str | None = option(
        "str", "of an adapter without fusion that is not a run's (default: lora)", choices=("lora", "input-fusion")
    )
    prompt: str | None = option("str", "of a decoder's adapter that is not a run's: with {column} for every text")
    text_columns: tuple[str, ...] | None = option("strs", "the input's text columns (default: the task's)")
    max_length: int | None = option("int", "tokens per text (default: the run's)")
    padding: str | None = option(
        "str", "pad to max-length, or to a batch's longest text (default: the run's; else longest)", choices=PADDINGS
    )
    mt_model: str | None = option("str", "encoder of a flare-mt adapter (default: the run's)", metavar="MODEL")
    mt_language: str | None = option("str", "its tag for the texts' language (default: the run's)", metavar="TAG")
    quantization: str | None = option("str", "of the base (default: the run's, else none)", choices=QUANTIZATIONS)
    batch_size: int | None = option("int", "rows per step (default: flare evaluate's)")
    device: str | None = option("str", "cuda, cuda:1, cpu (default: the GPU if there is one)")

    def check(self) -> None:
        """Raise UserError for a value that cannot work."""
        if self.adapter is None:
            raise UserError("--adapter is missing: name a run's folder (runs/<target>/<method>/seed-N) or an adapter's")
        if self.no_source and self.translator is not None:
            raise UserError("--no-source and --translator exclude each other: there would be nothing to translate for")
        for name, least in (("max_length", 4), ("batch_size", 1), ("beams", 1), ("batch_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{flag(name)} must be {least} or more; got {value}")


@dataclass(frozen=True, kw_only=True)
class PredictSettings(PipelineSettings):
    """Options of `flare predict`."""

    input: str | None = option(
        "str", "file of texts: .jsonl, .csv or .parquet; - reads JSON lines from standard input", metavar="FILE"
    )
    source_input: str | None = option(
        "str", "file of their source texts, with the same columns; matched by id, else by position", metavar="FILE"
    )
    source_columns: tuple[str, ...] | None = option(
        "strs",
        "columns of the source texts (default: source_<column>, or with --source-input the texts' own names)",
        metavar="COLUMN",
    )
    label_column: str | None = option("str", "column of the label, where rows have one (default: the run's)")
    output: str = option(
        "str", ".jsonl or .csv; - (the default) writes JSON lines to standard output", "-", None, "FILE"
    )
    overwrite: bool = option("bool", "replace an --output that is there already", False)
    threads: int | None = option("int", "CPU threads (default: PyTorch's choice)")
    progress: bool = option("bool", "show progress", True)

    def check(self) -> None:
        super().check()
        if self.input is None:
            raise UserError("--input is missing: name a file, or - for JSON lines from standard input")
        if self.source_input == "-":
            raise UserError("--source-input must be a file; standard input is for --input")


def options_of(values: dict[str, Any]) -> PipelineSettings:
    """Return the settings of a pipeline's keyword arguments; lists become tuples.

    Raises:
        TypeError: an unknown name.
        UserError: a value that cannot work.
    """
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    made = PipelineSettings(**given)
    made.check()
    return made
