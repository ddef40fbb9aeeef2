"""Record a callable as a CUDA graph, on the stream that all steps of one GraphedStep share."""

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
    """A recorded callable.

    Attributes:
        result: the tensor that every replay writes its result to.
        replay: runs the recorded kernels again.
        release: frees the recording.
    """

    result: Tensor
    replay: Callable[[], None]
    release: Callable[[], None]


class Recorder(Protocol):
    """Interface that GraphedStep records with. The tests have an implementation for the CPU."""

    def stream(self) -> AbstractContextManager[None]:
        """Run the block on the recorder's stream, after earlier and before later work of the current stream."""

    def capture(self, run: Callable[[], Tensor]) -> Recording:
        """Record ``run`` without running its kernels; called inside :meth:`stream`.

        Gradients, parameters and the device's random state do not change, even if an exception is raised. After an
        exception, earlier recordings must not be replayed.
        """


class CudaRecorder:
    """Recorder of CUDA graphs, which share one memory pool and one stream.

    Eager steps must run on the same stream: an AccumulateGrad node keeps the stream that it was created on, and a node
    of the default stream makes a capture fail.
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
        # thread_local: the data loader's pinning thread may allocate host memory during the capture
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
            self._stream.synchronize()  # the last replay may still run
            graph.reset()

        return Recording(result, graph.replay, release)


def recorder_for(device: torch.device) -> Recorder | None:
    """Return a recorder for a device, or None if the device has no CUDA graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None
