"""GraphedStep: forward and backward of a training step as one CUDA graph per batch shape.

The first steps of a shape run eagerly. Then the step is captured once and replayed: the batch is copied into the
graph's input tensors, and the graph adds to one gradient buffer per parameter, which all shapes share.
"""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..source.inputs import DECODER_ARGUMENTS
from ..source.states import SourceStates
from ..source_cache import SourceStateCache
from .capturable import ModelState, unsupported_batch, unsupported_model, warn_once, without_full_masks
from .graph_recorder import Recorder, Recording, recorder_for

#: Arguments with the source text. Source states replace them if all rows of the batch are in the cache.
_SOURCE_TEXT = ("source_input_ids", "source_attention_mask", "source_token_type_ids")
#: Number of shapes that are remembered, captured or not.
_MAX_SHAPES = 256
#: Number of eager steps of a shape whose graph was dropped because of max_graphs, before the shape is captured again.
_STEPS_AFTER_DROP = 16
#: Number of changes of the model without a replay in between, above which a warning is given.
_MAX_CHANGES = 4

#: Runs forward and backward of one batch and returns the loss.
Step = Callable[[dict[str, Any]], Tensor]


@dataclass
class _Shape:
    """One batch shape: a count of its eager steps, its graph, and the input tensors of the graph."""

    eager_steps: int = 0  # the shape is captured when this reaches warmup_steps; dropping its graph lowers it
    trained: list[nn.Parameter] = field(default_factory=list)  # parameters that get a gradient in a step of this shape
    inputs: dict[str, Any] = field(default_factory=dict)
    recording: Recording | None = None
    failed: bool = False


