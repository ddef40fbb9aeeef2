"""Choice of the form of a step, without importing Triton.

A step is one operation of the adapter, such as the down-projection ("shrink"). A form is one implementation of a step.
``FORMS`` in ``triton_ops/config.py`` lists the forms of each step. A call takes the form that the launch mode forces,
otherwise the form in the launch table (the tuned launches of one GPU model), otherwise the step's first form (the
general rule). A form that the call's arguments exclude is skipped, and so is a form of the table that the GPU cannot
run.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .launch_mode import Mode
from .launch_table import ROW_BOUNDS, WIDTH_BOUNDS, Entry, Key, bucket, table_for
from .triton_ops.config import FORMS, can_run, operand_class, rank_bucket


def select_form(
    mode: Mode,
    step: str,
    operands: str,
    rank: int,
    rows: int,
    width: int,
    device: torch.device,
    excluded: Collection[str] = (),
) -> tuple[str, Entry | None]:
    """Return the form of a step, and the table entry that decided it (None if no entry did).

    A forced form is taken without a check that the device can run it.

    Args:
        mode: the launch mode, which may force a form or a table.
        step: a key of ``FORMS``.
        operands: the operand class (:func:`class_of`).
        rank, rows, width: sizes as in :class:`~flare_kernels.launch_table.Key`, not yet mapped to buckets.
        device: where the launch runs.
        excluded: forms that this call cannot take, even if they are forced or tuned.
    """
    if mode.forced_form in FORMS[step] and mode.forced_form not in excluded:
        return mode.forced_form, None
    if mode.table is not None:
        entry = mode.table.entries.get(table_key(step, operands, rank, rows, width))
    else:
        entry = tuned_entry(step, operands, rank, rows, width, device)
    if entry is not None and entry.form not in excluded and can_run(step, entry.form, operands, capability(device)):
        return entry.form, entry
    return next(form for form in FORMS[step] if form not in excluded), None


def tuned_entry(step: str, operands: str, rank: int, rows: int, width: int, device: torch.device) -> Entry | None:
    """Return the entry of the device's tuned table for a step; None without an entry or without a CUDA device."""
    if device.type != "cuda":
        return None
    return table_for(_gpu_name(_index(device))).entries.get(table_key(step, operands, rank, rows, width))


def table_key(step: str, operands: str, rank: int, rows: int, width: int) -> Key:
    """Return the key of the launch table's entry for these sizes."""
    return Key(step, operands, rank_bucket(rank), bucket(rows, ROW_BOUNDS), bucket(width, WIDTH_BOUNDS))


def class_of(
    rank: int, compute_dtype: torch.dtype, wide: Sequence[Tensor | None], thin: Sequence[Tensor | None]
) -> str:
    """Return the operand class of a launch (``OPERAND_CLASSES`` in ``triton_ops/config.py``).

    Args:
        rank: rank of one adapter.
        compute_dtype: dtype of the products' operands.
        wide: operands whose rows are as wide as an input or output of the layer (x, y, G = dL/dy, A).
        thin: operands whose rows are as wide as the rank (T, S, B).
    """
    # rows of up to 16 elements may be too short for aligned accesses, and their alignment does not matter
    aligned = is_aligned(*wide) and (rank <= 16 or is_aligned(*thin))
    widest = max(x.element_size() for x in (*wide, *thin) if x is not None)
    return operand_class(compute_dtype.itemsize, widest, aligned)


def is_aligned(*tensors: Tensor | None) -> bool:
    """Return whether Triton can use 16-byte accesses.

    Addresses in bytes, and strides in elements (except strides of 1), must be multiples of 16.
    """
    for x in tensors:
        if x is not None and (x.data_ptr() % 16 or any(s != 1 and s % 16 for s in x.stride())):
            return False
    return True


def capability(device: torch.device) -> int:
    """Return a CUDA device's compute capability as one number (90 for sm_90), or 0 for any other device."""
    return _cuda_capability(_index(device)) if device.type == "cuda" else 0


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


@functools.cache
def _cuda_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)
