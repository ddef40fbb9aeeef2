"""The options of `flare demo`: their defaults, and the checks of their values."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flare_kernels import FUSIONS

from ..utils.errors import UserError
from ..utils.names import checked_text, folder_name


class DemoError(UserError, ValueError):
    """A wrong option, folder or file of the demo; the message says how to fix it."""


@dataclass(frozen=True)
class DemoSettings:
    """Options of the demo.

    The demo runs on the embedded corpus, which it generates, or on real data. `resolved` replaces None in the fields
    that `EMBEDDED` (for the embedded corpus) or `REAL` (for real data) lists. Other fields may stay None, with
    the meaning given below.

    Attributes:
        output: folder for results.json, run.json, table.md and results.png.
        seeds: number of seeds; the seeds are 0, 1, and so on.
        model: folder or hub id of a transformers model. None: a tiny BERT that the demo pre-trains (the embedded base).
        data: folder or hub id of parallel data. None: the embedded corpus.
        source, target: two languages of `data`: the base model is fine-tuned on `source`, and the adapters are trained
            for `target`. None for the embedded corpus.
        fusion: FLARE's fusion function.
        r, alpha, epochs, batch_size, lr, max_length: hyper-parameters of the adapters, equal for every method.
        finetune_epochs, finetune_lr, finetune_batch_size: hyper-parameters of the fine-tuning of all weights of the
            base model on the source language.
        noise: share of damaged words in the noisy source. 0: no method is run with a noisy source.
        rows: use at most this many rows of every part of the data, for a quick run. None: all rows.
        pretrain_steps: number of steps of masked-language modelling that pre-train the embedded base. None: 500.
        cache_dir: folder that keeps the embedded base. None: $XDG_CACHE_HOME/flare-kernels, or
            ~/.cache/flare-kernels if that variable is not set.
        threads: number of CPU threads. None: 1 for the embedded base, PyTorch's choice for a real model.
        overwrite: replace earlier results in `output` instead of moving them to a sub-folder.
        progress: show progress bars.
    """

    output: Path = Path("flare-demo")
    seeds: int = 3
    model: str | None = None
    data: str | None = None
    source: str | None = None
    target: str | None = None
    fusion: str = "add_relu"
    r: int | None = None
    alpha: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    max_length: int | None = None
    finetune_epochs: int | None = None
    finetune_lr: float | None = None
    finetune_batch_size: int | None = None
    noise: float = 0.15
    rows: int | None = None
    pretrain_steps: int | None = None
    cache_dir: Path | None = None
    threads: int | None = None
    overwrite: bool = False
    progress: bool = True

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
        for name in ("seeds", "r", "batch_size", "rows", "threads", "finetune_batch_size"):
            _at_least(self, name, 1)
        for name in ("epochs", "finetune_epochs", "pretrain_steps"):
            _at_least(self, name, 0 if name != "epochs" else 1)
        _at_least(self, "max_length", 4)
        for name in ("alpha", "lr", "finetune_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DemoError(f"{option(name)} must be greater than 0; got {value}")
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
                    f"{option(name)} is missing: name a language of {self.data}, for instance "
                    f"{option(name)} {'english' if name == 'source' else 'acehnese'}"
                )
            if self.data is None and getattr(self, name) is not None:
                raise DemoError(
                    f"{option(name)} needs --model and --data; the embedded corpus has only one language pair"
                )
        for name in ("source", "target"):
            try:
                folder_name("-" if getattr(self, name) is None else getattr(self, name), option(name))
            except UserError as error:
                raise DemoError(str(error)) from None
        for name in ("model", "data", "output", "cache_dir"):
            try:
                if getattr(self, name) is not None:
                    checked_text(str(getattr(self, name)), option(name))
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


def option(name: str) -> str:
    """Return the command-line flag of a field."""
    assert name in {item.name for item in fields(DemoSettings)}, name
    return "--" + name.replace("_", "-")


def _at_least(settings: DemoSettings, name: str, least: int) -> None:
    value = getattr(settings, name)
    if value is not None and value < least:
        raise DemoError(f"{option(name)} must be {least} or more; got {value}")
