"""Pytest plugin for PEFT's own tests: keep those about LoRA, and run them with LoraConfig or with a plain FlareConfig.

``FLARE_PEFT_ADAPTER=lora`` leaves PEFT alone. ``FLARE_PEFT_ADAPTER=flare`` puts ``FlareConfig(fusion=None)``, with
LoraConfig's defaults, in LoraConfig's place before PEFT's tests import it. Outcomes go to ``FLARE_PEFT_OUTCOMES``, by
the tests' names under LoraConfig. ``FLARE_PEFT_ONLY`` names a JSON file with a list of those, to run no others.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest

_LORA = peft.LoraConfig
_outcomes: dict[str, list[str]] = {}  # test id: [outcome, reason]


class _Offline(dict):
    """Says of every model that it was fetched before, so that PEFT's hub_online_once stays offline."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> int:
        return 0


def _use_flare() -> None:
    """Put FlareConfig in LoraConfig's place; values that are not given are LoraConfig's."""
    from flare import FlareConfig

    initialise = FlareConfig.__init__

    def with_lora_defaults(self: Any, *args: Any, **fields: Any) -> None:
        initialise(self, *args, **{"fusion": None, "r": 8, "lora_alpha": 8, **fields})

    FlareConfig.__init__ = with_lora_defaults  # type: ignore[method-assign]
    peft.LoraConfig = FlareConfig


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("diffusers") is None:  # PEFT's tests ask whether a model is its pipeline, and no more
        diffusers = types.ModuleType("diffusers")
        diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = diffusers
    if os.environ["FLARE_PEFT_ADAPTER"] == "flare":
        _use_flare()


def _about_lora(item: Any) -> bool:
    """Whether a test is run with LoraConfig: as its parameter, or, where it takes no config class, in its text."""
    parameters = getattr(item, "callspec", None)
    for value in parameters.params.values() if parameters else ():
        if inspect.isclass(value) and issubclass(value, peft.PeftConfig):
            return value is peft.LoraConfig
        if isinstance(value, peft.PeftConfig):
            return type(value) is peft.LoraConfig
    text = inspect.getsource(item.function)
    return re.search(r"\bLoraConfig\b", text) is not None or (item.cls is not None and "Lora" in item.cls.__name__)


def _name(nodeid: str) -> str:
    """A test's name under LoraConfig, without its folder."""
    file, _, test = nodeid.partition("::")
    return f"{Path(file).name}::{re.sub('FlareConfig', 'LoraConfig', test)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    for name, module in sys.modules.items():
        if name.endswith(".testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = _Offline()
    only = os.environ.get("FLARE_PEFT_ONLY")
    wanted = set(json.loads(Path(only).read_text())) if only else None
    items[:] = [item for item in items if _about_lora(item) and (wanted is None or _name(item.nodeid) in wanted)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    said = report.longreprtext.strip().splitlines() if report.failed else []
    _outcomes[_name(report.nodeid)] = [report.outcome, said[-1] if said else ""]


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ["FLARE_PEFT_OUTCOMES"]).write_text(json.dumps(_outcomes, indent=1, sort_keys=True))
