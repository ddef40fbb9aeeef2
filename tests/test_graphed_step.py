"""GraphedStep on a CPU: everything but CUDA itself, by a recorder that runs the step again instead of a graph."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cached_states import batch_of, fused
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trained import arguments, flare_model, lora
from two_streams import rows, tokenizer

import flare
from flare import _compat
from flare.training import graphed_step
from flare.training.capturable import without_full_masks
from flare.training.graph_recorder import Recording


class CpuRecorder:
    """Runs what a graph would replay: on the tensors of the capture, into the gradients that p.grad was then."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.failing: Callable[[], None] | None = None
        self.captures = self.replays = self.released = self.depth = 0

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def capture(self, run: Callable[[], Tensor]) -> Recording:
        assert self.depth == 1, "steps and captures share one stream"
        self.captures += 1
        parameters = list(self.model.parameters())
        grads = [p.grad for p in parameters]
        values = [None if grad is None else grad.clone() for grad in grads]
        before = torch.get_rng_state()
        try:
            result = run().clone()
            if self.failing is not None:
                self.failing()
        finally:
            torch.set_rng_state(before)
            for grad, value in zip(grads, values, strict=True):
                if grad is not None:
                    grad.copy_(value)
        result.fill_(torch.nan)

        def replay() -> None:
            assert self.depth == 1
            self.replays += 1
            placed = [p.grad for p in parameters]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            result.copy_(run())
            for parameter, grad in zip(parameters, placed, strict=True):
                parameter.grad = grad

        def release() -> None:
            self.released += 1

        return Recording(result, replay, release)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cuda_graphs", UserWarning)
        yield


def graphed(model: nn.Module, *args: Any, **options: Any) -> tuple[flare.GraphedStep, CpuRecorder]:
    recorder = CpuRecorder(model)
    return flare.GraphedStep(model, *args, recorder=recorder, **options), recorder


