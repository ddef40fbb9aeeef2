"""What `flare finetune`, `train` and `evaluate` can be told, and the errors for values that cannot work."""

# ruff: noqa: RUF009 - option() is a dataclass field
from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from flare_kernels.fusion import ALL_FUSIONS

from ..tasks.registry import OWN, TASKS
from ..utils.errors import UserError
from ..utils.names import folder_name
from ..utils.result_folders import EARLIER
from .options import flag, option, parse_bytes

METHODS = ("lora", "input-fusion", "x-mixup", "flare", "flare-mt")
SETTINGS = ("zero-shot", "translate-test", "translate-train")
FORMS = ("encoder", "causal", "seq2seq")
TEXTS = ("gold", "mt")
QUANTIZATIONS = ("none", "nf4", "int8")
BASE = "base"
_FROM_ZERO = ("seeds", "show", "score_rows", "steps", "mixup_layer")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options that all three commands have.

    PAPER: what --paper sets where an option is not given.
    """

    PAPER: ClassVar[dict[str, Any]] = {"padding": "max_length"}

    task: str | None = option("str", f"{', '.join(TASKS)} ({', '.join(OWN)} are for data of your own)")
    data: str | None = option(
        "str", "folder (one sub-folder per language), table with columns of both, or hub id (default: the task's)"
    )
    source: str | None = option("str", "source language (default: english)")
    output: Path = option("path", "folder of the experiment (default: runs)", Path("runs"))
    translations: Path | None = option("path", "folder that flare translate wrote")
    text_columns: tuple[str, ...] | None = option("strs", "the task's text columns, where yours are named otherwise")
    choice_columns: tuple[str, ...] | None = option("strs", "the columns of a multiple choice's choices")
    label_column: str | None = option("str", "column of the label, tags or number")
    id_column: tuple[str, ...] | None = option(
        "strs", "column (or columns) of the id that rows of two languages are matched by (default: the task's, or id)"
    )
    source_column: tuple[str, ...] | None = option(
        "strs", "DATA is one table with both languages: column of the source text, one for each text column"
    )
    target_column: tuple[str, ...] | None = option(
        "strs", "and of the target text; {language} stands for the target's name"
    )
    prompt: str | None = option("str", "what a model that writes reads, with {column} for each text column")
    verbalizer: dict[str, Any] = option("map", "what such a model writes for a label, where it is not the label")
    labels: tuple[str, ...] | None = option("strs", "the labels (default: the task's, or those of the source language)")
    metric: str | None = option("str", "metric that checkpoints are chosen by (default: the task's first)")
    max_length: int | None = option("int", "tokens per text (default: the paper's, 128, or 512 for questions)")
    padding: str | None = option(
        "str",
        "pad every batch to max-length, as the paper, or to its longest text (default: of decoders)",
        choices=("max_length", "longest"),
    )
    form: str | None = option("str", "read the task as this kind of model (default: by the model)", choices=FORMS)
    quantization: str | None = option(
        "str", "of the base model (default: the paper's, where the device can)", choices=QUANTIZATIONS
    )
    rows: int | None = option("int", "at most N rows of every split, for a quick look")
    eval_batch_size: int | None = option("int", "rows per step of evaluation (default: twice that of training)")
    threads: int | None = option("int", "CPU threads (default: PyTorch's choice)")
    paper: bool = option(
        "bool",
        "the paper's settings where the defaults are others: 5 seeds, machine-translated text, fixed length",
        False,
    )
    progress: bool = option("bool", "progress bars", True)
    resume: bool = option(
        "bool", "go on with unfinished runs (--no-resume: start anew, keep the old as earlier-N)", True
    )

    def check(self) -> None:
        """Raise UserError for a value that cannot work."""
        if self.source is not None:
            folder_name(self.source, "--source")
        for target in getattr(self, "target", None) or ():
            folder_name(target, "--target")
            if target == BASE or target.startswith(EARLIER):
                raise UserError(f"--target {target!r}: this name is the experiment's own; rename the language's folder")
        if (self.source_column or self.target_column) and self.data is None and not isinstance(self, EvaluateSettings):
            raise UserError("--source-column and --target-column name columns of your own table: name it with --data")
        for one in fields(self):
            value = getattr(self, one.name)
            for number in value if one.metadata.get("kind") == "ints" and value is not None else [value]:
                least = 0 if one.name in _FROM_ZERO else 4 if one.name == "max_length" else 1
                if one.metadata.get("kind") in ("int", "ints") and number is not None and number < least:
                    raise UserError(f"{flag(one.name)} must be {least} or more; got {number}")


@dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """Options of the commands that train."""

    seeds: tuple[int, ...] = option("ints", "one run for each (default: 0)", (0,))
    alpha: float | None = option("float", "scale of the adapters times r (default: 2 r, as the paper's 128 for 64)")
    dropout: float | None = option("float", "dropout in front of the adapters (default: 0)")
    target_modules: tuple[str, ...] | None = option(
        "strs", "where adapters go (default: query and value; all-linear for decoders, as the paper)"
    )
    keep_checkpoints: bool = option("bool", "keep the checkpoints of a finished run", False)
    training: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if not self.seeds:
            raise UserError("--seeds: one or more numbers are needed")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"--alpha must be greater than 0; got {self.alpha}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be 0 or more and less than 1; got {self.dropout}")
        if self.task is None:
            raise UserError(f"--task is missing; one of {', '.join(TASKS)}")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(Training):
    """Options of `flare finetune`."""

    PAPER: ClassVar[dict[str, Any]] = {**Settings.PAPER, "seeds": (0, 1, 2, 3, 4)}

    model: str | None = option("str", "folder or hub id of the model to begin with")
    r: int | None = option("int", "rank of the adapter (default: 64)")
    full: bool = option("bool", "train all weights instead of an adapter that is merged", False)

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise UserError("--model is missing: name a folder or hub id, such as FacebookAI/xlm-roberta-large")
        if self.full and (self.r or self.alpha or self.dropout or self.target_modules):
            raise UserError("--full trains all weights: leave --r, --alpha, --dropout and --target-modules out")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Training):
    """Options of `flare train`."""

    PAPER: ClassVar[dict[str, Any]] = {**FinetuneSettings.PAPER, "source_text": "mt", "target_text": "mt"}

    target: tuple[str, ...] | None = option(
        "strs", "target languages, or all: every language of the data but the source"
    )
    method: tuple[str, ...] | None = option("strs", f"{', '.join(METHODS)} (default: flare)", choices=METHODS)
    fusion: tuple[str, ...] = option("strs", "of flare and flare-mt (default: add_relu)", ("add_relu",), ALL_FUSIONS)
    r: tuple[int, ...] | None = option("ints", "ranks of the adapters (default: 64)")
    base: str | None = option("str", "the fine-tuned base (default: OUTPUT/base), or any model")
    source_text: str = option("str", "source text: gold, or machine-translated", "gold", TEXTS)
    target_text: str = option("str", "target text of training: gold, or machine-translated", "gold", TEXTS)
    train_only_fusion: bool = option(
        "bool", "ablation: a source on half of the training rows and none at test (flare)", False
    )
    mt_model: str | None = option(
        "str", "encoder of flare-mt (default: facebook/nllb-200-distilled-600M)", "facebook/nllb-200-distilled-600M"
    )
    mt_language: str | None = option("str", "its tag for the target language (default: by the language)")
    mixup_layer: int | None = option("int", "block in which x-mixup mixes, from 0 (default: the middle one)")
    adapter: dict[str, Any] = option("map", "further fields of FlareConfig, such as source_layer_offset=0")
    source_cache: str = option(
        "str",
        "keep the source's states between epochs (flare): auto (default) where they fit into a quarter of the free "
        "memory, on, off",
        "auto",
        ("auto", "on", "off"),
    )
    source_cache_budget: str | None = option(
        "str", "host memory for them, such as 8GiB (default: a quarter of what is free; on: half)", metavar="BYTES"
    )
    name: str | None = option("str", "folder of the runs, in place of the method's name")
    test: bool = option("bool", "evaluate the test split at the end", True)

    @property
    def methods(self) -> tuple[str, ...]:
        return self.method or ("flare",)

    def check(self) -> None:
        super().check()
        if not self.target:
            raise UserError("--target is missing: name one or more languages, such as --target acehnese")
        if self.source_language in self.target:
            raise UserError(f"--source and --target are both {self.source_language!r}; name two languages")
        if self.source_cache_budget is not None and self.source_cache == "off":
            raise UserError("--source-cache-budget is for a cache: leave it or --source-cache off out")
        parse_bytes(self.source_cache_budget, "--source-cache-budget")
        if self.train_only_fusion and set(self.methods) - {"flare"}:
            raise UserError(f"--train-only-fusion is for --method flare; got {', '.join(self.methods)}")
        if "mt" in (self.source_text, self.target_text) and self.translations is None:
            raise UserError(
                "--source-text mt and --target-text mt (which --paper sets) need --translations, the folder of flare "
                "translate"
            )
        if self.name is not None and folder_name(self.name, "--name").startswith(EARLIER):
            raise UserError(f"--name {self.name!r}: {EARLIER}N is where earlier runs are kept; choose another name")
        if self.name is not None and len(self.variants()) > 1:
            raise UserError("--name is for one method, fusion and rank: several runs would share the folder")

    def variants(self) -> list[tuple[str, str | None, int | None]]:
        """(method, fusion, r) of every kind of run."""
        return [
            (method, fusion, r)
            for method in self.methods
            for fusion in (self.fusion if method.startswith("flare") else (None,))
            for r in (self.r or (None,))
        ]

    @property
    def source_language(self) -> str:
        return self.source or "english"


@dataclass(frozen=True, kw_only=True)
class CheckSettings(TrainSettings):
    """Options of `flare check`: those of `flare train`, and how much is measured."""

    model: str | None = option(
        "str", "folder or hub id of the model, as for flare finetune, where no base is there yet"
    )
    show: int = option("int", "pairs shown of each target (default: 2; 0: none)", 2)
    score_rows: int = option(
        "int", "rows of the source language that the base is scored on (default: 200; 0: none)", 200
    )
    steps: int = option("int", "steps timed of each method, after one that is not (default: 3; 0: no measurement)", 3)
    json: Path | None = option("path", "also write everything to this file, which must not exist", metavar="FILE")

    def check(self) -> None:
        super().check()
        if self.model is not None and self.base is not None:
            raise UserError("--model and --base both name the model; give one of them")
        if self.json is not None and self.json.exists():
            raise UserError(f"--json {self.json} is there already; name another file")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """Options of `flare evaluate`; what is left out is read from the runs."""

    PAPER: ClassVar[dict[str, Any]] = {"source_text": ("mt",)}

    setting: tuple[str, ...] = option("strs", "what to evaluate (default: all three)", SETTINGS, SETTINGS)
    target: tuple[str, ...] | None = option("strs", "target languages (default: all that have runs)")
    seeds: tuple[int, ...] | None = option("ints", "default: all that have runs")
    base: str | None = option("str", "the fine-tuned base (default: OUTPUT/base)")
    variant: tuple[str, ...] | None = option("strs", "translate-train: only runs of these folders (default: all)")
    source_text: tuple[str, ...] | None = option(
        "strs", "gold or mt (default: gold for translate-test, the run's own for translate-train)", None, TEXTS
    )

    def check(self) -> None:
        super().check()
        if self.source_text is not None and "mt" in self.source_text and self.translations is None:
            raise UserError("--source-text mt (which --paper sets) needs --translations, the folder of flare translate")


#: Names that a file for several commands may hold: each command takes its own.
NAMES = frozenset(one.name for kind in (FinetuneSettings, CheckSettings, EvaluateSettings) for one in fields(kind))
