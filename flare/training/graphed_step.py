"""GraphedStep: forward and backward of a training step as one CUDA graph per shape of batch.

    step = flare.GraphedStep(model)
    for batch in loader:                # tensors on the host, pinned where the copy should not wait
        loss = step(batch)              # gradients are added to p.grad, as by loss.backward()
        optimizer.step()
        optimizer.zero_grad()

A shape's first steps are ordinary eager steps. Then the step is captured once and replayed: the batch is copied into
the graph's own tensors, and the graph adds into one gradient buffer per parameter, which all shapes share.
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

#: Arguments of the source's text, for which a warm cache has states.
_SOURCE_TEXT = ("source_input_ids", "source_attention_mask", "source_token_type_ids")
#: Shapes that are remembered, captured or not.
_MAX_SHAPES = 256
#: Eager steps of a shape whose graph made room for another, before it is captured again.
_PATIENCE = 16
#: How often the model may change between two replays before that is said.
_MAX_CHANGES = 4

#: Forward and backward of one batch; returns the loss.
Step = Callable[[dict[str, Any]], Tensor]


@dataclass
class _Shape:
    """One shape of batch: how many eager steps it had, and its graph with the tensors that the graph reads."""

    warmed: int = 0
    trained: list[nn.Parameter] = field(default_factory=list)  # what gets a gradient in a step of this shape
    inputs: dict[str, Any] = field(default_factory=dict)
    recording: Recording | None = None
    failed: bool = False


class GraphedStep:
    """Run training steps of a model as CUDA graphs, one per shape of batch; steps that cannot be captured run eagerly.

    Calling it runs forward and backward of one batch and returns the detached loss. Gradients are added to ``p.grad``.
    Accumulation, clipping, the optimizer and its schedule stay outside, and may set gradients to None.

    What a graph freezes is part of its key or checked before each replay: shapes, whether a text has padding, autocast,
    training mode, the addresses of the model's tensors, active adapters and their scalings, hooks. After another change
    to what the step's Python code does (a dropout probability, a fusion) call :meth:`reset`.

    Masks that are all ones are left out, so that attention takes the kernel that it takes eagerly. Pass batches on the
    host: reading a mask on the device waits for it.

    Args:
        model: the model that is trained, on one CUDA device.
        step: runs forward and backward of a batch (a dict of tensors on the device) and returns the loss. Default:
            ``loss = model(**batch).loss; loss.backward()``. It must not read values of tensors.
        max_graphs: how many shapes are kept captured, those last used. Each keeps its inputs; they share one pool for
            activations.
        warmup_steps: eager steps of a shape before it is captured, at least 1.
        source_cache: the flare.SourceStateCache that the model was given (``set_source_cache``): batches whose rows are
            all kept are replayed without a source pass.
        unsupported: why the caller's step cannot be captured; all steps then run eagerly.
        recorder: for tests, what records in place of CUDA graphs.

    Raises:
        ValueError: max_graphs or warmup_steps below 1.
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
        self._given_recorder = self._recorder = recorder
        self._state: ModelState | None = None
        self._given_reason = self._unsupported = unsupported
        self._device = torch.device("cpu")
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._said: set[str] = set()
        self._captured = self._failed = self._changes = 0

    def __call__(self, batch: Mapping[str, Any], *, variant: Hashable = None) -> Tensor:
        """Run forward and backward of one batch.

        Args:
            batch: what the step reads: tensors on any device (an integer ``num_items_in_batch`` becomes one), constants
                and a flare.SourceStates. ``None`` counts as left out.
            variant: anything else that the step's Python code depends on, such as how many batches are accumulated.

        Returns:
            The loss, a tensor of its own without a graph.
        """
        self._check_model()
        if self._unsupported is not None:
            self._say_eager(self._unsupported)
            return self._run(batch)
        inputs = without_full_masks({name: value for name, value in batch.items() if value is not None})
        if isinstance(inputs.get("num_items_in_batch"), int | float):
            inputs["num_items_in_batch"] = torch.tensor(inputs["num_items_in_batch"])
        reason = self._read_cache(inputs) or unsupported_batch(self.model, inputs)
        if reason is not None:
            self._say_eager(reason)
            return self._run_eagerly(batch)
        shape = self._shape(inputs, variant)
        if shape.failed:
            return self._run_eagerly(batch)
        if shape.recording is None:
            if shape.warmed < self._warmup_steps:
                return self._warm_up(shape, inputs)
            if not self._capture(shape, inputs):
                return self._run_eagerly(batch)
        return self._replay(shape, inputs)

    def reset(self) -> None:
        """Forget all graphs; every shape starts with eager steps again."""
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
        """The step itself, on tensors of the device, without autocast's cache of cast weights."""
        given = {name: _moved(value, self._device) for name, value in inputs.items()}
        kind = self._device.type
        cast: Any = contextlib.nullcontext()
        if torch.is_autocast_enabled(kind):  # a cast kept from outside a graph would be old in its replays
            cast = torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
        with cast:
            return self._step(given).detach()

    def _run_eagerly(self, batch: Mapping[str, Any]) -> Tensor:
        assert self._recorder is not None
        with self._recorder.stream():
            return self._run(batch)

    def _warm_up(self, shape: _Shape, inputs: dict[str, Any]) -> Tensor:
        """An eager step that counts; the last one notes which parameters get a gradient."""
        assert self._recorder is not None
        shape.warmed += 1
        with self._recorder.stream():
            if shape.warmed < self._warmup_steps:
                return self._run(inputs)
            with self._noting_gradients(shape):
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
        """Capture a shape's step. False, with the reason said, where that fails: everything is then as before."""
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
                reason = reason or "a parameter got a gradient that had none in the eager steps of the same shape"
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad
        if random.getstate() != host_random[1] or not torch.equal(torch.get_rng_state(), host_random[0]):
            reason = reason or "the step draws random numbers on the host (layer drop?), which a replay would not"
            torch.set_rng_state(host_random[0])
            random.setstate(host_random[1])
        if reason:
            self._give_up(shape, recording, reason)
            return False
        shape.recording = recording
        self._captured += 1
        self._keep_few()
        return True

    def _give_up(self, shape: _Shape, recording: Recording | None, reason: str) -> None:
        if recording is not None:
            recording.release()
        shape.inputs, shape.failed = {}, True
        self._failed += 1
        self._say_eager(reason)
        if self._failed > 1 and not self._captured:  # each further shape would fail in the same way
            self._unsupported = reason

    def _keep_few(self) -> None:
        """Release the graphs used longest ago, beyond ``max_graphs``."""
        captured = [shape for shape in self._shapes.values() if shape.recording is not None]
        for shape in captured[: -self._max_graphs]:
            _release(shape)
            shape.warmed = self._warmup_steps - _PATIENCE
            warn_once(
                f"batches have more than max_graphs={self._max_graphs} shapes, so graphs are dropped and many steps "
                "run eagerly; pad to fewer lengths (FlareDataCollator(pad_to_multiple_of=64)), or keep more graphs",
                self._said,
            )

    def _say_eager(self, reason: str) -> None:
        warn_once(f"{reason}; such steps run eagerly", self._said)

    def _drop_graphs(self) -> None:
        for shape in self._shapes.values():
            if shape.recording is not None:
                _release(shape)

    # --- gradients ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _noting_gradients(self, shape: _Shape) -> Iterator[None]:
        """Note the parameters that get a gradient inside: others keep p.grad as None, and the optimizer skips them."""
        noted: dict[nn.Parameter, None] = {}
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda reached: noted.setdefault(reached))
            for parameter in self.model.parameters()
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        shape.trained = list(noted)
        if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in noted):
            self._give_up(shape, None, "a parameter has a sparse gradient")

    @torch.no_grad()
    def _place_gradients(self, shape: _Shape) -> None:
        """Point p.grad to its buffer: zero where there was no gradient, else with what is there so far."""
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

    # --- what a batch is ----------------------------------------------------------------------------------------------

    def _check_model(self) -> None:
        """Forget the graphs of a model that has changed, and look anew at whether it can be captured."""
        change = self._state.changed() if self._state is not None else ""
        if self._state is not None and not change:
            return
        self._changes += 1
        if self._changes > _MAX_CHANGES:
            self._say_eager(f"the model changes from step to step ({change}), and a graph is for one state of it")
        self.reset()
        self._state = ModelState(self.model)
        self._captured = self._failed = 0
        self._unsupported = self._given_reason or unsupported_model(self.model)
        device = next(self.model.parameters()).device
        if self._recorder is None or device != self._device:
            self._recorder = self._given_recorder or recorder_for(device)
            self._device = device
        if self._recorder is None:
            self._unsupported = self._unsupported or f"the model is on {device}, and CUDA graphs need a CUDA device"

    def _read_cache(self, inputs: dict[str, Any]) -> str | None:
        """Put a warm cache's states in the place of the source's text; else why the step cannot be captured."""
        if self._source_cache is None or "source_input_ids" not in inputs:
            return None
        if any(name in inputs for name in DECODER_ARGUMENTS):
            return "a source_cache's states of a decoder are read inside the step"
        states = cached_states(self._source_cache, self.model, inputs)
        if states is None:
            return "source_cache has not all rows of a batch yet, and computes those that are missing"
        mask = inputs.get("source_attention_mask")
        for name in _SOURCE_TEXT:
            inputs.pop(name, None)
        inputs["source_states"] = SourceStates(states.states, states.offset, mask)
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


