"""`flare check`: show what `flare train` would read and cost. No file is written, except the file that --json names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..runs.base import Base, find_base
from ..runs.callbacks import quiet_libraries
from ..runs.grid import Plan, read_grid
from ..runs.methods import for_method
from ..runs.recorded_settings import location
from ..runs.run_settings import BASE, CheckSettings
from ..runs.setup import Data, Notes, Setup, prepare
from ..tasks import Pair
from ..utils.atomic_files import write_json
from ..utils.environment import environment, now
from ..utils.errors import UserError
from . import terminal
from .costs import Cost, Score, measure, memory_warning, score_base
from .data import DataCheck, check_data


@dataclasses.dataclass
class Check:
    """Results of a check.

    about: task, languages, model, lengths and device.
    data: results for the data of each target language.
    score: score of the base, or None if it was not scored.
    costs: costs of one run of each method (with each fusion and rank) on the first target language; [] if --steps is 0.
    runs: number of runs of each method: the number of seeds times the number of target languages.
    warnings: one sentence per warning.
    """

    about: dict[str, Any]
    data: list[DataCheck]
    score: Score | None
    costs: list[Cost]
    runs: int
    warnings: list[str]


def run_check(settings: CheckSettings, print_fn: Callable[[str], None] = print) -> Check:
    """Check the data and the model, measure costs, and print tables and warnings.

    Raises:
        UserError: an error the user can fix, such as a missing split.
    """
    settings.check()
    with quiet_libraries():
        base = _base(settings)
        notes = Notes(print_fn)
        settings, data, grid = read_grid(settings, {settings.seeds[0]: base}, notes)
        setup = prepare(settings, data.task, base.model, settings.training)
        notes(setup.notes)
        about = _about(settings, data, setup, base)
        print_fn(terminal.headline(about))
        checks = []
        for target in settings.target or ():
            splits, messages = _splits(_plan_with_source(grid, target), data)
            checks.append(check_data(target, data.source, splits, messages, setup, settings.show))
            for line in terminal.data(checks[-1], data.source):
                print_fn(line)
        score, no_score = _score(settings, data, setup, base)
        for line in no_score if score is None else terminal.score(score, data.source):
            print_fn(line)
        costs = _costs(settings, grid, base, data)
        runs = len(settings.seeds) * len(settings.target or ())
        if costs:
            for line in terminal.costs(costs, runs, about):
                print_fn(line)
        warnings = _warnings(checks, score, costs, data.source)
        for line in terminal.warnings(warnings):
            print_fn(line)
    check = Check(about, checks, score, costs, runs, warnings)
    if settings.json is not None:
        write_json(settings.json, {**dataclasses.asdict(check), "environment": environment(), "date": now()})
        print_fn(f"written to {settings.json}")
    return check


def _base(settings: CheckSettings) -> Base:
    """Return the fine-tuned base or the model of --base if there is one, else the model of --model."""
    exists = (settings.output / BASE).is_dir() or settings.base is not None
    if settings.model is not None and not exists:
        return Base(settings.model, location(settings.model), None)
    try:
        return find_base(settings.output, settings.base, settings.seeds[0])
    except UserError as error:
        if exists:
            raise
        raise UserError(f"{error}. To check without a base, name the pretrained model with --model") from error


def _about(settings: CheckSettings, data: Data, setup: Setup, base: Base) -> dict[str, Any]:
    machine = environment(bool(settings.training.get("use_cpu")))
    return {
        "task": data.task.name,
        "data": location(str(data.folder or data.task.hub_id or "")),
        "source": data.source,
        "targets": list(settings.target or ()),
        "model": setup.model,
        "fine-tuned": base.record is not None,
        "family": setup.family,
        "max_length": setup.max_length,
        "padding": setup.batches["padding"],
        "source_text": settings.source_text,
        "target_text": settings.target_text,
        "device": machine["device"]
        if machine["device"] != "cpu"
        else f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}",
    }


def _plan_with_source(grid: Sequence[Plan], target: str) -> Plan:
    """Return a run of a target language that reads a source, or the target's first run if no run does."""
    plans = [plan for plan in grid if plan.target == target]
    return next((plan for plan in plans if plan.source_text is not None), plans[0])


def _splits(plan: Plan, data: Data) -> tuple[dict[str, list[Pair]], list[str]]:
    """Return a dict from each split that a run reads to its pairs, and notes about the splits."""
    splits: dict[str, list[Pair]] = {}
    splits["train"], notes = data.pairs(
        plan.target, "train", target_text=plan.target_text, source_text=plan.train_source
    )
    language = data.source if plan.target_text == "mt" else plan.target
    if data.has(language, "valid"):
        splits["valid"], more = data.pairs(
            plan.target, "valid", target_text=plan.target_text, source_text=plan.train_source
        )
        notes = [*notes, *more]
    else:
        notes = [*notes, f"{language} has no valid split, so the last checkpoint is used"]
    splits["test"], more = data.pairs(plan.target, "test", source_text=plan.source_text)
    return splits, [*notes, *more]


def _score(settings: CheckSettings, data: Data, setup: Setup, base: Base) -> tuple[Score | None, list[str]]:
    """Return the base's score and no lines. If the base is not scored, return None and lines that say why.

    There are no lines if the user switched the scoring off (`score_rows` is 0).
    """
    if settings.score_rows == 0:
        return None, []
    if base.record is None and setup.form.layout == "encoder":
        return None, ["", f"No score of the base: {base.model} is not fine-tuned, so its head has random weights."]
    split = "valid" if data.has(data.source, "valid") else "test"
    pairs, _ = data.pairs(data.source, split)
    rows = min(settings.score_rows, len(pairs))
    pairs = [pairs[index * len(pairs) // rows] for index in range(rows)]  # the file may be sorted by label
    training = {**setup.recipe.training, **settings.training}
    batch = settings.eval_batch_size or 2 * int(training.get("per_device_train_batch_size", 32))
    name = f"base on {data.source}" if settings.progress else None
    return score_base(setup, pairs, split, batch, name, bool(settings.training.get("use_cpu"))), []


def _costs(settings: CheckSettings, grid: Sequence[Plan], base: Base, data: Data) -> list[Cost]:
    """Return the costs of every method, fusion and rank on the first target language, or [] if `steps` is 0."""
    if settings.steps == 0:
        return []
    costs = []
    plans = [plan for plan in grid if plan.target == grid[0].target and plan.seed == grid[0].seed]
    with tqdm(plans, unit="method", leave=False, disable=None if settings.progress else True) as bar:
        for plan in bar:
            bar.set_description(plan.variant)
            setup = for_method(plan.method, prepare(settings, data.task, base.model, settings.training))
            splits, _ = _splits(plan, data)
            costs.append(measure(settings, plan, setup, splits))
    return costs


def _warnings(checks: Sequence[DataCheck], score: Score | None, costs: Sequence[Cost], source: str) -> list[str]:
    lines = [line for check in checks for line in check.warnings]
    if score is not None and score.at_chance:
        lines.append(
            f"the base is at chance level on {source}, so adapters on it learn the task from the start, or not at all; "
            "fine-tune the base with more --epochs or another --lr"
        )
    lines += [f"{cost.method} cannot be trained here: {cost.error}" for cost in costs if cost.error]
    lines += [line for cost in costs if (line := memory_warning(cost))]
    return list(dict.fromkeys(lines))
