"""Find the newest complete checkpoint of a run.

Missing and truncated files are noticed. Changed bytes in a safetensors file are not noticed, because the format has no
checksum.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..utils.atomic_files import write_json
from ..utils.json_files import read_object
from .run_folder import CHECKPOINTS

STATE_FILE = "trainer_state.json"  # the trainer writes it last
#: Part of a checkpoint -> file patterns, one of which must match. Later patterns are for FSDP, DeepSpeed and XLA.
_PARTS = {
    "weights": ("adapter_model.*", "*/adapter_model.*", "model*.safetensors", "pytorch_model*", "global_step*"),
    "optimizer state": ("optimizer.pt", "optimizer.bin", "optimizer*/", "global_step*", "rank*-optimizer.pt"),
    "state of the random numbers": ("rng_state*.pth",),
}
_DAMAGED = "damaged-"


def last_checkpoint(folder: Path, print_fn: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint of a run, or None.

    A checkpoint whose writing was interrupted is deleted, and a damaged checkpoint is renamed. Both are reported. A
    checkpoint is also skipped if the best checkpoint that it names is damaged or missing, because the run could then
    not end with its best weights.

    Args:
        folder: folder of the run.
        print_fn: prints one line for the user.
    """
    complete: dict[Path, dict[str, Any]] = {}
    damaged = False
    for path in _by_step(folder):
        state = _state(path)
        if state is None:
            print_fn(f"{path} was cut off while it was written, and is removed")
            shutil.rmtree(path)
            continue
        why = damage_of(path)
        if why:
            aside = path.with_name(_DAMAGED + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)  # renamed, because the trainer counts checkpoints by name and deletes the oldest
            print_fn(f"{path} is damaged ({why}); it is kept as {aside.name}, and not used")
            damaged = True
            continue
        complete[path] = state
    for path, state in reversed(complete.items()):
        best = state.get("best_model_checkpoint")
        if best and path.parent / Path(best).name not in complete:
            print_fn(f"{path} is not used: {Path(best).name}, the best checkpoint so far, is damaged or missing")
            continue
        if best and Path(best) != path.parent / Path(best).name:
            # the folder has been moved
            state["best_model_checkpoint"] = str(path.parent / Path(best).name)
            write_json(path / STATE_FILE, state)
        return path
    if damaged or complete:
        print_fn(f"{folder}: no usable checkpoint is left; the training starts from the beginning")
    return None


def damage_of(path: Path) -> str:
    """Return what is missing or damaged in a checkpoint, as text; empty if the checkpoint is complete."""
    for part, patterns in _PARTS.items():
        if not any(next(path.glob(pattern), None) for pattern in patterns):
            return f"it has no {part}"
    if (path / "optimizer.pt").is_file() and not (path / "scheduler.pt").is_file():
        return "it has no scheduler.pt"
    for file in sorted(path.rglob("*")):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as weights:
                    if not len(weights.keys()):
                        return f"{file.name} holds no weights"
            elif file.name.endswith(".index.json"):
                shards = read_object(file)["weight_map"].values()
                lost = sorted(name for name in set(shards) if not (file.parent / name).is_file())
                if lost:
                    return f"it has no {lost[0]}"
            elif file.suffix in (".pt", ".pth", ".bin") and file.name != "training_args.bin":
                with zipfile.ZipFile(file) as content:
                    broken = content.testzip()
                if broken is not None:
                    return f"{file.name} is damaged"
            elif file.name == "adapter_config.json":
                read_object(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{file.name} is damaged: {error}"
    return ""


def _by_step(folder: Path) -> list[Path]:
    paths = [path for path in (folder / CHECKPOINTS).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(paths, key=lambda path: int(path.name.rpartition("-")[2]))


def _state(path: Path) -> dict[str, Any] | None:
    try:
        state = read_object(path / STATE_FILE)
    except (FileNotFoundError, ValueError):
        return None
    return state if isinstance(state, dict) else None
