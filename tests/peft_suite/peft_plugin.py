"""Pytest plugin for PEFT's own tests: select the LoRA tests, and run them with LoraConfig or with FlareConfig.

The plugin reads three environment variables:

``FLARE_PEFT_ADAPTER``
    "lora" runs the tests unchanged. "flare" replaces ``peft.LoraConfig`` by ``FlareConfig(fusion=None)`` with the
    defaults of LoraConfig, before PEFT's tests import LoraConfig.
``FLARE_PEFT_OUTCOMES``
    JSON file that receives the outcome of each test, under the name that the test has with LoraConfig.
``FLARE_PEFT_ONLY``
    JSON file with a list of such names; only these tests run. If the variable is empty, all LoRA tests run.
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

_outcomes: dict[str, list[str]] = {}  # test id: [outcome, reason]


class _Offline(dict):
    """Contains every model, so that PEFT's hub_online_once treats all models as downloaded and stays offline."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> int:
        return 0


def _use_flare() -> None:
    """Replace LoraConfig by FlareConfig with the defaults of LoraConfig."""
    from flare import FlareConfig

    initialise = FlareConfig.__init__

    def with_lora_defaults(self: Any, *args: Any, **fields: Any) -> None:
        initialise(self, *args, **{"fusion": None, "r": 8, "lora_alpha": 8, **fields})

    FlareConfig.__init__ = with_lora_defaults  # type: ignore[method-assign]
    peft.LoraConfig = FlareConfig


def pytest_configure(config: pytest.Config) -> None:
    # PEFT's tests use diffusers only to check for instances of its pipeline
    if importlib.util.find_spec("diffusers") is None:
        diffusers = types.ModuleType("diffusers")
        diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = diffusers
    if os.environ["FLARE_PEFT_ADAPTER"] == "flare":
        _use_flare()


def _uses_lora(item: Any) -> bool:
    """Return whether a test uses LoraConfig.

    If a parameter is a PEFT config or config class, it decides. Otherwise the test's source must contain LoraConfig, or
    the name of its class must contain Lora.
    """
    parameters = getattr(item, "callspec", None)
    for value in parameters.params.values() if parameters else ():
        if inspect.isclass(value) and issubclass(value, peft.PeftConfig):
            return value is peft.LoraConfig
        if isinstance(value, peft.PeftConfig):
            return type(value) is peft.LoraConfig
    text = inspect.getsource(item.function)
    return re.search(r"\bLoraConfig\b", text) is not None or (item.cls is not None and "Lora" in item.cls.__name__)


def _name(nodeid: str) -> str:
    """Return the name that a test has with LoraConfig, without its folder."""
    file, _, test = nodeid.partition("::")
    return f"{Path(file).name}::{re.sub('FlareConfig', 'LoraConfig', test)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    for name, module in sys.modules.items():
        if name.endswith(".testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = _Offline()
    only = os.environ.get("FLARE_PEFT_ONLY")
    names = set(json.loads(Path(only).read_text())) if only else None
    items[:] = [item for item in items if _uses_lora(item) and (names is None or _name(item.nodeid) in names)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    lines = report.longreprtext.strip().splitlines() if report.failed else []
    _outcomes[_name(report.nodeid)] = [report.outcome, lines[-1] if lines else ""]


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ["FLARE_PEFT_OUTCOMES"]).write_text(json.dumps(_outcomes, indent=1, sort_keys=True))
