"""Test GraphedStep on a CPU when models change, steps cannot be captured, or captures fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from cached_states import batch_of, fused
from recorded import eager, graphed, same_gradients
from torch import Tensor, nn

import flare
from flare import _compat
from flare.training.graph_recorder import Recording

# --- what changes the model -------------------------------------------------------------------------------------------


def swap_weights(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = parameter.data * 2


def freeze_one(model: Any) -> None:
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)


def lora_layers(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, _compat.LoraLayer))


def scale(model: Any) -> None:
    for layer in lora_layers(model):
        layer.scale_layer(2.0)


CHANGES = {
    "weights": swap_weights,
    "fewer adapters": lambda model: next(iter(lora_layers(model))).enable_adapters(False),
    "another adapter": lambda model: (model.add_adapter("b", model.peft_config["default"]), model.set_adapter("b")),
    "evaluation": lambda model: model.eval(),
    "frozen": freeze_one,
    "scaling": scale,
    "trained": lambda model: next(p for p in model.parameters() if not p.requires_grad).requires_grad_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_captured_again(change: str) -> None:
    model, eager_model = fused("bert", lora_dropout=0.1), fused("bert", lora_dropout=0.1)
    step, recorder = graphed(model, warmup_steps=1)
    batch = batch_of("bert")
    step(batch), step(batch)
    torch.manual_seed(3), CHANGES[change](model)
    torch.manual_seed(3), CHANGES[change](eager_model)
    for one in (model, eager_model):
        one.zero_grad()
        torch.manual_seed(4)
        run = step if one is model else eager(eager_model)
        losses = [run(batch) for _ in range(3)]
        assert all(loss.isfinite() for loss in losses)
    same_gradients(model, eager_model)
    assert (recorder.captures, recorder.released, recorder.replays) == (2, 1, 3)


def test_a_model_that_changes_in_every_step_is_reported() -> None:
    model = fused("bert")
    step, recorder = graphed(model, warmup_steps=1)
    with pytest.warns(UserWarning, match=r"changes from step to step \(active adapters or their scaling\)") as caught:
        for _ in range(8):
            scale(model)
            step(batch_of("bert"))
    assert len(caught) == 1 and recorder.captures == 0


# --- what cannot be captured ------------------------------------------------------------------------------------------


def with_hook(model: Any) -> None:
    model.get_submodule("base_model.model.bert").register_forward_hook(lambda module, args, output: None)


def with_gradient_hook(model: Any) -> None:
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: grad)


def with_checkpointing(model: Any) -> None:
    _compat.enable_checkpointing(model, {"use_reentrant": False})


UNSUPPORTED = {
    "bert has a hook .*with_hook": with_hook,
    "has a gradient hook": with_gradient_hook,
    "gradient checkpointing saves the random state": with_checkpointing,
    "the model is compiled": lambda model: model.get_submodule("base_model.model.bert.encoder").compile(),
    "several devices": lambda model: model.register_buffer("there", torch.empty(1, device="meta")),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_a_model_that_cannot_be_captured_runs_eagerly(reason: str) -> None:
    model, eager_model = fused("bert"), fused("bert")
    UNSUPPORTED[reason](model)
    if "compiled" in reason:
        torch._dynamo.config.disable = True
    step, recorder = graphed(model)
    try:
        with pytest.warns(UserWarning, match=f"cuda_graphs: .*{reason}.*run eagerly") as caught:
            for seed in range(4):
                assert torch.equal(step(batch_of("bert", seed=seed)), eager(eager_model)(batch_of("bert", seed=seed)))
    finally:
        torch._dynamo.config.disable = False
    assert len([one for one in caught if "cuda_graphs" in str(one.message)]) == 1 and recorder.captures == 0
    same_gradients(model, eager_model)


def test_data_parallel_wrappers_run_eagerly() -> None:
    model = fused("bert")
    step, recorder = graphed(nn.DataParallel(model))
    with pytest.warns(UserWarning, match="DataParallel reduces gradients in hooks"):
        step(batch_of("bert"))
    assert recorder.captures == 0


def test_without_cuda_every_step_is_eager() -> None:
    model, eager_model = fused("bert"), fused("bert")
    step = flare.GraphedStep(model)
    with pytest.warns(UserWarning, match="the model is on cpu, and CUDA graphs need a CUDA device") as caught:
        for _ in range(4):
            assert torch.equal(step(batch_of("bert")), eager(eager_model)(batch_of("bert")))
    assert len(caught) == 1
    same_gradients(model, eager_model)


@pytest.mark.parametrize("memory", ["recompute", "offload"])
def test_steps_with_recomputed_or_offloaded_states_run_eagerly(memory: str) -> None:
    model, eager_model = fused("bert", source_memory=memory), fused("bert")
    step, recorder = graphed(model, warmup_steps=1)
    with pytest.warns(UserWarning, match=f"source_memory='{memory}'") as caught:
        for seed in range(3):
            step(batch_of("bert", seed=seed))
            eager(eager_model)(batch_of("bert", seed=seed))
    same_gradients(model, eager_model)
    assert len([one for one in caught if "cuda_graphs" in str(one.message)]) == 1 and recorder.captures == 0
    plain = {name: value for name, value in batch_of("bert").items() if not name.startswith("source")}
    step(plain), step(plain)
    assert recorder.replays == 1  # without a source, the step can be captured


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"position_ids": torch.arange(9).expand(3, 9), "attention_mask": None}, "position_ids are given without"),
        ({"inputs_embeds": torch.zeros(3, 9, tiny.HIDDEN, requires_grad=True), "input_ids": None}, "requires a grad"),
    ],
    ids=["positions", "embeddings"],
)
def test_a_batch_that_cannot_be_captured_runs_eagerly(change: dict[str, Any], reason: str) -> None:
    model = fused("bert")
    step, recorder = graphed(model, warmup_steps=1)
    batch = {**batch_of("bert"), **change}
    with pytest.warns(UserWarning, match=reason) as caught:
        for _ in range(3):
            assert torch.equal(step(batch), eager(model)(batch))
    assert len(caught) == 1 and recorder.captures == 0


def test_a_value_that_a_graph_cannot_hold_is_reported() -> None:
    seen = []
    step, recorder = graphed(fused("bert"), lambda batch: (seen.append(batch["rows"]), torch.zeros(()))[1])
    with pytest.warns(UserWarning, match="rows is a list: a batch must hold tensors"):
        step({"rows": [1, 2]})
    assert seen == [[1, 2]] and recorder.captures == 0


class Interrupted(RuntimeError):
    pass


@pytest.mark.parametrize("where", ["forward", "backward", "end"])
def test_a_failed_capture_does_not_change_the_training(where: str) -> None:
    """Losses, gradients and dropout masks are as in an eager loop. Other shapes are still captured."""
    model, eager_model = fused("bert", lora_dropout=0.2), fused("bert", lora_dropout=0.2)
    failing = [False]

    def step_of(batch: dict[str, Any]) -> Tensor:
        if failing[0] and where == "forward":
            batch["labels"] = torch.full_like(batch["labels"], 99)  # not a class, so the forward raises an error
        loss = model(**batch).loss
        if failing[0] and where == "backward":
            loss.register_hook(raising)
        loss.backward()
        return loss

    def raising(*_: Any) -> None:
        raise Interrupted("operation not permitted when stream is capturing")

    step, recorder = graphed(model, step_of, warmup_steps=1)
    good, bad = batch_of("bert", m=6), batch_of("bert")
    torch.manual_seed(11)
    actual = [step(good), step(good), step(bad)]
    failing[0] = True
    recorder.failing = raising if where == "end" else None
    capture = recorder.capture

    def capture_then_stop_failing(run: Callable[[], Tensor]) -> Recording:
        try:
            return capture(run)
        finally:
            failing[0], recorder.failing = False, None

    recorder.capture = capture_then_stop_failing
    with pytest.warns(UserWarning, match="a step could not be captured .*such steps run eagerly") as caught:
        actual += [step(bad), step(bad), step(bad)]
    assert len(caught) == 1
    # ``good`` is captured again, because the failed capture may have damaged its graph
    actual += [step(good), step(good), step(good)]
    assert recorder.captures == 3 and recorder.released == 1 and recorder.replays == 3
    torch.manual_seed(11)
    run = eager(eager_model)
    assert torch.equal(torch.stack(actual), torch.stack([run(b) for b in [good] * 2 + [bad] * 4 + [good] * 3]))
    same_gradients(model, eager_model)


def test_out_of_memory_is_reported() -> None:
    step, recorder = graphed(fused("bert"), warmup_steps=1)

    def no_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    recorder.failing = no_memory
    step(batch_of("bert"))
    with pytest.warns(UserWarning, match="not enough memory to capture a step"):
        assert step(batch_of("bert")).isfinite()


def test_a_model_without_capturable_shapes_runs_eagerly() -> None:
    """A model that waits for the device cannot be captured in any shape. After two failures, no capture is tried."""
    step, recorder = graphed(fused("bert"), warmup_steps=1)

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder.failing = waits
    with pytest.warns(UserWarning, match="RuntimeError: operation not permitted") as caught:
        for m in (5, 6, 7, 8):
            step(batch_of("bert", m=m)), step(batch_of("bert", m=m))
    assert recorder.captures == 2 and len(caught) == 1


def test_a_gradient_that_only_the_capture_has_is_not_lost() -> None:
    """A capture puts the first gradient of `late` into the graph's memory, so the graph is released and not used."""
    model, eager_model = fused("bert"), fused("bert")
    late = model.late = nn.Parameter(torch.ones(()))
    steps = [0]

    def step_of(batch: dict[str, Any]) -> Tensor:
        steps[0] += 1
        loss = model(**batch).loss * (late if steps[0] > 1 else 1.0)
        loss.backward()
        return loss

    step, recorder = graphed(model, step_of, warmup_steps=1)
    with pytest.warns(UserWarning, match="a parameter without a gradient in the eager steps"):
        step(batch_of("bert"))
        loss = step(batch_of("bert"))
    assert recorder.released == 1 and late.grad == loss  # d(loss * late) / d(late) is loss, added once
    eager(eager_model)(batch_of("bert")), eager(eager_model)(batch_of("bert"))
    late.grad = None
    same_gradients(model, eager_model)


def test_random_numbers_on_the_host_are_detected() -> None:
    """If the host draws random numbers (as in LayerDrop), every replay would repeat the draws made at capture."""
    model = fused("bert")

    def drops(batch: dict[str, Any]) -> Tensor:
        loss = model(**batch).loss * (1.0 if random.random() < 0.5 else 2.0)
        loss.backward()
        return loss

    step, recorder = graphed(model, drops, warmup_steps=1)
    random.seed(1)
    expected = [random.random() < 0.5 for _ in range(6)]
    random.seed(1)
    with pytest.warns(UserWarning, match="random numbers on the host"):
        losses = torch.stack([step(batch_of("bert")) for _ in range(6)])
    assert recorder.replays == 0
    assert ((losses == losses.min()) == torch.tensor(expected)).all()
