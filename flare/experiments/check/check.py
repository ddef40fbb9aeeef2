"""`flare check`: what `flare train` would read and cost, said before it is started. Nothing is written but --json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..runs.base import Base, find_base
from ..runs.callbacks import quiet_libraries
from ..runs.methods import for_method
from ..runs.recorded_settings import location
from ..runs.run_settings import BASE, CheckSettings
from ..runs.setup import Data, Notes, Setup, prepare
from ..runs.train import Plan, read_grid
from ..tasks import Pair
from ..utils.atomic_files import write_json
from ..utils.environment import environment, now
from ..utils.errors import UserError
from . import tables
from .costs import Cost, Score, measure, memory_warning, score_base
from .data import DataCheck, check_data


@dataclasses.dataclass
class Check:
    """Everything that was found.

    about: task, languages, model and sizes. data: of each target. score: of the base. costs: of each method, for the
    first target. runs: how many there are of each method. warnings: in words.
    """

    about: dict[str, Any]
    data: list[DataCheck]
    score: Score | None
    costs: list[Cost]
    runs: int
    warnings: list[str]


def run_check(settings: CheckSettings, say: Callable[[str], None] = print) -> Check:
    """Look at data and model, measure, and print tables and warnings.

    Raises:
        UserError: something the user can mend, such as a split that is missing.
    """
    settings.check()
    with quiet_libraries():
        base = _base(settings)
        notes = Notes(say)
        settings, data, grid = read_grid(settings, {settings.seeds[0]: base}, notes)
        setup = prepare(settings, data.task, base.model, settings.training)
        notes(setup.notes)
        about = _about(settings, data, setup, base)
        say(tables.headline(about))
        checks = []
        for target in settings.target or ():
            plan = _reading(grid, target)
            splits, news = _splits(settings, plan, data)
            checks.append(check_data(target, data.source, splits, news, setup, settings.show))
            for line in tables.data(checks[-1], data.source):
                say(line)
        score, said = _score(settings, data, setup, base)
        for line in said if score is None else tables.score(score, data.source):
            say(line)
        costs = _costs(settings, grid, base, data)
        runs = len(settings.seeds) * len(settings.target or ())
        if costs:
            for line in tables.costs(costs, runs, about):
                say(line)
        warnings = _warnings(checks, score, costs, data.source)
        for line in tables.warnings(warnings):
            say(line)
    found = Check(about, checks, score, costs, runs, warnings)
    if settings.json is not None:
        write_json(settings.json, {**dataclasses.asdict(found), "environment": environment(), "date": now()})
        say(f"written to {settings.json}")
    return found


def _base(settings: CheckSettings) -> Base:
    """The base that is there; else the model of --model, which is not fine-tuned."""
    there = (settings.output / BASE).is_dir() or settings.base is not None
    if settings.model is not None and not there:
        return Base(settings.model, location(settings.model), None)
    try:
        return find_base(settings.output, settings.base, settings.seeds[0])
    except UserError as error:
        if there:
            raise
        raise UserError(f"{error}. To check before that, name the model to begin with: --model") from error


def _about(settings: CheckSettings, data: Data, setup: Setup, base: Base) -> dict[str, Any]:
    here = environment(bool(settings.training.get("use_cpu")))
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
        "device": here["device"]
        if here["device"] != "cpu"
        else f"{here['cpu']}, {here['threads']} thread{'s' * (here['threads'] > 1)}",
    }


def _reading(grid: Sequence[Plan], target: str) -> Plan:
    """A run of a target that reads a source, if one does."""
    own = [plan for plan in grid if plan.target == target]
    return next((plan for plan in own if plan.source_text is not None), own[0])


def _splits(settings: CheckSettings, plan: Plan, data: Data) -> tuple[dict[str, list[Pair]], list[str]]:
    """The pairs that a run reads, and the notes about them."""
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
        notes = [*notes, f"{language} has no valid split: the last checkpoint is used"]
    splits["test"], more = data.pairs(plan.target, "test", source_text=plan.source_text)
    return splits, [*notes, *more]


def _score(settings: CheckSettings, data: Data, setup: Setup, base: Base) -> tuple[Score | None, list[str]]:
    """The base's score, or why there is none."""
    if settings.score_rows == 0:
        return None, []
    if base.record is None and setup.form.layout == "encoder":
        return None, ["", f"No score of the base: {base.model} is not fine-tuned, so its head is random."]
    split = "valid" if data.has(data.source, "valid") else "test"
    pairs, _ = data.pairs(data.source, split)
    pairs = pairs[: settings.score_rows]
    batch = settings.eval_batch_size or 2 * int(setup.recipe.training.get("per_device_train_batch_size", 32))
    batch = int(settings.training.get("per_device_train_batch_size", batch))
    name = f"base on {data.source}" if settings.progress else None
    return score_base(setup, pairs, split, batch, name), []


def _costs(settings: CheckSettings, grid: Sequence[Plan], base: Base, data: Data) -> list[Cost]:
    """The cost of every method, fusion and rank, on the first target."""
    if settings.steps == 0:
        return []
    found = []
    own = [plan for plan in grid if plan.target == grid[0].target and plan.seed == grid[0].seed]
    with tqdm(own, unit="method", leave=False, disable=None if settings.progress else True) as bar:
        for plan in bar:
            bar.set_description(plan.variant)
            setup = for_method(plan.method, prepare(settings, data.task, base.model, settings.training))
            splits, _ = _splits(settings, plan, data)
            found.append(measure(settings, plan, setup, splits))
    return found


def _warnings(checks: Sequence[DataCheck], score: Score | None, costs: Sequence[Cost], source: str) -> list[str]:
    found = [line for check in checks for line in check.warnings]
    if score is not None and score.at_chance:
        found.append(
            f"the base is at chance level on {source}: adapters trained on it learn the task anew, or not at all; "
            "fine-tune it longer or with another --lr"
        )
    found += [f"{cost.method} cannot be trained here: {cost.error}" for cost in costs if cost.error]
    found += [line for cost in costs if (line := memory_warning(cost))]
    return list(dict.fromkeys(found))
