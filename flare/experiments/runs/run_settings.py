"""Define the options of `flare finetune`, `train`, `check` and `evaluate`, and refuse values that cannot work."""

# ruff: noqa: RUF009 - option() is a dataclass field
from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from flare_kernels.fusion import ALL_FUSIONS

from ..tasks.registry import OWN, TASKS
from ..utils.errors import UserError
from ..utils.names import folder_name
from ..utils.options import flag, option, parse_bytes
from ..utils.result_folders import EARLIER

METHODS = ("lora", "input-fusion", "x-mixup", "flare", "flare-mt")
SETTINGS = ("zero-shot", "translate-test", "translate-train")
FORMS = ("encoder", "causal", "seq2seq")
TEXTS = ("gold", "mt")
QUANTIZATIONS = ("none", "nf4", "int8")
BASE = "base"
_FROM_ZERO = ("seeds", "show", "score_rows", "steps", "mixup_layer")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options shared by `flare finetune`, `train`, `check` and `evaluate`.

    PAPER: values that --paper sets for options that the user does not give.
    """

    PAPER: ClassVar[dict[str, Any]] = {"padding": "max_length"}

    task: str | None = option("str", f"a task of the list below; for your own data: {', '.join(OWN)}")
    data: str | None = option(
        "str",
        "folder (one sub-folder per language), table with columns of both languages, or hub id (default: the task's)",
    )
    source: str | None = option("str", "source language (default: english)")
    output: Path = option("path", "folder of the experiment (default: runs)", Path("runs"))
    translations: Path | None = option("path", "folder that flare translate wrote")
    text_columns: tuple[str, ...] | None = option("strs", "text columns (default: the task's)")
    choice_columns: tuple[str, ...] | None = option("strs", "columns of the choices of a multiple-choice task")
    label_column: str | None = option(
        "str", "column of the label, of the tags (named entities) or of the number (regression)"
    )
    id_column: tuple[str, ...] | None = option(
        "strs", "id column or columns that match the rows of two languages (default: the task's, or id)"
    )
    source_column: tuple[str, ...] | None = option(
        "strs",
        "if DATA is one table with both languages: the columns of the source text, in the order of the text columns",
    )
    target_column: tuple[str, ...] | None = option(
        "strs",
        "if DATA is one table with both languages: the columns of the target text, in the order of the text columns; "
        "{language} stands for the name of the target language",
    )
    prompt: str | None = option("str", "prompt of a generating model, with {column} for each text column")
    verbalizer: dict[str, Any] = option(
        "map", "LABEL=TEXT: the text that a generating model writes for a label (default: the label itself)"
    )
    labels: tuple[str, ...] | None = option(
        "strs", "labels (default: the task's, or the labels in the source language's data)"
    )
    metric: str | None = option("str", "metric that selects the best checkpoint (default: the task's first metric)")
    max_length: int | None = option(
        "int", "maximum tokens per text (default as in the paper: 128, or 512 for questions)"
    )
    padding: str | None = option(
        "str",
        "pad batches to --max-length, as in the paper, or to their longest text (default for decoders: longest)",
        choices=("max_length", "longest"),
    )
    form: str | None = option(
        "str",
        "how the model answers: with a head (encoder), or by generating text (causal, seq2seq) (default: what the "
        "model is made for)",
        choices=FORMS,
    )
    quantization: str | None = option(
        "str", "quantization of the base model (default: the paper's, if the device supports it)", choices=QUANTIZATIONS
    )
    rows: int | None = option("int", "use at most N rows of every split, for a quick test")
    eval_batch_size: int | None = option("int", "rows per evaluation step (default: twice the training batch)")
    threads: int | None = option("int", "CPU threads (default: PyTorch's choice)")
    paper: bool = option(
        "bool",
        "use the paper's settings in place of the defaults: 5 seeds, machine-translated text, fixed length",
        False,
    )
    progress: bool = option("bool", "show progress bars", True)
    resume: bool = option(
        "bool",
        "skip finished runs and resume unfinished runs (--no-resume: restart both, and keep the old runs as earlier-N; "
        "but flare evaluate --no-resume overwrites the scores that an adapter already has for this source text)",
        True,
    )

    def check(self) -> None:
        """Raise UserError for a value that cannot work."""
        if self.source is not None:
            folder_name(self.source, "--source")
        for target in getattr(self, "target", None) or ():
            folder_name(target, "--target")
            if target == BASE or target.startswith(EARLIER):
                raise UserError(f"--target {target!r}: the experiment reserves this name; rename the language's folder")
        if (self.source_column or self.target_column) and self.data is None and not isinstance(self, EvaluateSettings):
            raise UserError("--source-column and --target-column need a table: name it with --data")
        for one in fields(self):
            value = getattr(self, one.name)
            for number in value if one.metadata.get("kind") == "ints" and value is not None else [value]:
                least = 0 if one.name in _FROM_ZERO else 4 if one.name == "max_length" else 1
                if one.metadata.get("kind") in ("int", "ints") and number is not None and number < least:
                    raise UserError(f"{flag(one.name)} must be {least} or more; got {number}")


@dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """Options of the commands that train.

    training: name -> value of the TrainingArguments fields that the user sets.
    """

    seeds: tuple[int, ...] = option("ints", "seeds, one run for each (default: 0)", (0,))
    alpha: float | None = option("float", "LoRA alpha (default: 2 r, as in the paper, 128 for r = 64)")
    dropout: float | None = option("float", "dropout before the adapters (default: 0)")
    target_modules: tuple[str, ...] | None = option(
        "strs", "modules that get adapters (default: query and value; all-linear for decoders, as in the paper)"
    )
    keep_checkpoints: bool = option("bool", "keep the checkpoints of a finished run", False)
    training: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if not self.seeds:
            raise UserError("--seeds is empty; give one or more numbers")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"--alpha must be greater than 0; got {self.alpha}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be 0 or more and less than 1; got {self.dropout}")
        if self.task is None:
            raise UserError(f"--task is missing; name one of {', '.join(TASKS)}")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(Training):
    """Options of `flare finetune`."""

    PAPER: ClassVar[dict[str, Any]] = {**Settings.PAPER, "seeds": (0, 1, 2, 3, 4)}

    model: str | None = option("str", "folder or hub id of the pretrained model")
    r: int | None = option("int", "rank of the adapter (default: 64)")
    full: bool = option(
        "bool", "train all weights instead of an adapter that is merged into the base afterwards", False
    )

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise UserError("--model is missing: name a folder or hub id, such as FacebookAI/xlm-roberta-large")
        if self.full and (self.r or self.alpha or self.dropout or self.target_modules):
            raise UserError("--full trains all weights, so remove --r, --alpha, --dropout and --target-modules")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Training):
    """Options of `flare train`."""

    PAPER: ClassVar[dict[str, Any]] = {**FinetuneSettings.PAPER, "source_text": "mt", "target_text": "mt"}

    target: tuple[str, ...] | None = option(
        "strs", "target languages, or all: every language of the data except the source"
    )
    method: tuple[str, ...] | None = option("strs", f"{', '.join(METHODS)} (default: flare)", choices=METHODS)
    fusion: tuple[str, ...] = option(
        "strs", "fusion functions of flare and flare-mt (default: add_relu)", ("add_relu",), ALL_FUSIONS
    )
    r: tuple[int, ...] | None = option("ints", "ranks of the adapters (default: 64)")
    base: str | None = option("str", "fine-tuned base (default: OUTPUT/base), or any other model")
    source_text: str = option("str", "source text: gold (from the data) or mt (machine-translated)", "gold", TEXTS)
    target_text: str = option(
        "str", "target text in training: gold (from the data) or mt (machine-translated)", "gold", TEXTS
    )
    train_only_fusion: bool = option(
        "bool", "ablation: half of the training rows have a source, and the test rows have none (flare)", False
    )
    mt_model: str | None = option(
        "str", "MT encoder of flare-mt (default: facebook/nllb-200-distilled-600M)", "facebook/nllb-200-distilled-600M"
    )
    mt_language: str | None = option(
        "str", "the MT encoder's tag for the target language (default: looked up by language name)"
    )
    mixup_layer: int | None = option(
        "int", "index of the block in which x-mixup mixes, from 0 (default: the middle one)"
    )
    adapter: dict[str, Any] = option("map", "other fields of FlareConfig, such as source_layer_offset=0")
    source_cache: str = option(
        "str",
        "cache the source states between epochs (flare): on, off, or auto (default: on if the cache saves time and "
        "fits into a quarter of the free memory)",
        "auto",
        ("auto", "on", "off"),
    )
    source_cache_budget: str | None = option(
        "str",
        "host memory for the source cache, such as 8GiB (default: a quarter of the free memory, or half of the free "
        "memory with --source-cache on)",
        metavar="BYTES",
    )
    name: str | None = option("str", "name of the runs' folder (default: made from the method and its settings)")
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
            raise UserError("--source-cache-budget has no effect with --source-cache off; remove one of the two")
        parse_bytes(self.source_cache_budget, "--source-cache-budget")
        if self.train_only_fusion and set(self.methods) - {"flare"}:
            raise UserError(f"--train-only-fusion is for --method flare; got {', '.join(self.methods)}")
        if "mt" in (self.source_text, self.target_text) and self.translations is None:
            raise UserError(
                "--source-text mt and --target-text mt (which --paper sets) need --translations, the output folder of "
                "flare translate"
            )
        if self.name is not None and folder_name(self.name, "--name").startswith(EARLIER):
            raise UserError(f"--name {self.name!r}: the folders {EARLIER}N hold earlier runs; choose another name")
        if self.name is not None and len(self.variants()) > 1:
            raise UserError("--name accepts one method, fusion and rank only: several runs would share the folder")

    def variants(self) -> list[tuple[str, str | None, int | None]]:
        """Return (method, fusion, r) of every variant in the grid.

        fusion is None for a method without a fusion function, and r is None for the default rank.
        """
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
    """Options of `flare check`: the options of `flare train`, and how much to measure."""

    model: str | None = option(
        "str", "folder or hub id of the pretrained model, if flare finetune has not made a base yet"
    )
    show: int = option("int", "number of pairs to show for each target language (default: 2; 0: none)", 2)
    score_rows: int = option("int", "number of source-language rows to score the base on (default: 200; 0: none)", 200)
    steps: int = option("int", "timed steps of each method, after one warm-up step (default: 3; 0: no measurement)", 3)
    json: Path | None = option("path", "also write the results to this file, which must not exist", metavar="FILE")

    def check(self) -> None:
        super().check()
        if self.model is not None and self.base is not None:
            raise UserError("--model and --base both name the model; give one of them")
        if self.json is not None and self.json.exists():
            raise UserError(f"--json {self.json} already exists; name another file")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """Options of `flare evaluate`. Options that are not given are taken from the evaluated runs."""

    PAPER: ClassVar[dict[str, Any]] = {"source_text": ("mt",)}

    setting: tuple[str, ...] = option("strs", "what to evaluate (default: all three)", SETTINGS, SETTINGS)
    target: tuple[str, ...] | None = option("strs", "target languages (default: all languages that have runs)")
    seeds: tuple[int, ...] | None = option("ints", "seeds (default: all seeds that have runs)")
    base: str | None = option("str", "fine-tuned base (default: OUTPUT/base)")
    variant: tuple[str, ...] | None = option(
        "strs", "for translate-train: names of the runs' folders, such as flare-mul (default: all)"
    )
    source_text: tuple[str, ...] | None = option(
        "strs",
        "source text: gold (from the data), mt (machine-translated) or both (default: gold for translate-test, the "
        "source text of the training for translate-train)",
        None,
        TEXTS,
    )

    def check(self) -> None:
        super().check()
        if self.source_text is not None and "mt" in self.source_text and self.translations is None:
            raise UserError(
                "--source-text mt (which --paper sets) needs --translations, the output folder of flare translate"
            )


#: Names allowed in a YAML file for several commands; each command reads the names that it knows.
NAMES = frozenset(one.name for kind in (FinetuneSettings, CheckSettings, EvaluateSettings) for one in fields(kind))
