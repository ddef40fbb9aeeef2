"""Measure what a training step costs: tensor bytes, bytes saved for backward, FLOPs, launches, module calls, seconds.

    with peak_bytes(live=model.parameters()) as peak, saved_bytes(ignore=model.parameters()) as saved:
        model(**batch).loss.backward()
    print(peak.peak, saved.total)

- :mod:`.memory`: ``peak_bytes``, ``saved_bytes`` and ``transient_bytes``.
- :mod:`.flops`: ``count_flops``.
- :mod:`.counts`: ``count_ops`` (launches) and ``count_calls`` (module calls).
- :mod:`.timing`: ``StepTimer``.

Bytes on a CPU, FLOPs and counts are the same on every machine, so tests can assert them. Counting slows a step down, so
measure memory and seconds in different steps.
"""

from .counts import count_calls, count_ops
from .flops import count_flops
from .memory import peak_bytes, saved_bytes, transient_bytes
from .timing import StepTimer

__all__ = ["StepTimer", "count_calls", "count_flops", "count_ops", "peak_bytes", "saved_bytes", "transient_bytes"]
