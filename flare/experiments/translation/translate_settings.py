"""Options of `flare translate`, with their defaults and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.errors import UserError
from ..utils.names import checked_text, folder_name
from .model import TranslationError

SPLITS = ("train", "valid", "test")
DIRECTIONS = ("auto", "to-target", "to-source")
LOST_MARKS = ("auto", "drop", "keep")


@dataclass(frozen=True)
class TranslateSettings:
    """Options of `flare translate`.

    Attributes:
        task: name of the task.
        source: the high-resource language (English).
        target: the low-resource languages. Training text is translated into them, test text from them.
        model: hub id or folder of an encoder-decoder.
        output: folder of the translations.
        data: folder or hub id of the task's data; None: the task's data set on the hub.
        text_columns, choice_columns, label_column, id_column, labels: columns and labels of your own data; see
            `get_task`.
        splits: the splits to translate.
        direction: "to-target": translate all splits into the target language; "to-source": translate all splits into
            the source language; "auto": train and valid into the target language, test into the source language.
        source_code, target_code: language tags to use instead of the NLLB tags of the languages; `target_code` has one
            tag per target.
        prefix: text that is written before every text; {source} and {target} are replaced by the tags, or by the
            languages' names if no tags are given.
        lost_marks: what to do with QA rows whose answer is not found in the translation: "drop" the rows, "keep" them
            without answers, or "auto": drop rows of train and valid, and keep rows of test.
        max_length, max_new_tokens, batch_tokens, batch_size, beams, dtype, device, revision: see `Translator`.
        limit: number of rows of every split that are translated, from the first row; None: all rows.
        threads: CPU threads; None: PyTorch's default.
        progress: whether to show progress bars.
    """

    task: str
    source: str
    target: Sequence[str]
    model: str
    output: Path = Path("translations")
    data: str | None = None
    text_columns: Sequence[str] | None = None
    choice_columns: Sequence[str] | None = None
    label_column: str | None = None
    id_column: Sequence[str] | None = None
    labels: Sequence[str] | None = None
    splits: Sequence[str] = SPLITS
    direction: str = "auto"
    source_code: str | None = None
    target_code: Sequence[str] | None = None
    prefix: str = ""
    lost_marks: str = "auto"
    max_length: int | None = None
    max_new_tokens: int | None = None
    batch_tokens: int = 2048
    batch_size: int | None = None
    beams: int = 1
    dtype: str = "auto"
    device: str | None = None
    revision: str | None = None
    limit: int | None = None
    threads: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, accepted in (("direction", DIRECTIONS), ("lost_marks", LOST_MARKS)):
            if getattr(self, name) not in accepted:
                raise TranslationError(
                    f"{option(name)} must be one of {', '.join(accepted)}; got {getattr(self, name)!r}"
                )
        for name in ("splits", "target"):
            values = getattr(self, name)
            if isinstance(values, str) or not values or len(set(values)) < len(values):
                raise TranslationError(f"{option(name)} must list one or more different values; got {values!r}")
        for name, value in (("source", self.source), *(("target", name) for name in self.target)):
            try:
                folder_name(value, option(name))
            except UserError as error:
                raise TranslationError(str(error)) from None
        for name in ("model", "output", "data", "revision", "prefix"):
            try:
                if getattr(self, name) not in (None, ""):
                    checked_text(str(getattr(self, name)), option(name))
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
                raise TranslationError(f"{option(name)} must be 1 or more; got {value}")

    def to_target(self, split: str) -> bool:
        """Return whether a split is translated from the source into the target language."""
        return self.direction == "to-target" or (self.direction == "auto" and split != "test")

    def policy(self, split: str) -> str:
        """Return what to do with a QA row of a split whose answer is not found in the translation: "drop" or "keep"."""
        if self.lost_marks != "auto":
            return self.lost_marks
        return "keep" if split == "test" else "drop"


def option(name: str) -> str:
    """Return the command line option of a field."""
    return "--" + name.replace("_", "-")
