"""Options of `flare translate`, with their defaults and checks."""

# ruff: noqa: RUF009 - option() is a dataclass field

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..tasks.registry import OWN
from ..utils.errors import UserError
from ..utils.names import checked_text, folder_name
from ..utils.options import flag, option
from .model import TranslationError

SPLITS = ("train", "valid", "test")
DIRECTIONS = ("auto", "to-target", "to-source")
LOST_MARKS = ("auto", "drop", "keep")


@dataclass(frozen=True)
class TranslateSettings:
    """Options of `flare translate`.

    Raises:
        TranslationError: an option is missing, or a value is not accepted.
    """

    task: str = option("str", f"a task of the list below; for your own data: {', '.join(OWN)}")
    source: str = option("str", "source language, such as english", metavar="LANGUAGE")
    target: Sequence[str] = option("strs", "target languages, or all", metavar="LANGUAGE")
    model: str = option("str", "hub id or folder of an encoder-decoder (NLLB, M2M100, mBART, Marian, T5)")
    output: Path = option("path", "folder of the translations (default: translations)", Path("translations"))
    data: str | None = option("str", "folder with one sub-folder per language, or hub id (default: the task's)")
    text_columns: Sequence[str] | None = option("strs", "text columns of your own data", metavar="COLUMN")
    choice_columns: Sequence[str] | None = option("strs", "columns of the choices (multiple-choice)", metavar="COLUMN")
    label_column: str | None = option("str", "label column of your own data", metavar="COLUMN")
    id_column: Sequence[str] | None = option("strs", "id columns (default: the task's, or id)", metavar="COLUMN")
    labels: Sequence[str] | None = option("strs", "names of the labels, if the rows hold indices", metavar="LABEL")
    splits: Sequence[str] = option("strs", "splits to translate: train, valid, test (default: all)", SPLITS)
    direction: str = option(
        "str",
        "auto (default): train and valid into the target language, test into the source language; to-target or "
        "to-source: all splits into that language",
        "auto",
        metavar="WHICH",
    )
    source_code: str | None = option(
        "str", "the model's tag of the source language (default: the tag of NLLB, such as eng_Latn)", metavar="TAG"
    )
    target_code: Sequence[str] | None = option(
        "strs", "the model's tags of the target languages, one per language", metavar="TAG"
    )
    prefix: str = option(
        "str",
        "text before every input, for models without language tags (T5); {source} and {target} are replaced by the "
        "tags, or by the names of the languages if no tags are given",
        "",
        metavar="TEXT",
    )
    lost_marks: str = option(
        "str",
        "what to do with QA rows whose answer cannot be found after translation: drop, keep (without answers), or "
        "auto (default: keep them in the test split, drop them in the other splits)",
        "auto",
        metavar="WHAT",
    )
    max_length: int | None = option(
        "int",
        "maximum tokens of a text; longer texts are split at sentence ends (default: the model's limit, at most 512)",
    )
    max_new_tokens: int | None = option(
        "int", "maximum tokens of a translated text or part (default: the model's limit, at most 512)"
    )
    batch_tokens: int = option("int", "maximum tokens per batch, padding included (default: 2048)", 2048)
    batch_size: int | None = option("int", "maximum rows per batch (default: no limit)")
    beams: int = option("int", "beams of the beam search (default: 1, greedy decoding)", 1)
    dtype: str = option(
        "str", "float32, float16, bfloat16 (default: bfloat16 on a GPU that supports it, else float32)", "auto"
    )
    device: str | None = option("str", "cuda, cuda:1, cpu (default: the GPU if there is one)")
    revision: str | None = option("str", "branch, tag or commit of the model on the hub", metavar="NAME")
    limit: int | None = option("int", "translate the first N rows of every split")
    threads: int | None = option("int", "CPU threads (default: PyTorch's choice)")
    progress: bool = option("bool", "show progress bars", True)

    def __post_init__(self) -> None:
        missing = [flag(name) for name in ("task", "source", "target", "model") if getattr(self, name) is None]
        if missing:
            raise TranslationError(f"{', '.join(missing)} must be given, as flags or in a --config file")
        for name, accepted in (("direction", DIRECTIONS), ("lost_marks", LOST_MARKS)):
            if getattr(self, name) not in accepted:
                raise TranslationError(
                    f"{flag(name)} must be one of {', '.join(accepted)}; got {getattr(self, name)!r}"
                )
        for name in ("splits", "target"):
            values = getattr(self, name)
            if isinstance(values, str) or not values or len(set(values)) < len(values):
                raise TranslationError(f"{flag(name)} must list one or more different values; got {values!r}")
        for name, value in (("source", self.source), *(("target", name) for name in self.target)):
            try:
                folder_name(value, flag(name))
            except UserError as error:
                raise TranslationError(str(error)) from None
        for name in ("model", "output", "data", "revision", "prefix"):
            try:
                if getattr(self, name) not in (None, ""):
                    checked_text(str(getattr(self, name)), flag(name))
            except UserError as error:
                raise TranslationError(str(error)) from None
        unknown = [split for split in self.splits if split not in SPLITS]
        if unknown:
            raise TranslationError(f"--splits must be among {', '.join(SPLITS)}; got {', '.join(unknown)}")
        if self.source in self.target:
            raise TranslationError(
                f"--source {self.source} is also a target ({', '.join(self.target)}); remove it from --target"
            )
        if self.target_code is not None and len(self.target_code) != len(self.target):
            raise TranslationError(
                f"--target-code needs one code per target; got {len(self.target)} targets ({', '.join(self.target)}) "
                f"and {len(self.target_code)} codes ({', '.join(self.target_code)})"
            )
        for name in ("limit", "threads", "batch_tokens", "batch_size", "beams", "max_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TranslationError(f"{flag(name)} must be 1 or more; got {value}")

    def to_target(self, split: str) -> bool:
        """Return whether a split is translated from the source into the target language."""
        return self.direction == "to-target" or (self.direction == "auto" and split != "test")

    def policy(self, split: str) -> str:
        """Return what to do with a QA row of a split whose answer is not found in the translation: "drop" or "keep"."""
        if self.lost_marks != "auto":
            return self.lost_marks
        return "keep" if split == "test" else "drop"
