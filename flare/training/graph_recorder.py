"""Record a callable into a CUDA graph, on the one stream on which all steps of a GraphedStep run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._compat import eager_attention_masks, end_failed_capture


@dataclass(frozen=True)
class Recording:
    """A recorded callable: ``replay()`` runs it again and leaves its result in ``result``; ``release()`` frees it."""

    result: Tensor
    replay: Callable[[], None]
    release: Callable[[], None]


class Recorder(Protocol):
    """How GraphedStep records. The tests have one that runs on a CPU."""

    def stream(self) -> AbstractContextManager[None]:
        """Run what is inside on the recorder's stream, after the current stream's work and before what follows."""

    def capture(self, run: Callable[[], Tensor]) -> Recording:
        """Record ``run`` without running its kernels; called inside :meth:`stream`.

        Gradients, parameters and the device's random state are unchanged, also where an exception is raised. After an
        exception, earlier recordings must not be replayed.
        """


class CudaRecorder:
    """Records CUDA graphs. The graphs share one memory pool, and are captured on the stream that the eager steps use.

    The eager steps must run on that stream too: an AccumulateGrad node remembers the stream it was made on, and one of
    the default stream ends a capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def capture(self, run: Callable[[], Tensor]) -> Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[self.device.index]
        random_state = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins the data loader's batches may allocate host memory meanwhile
        capturing = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with eager_attention_masks(), capturing:
                result = run()
        except BaseException:
            # a failed capture leaves the allocator and the generator in capture mode
            end_failed_capture(self.device, self._pool)
            self._pool = None
            generator.graphsafe_set_state(random_state)
            raise

        def release() -> None:
            self._stream.synchronize()  # the last replay may be under way
            graph.reset()

        return Recording(result, graph.replay, release)


def recorder_for(device: torch.device) -> Recorder | None:
    """A recorder for a device, or None where it has no CUDA graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None