class GraphedStep:
    """Callable that runs training steps of a model as CUDA graphs, one graph per batch shape.

        step = flare.GraphedStep(model)
        for batch in loader:  # tensors on the host; pin_memory=True makes their copies asynchronous
            loss = step(batch)  # adds gradients to p.grad, as loss.backward() does
            optimizer.step()
            optimizer.zero_grad()

    A call runs forward and backward of one batch, adds the gradients to ``p.grad`` and returns the detached loss.
    Accumulation, clipping, the optimizer and its schedule stay outside, and may set gradients to None. A step that
    cannot be captured runs eagerly, with one warning per reason.

    A replay repeats what was captured. Every call therefore selects the graph by the names, shapes, dtypes and
    constants of the batch, by whether target and source have padding, by autocast's dtype, and by ``variant``. All
    graphs are dropped if one of these has changed: training mode, ``requires_grad``, the addresses of the model's
    tensors, the adapters, the active adapters and their scalings, or hooks. Call :meth:`reset` after any other change
    to what the step's Python code does, such as a dropout probability or a fusion.

    Masks of ones are left out of the batch, so that attention uses the same kernel as in eager steps. Pass batches on
    the host, because reading a mask on the device waits for the device.

    Args:
        model: the model to train, on one CUDA device.
        step: runs forward and backward of a batch (a dict of tensors on the device) and returns the loss. It must not
            read values of tensors. Default: ``loss = model(**batch).loss; loss.backward()``.
        max_graphs: the number of graphs to keep. The least recently used graph is dropped. Each graph keeps its own
            input tensors; the activations of all graphs share one memory pool.
        warmup_steps: number of eager steps of a shape before it is captured, at least 1.
        source_cache: the flare.SourceStateCache passed to the model's ``set_source_cache``. A batch whose rows are all
            in the cache is replayed without a source pass.
        unsupported: the reason why the caller's step cannot be captured, or None. With a reason, all steps run eagerly.
        recorder: replaces CUDA graphs in tests.

    Raises:
        ValueError: max_graphs or warmup_steps is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Step | None = None,
        *,
        max_graphs: int = 4,
        warmup_steps: int = 2,
        source_cache: SourceStateCache | None = None,
        unsupported: str | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        for name, value in (("max_graphs", max_graphs), ("warmup_steps", warmup_steps)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model = model
        self._step = step or self._default_step
        self._max_graphs, self._warmup_steps = max_graphs, warmup_steps
        self._source_cache = source_cache
        self._recorder_argument = self._recorder = recorder
        self._state: ModelState | None = None
        self._unsupported_argument = self._unsupported = unsupported
        self._device = torch.device("cpu")
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._warned: set[str] = set()
        self._captured = self._failed = self._changes = 0

    def __call__(self, batch: Mapping[str, Any], *, variant: Hashable = None) -> Tensor:
        """Run forward and backward of one batch.

        Args:
            batch: the step's arguments: tensors on any device, hashable constants and a flare.SourceStates. Arguments
                that are None are left out, and a number ``num_items_in_batch`` becomes a tensor.
            variant: anything else that the step's Python code depends on, such as the number of accumulated batches.

        Returns:
            The loss, detached. Later calls do not overwrite it.

        Raises:
            ValueError: the default step got a batch for which the model returns no loss.
        """
        self._check_model()
        if self._unsupported is not None:
            self._warn_eager(self._unsupported)
            return self._run(batch)
        inputs = without_full_masks({name: value for name, value in batch.items() if value is not None})
        if isinstance(inputs.get("num_items_in_batch"), int | float):
            inputs["num_items_in_batch"] = torch.tensor(inputs["num_items_in_batch"])
        reason = self._read_cache(inputs) or unsupported_batch(self.model, inputs)
        if reason is not None:
            self._warn_eager(reason)
            return self._run_eagerly(batch)
        shape = self._shape(inputs, variant)
        if shape.failed:
            return self._run_eagerly(batch)
        if shape.recording is None:
            if shape.eager_steps < self._warmup_steps:
                return self._warm_up(shape, inputs)
            if not self._capture(shape, inputs):
                return self._run_eagerly(batch)
        return self._replay(shape, inputs)

    def reset(self) -> None:
        """Drop all graphs; every shape starts with eager steps again."""
        self._drop_graphs()
        self._shapes.clear()
        self._gradients.clear()

    # --- running ------------------------------------------------------------------------------------------------------

    def _default_step(self, batch: dict[str, Any]) -> Tensor:
        output = self.model(**batch)
        loss = output.get("loss") if isinstance(output, dict) else output[0]
        if not isinstance(loss, Tensor):
            raise ValueError(f"the model returned no loss for a batch of {', '.join(batch)}: add labels, or pass step=")
        loss.backward()
        return loss

    def _run(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run the step on tensors of the device, without autocast's cache of cast weights."""
        moved = {name: _moved(value, self._device) for name, value in inputs.items()}
        kind = self._device.type
        cast: Any = contextlib.nullcontext()
        if torch.is_autocast_enabled(kind):  # a weight cast outside a graph would be stale in its replays
            cast = torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
        with cast:
            return self._step(moved).detach()

    def _run_eagerly(self, batch: Mapping[str, Any]) -> Tensor:
        assert self._recorder is not None
        with self._recorder.stream():
            return self._run(batch)

    def _warm_up(self, shape: _Shape, inputs: dict[str, Any]) -> Tensor:
        """Run one of a shape's eager steps before its capture. The last one records which parameters get gradients."""
        assert self._recorder is not None
        shape.eager_steps += 1
        with self._recorder.stream():
            if shape.eager_steps < self._warmup_steps:
                return self._run(inputs)
            with self._recording_gradients(shape):
                return self._run(inputs)

    def _replay(self, shape: _Shape, inputs: dict[str, Any]) -> Tensor:
        assert self._recorder is not None and shape.recording is not None
        with self._recorder.stream():
            _fill(shape.inputs, inputs)
            self._place_gradients(shape)
            shape.recording.replay()
            self._changes = 0
            return shape.recording.result.clone()

    # --- capturing ----------------------------------------------------------------------------------------------------

    def _capture(self, shape: _Shape, inputs: dict[str, Any]) -> bool:
        """Capture a shape's step and return True. Otherwise restore gradients and random state, warn, return False."""
        assert self._recorder is not None
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        host_random = torch.get_rng_state(), random.getstate()
        recording, reason = None, ""
        with self._recorder.stream():
            self._place_gradients(shape)
            grads = [parameter.grad for parameter in parameters]
            try:
                shape.inputs = {name: _static(value, self._device) for name, value in inputs.items()}
                _fill(shape.inputs, inputs)
                recording = self._recorder.capture(lambda: self._run(shape.inputs))
            except Exception as error:
                reason = _described(error)
                self._drop_graphs()
            if any(parameter.grad is not grad for parameter, grad in zip(parameters, grads, strict=True)):
                reason = reason or "a parameter without a gradient in the eager steps of this shape now got one"
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad
        if random.getstate() != host_random[1] or not torch.equal(torch.get_rng_state(), host_random[0]):
            reason = reason or "the step draws random numbers on the host (layer drop?), which a replay would not do"
            torch.set_rng_state(host_random[0])
            random.setstate(host_random[1])
        if reason:
            self._give_up(shape, recording, reason)
            return False
        shape.recording = recording
        self._captured += 1
        self._release_oldest()
        return True

    def _give_up(self, shape: _Shape, recording: Recording | None, reason: str) -> None:
        if recording is not None:
            recording.release()
        shape.inputs, shape.failed = {}, True
        self._failed += 1
        self._warn_eager(reason)
        if self._failed > 1 and not self._captured:  # other shapes would fail in the same way
            self._unsupported = reason

    def _release_oldest(self) -> None:
        """Release the least recently used graphs beyond ``max_graphs``."""
        captured = [shape for shape in self._shapes.values() if shape.recording is not None]
        for shape in captured[: -self._max_graphs]:
            _release(shape)
            shape.eager_steps = self._warmup_steps - _STEPS_AFTER_DROP
            warn_once(
                f"batches have more than max_graphs={self._max_graphs} shapes, so graphs are dropped and many steps "
                "run eagerly; pad to fewer lengths (FlareDataCollator(pad_to_multiple_of=64)), or raise max_graphs",
                self._warned,
            )

    def _warn_eager(self, reason: str) -> None:
        warn_once(f"{reason}; such steps run eagerly", self._warned)

    def _drop_graphs(self) -> None:
        for shape in self._shapes.values():
            if shape.recording is not None:
                _release(shape)

    # --- gradients ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _recording_gradients(self, shape: _Shape) -> Iterator[None]:
        """Record which parameters get a gradient. For all others ``p.grad`` stays None, so the optimizer skips them."""
        reached: dict[nn.Parameter, None] = {}
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda parameter: reached.setdefault(parameter))
            for parameter in self.model.parameters()
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        shape.trained = list(reached)
        if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in reached):
            self._give_up(shape, None, "a parameter has a sparse gradient")

    @torch.no_grad()
    def _place_gradients(self, shape: _Shape) -> None:
        """Point ``p.grad`` to its buffer, which holds zeros or the gradient accumulated so far."""
        for parameter in shape.trained:
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.empty_like(parameter, requires_grad=False)
        empty: list[Tensor] = []
        buffers: list[Tensor] = []
        grads: list[Tensor] = []
        for parameter in shape.trained:
            grad, buffer = parameter.grad, self._gradients[parameter]
            if grad is None:
                empty.append(buffer)
            elif grad is not buffer:
                buffers.append(buffer)
                grads.append(grad)
            parameter.grad = buffer
        if empty:
            torch._foreach_zero_(empty)
        if buffers:
            torch._foreach_copy_(buffers, grads)

    # --- models and batches -------------------------------------------------------------------------------------------

    def _check_model(self) -> None:
        """Drop the graphs of a model that has changed, and check again whether it can be captured."""
        change = self._state.changed() if self._state is not None else ""
        if self._state is not None and not change:
            return
        self._changes += 1
        if self._changes > _MAX_CHANGES:
            self._warn_eager(f"the model changes from step to step ({change}), and a graph holds only one state of it")
        self.reset()
        self._state = ModelState(self.model)
        self._captured = self._failed = 0
        self._unsupported = self._unsupported_argument or unsupported_model(self.model)
        device = next(self.model.parameters()).device
        if self._recorder is None or device != self._device:
            self._recorder = self._recorder_argument or recorder_for(device)
            self._device = device
        if self._recorder is None:
            self._unsupported = self._unsupported or f"the model is on {device}, and CUDA graphs need a CUDA device"

    def _read_cache(self, inputs: dict[str, Any]) -> str | None:
        """Replace the source text by its cached states. Return why the step cannot be captured, or None."""
        if self._source_cache is None or "source_input_ids" not in inputs:
            return None
        if any(name in inputs for name in DECODER_ARGUMENTS):
            return "source_cache: the states of a decoder are looked up inside the step"
        states = self._source_cache.lookup(self.model, inputs)
        if states is None:
            return "source_cache does not return all states of a batch yet, so the step runs the source pass"
        for name in _SOURCE_TEXT:
            inputs.pop(name, None)
        inputs["source_states"] = states
        return None

    def _shape(self, inputs: dict[str, Any], variant: Hashable) -> _Shape:
        kind = self._device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = variant, cast, tuple((name, _key(inputs[name])) for name in sorted(inputs))
        shape = self._shapes.setdefault(key, _Shape())
        self._shapes.move_to_end(key)
        while len(self._shapes) > _MAX_SHAPES:
            _, oldest = self._shapes.popitem(last=False)
            if oldest.recording is not None:
                _release(oldest)
        return shape


