"""What `flare translate` can be told, its defaults, and the errors for values that cannot work."""

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
        source: the language that is rich in data (English).
        target: the languages to translate into, and test texts from.
        model: hub id or folder of an encoder-decoder.
        output: folder of the translations.
        data: folder or hub id of the task's data; None takes the task's own on the hub.
        text_columns, choice_columns, label_column, id_column, labels: of your own data, as `get_task` takes them.
        splits: which ones.
        direction: "auto": train and valid to the target, test to the source; "to-target", "to-source": all of them.
        source_code, target_code: language tags in place of the table's NLLB tags; target_code: one for each target.
        prefix: written before every text; {source} and {target} stand for the tags, or for the languages' names where
            no tags are given.
        lost_marks: "auto" drops QA rows of train and valid whose span is lost, and keeps those of test without one.
        max_length, max_new_tokens, batch_tokens, batch_size, beams, dtype, device, revision: see `Translator`.
        limit: translate the first so many rows of every split.
        threads: CPU threads; None: PyTorch's choice.
        progress: show progress bars.
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
                raise TranslationError(f"{option(name)} must name one or more, each once; got {values!r}")
        for name, value in (("source", self.source), *(("target", one) for one in self.target)):
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
            raise TranslationError(f"--splits must be of {', '.join(SPLITS)}; got {', '.join(unknown)}")
        if self.source in self.target:
            raise TranslationError(f"--source {self.source} is among the targets ({', '.join(self.target)})")
        if self.target_code is not None and len(self.target_code) != len(self.target):
            raise TranslationError(
                f"--target-code needs a code for every target: {len(self.target)} targets ({', '.join(self.target)}), "
                f"{len(self.target_code)} codes ({', '.join(self.target_code)})"
            )
        for name in ("limit", "threads", "batch_tokens", "batch_size", "beams", "max_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TranslationError(f"{option(name)} must be 1 or more; got {value}")

    def to_target(self, split: str) -> bool:
        """Whether a split is translated from the source into the target language."""
        return self.direction == "to-target" or (self.direction == "auto" and split != "test")

    def policy(self, split: str) -> str:
        """What happens to a QA row of a split whose span is lost."""
        if self.lost_marks != "auto":
            return self.lost_marks
        return "keep" if split == "test" else "drop"


def option(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")