def eager(model: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    def step(batch: dict[str, Any]) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step


def full(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with masks of ones."""
    return {name: torch.ones_like(value) if name.endswith("mask") else value for name, value in batch.items()}


def plain_lora(family: str) -> Any:
    names = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}[family]
    model = get_peft_model(tiny.model(family), LoraConfig(r=4, target_modules=names))
    tiny.randomize_lora(model)
    return model


def same_gradients(model: nn.Module, other: nn.Module) -> None:
    got, want = tiny.gradients(model), tiny.gradients(other)
    assert got.keys() == want.keys() and want
    for name in want:
        assert torch.equal(got[name], want[name]), name


# --- equal to eager steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False], ids=["set to None", "zeroed"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: fused("bert"),
        lambda: fused("llama", lora_dropout=0.3),
        lambda: fused("mt5"),
        lambda: plain_lora("llama"),
    ],
    ids=["bert", "llama with dropout", "mt5", "lora"],
)
def test_a_training_loop_is_the_eager_one(make: Callable[[], Any], to_none: bool) -> None:
    """Three shapes in turn, accumulation over two batches, clipping, AdamW and a schedule: bit-equal parameters."""
    plain = "lora" in type(make().base_model).__name__.lower() and not hasattr(make(), "fast_lora_report")
    family = make().get_base_model().config.model_type
    batches = [batch_of(family, B=B, m=m, seed=seed) for seed, (B, m) in enumerate([(3, 9), (2, 7), (3, 9)] * 4)]
    batches = [full(batch) if index % 3 == 2 else batch for index, batch in enumerate(batches)]
    if plain:
        batches = [{k: v for k, v in batch.items() if not k.startswith("source")} for batch in batches]
    losses, models = [], []
    for captured in (False, True):
        model = make()
        if captured:
            step, recorder = graphed(model)
        else:
            step = eager(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        torch.manual_seed(5)
        found = []
        for index, batch in enumerate(batches):
            with no_warnings():
                # the eager loop gets what the graph gets: batches without masks of ones
                found.append(step(batch if captured else without_full_masks(batch)))
            if index % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=to_none)
        losses.append(torch.stack(found))
        models.append(model)
    assert recorder.captures == 3 and recorder.replays == len(batches) - 2 * 3
    assert torch.equal(*losses) and losses[0].isfinite().all()
    for (name, got), want in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert torch.equal(got, want), name


def test_gradients_are_added_to_what_is_there() -> None:
    """Gradients of a user's own, of eager steps of other shapes and of replays meet in p.grad."""
    model, want = fused("bert"), fused("bert")
    step, recorder = graphed(model, warmup_steps=1)
    batch, other = batch_of("bert"), batch_of("bert", m=6)
    for one, run in ((model, step), (want, eager(want))):
        run(batch), run(batch)
        one.zero_grad(set_to_none=True)
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.25)
        run(batch)
        one.zero_grad(set_to_none=True)
        run(other), run(batch), run(other), run(batch)
    same_gradients(model, want)
    assert recorder.replays == 5


def test_a_parameter_without_a_gradient_stays_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero gradient would decay the weight, and move it by Adam's momentum."""
    model = fused("bert")
    unused = model.unused = nn.Parameter(torch.ones(3))
    step, recorder = graphed(model)
    for seed in range(4):
        step(batch_of("bert", seed=seed))
    assert recorder.replays == 2 and unused.grad is None


def test_dropout_draws_new_masks_at_each_replay() -> None:
    model = fused("bert", lora_dropout=0.5)
    step, recorder = graphed(model)
    losses = [step(batch_of("bert")) for _ in range(6)]
    assert recorder.replays == 4 and len(set(map(float, losses))) == 6


def test_a_loss_is_not_overwritten_by_the_next_replay() -> None:
    step, recorder = graphed(fused("bert"), warmup_steps=1)
    step(batch_of("bert"))
    first = step(batch_of("bert"))
    kept = first.clone()
    step(batch_of("bert", seed=8))
    assert torch.equal(first, kept) and recorder.replays == 2


def test_num_items_in_batch_is_an_input_of_the_graph() -> None:
    model = fused("llama")
    step, recorder = graphed(model, warmup_steps=1)
    batch = batch_of("llama")
    losses = [step({**batch, "num_items_in_batch": items}) for items in (10, 20, torch.tensor(40))]
    assert recorder.captures == 1 and recorder.replays == 2
    torch.testing.assert_close(losses[0], 2 * losses[1])
    torch.testing.assert_close(losses[0], 4 * losses[2])


def test_constants_and_the_variant_are_part_of_the_shape() -> None:
    model, factor = fused("bert"), [1.0]
    step, recorder = graphed(model, warmup_steps=1)
    model.register_buffer("here", torch.zeros(()))

    def scaled(batch: dict[str, Any]) -> Tensor:
        loss = model(**batch)[0] * factor[0]
        loss.backward()
        return loss

    step, recorder = graphed(model, scaled, warmup_steps=1)
    batch = batch_of("bert")
    losses = {}
    for factor[0] in (1.0, 3.0):
        for returned in (True, False):
            for _ in range(2):
                losses[factor[0]] = step({**batch, "return_dict": returned}, variant=factor[0])
    assert recorder.captures == 4
    torch.testing.assert_close(losses[3.0], 3 * losses[1.0])


def test_autocast_is_part_of_the_shape_and_keeps_no_cast_weights() -> None:
    model, caches = fused("bert"), []

    def noting(batch: dict[str, Any]) -> Tensor:
        caches.append(torch.is_autocast_cache_enabled() and torch.is_autocast_enabled("cpu"))
        loss = model(**batch).loss
        loss.backward()
        return loss

    step, recorder = graphed(model, noting, warmup_steps=1)
    want = fused("bert")
    for dtype in (None, torch.bfloat16):
        for seed in range(3):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                got = step(batch_of("bert", seed=seed))
                assert torch.equal(got, eager(want)(batch_of("bert", seed=seed)))
    assert recorder.captures == 2 and not any(caches)
    same_gradients(model, want)


# --- a few shapes -----------------------------------------------------------------------------------------------------


def test_the_shapes_last_used_are_kept() -> None:
    model, want = fused("bert"), fused("bert")
    step, recorder = graphed(model, warmup_steps=1, max_graphs=2)
    lengths = [5, 5, 6, 6, 5, 7, 7, 5, *[6] * 17]  # 7 takes the place of 6, which waits before it takes that of 7
    with pytest.warns(UserWarning, match="more than max_graphs=2 shapes") as said:
        for m in lengths:
            step(batch_of("bert", m=m))
            eager(want)(batch_of("bert", m=m))
    same_gradients(model, want)
    assert len(said) == 1
    assert (recorder.captures, recorder.released, recorder.replays) == (4, 2, 6)


@pytest.mark.parametrize("options", [{"max_graphs": 0}, {"warmup_steps": 0}], ids=str)
def test_options_that_are_not_accepted(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=0 must be at least 1"):
        flare.GraphedStep(fused("bert"), **options)


def test_a_batch_without_labels() -> None:
    step, _ = graphed(fused("bert"))
    with pytest.raises(ValueError, match=r"returned no loss for a batch of .*input_ids.*labels"):
        step({name: value for name, value in batch_of("bert").items() if name != "labels"})


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
    model, want = fused("bert", lora_dropout=0.1), fused("bert", lora_dropout=0.1)
    step, recorder = graphed(model, warmup_steps=1)
    batch = batch_of("bert")
    step(batch), step(batch)
    torch.manual_seed(3), CHANGES[change](model)
    torch.manual_seed(3), CHANGES[change](want)
    for one in (model, want):
        one.zero_grad()
        torch.manual_seed(4)
        run = step if one is model else eager(want)
        losses = [run(batch) for _ in range(3)]
        assert all(loss.isfinite() for loss in losses)
    same_gradients(model, want)
    assert (recorder.captures, recorder.released, recorder.replays) == (2, 1, 3)


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
    model, want = fused("bert"), fused("bert")
    UNSUPPORTED[reason](model)
    if "compiled" in reason:
        torch._dynamo.config.disable = True
    step, recorder = graphed(model)
    try:
        with pytest.warns(UserWarning, match=f"cuda_graphs: .*{reason}.*run eagerly") as said:
            for seed in range(4):
                assert torch.equal(step(batch_of("bert", seed=seed)), eager(want)(batch_of("bert", seed=seed)))
    finally:
        torch._dynamo.config.disable = False
    assert len([one for one in said if "cuda_graphs" in str(one.message)]) == 1 and recorder.captures == 0
    same_gradients(model, want)


def test_data_parallel_wrappers_run_eagerly() -> None:
    model = fused("bert")
    step, recorder = graphed(nn.DataParallel(model))
    with pytest.warns(UserWarning, match="DataParallel reduces gradients in hooks"):
        step(batch_of("bert"))
    assert recorder.captures == 0


def test_without_cuda_every_step_is_eager() -> None:
    model, want = fused("bert"), fused("bert")
    step = flare.GraphedStep(model)
    with pytest.warns(UserWarning, match="the model is on cpu, and CUDA graphs need a CUDA device") as said:
        for _ in range(4):
            assert torch.equal(step(batch_of("bert")), eager(want)(batch_of("bert")))
    assert len(said) == 1
    same_gradients(model, want)


@pytest.mark.parametrize("memory", ["recompute", "offload"])
def test_states_from_outside_the_graph_run_eagerly(memory: str) -> None:
    model, want = fused("bert", source_memory=memory), fused("bert")
    step, recorder = graphed(model, warmup_steps=1)
    with pytest.warns(UserWarning, match=f"source_memory='{memory}'") as said:
        for seed in range(3):
            step(batch_of("bert", seed=seed))
            eager(want)(batch_of("bert", seed=seed))
    same_gradients(model, want)
    assert len([one for one in said if "cuda_graphs" in str(one.message)]) == 1 and recorder.captures == 0
    plain = {name: value for name, value in batch_of("bert").items() if not name.startswith("source")}
    step(plain), step(plain)
    assert recorder.replays == 1  # without a source there is nothing that waits


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
    with pytest.warns(UserWarning, match=reason) as said:
        for _ in range(3):
            assert torch.equal(step(batch), eager(model)(batch))
    assert len(said) == 1 and recorder.captures == 0


def test_a_value_that_a_graph_cannot_hold_is_named() -> None:
    seen = []
    step, recorder = graphed(fused("bert"), lambda batch: (seen.append(batch["rows"]), torch.zeros(()))[1])
    with pytest.warns(UserWarning, match="rows is a list: a batch must hold tensors"):
        step({"rows": [1, 2]})
    assert seen == [[1, 2]] and recorder.captures == 0


class Interrupted(RuntimeError):
    pass


@pytest.mark.parametrize("where", ["forward", "backward", "end"])
def test_a_capture_that_fails_leaves_all_as_it_was(where: str) -> None:
    """Gradients in accumulation, random numbers and the model are those of an eager loop; other shapes go on."""
    model, want = fused("bert", lora_dropout=0.2), fused("bert", lora_dropout=0.2)
    failing = [False]

    def step_of(batch: dict[str, Any]) -> Tensor:
        if failing[0] and where == "forward":
            batch["labels"] = torch.full_like(batch["labels"], 99)  # the loss raises, in the middle of the model
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
    got = [step(good), step(good), step(bad)]
    failing[0] = True
    recorder.failing = raising if where == "end" else None
    with pytest.warns(UserWarning, match="a step could not be captured .*such steps run eagerly") as said:

        def fails_only_in_capture() -> Any:
            capture = recorder.capture

            def once(run: Callable[[], Tensor]) -> Recording:
                try:
                    return capture(run)
                finally:
                    failing[0], recorder.failing = False, None

            return once

        recorder.capture = fails_only_in_capture()
        got += [step(bad), step(bad), step(bad)]
    assert len(said) == 1
    got += [step(good), step(good), step(good)]  # captured anew: a failed capture may have spoilt other graphs
    assert recorder.captures == 3 and recorder.released == 1 and recorder.replays == 3
    torch.manual_seed(11)
    run = eager(want)
    assert torch.equal(torch.stack(got), torch.stack([run(b) for b in [good] * 2 + [bad] * 4 + [good] * 3]))
    same_gradients(model, want)


def test_out_of_memory_is_reported() -> None:
    step, recorder = graphed(fused("bert"), warmup_steps=1)

    def no_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    recorder.failing = no_memory
    step(batch_of("bert"))
    with pytest.warns(UserWarning, match="not enough memory to capture a step"):
        assert step(batch_of("bert")).isfinite()


def test_a_model_of_which_no_shape_can_be_captured_is_left_alone() -> None:
    """A model that waits for the device fails for each shape alike."""
    step, recorder = graphed(fused("bert"), warmup_steps=1)

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder.failing = waits
    with pytest.warns(UserWarning, match="RuntimeError: operation not permitted") as said:
        for m in (5, 6, 7, 8):
            step(batch_of("bert", m=m)), step(batch_of("bert", m=m))
    assert recorder.captures == 2 and len(said) == 1


def test_a_gradient_that_only_the_capture_has_is_not_lost() -> None:
    """It would be memory of the graph's own: the step goes back to eager and p.grad to what it was."""
    model = fused("bert")
    late = model.late = nn.Parameter(torch.ones(()))
    steps = [0]

    def step_of(batch: dict[str, Any]) -> Tensor:
        steps[0] += 1
        loss = model(**batch).loss
        if steps[0] > 1:
            loss = loss * late
        loss.backward()
        return loss

    step, recorder = graphed(model, step_of, warmup_steps=1)
    with pytest.warns(UserWarning, match="a gradient that had none"):
        step(batch_of("bert")), step(batch_of("bert"))
    assert recorder.released == 1 and late.grad is not None and late.grad.isfinite()


def test_random_numbers_of_the_host_are_found() -> None:
    """Layer drop decides in Python, and a replay would take the capture's decision for ever."""
    model = fused("bert")

    def drops(batch: dict[str, Any]) -> Tensor:
        loss = model(**batch).loss * (1.0 if random.random() < 0.5 else 2.0)
        loss.backward()
        return loss

    step, recorder = graphed(model, drops, warmup_steps=1)
    random.seed(1)
    want = [random.random() < 0.5 for _ in range(6)]
    random.seed(1)
    with pytest.warns(UserWarning, match="random numbers on the host"):
        losses = torch.stack([step(batch_of("bert")) for _ in range(6)])
    assert recorder.replays == 0
    assert ((losses == losses.min()) == torch.tensor(want)).all()


# --- padding and masks ------------------------------------------------------------------------------------------------


def test_full_and_padded_rows_are_different_graphs() -> None:
    """Each stream by itself; a mask of ones is left out, and the padded ones keep their values."""
    model, seen = fused("bert"), []

    def noting(batch: dict[str, Any]) -> Tensor:
        seen.append(tuple(sorted(name for name in batch if name.endswith("mask"))))
        return eager(model)(batch)

    step, recorder = graphed(model, noting, warmup_steps=1)
    batch = batch_of("bert")
    ones = full(batch)
    for mask in (batch["attention_mask"], ones["attention_mask"]):
        for source_mask in (batch["source_attention_mask"], ones["source_attention_mask"]):
            for _ in range(2):
                step({**batch, "attention_mask": mask, "source_attention_mask": source_mask})
    assert recorder.captures == 4
    assert set(seen) == {
        ("attention_mask", "source_attention_mask"),
        ("attention_mask",),
        ("source_attention_mask",),
        (),
    }


def test_positions_of_the_users_own_keep_the_mask() -> None:
    """Without one, transformers looks in position_ids for packed texts."""
    batch = {**full(batch_of("llama")), "position_ids": torch.arange(9).expand(3, 9)}
    assert set(batch) - set(without_full_masks(batch)) == {"source_attention_mask"}


SOURCE_MASK = pytest.mark.xfail(strict=True, reason="the source pass makes a mask of ones where none is given")


@pytest.mark.parametrize("family", ["xlmr", "bert", "llama", "mt5"])
@pytest.mark.parametrize(
    ("source", "padding"),
    [
        (False, "no mask"),
        (False, "ones"),
        (False, "padded"),
        pytest.param(True, "no mask", marks=SOURCE_MASK),
        pytest.param(True, "ones", marks=SOURCE_MASK),
        (True, "padded"),
    ],
)
def test_attention_is_given_what_it_is_given_eagerly(
    family: str, source: bool, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sdpa's attn_mask and is_causal in both passes, with transformers told that a stream is capturing."""
    from transformers.utils import import_utils

    model, calls = fused(family), []
    stock = nn.functional.scaled_dot_product_attention

    def noting(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        mask = None if attn_mask is None else (attn_mask.dtype, attn_mask.stride(), attn_mask.detach().clone())
        calls.append((mask, options.get("is_causal"), options.get("enable_gqa")))
        return stock(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noting)
    batch = batch_of(family)
    if not source:
        batch = {name: value for name, value in batch.items() if not name.startswith("source")}
    if padding != "padded":
        batch = full(batch)
    if padding == "no mask":
        batch = {name: value for name, value in batch.items() if not name.endswith("mask")}
    model(**batch)
    want, calls[:] = list(calls), []
    with _compat.eager_attention_masks():
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        model(**without_full_masks(batch))
    assert len(calls) == len(want) >= (1 + source) * tiny.LAYERS
    for (got_mask, *got), (want_mask, *wanted) in zip(calls, want, strict=True):
        assert got == wanted and (got_mask is None) == (want_mask is None)
        if want_mask is not None:
            assert got_mask[:2] == want_mask[:2] and torch.equal(got_mask[2], want_mask[2])
    if padding != "padded" and family != "mt5":  # mt5's masks are its position biases
        assert all(mask is None for mask, *_ in calls)


# --- a warm cache -----------------------------------------------------------------------------------------------------


class Cache:
    """What GraphedStep needs of a SourceStateCache: the states of a batch whose rows are all kept."""

    def __init__(self, model: Any) -> None:
        self.model, self.warm = model, False

    def lookup(self, model: Any, ids: Tensor, mask: Tensor | None, types: Tensor | None) -> Any:
        assert model is self.model
        return self.model.encode_source(ids, mask) if self.warm else None


@pytest.mark.parametrize("padded", [True, False])
def test_a_warm_cache_is_copied_into_the_graph(padded: bool) -> None:
    """The graph reads states, of buffers of its own, and no text; a cold cache is read in an eager step."""
    model, want, seen = fused("bert"), fused("bert"), []

    def noting(batch: dict[str, Any]) -> Tensor:
        seen.append(batch)
        return eager(model)(batch)

    cache = Cache(model)
    step, recorder = graphed(model, noting, warmup_steps=1, source_cache=cache)
    batches = [batch_of("bert", seed=seed) for seed in range(4)]
    batches = batches if padded else [full(batch) for batch in batches]
    run = eager(want)
    with pytest.warns(UserWarning, match="source_cache has not all rows of a batch yet") as said:
        step(batches[0]), step(batches[1])
    assert len(said) == 1 and all("source_input_ids" in batch for batch in seen)
    cache.warm, seen[:] = True, []
    for batch in batches:
        step(batch)
    for batch in [*batches[:2], *batches]:
        run(without_full_masks(batch))
    same_gradients(model, want)
    assert recorder.captures == 1 and recorder.replays == 3
    assert not any("source_input_ids" in batch or "source_attention_mask" in batch for batch in seen)
    assert all((batch["source_states"].attention_mask is not None) == padded for batch in seen)
    of_graph = {id(batch["source_states"]) for batch in seen[1:]}
    assert len(of_graph) == 1, "the states' object is made once"


def test_a_decoders_source_is_not_in_the_cache() -> None:
    model = fused("mt5")
    cache = Cache(model)
    cache.warm = True
    step, recorder = graphed(model, warmup_steps=1, source_cache=cache)
    with pytest.warns(UserWarning, match="states of a decoder are read inside the step"):
        step(batch_of("mt5")), step(batch_of("mt5"))
    assert recorder.captures == 0


# --- the Trainer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trainers record on the CPU; the recorders that were made."""
    made: list[Any] = []

    class OfTrainer(CpuRecorder):
        def __init__(self) -> None:
            super().__init__(nn.Module())

        def capture(self, run: Callable[[], Tensor]) -> Recording:
            assert self.depth == 1
            self.model = self.trained
            return super().capture(run)

    def recorder_for(device: torch.device) -> CpuRecorder:
        made.append(OfTrainer())
        return made[-1]

    monkeypatch.setattr(graphed_step, "recorder_for", recorder_for)
    return made


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {}),
        ("bert", {"label_smoothing_factor": 0.1}),
        ("bert", {"bf16": True}),
        ("bert-spans", {}),
        ("llama", {"include_num_input_tokens_seen": "non_padding"}),
        ("mt5", {}),
    ],
    ids=str,
)
def test_the_trainer_gives_the_same_parameters(
    family: str, options: dict[str, Any], tmp_path: Path, recorders: list[Any]
) -> None:
    """Accumulation whose last step has fewer batches, clipping, evaluation in between, unequal numbers of labels."""
    data = rows(family, 11)
    logs, models = [], []
    for captured in (False, True):
        model = flare_model(family)
        trainer = flare.FlareTrainer(
            model=model,
            args=arguments(
                tmp_path,
                num_train_epochs=4,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=4,
                max_grad_norm=0.5,
                eval_strategy="epoch",
                logging_strategy="steps",
                logging_steps=1,
                **options,
            ),
            train_dataset=data,
            eval_dataset=data[:3],
            data_collator=flare.FlareDataCollator(tokenizer(), "max_length", 16, layout=trainer_layout(family)),
            cuda_graphs=captured,
        )
        if captured:
            CpuRecorder.trained = model
        trainer.train()
        logs.append(
            [{k: v for k, v in log.items() if k.endswith(("loss", "tokens_seen"))} for log in trainer.state.log_history]
        )
        models.append(model)
    (recorder,) = recorders
    assert recorder.captures >= 2 and recorder.replays > recorder.captures
    assert logs[0] == logs[1]
    for (name, got), want in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert torch.equal(got, want), name


def trainer_layout(family: str) -> str:
    return {"llama": "causal", "mt5": "seq2seq"}.get(family, "encoder")


def test_a_trainers_batches_stay_on_the_host(tmp_path: Path, recorders: list[Any]) -> None:
    """accelerate would move them before their masks are read."""
    for captured in (False, True):
        trainer = flare.FlareTrainer(
            model=flare_model("bert"),
            args=arguments(tmp_path),
            train_dataset=rows("bert", 4),
            processing_class=tokenizer(),
            cuda_graphs=captured,
        )
        assert (trainer.get_train_dataloader().device is None) == captured
        assert trainer.get_eval_dataloader(rows("bert", 2)).device is not None


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, "the model is on cpu"), ({"torch_empty_cache_steps": 2}, "torch_empty_cache_steps frees memory")],
    ids=str,
)
def test_a_trainer_that_cannot_capture_says_so_once(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    models = []
    for captured in (False, True):
        model = lora("bert")
        trainer = flare.FlareTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=3, **options),
            train_dataset=rows("bert", 8, source=False),
            processing_class=tokenizer(),
            cuda_graphs=captured,
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train()
        found = [str(one.message) for one in said if "cuda_graphs" in str(one.message)]
        assert len(found) == captured and all(reason in message for message in found)
        models.append(model)
    for got, want in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(got, want)