def cached_states(cache: SourceStateCache, model: nn.Module, inputs: Mapping[str, Any]) -> SourceStates | None:
    """The states of a batch's source text on the model's device, or None where a row has to be computed."""
    return cache.lookup(model, inputs)


def _release(shape: _Shape) -> None:
    assert shape.recording is not None
    shape.recording.release()
    shape.recording, shape.inputs, shape.warmed = None, {}, 0


def _described(error: BaseException) -> str:
    """The first error behind an exception: ending a capture that has failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    if isinstance(error, torch.OutOfMemoryError):
        return "there was not enough memory to capture a step, which needs its activations beside those of eager steps"
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
    # weights that accelerate keeps elsewhere are on "meta", and its hooks move the inputs
    if isinstance(value, Tensor) and value.device != device and device.type != "meta":
        return value.to(device, non_blocking=True)
    return value


def _static(value: Any, device: torch.device) -> Any:
    """The graph's own copy of an argument, not yet filled."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=device)
    if isinstance(value, SourceStates):
        states = {key: _static(state, device) for key, state in value.states.items()}
        mask = value.attention_mask
        return SourceStates(states, value.offset, None if mask is None else _static(mask, device))
    return value


@torch.no_grad()
def _fill(static: dict[str, Any], inputs: Mapping[str, Any]) -> None:
    """Copy a batch into the graph's own tensors."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            static[name].copy_(value, non_blocking=True)
        elif isinstance(value, SourceStates):
            states = static[name].states
            torch._foreach_copy_(list(states.values()), [value.states[key] for key in states])
            if value.attention_mask is not None:
                static[name].attention_mask.copy_(value.attention_mask, non_blocking=True)
