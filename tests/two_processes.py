"""Two CPU processes of one gloo group, for tests of what runs on many GPUs."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


def run(folder: Path, function: Callable[..., None], *args: Any, timeout: float = 120.0) -> list[Any]:
    """``function(rank, *args)`` in two processes that find each other through a file; what each returned.

    The processes come from a server that has the imports behind it. None outlives the call.

    Raises:
        AssertionError: one raised (with its traceback), or was not done in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.tensor", "transformers", "peft", "flare", "tiny"]
    )
    meeting = folder / f"meeting-{len(list(folder.iterdir()))}"
    meeting.mkdir()
    workers = [
        context.Process(target=_work, args=(rank, meeting, function, args), daemon=True) for rank in range(WORLD)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout)
            if worker.exitcode != 0:
                break  # the other one waits for it
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
    errors = [path.read_text() for path in sorted(meeting.glob("error-*"))]
    assert not errors, "\n".join(errors)
    codes = [worker.exitcode for worker in workers]
    assert codes == [0] * WORLD, f"exit codes {codes} (-9: not done within {timeout} s)"
    return [torch.load(meeting / f"result-{rank}", weights_only=False) for rank in range(WORLD)]


def _work(rank: int, meeting: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}/group", rank=rank, world_size=WORLD)
        torch.save(function(rank, *args), meeting / f"result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (meeting / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None
