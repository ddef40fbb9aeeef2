"""Write facts about a run, such as its task and languages, into its adapter's model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...tuner.card import fill_card
from ..tasks import language
from ..utils.errors import UserError
from .methods import READS_SOURCE
from .records import RunRecord


def fill_run_card(folder: Path, model: Any, record: RunRecord) -> None:
    """Fill in the model card of a run's adapter.

    Args:
        folder: the saved adapter.
        model: the trained PeftModel.
        record: run.json of the run.
    """
    target, source = str(record.target_language), record.source_language
    facts = [("task", record.task)]
    if record.settings.get("labels"):
        facts.append(("labels, by index", ", ".join(record.settings["labels"])))
    if record.method in READS_SOURCE:
        origin = {"gold": "human", "mt": "machine-translated"}.get(str(record.source_text), "")
        facts += [("languages", f"{target}, with its source in {source}"), ("source text in training", origin)]
    else:
        facts.append(("language", target))
    if record.method == "flare-mt":
        facts.append(("MT encoder", f"`{record.settings.get('mt_model')}`"))
    facts.append(("texts", f"up to {record.settings.get('max_length')} tokens"))
    codes = [language(name).iso639_3 for name in (target, source) if _known(name)]
    fill_card(folder, model.peft_config["default"], facts, codes if record.method in READS_SOURCE else codes[:1])


def _known(name: str) -> bool:
    try:
        return bool(language(name).iso639_3)
    except UserError:
        return False
