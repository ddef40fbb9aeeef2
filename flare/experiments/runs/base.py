"""The base that adapters begin with: what `flare finetune` made, or any other model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..utils.errors import UserError
from .recorded_settings import location
from .records import RUN_FILE, RunRecord, diverged, read_record, read_run
from .run_settings import BASE


@dataclass(frozen=True)
class Base:
    """model: folder or hub id. shown: what run.json names it. record: of its fine-tuning, None for another model."""

    model: str
    shown: str
    record: RunRecord | None

    @property
    def made(self) -> str | None:
        """When it was fine-tuned: another fine-tuning in the same folder is another base."""
        return None if self.record is None else self.record.date


def find_base(output: Path, base: str | None, seed: int) -> Base:
    """The base for a seed: `base`/seed-N where flare finetune wrote it, `base` itself where it is a model.

    Raises:
        UserError: there is none for this seed, or its fine-tuning was not finished.
    """
    named = Path(base).expanduser() if base is not None else output / BASE
    of_seed = named / f"seed-{seed}"
    if (of_seed / RUN_FILE).is_file():
        return _finetuned(of_seed, output)
    if (named / RUN_FILE).is_file():
        return _finetuned(named, output)
    there = sorted(path.parent.name for path in named.glob(f"seed-*/{RUN_FILE}")) if named.is_dir() else []
    if there:
        raise UserError(
            f"{named} has no base for seed {seed}, only {', '.join(there)}; run flare finetune --seeds {seed}, or "
            f"begin every seed with one base: --base {named / there[0]}"
        )
    if base is None:
        raise UserError(
            f"{named} holds no fine-tuned base; run flare finetune --output {output} first, or name a model with --base"
        )
    return Base(base, location(base), None)


def seeds_of(output: Path, base: str | None) -> list[int]:
    """The seeds that there are bases of; [0] for a model that is no folder of seeds."""
    named = Path(base).expanduser() if base is not None else output / BASE
    found = [path.parent.name.removeprefix("seed-") for path in named.glob(f"seed-*/{RUN_FILE}")]
    return sorted(int(seed) for seed in found if seed.isdigit()) or [0]


def _finetuned(folder: Path, output: Path) -> Base:
    record = read_record(folder)
    if what := diverged(read_run(folder)):
        raise UserError(
            f"{folder}: its fine-tuning diverged ({what}); run flare finetune --no-resume with a smaller --lr"
        )
    if not record.done:
        raise UserError(f"{folder}: its fine-tuning is not finished; run flare finetune again, it goes on")
    inside = folder.resolve().is_relative_to(output.resolve())
    # relative where it can be, so that the experiment's folder may move
    shown = folder.resolve().relative_to(output.resolve()).as_posix() if inside else str(folder.resolve())
    return Base(str(folder), shown, record)
