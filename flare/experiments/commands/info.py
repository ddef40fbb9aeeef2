"""`flare info`: versions, device, kernel backends, what this machine can run and why not."""

from __future__ import annotations

from typing import Any

from .running import say


def add_parser(commands: Any) -> None:
    """Register the command."""
    info = commands.add_parser("info", help="versions, device and what can run here", description="For bug reports.")
    info.set_defaults(command=run)


def run() -> int:
    """Print it."""
    from flare_kernels import backends

    from ..utils.capabilities import lines
    from ..utils.environment import environment

    here = environment()
    for name, version in here["versions"].items():
        say(f"{name:<15}{version}")
    say(f"{'device':<15}{here['device']}")
    say(f"{'processor':<15}{here['cpu']}, {here['threads']} threads")
    say(f"{'platform':<15}{here['platform']}")
    say("kernel backends")
    for name, status in backends().items():
        say(f"  {name:<13}{status}")
    say(f"{'launch table':<15}{_launch_table()}")
    for line in lines():
        say(line)
    return 0


def _launch_table() -> str:
    import torch

    from flare_kernels.launch_table import table_for

    if not torch.cuda.is_available():
        return "none (no CUDA device)"
    table = table_for(torch.cuda.get_device_name())
    if table.path is None:
        return "none: launches follow the general rule (flare bench --tune measures one)"
    return f"{len(table.entries)} entries from {table.path}, {table.about.get('date', 'undated')}"
