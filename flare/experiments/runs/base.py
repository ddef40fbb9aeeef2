"""Find the base model that adapters are trained on: a model fine-tuned by `flare finetune`, or any other model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..utils.errors import UserError
from .recorded_settings import location
from .records import RUN_FILE, RunRecord, diverged, read_record, read_run
from .run_settings import BASE


@dataclass(frozen=True)
class Base:
    """A base model.

    model: folder or hub id of the model.
    shown: the model's name in the run.json of runs that use it.
    record: run.json of the fine-tuning; None for a model that `flare finetune` did not write.
    """

    model: str
    shown: str
    record: RunRecord | None

    @property
    def date(self) -> str | None:
        """Date of the fine-tuning, which distinguishes two fine-tunings in one folder."""
        return None if self.record is None else self.record.date


def find_base(output: Path, base: str | None, seed: int) -> Base:
    """Return the base for a seed.

    It is `base`/seed-N or `base`, whichever `flare finetune` wrote, otherwise the model that `base` names.

    Args:
        output: folder of the experiment.
        base: folder or hub id from the user; None: the folder "base" in `output`.
        seed: seed of the runs that use the base; N in seed-N.

    Raises:
        UserError: there is no base for this seed, or its fine-tuning diverged or is not finished.
    """
    named = Path(base).expanduser() if base is not None else output / BASE
    seed_folder = named / f"seed-{seed}"
    if (seed_folder / RUN_FILE).is_file():
        return _finetuned(seed_folder, output)
    if (named / RUN_FILE).is_file():
        return _finetuned(named, output)
    seeds = sorted(path.parent.name for path in named.glob(f"seed-*/{RUN_FILE}")) if named.is_dir() else []
    if seeds:
        raise UserError(
            f"{named} has no base for seed {seed}, only {', '.join(seeds)}; run flare finetune --seeds {seed}, or "
            f"use one base for every seed: --base {named / seeds[0]}"
        )
    if base is None:
        raise UserError(
            f"{named} has no fine-tuned base; run flare finetune --output {output} first, or name a model with --base"
        )
    return Base(base, location(base), None)


def seeds_of(output: Path, base: str | None) -> list[int]:
    """Return every seed N for which `base`/seed-N is a run of `flare finetune`, sorted; [0] if there is none.

    If `base` is None, the folder "base" in `output` is searched instead.
    """
    named = Path(base).expanduser() if base is not None else output / BASE
    seeds = [path.parent.name.removeprefix("seed-") for path in named.glob(f"seed-*/{RUN_FILE}")]
    return sorted(int(seed) for seed in seeds if seed.isdigit()) or [0]


def _finetuned(folder: Path, output: Path) -> Base:
    record = read_record(folder)
    if what := diverged(read_run(folder)):
        raise UserError(
            f"{folder}: the fine-tuning of this base diverged ({what}); run flare finetune --no-resume with a smaller "
            "--lr"
        )
    if not record.done:
        raise UserError(
            f"{folder}: the fine-tuning of this base is not finished; run flare finetune again to resume it"
        )
    inside = folder.resolve().is_relative_to(output.resolve())
    # relative to the experiment's folder if possible, so that this folder can be moved
    shown = folder.resolve().relative_to(output.resolve()).as_posix() if inside else str(folder.resolve())
    return Base(str(folder), shown, record)
