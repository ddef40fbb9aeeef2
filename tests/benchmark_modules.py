"""Functions that import modules of benchmarks/ and run commands. ``KEYS`` names ratios in the benchmarks' summary."""

from __future__ import annotations

import importlib
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def module(name: str) -> Any:
    """Import a module of benchmarks/, which is not a package."""
    return importlib.import_module(name)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root, with one thread and without model downloads. Return its result.

    ``environment`` is added to the environment variables. TRITON_INTERPRET, OUT and PYTEST_ADDOPTS are not inherited.
    """
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT", "PYTEST_ADDOPTS")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**inherited, **variables})


KEYS = {
    *("adapter_over_floor", "qv_speedup_vs_peft_bf16", "qv_speedup_vs_peft_fp32", "qv_speedup_vs_peft_dropout"),
    *("qv_speedup_vs_compile", "qv_speedup_vs_addmm", "forward_transient_vs_eager", "step_vs_lora"),
    *("step_vs_input_fusion", "peak_vs_input_fusion", "step_speedup_vs_authors"),
    *("adapter_share_of_frozen_step", "padded_step_vs_input_fusion"),
}
