"""Two CPU processes of one gloo group, to test multi-GPU code."""

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
    """Run ``function(rank, *args)`` in two processes, which rendezvous through a file; return both results.

    The processes are forked from a server that has imported the packages. They are killed if they do not end in time.

    Raises:
        AssertionError: a process raised (the message has its traceback) or did not end within ``timeout`` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.tensor", "transformers", "peft", "flare", "tiny"]
    )
    shared = folder / f"rendezvous-{len(list(folder.iterdir()))}"
    shared.mkdir()
    workers = [context.Process(target=_work, args=(rank, shared, function, args), daemon=True) for rank in range(WORLD)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout)
            if worker.exitcode != 0:
                break  # the other process may wait forever for this one
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
    errors = [path.read_text() for path in sorted(shared.glob("error-*"))]
    assert not errors, "\n".join(errors)
    codes = [worker.exitcode for worker in workers]
    assert codes == [0] * WORLD, f"exit codes {codes} (-9: killed after {timeout} s)"
    return [torch.load(shared / f"result-{rank}", weights_only=False) for rank in range(WORLD)]


def _work(rank: int, shared: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("gloo", init_method=f"file://{shared}/group", rank=rank, world_size=WORLD)
        torch.save(function(rank, *args), shared / f"result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (shared / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None
