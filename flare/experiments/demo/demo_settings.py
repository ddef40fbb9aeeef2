"""The options of `flare demo`: their defaults, and the checks of their values."""

# ruff: noqa: RUF009 - option() is a dataclass field

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flare_kernels import FUSIONS

from ..utils.errors import UserError
from ..utils.names import checked_text, folder_name
from ..utils.options import flag, option


class DemoError(UserError, ValueError):
    """A wrong option, folder or file of the demo; the message says how to fix it."""


@dataclass(frozen=True)
class DemoSettings:
    """Options of the demo.

    The demo runs on the embedded corpus, which it generates, or on real data. `resolved` replaces None in the fields
    that `EMBEDDED` (for the embedded corpus) or `REAL` (for real data) lists.
    """

    output: Path = option(
        "path", "folder for results.json, a table and a figure (default: flare-demo)", Path("flare-demo"), group="run"
    )
    seeds: int = option("int", "number of seeds (default: 3)", 3)
    overwrite: bool = option(
        "bool", "replace earlier results in the folder (default: move them to its sub-folder earlier-N)", False
    )
    rows: int | None = option("int", "use at most N rows of every split, for a quick test")
    threads: int | None = option("int", "CPU threads (default: 1 / PyTorch's choice)")
    cache_dir: Path | None = option(
        "path",
        "folder that keeps the pretrained base of the generated corpus (default: flare-kernels in $XDG_CACHE_HOME or "
        "~/.cache)",
    )
    progress: bool = option("bool", "show progress bars", True)

    model: str | None = option("str", "folder or hub id of a transformers model", group="real data and a real model")
    data: str | None = option(
        "str", "hub id, or folder with one sub-folder per language that holds train.csv and test.csv (id, text, label)"
    )
    source: str | None = option("str", "language that the base is fine-tuned on", metavar="LANGUAGE")
    target: str | None = option("str", "language that the adapters are trained for", metavar="LANGUAGE")

    fusion: str = option(
        "str", f"{', '.join(FUSIONS)} (default: add_relu)", "add_relu", metavar="NAME", group="hyper-parameters"
    )
    noise: float = option("float", "share of damaged words in the noisy source; 0: no noisy rows (default: 0.15)", 0.15)
    r: int | None = option("int", "rank of the adapters (default: 16 / 64)")
    alpha: float | None = option("float", "lora_alpha of the adapters (default: 32 / 128)")
    epochs: int | None = option("int", "epochs of training the adapters (default: 10 / 8)")
    batch_size: int | None = option("int", "rows per step (default: 32 / 32)")
    lr: float | None = option("float", "learning rate of the adapters (default: 5e-3 / 1e-3)")
    max_length: int | None = option("int", "tokens per text (default: 24 / 64)")
    finetune_epochs: int | None = option("int", "epochs of fine-tuning on the source language (default: 15 / 5)")
    finetune_batch_size: int | None = option("int", "rows per step of fine-tuning (default: 32 / 16)")
    finetune_lr: float | None = option("float", "learning rate of fine-tuning (default: 1e-3 / 5e-5)")
    pretrain_steps: int | None = option(
        "int", "pretraining steps (masked language modelling) of the base of the generated corpus (default: 500)"
    )

    @property
    def embedded(self) -> bool:
        """Whether the demo uses its own model and data."""
        return self.data is None

    def resolved(self) -> DemoSettings:
        """Check every value, and return the settings with the defaults filled in.

        Raises:
            DemoError: a value is not accepted; the message names the option.
        """
        self._check()
        defaults: dict[str, Any] = EMBEDDED if self.embedded else REAL
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def _check(self) -> None:
        for name in ("seeds", "r", "epochs", "batch_size", "rows", "threads", "finetune_batch_size"):
            _at_least(self, name, 1)
        for name in ("finetune_epochs", "pretrain_steps"):
            _at_least(self, name, 0)
        _at_least(self, "max_length", 4)
        for name in ("alpha", "lr", "finetune_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DemoError(f"{flag(name)} must be greater than 0; got {value}")
        if not 0.0 <= self.noise < 1.0:
            raise DemoError(f"--noise must be a share of words, from 0 up to but not including 1; got {self.noise}")
        if self.fusion not in FUSIONS:
            raise DemoError(f"--fusion must be one of {', '.join(FUSIONS)}; got {self.fusion!r}")
        if (self.model is None) != (self.data is None):
            present, missing = ("--model", "--data") if self.data is None else ("--data", "--model")
            raise DemoError(
                f"{present} needs {missing} as well: a real model and real data must be given together. "
                "Omit both to run on the embedded corpus."
            )
        for name in ("source", "target"):
            if self.data is not None and getattr(self, name) is None:
                raise DemoError(
                    f"{flag(name)} is missing: name a language of {self.data}, for instance "
                    f"{flag(name)} {'english' if name == 'source' else 'acehnese'}"
                )
            if self.data is None and getattr(self, name) is not None:
                raise DemoError(
                    f"{flag(name)} needs --model and --data; the embedded corpus has only one language pair"
                )
        for name in ("source", "target"):
            try:
                folder_name("-" if getattr(self, name) is None else getattr(self, name), flag(name))
            except UserError as error:
                raise DemoError(str(error)) from None
        for name in ("model", "data", "output", "cache_dir"):
            try:
                if getattr(self, name) is not None:
                    checked_text(str(getattr(self, name)), flag(name))
            except UserError as error:
                raise DemoError(str(error)) from None
        if self.data is not None and self.pretrain_steps is not None:
            raise DemoError("--pretrain-steps is for the embedded base; omit it with --model and --data")
        if self.data is not None and self.source == self.target:
            raise DemoError(f"--source and --target are both {self.source!r}; name two languages")


# Defaults for the embedded corpus. Its longest sentence has 23 tokens. The embedded base is too small to run faster
# with two threads.
EMBEDDED = {
    "threads": 1,
    "r": 16,
    "alpha": 32,
    "epochs": 10,
    "batch_size": 32,
    "lr": 5e-3,  # the best learning rate for plain LoRA on this corpus
    "max_length": 24,
    "finetune_epochs": 15,
    "finetune_lr": 1e-3,
    "finetune_batch_size": 32,
}
# Defaults for a real model on a few hundred rows.
REAL = {
    "r": 64,
    "alpha": 128,
    "epochs": 8,
    "batch_size": 32,
    "lr": 1e-3,
    "max_length": 64,
    "finetune_epochs": 5,
    "finetune_lr": 5e-5,
    "finetune_batch_size": 16,
}


def _at_least(settings: DemoSettings, name: str, least: int) -> None:
    value = getattr(settings, name)
    if value is not None and value < least:
        raise DemoError(f"{flag(name)} must be {least} or more; got {value}")