def _release(shape: _Shape) -> None:
    assert shape.recording is not None
    shape.recording.release()
    shape.recording, shape.inputs, shape.eager_steps = None, {}, 0


def _described(error: BaseException) -> str:
    """Describe the first error in the chain of an exception, because ending a failed capture raises another error."""
    while error.__context__ is not None:
        error = error.__context__
    if isinstance(error, torch.OutOfMemoryError):
        return "there was not enough memory to capture a step, whose activations need memory in addition to eager steps"
    lines = str(error).strip().splitlines() or [""]
    return f"a step could not be captured ({type(error).__name__}: {lines[0]})"


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, SourceStates):
        states = tuple((key, _key(value.states[key])) for key in sorted(value.states))
        return states, value.offset, None if value.attention_mask is None else _key(value.attention_mask)
    return type(value), value


def _moved(value: Any, device: torch.device) -> Any:
    # accelerate puts offloaded weights on "meta", and its hooks move the inputs
    if isinstance(value, Tensor) and value.device != device and device.type != "meta":
        return value.to(device, non_blocking=True)
    return value


def _static(value: Any, device: torch.device) -> Any:
    """Return what the graph reads for an argument: uninitialised tensors of its shapes, or the constant itself."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=device)
    if isinstance(value, SourceStates):
        states = {key: _static(state, device) for key, state in value.states.items()}
        mask = value.attention_mask
        return SourceStates(states, value.offset, None if mask is None else _static(mask, device))
    return value


@torch.no_grad()
def _fill(static: dict[str, Any], inputs: Mapping[str, Any]) -> None:
    """Copy a batch into the tensors that the graph reads."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            static[name].copy_(value, non_blocking=True)
        elif isinstance(value, SourceStates):
            states = static[name].states
            torch._foreach_copy_(list(states.values()), [value.states[key] for key in states])
            if value.attention_mask is not None:
                static[name].attention_mask.copy_(value.attention_mask, non_blocking=True)
