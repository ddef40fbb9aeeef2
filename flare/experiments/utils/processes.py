"""One process or several (accelerate launch): who writes and prints, how work is shared, and how errors reach all."""

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
_ENDED = "another process of this run has ended, so this one cannot go on; its own message says why"


def process_count() -> int:
    """Return how many processes work on this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Return which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return process_number() == 0


def only_main(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that says a line in the main process and nothing in the others."""
    return say if is_main() else lambda line: None


def device() -> Any:
    """Return the torch.device of this process: its own GPU where there are some, else the CPU."""
    import torch

    if process_count() > 1:
        return _state().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Wait for the other processes.

    Raises:
        UserError: one of them has ended, or has raised one inside :func:`errors_reach_all`.
    """
    _exchange((None, None))


def on_main(call: Callable[[], T]) -> T:
    """Call in the main process and return the result (which must be picklable) in all.

    Raises:
        UserError: in every process, where the call raises one.
    """
    return _exchange(_attempt(call) if is_main() else (None, None))[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def errors_reach_all() -> Iterator[None]:
    """Raise a UserError of one process in the others as well, where they next wait for it.

    Without this a process that fails has to end, and the launcher ends the others.
    """
    try:
        yield
    except UserError as error:
        if not vars(error).get(_EVERYWHERE):
            _exchange((None, error))
        raise


def shared(items: Sequence[A], work: Callable[[A], T]) -> Iterator[tuple[A, T]]:
    """Yield every item with its result, in order and in every process; each process works on every n-th item.

    The processes exchange results after each round of one item per process. Results are one process's, to the bit,
    where an item is a batch that is formed in the same way whatever the number of processes. The models of the
    processes must not communicate (DDP's unwrapped model, not FSDP's).

    Args:
        items: the same in every process.
        work: makes the result of an item, which must be picklable.

    Raises:
        UserError: in every process, where `work` raises one.
    """
    count, number = process_count(), process_number()
    for first in range(0, len(items), count):
        together = items[first : first + count]
        outcome = (None, None) if number >= len(together) else _attempt(functools.partial(work, together[number]))
        yield from zip(together, _exchange(outcome), strict=False)


def says_the_error() -> bool:
    """Whether this process is the first of the run to end with an error, and so the one that prints it."""
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


def leave() -> None:
    """Leave the group of processes. Only after a run that succeeded: after an error it could wait for a process that
    has ended.
    """
    if process_count() > 1:
        _state().destroy_process_group()


def _state() -> Any:
    """The group of processes, joined if this process has not; its GPU becomes the current device."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # accelerate joins no group on a CPU unless it is told to
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def _attempt(call: Callable[[], Any]) -> tuple[Any, UserError | None]:
    try:
        return call(), None
    except UserError as error:
        return None, error


def _exchange(outcome: tuple[Any, UserError | None]) -> list[Any]:
    """Return the results of all processes, in order. All that processes say to each other is said here, so that an
    error is received wherever the others wait.

    Raises:
        UserError: the first of the outcomes' errors, in every process; or a process has ended.
    """
    outcomes = [outcome] * process_count()
    if process_count() > 1:
        import torch.distributed

        _state()
        try:
            # not accelerate's: transformers' TrainingArguments make its state anew, on a CPU as that of one process
            torch.distributed.all_gather_object(outcomes, outcome)
        except RuntimeError as error:
            raise UserError(f"{_ENDED} ({str(error).splitlines()[0]})") from error
    for _, failure in outcomes:
        if failure is not None:
            vars(failure)[_EVERYWHERE] = True
            raise failure
    return [result for result, _ in outcomes]
