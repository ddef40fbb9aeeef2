"""Share work, results and errors between the processes of a run (accelerate launch). The main process writes files."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from .errors import UserError

A = TypeVar("A")
T = TypeVar("T")

_EVERYWHERE = "known_to_all_processes"
_ENDED = "another process of this run has ended, so this process stops too; the message of the other process says why"


def process_count() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return process_number() == 0


def only_main(print_fn: Callable[[str], None]) -> Callable[[str], None]:
    """Return ``print_fn`` in the main process, and a function that does nothing in every other process."""
    return print_fn if is_main() else lambda line: None


def device() -> Any:
    """Return the torch.device of this process: its own GPU if there are GPUs, otherwise the CPU."""
    import torch

    if process_count() > 1:
        return _state().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Wait for the other processes.

    Raises:
        UserError: another process has ended, or has raised a UserError inside :func:`errors_reach_all`.
    """
    _exchange((None, None))


def on_main(call: Callable[[], T]) -> T:
    """Call a function in the main process and return its result, which must be picklable, in all processes.

    Raises:
        UserError: in every process, if the call raises one.
    """
    return _exchange(_attempt(call) if is_main() else (None, None))[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def errors_reach_all() -> Iterator[None]:
    """Raise a UserError of one process in the other processes too, as soon as they wait for the failing process.

    Without this context, the failing process ends and the launcher ends the other processes.
    """
    try:
        yield
    except UserError as error:
        if not vars(error).get(_EVERYWHERE):
            _exchange((None, error))
        raise


def shared(items: Sequence[A], work: Callable[[A], T]) -> Iterator[tuple[A, T]]:
    """Yield every item with its result, in order and in every process. Each of n processes computes every n-th item.

    The processes exchange results after each round of one item per process. The results equal the results of a single
    process bit for bit if an item is a batch whose content does not depend on the number of processes. The models of
    the processes must not communicate, so `work` must call the unwrapped model, not its DDP wrapper, and must not use
    FSDP.

    Args:
        items: the items, which must be the same in every process.
        work: computes the result of an item, which must be picklable.

    Raises:
        UserError: in every process, if `work` raises one.
    """
    count, number = process_count(), process_number()
    for first in range(0, len(items), count):
        batch = items[first : first + count]
        outcome = (None, None) if number >= len(batch) else _attempt(functools.partial(work, batch[number]))
        yield from zip(batch, _exchange(outcome), strict=False)


def prints_errors() -> bool:
    """Return whether this process is the first of the run to end with an error. Only the first one prints its error.

    Return True too if the launcher's store, which counts the failed processes, cannot be reached.
    """
    if process_count() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:  # the launcher's store outlives every process
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=datetime.timedelta(seconds=10)
        )
        return bool(store.add(f"flare/failed/{attempt}", 1) == 1)
    except (RuntimeError, KeyError, ValueError):
        return True


def leave_group() -> None:
    """Destroy the process group. Call it only after success: after an error, it may wait for an ended process."""
    if process_count() > 1:
        _state().destroy_process_group()


def _state() -> Any:
    """Return accelerate's PartialState. The first call joins the process group and selects this process's GPU."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # on a CPU, accelerate joins a group only if cpu=True
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def _attempt(call: Callable[[], Any]) -> tuple[Any, UserError | None]:
    try:
        return call(), None
    except UserError as error:
        return None, error


def _exchange(outcome: tuple[Any, UserError | None]) -> list[Any]:
    """Return the results of all processes, in order.

    Every communication between processes goes through this function, so that an error reaches the other processes
    wherever they wait.

    Raises:
        UserError: the first error among the outcomes, raised in every process; or a process has ended.
    """
    outcomes = [outcome] * process_count()
    if process_count() > 1:
        import torch.distributed

        _state()
        try:
            # accelerate's gather is not used: TrainingArguments recreates accelerate's state, and on a CPU the new
            # state has a single process
            torch.distributed.all_gather_object(outcomes, outcome)
        except RuntimeError as error:
            raise UserError(f"{_ENDED} ({str(error).splitlines()[0]})") from error
    for _, failure in outcomes:
        if failure is not None:
            vars(failure)[_EVERYWHERE] = True
            raise failure
    return [result for result, _ in outcomes]
