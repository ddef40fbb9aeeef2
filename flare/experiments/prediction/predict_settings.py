"""The options of `flare predict` and `FlarePipeline`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..runs.run_settings import QUANTIZATIONS
from ..utils.errors import UserError
from ..utils.options import flag, option

PADDINGS = ("max_length", "longest")


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """Options that the command and the pipeline share."""

    adapter: str | None = option("str", "folder of a run of flare train, or of a saved adapter")
    base: str | None = option("str", "base model (default: the one that the adapter names)", metavar="MODEL")
    translator: str | None = option(
        "str", "encoder-decoder that translates texts without a source (see flare translate --model)", metavar="MODEL"
    )
    no_source: bool = option(
        "bool", "predict without a source: the adapter is then plain LoRA and predicts worse", False
    )
    source: str | None = option(
        "str", "language to translate into (default: source language of the run)", metavar="LANGUAGE"
    )
    target: str | None = option(
        "str", "language of the texts (default: target language of the run)", metavar="LANGUAGE"
    )
    source_code: str | None = option("str", "the translator's tag for the source language", metavar="TAG")
    target_code: str | None = option("str", "the translator's tag for the language of the texts", metavar="TAG")
    prefix: str = option(
        "str", "text put before every text to translate; {source} and {target} stand for the languages (T5, MADLAD)", ""
    )
    beams: int = option("int", "beams of the translator (default: 1, greedy)", 1)
    batch_tokens: int = option("int", "tokens per batch of the translator (default: 2048)", 2048)
    task: str | None = option("str", "task of an adapter without a run: nusax, xnli, tydiqa, classification, qa, ...")
    labels: tuple[str, ...] | None = option("strs", "labels of an adapter without a run, in the order of their indices")
    method: str | None = option(
        "str",
        "method of an adapter that does not fuse and belongs to no run (default: lora)",
        choices=("lora", "input-fusion"),
    )
    prompt: str | None = option(
        "str", "prompt of a decoder, if the adapter belongs to no run; {column} stands for the text of a column"
    )
    text_columns: tuple[str, ...] | None = option(
        "strs", "text columns of the input (default: text columns of the task)"
    )
    max_length: int | None = option("int", "tokens per text (default: as in the run)")
    padding: str | None = option(
        "str",
        "pad to --max-length, or to the longest text of a batch (default: as in the run, or longest without a run)",
        choices=PADDINGS,
    )
    mt_model: str | None = option(
        "str", "MT model whose encoder states a flare-mt adapter reads (default: as in the run)", metavar="MODEL"
    )
    mt_language: str | None = option(
        "str", "the MT model's tag for the language of the texts (default: as in the run)", metavar="TAG"
    )
    quantization: str | None = option(
        "str", "quantization of the base (default: as in the run, or none without a run)", choices=QUANTIZATIONS
    )
    batch_size: int | None = option("int", "rows per step (default: as in flare evaluate)")
    device: str | None = option("str", "cuda, cuda:1, cpu (default: the GPU if there is one)")

    def check(self) -> None:
        """Raise UserError for a value that is not accepted."""
        if self.adapter is None:
            raise UserError(
                "--adapter is missing: name the folder of a run (runs/<target>/<method>/seed-N) or of an adapter"
            )
        if self.no_source and self.translator is not None:
            raise UserError("--no-source and --translator exclude each other: without a source, nothing is translated")
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
        "str",
        "file of the source texts, with the same columns as --input; rows are matched by id, else by position",
        metavar="FILE",
    )
    source_columns: tuple[str, ...] | None = option(
        "strs",
        "columns of the source texts (default: source_<column>, or the text columns of a --source-input)",
        metavar="COLUMN",
    )
    label_column: str | None = option("str", "label column, if the rows have labels (default: as in the run)")
    output: str = option(
        "str", ".jsonl or .csv file; - (default) writes JSON lines to standard output", "-", None, "FILE"
    )
    overwrite: bool = option("bool", "replace an existing --output", False)
    threads: int | None = option("int", "CPU threads (default: PyTorch's choice)")
    progress: bool = option("bool", "show progress", True)

    def check(self) -> None:
        super().check()
        if self.input is None:
            raise UserError("--input is missing: name a file, or - for JSON lines from standard input")
        if self.source_input == "-":
            raise UserError("--source-input must be a file; standard input is for --input")


def options_of(values: dict[str, Any]) -> PipelineSettings:
    """Return checked settings from the keyword arguments of a pipeline. Lists become tuples.

    Raises:
        TypeError: an unknown name.
        UserError: a value is not accepted.
    """
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    settings = PipelineSettings(**options)
    settings.check()
    return settings
