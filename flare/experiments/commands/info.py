"""`flare info`: versions, device, kernel backends, launch table, and what this machine can run.

A launch table (`flare bench --tune`) lists the fastest measured launches (tile sizes and the like) of the kernels on
one GPU. If it has no entry for a call, a general rule (flare_kernels/triton_ops/config.py) chooses the launch.
"""

from __future__ import annotations

from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `flare`."""
    info = commands.add_parser(
        "info",
        help="print versions, the device, and what can run here",
        description="Print versions, the device, and which features can run on this machine. Useful in bug reports.",
    )
    info.set_defaults(command=run)


def run() -> None:
    """Print the information. This needs no package of the extra `experiments`."""
    from flare_kernels import backends

    from ..utils.environment import environment
    from .capabilities import lines

    here = environment()
    for name, version in here["versions"].items():
        print(f"{name:<15}{version}")
    print(f"{'device':<15}{here['device']}")
    print(f"{'processor':<15}{here['cpu']}, {here['threads']} threads")
    print(f"{'platform':<15}{here['platform']}")
    print("kernel backends")
    for name, status in backends().items():
        print(f"  {name:<13}{status}")
    print(f"{'launch table':<15}{_launch_table()}")
    for line in lines():
        print(line)


def _launch_table() -> str:
    import torch

    from flare_kernels.launch_table import table_for

    if not torch.cuda.is_available():
        return "none (no CUDA device)"
    table = table_for(torch.cuda.get_device_name())
    if table.path is None:
        return "none, so a general rule chooses the launches (flare bench --tune measures a table)"
    return f"{len(table.entries)} entries from {table.path}, {table.about.get('date', 'undated')}"
