"""Test GraphedStep on a CPU, without CUDA graphs: captured steps equal eager steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers
from cached_states import batch_of, fused
from peft import LoraConfig, get_peft_model
from recorded import eager, full, graphed, no_warnings, same_gradients
from torch import Tensor, nn

import flare
from flare import _compat
from flare.training.capturable import without_full_masks


def plain_lora(family: str) -> Any:
    names = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}[family]
    model = get_peft_model(tiny.model(family), LoraConfig(r=4, target_modules=names))
    tiny.randomize_lora(model)
    return model


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
def test_a_training_loop_equals_the_eager_loop(make: Callable[[], Any], to_none: bool) -> None:
    """Parameters are bit-equal with two shapes, batches without padding, accumulation, clipping, AdamW, a schedule."""
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
        step_losses = []
        for index, batch in enumerate(batches):
            with no_warnings():
                # like the graph, the eager loop gets batches without masks of ones
                step_losses.append(step(batch if captured else without_full_masks(batch)))
            if index % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=to_none)
        losses.append(torch.stack(step_losses))
        models.append(model)
    assert recorder.captures == 3 and recorder.replays == len(batches) - 2 * 3
    assert torch.equal(*losses) and losses[0].isfinite().all()
    for (name, actual), expected in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_gradients_are_accumulated() -> None:
    """Replays and eager steps with another shape add to p.grad, also after the user has set and cleared p.grad."""
    model, eager_model = fused("bert"), fused("bert")
    step, recorder = graphed(model, warmup_steps=1)
    batch, other = batch_of("bert"), batch_of("bert", m=6)
    for one, run in ((model, step), (eager_model, eager(eager_model))):
        run(batch), run(batch)
        one.zero_grad(set_to_none=True)
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.25)
        run(batch)
    same_gradients(model, eager_model)
    for one, run in ((model, step), (eager_model, eager(eager_model))):
        one.zero_grad(set_to_none=True)
        run(other), run(batch), run(other), run(batch)
    same_gradients(model, eager_model)
    assert recorder.replays == 5


def test_a_parameter_without_a_gradient_keeps_none() -> None:
    """With a zero gradient instead of None, AdamW would decay the weight and apply its momentum."""
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
    copy_of_first = first.clone()
    step(batch_of("bert", seed=8))
    assert torch.equal(first, copy_of_first) and recorder.replays == 2


def test_num_items_in_batch_is_an_input_of_the_graph() -> None:
    model = fused("llama")
    step, recorder = graphed(model, warmup_steps=1)
    batch = batch_of("llama")
    losses = [step({**batch, "num_items_in_batch": items}) for items in (10, 20, torch.tensor(40))]
    assert recorder.captures == 1 and recorder.replays == 2
    torch.testing.assert_close(losses[0], 2 * losses[1])
    torch.testing.assert_close(losses[0], 4 * losses[2])


def test_constants_and_the_variant_are_part_of_the_shape() -> None:
    """Batches with another return_dict or another ``variant`` get their own graph."""
    model, factor = fused("bert"), [1.0]
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
    """Steps with and without autocast get separate graphs. Autocast's cache of cast weights is off in every step."""
    model, caches = fused("bert"), []

    def noting(batch: dict[str, Any]) -> Tensor:
        caches.append(torch.is_autocast_cache_enabled() and torch.is_autocast_enabled("cpu"))
        loss = model(**batch).loss
        loss.backward()
        return loss

    step, recorder = graphed(model, noting, warmup_steps=1)
    eager_model = fused("bert")
    for dtype in (None, torch.bfloat16):
        for seed in range(3):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                actual = step(batch_of("bert", seed=seed))
                assert torch.equal(actual, eager(eager_model)(batch_of("bert", seed=seed)))
    assert recorder.captures == 2 and not any(caches)
    same_gradients(model, eager_model)


# --- a few shapes -----------------------------------------------------------------------------------------------------


def test_the_graphs_of_the_last_used_shapes_are_kept() -> None:
    model, eager_model = fused("bert"), fused("bert")
    step, recorder = graphed(model, warmup_steps=1, max_graphs=2)
    lengths = [5, 5, 6, 6, 5, 7, 7, 5, *[6] * 17]  # length 7 replaces 6; 6 replaces 7 after 16 eager steps
    with pytest.warns(UserWarning, match="more than max_graphs=2 shapes") as caught:
        for m in lengths:
            step(batch_of("bert", m=m))
            eager(eager_model)(batch_of("bert", m=m))
    same_gradients(model, eager_model)
    assert len(caught) == 1
    assert (recorder.captures, recorder.released, recorder.replays) == (4, 2, 6)


@pytest.mark.parametrize("options", [{"max_graphs": 0}, {"warmup_steps": 0}], ids=str)
def test_invalid_options_raise(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=0 must be at least 1"):
        flare.GraphedStep(fused("bert"), **options)


def test_a_batch_without_labels_raises() -> None:
    step, _ = graphed(fused("bert"))
    with pytest.raises(ValueError, match=r"returned no loss for a batch of .*input_ids.*labels"):
        step({name: value for name, value in batch_of("bert").items() if name != "labels"})


# --- a warm cache -----------------------------------------------------------------------------------------------------


class Cache:
    """Stand-in for SourceStateCache. If ``warm`` is set, ``lookup`` returns the states of all rows, otherwise None."""

    def __init__(self, model: Any) -> None:
        self.model, self.warm = model, False

    def lookup(self, model: Any, batch: dict[str, Any]) -> Any:
        assert model is self.model
        mask = batch.get("source_attention_mask")
        return self.model.encode_source(batch["source_input_ids"], mask) if self.warm else None


@pytest.mark.parametrize("padded", [True, False])
def test_a_warm_cache_is_copied_into_the_graph(padded: bool) -> None:
    """The graph reads source states from its own buffers and no source text. With a cold cache, steps are eager."""
    model, eager_model, seen = fused("bert"), fused("bert"), []

    def noting(batch: dict[str, Any]) -> Tensor:
        seen.append(batch)
        return eager(model)(batch)

    cache = Cache(model)
    step, recorder = graphed(model, noting, warmup_steps=1, source_cache=cache)
    batches = [batch_of("bert", seed=seed) for seed in range(4)]
    batches = batches if padded else [full(batch) for batch in batches]
    run = eager(eager_model)
    with pytest.warns(UserWarning, match="source_cache does not return all states of a batch yet") as caught:
        step(batches[0]), step(batches[1])
    assert len(caught) == 1 and all("source_input_ids" in batch for batch in seen)
    cache.warm, seen[:] = True, []
    for batch in batches:
        step(batch)
    for batch in [*batches[:2], *batches]:
        run(without_full_masks(batch))
    same_gradients(model, eager_model)
    assert recorder.captures == 1 and recorder.replays == 3
    assert not any("source_input_ids" in batch or "source_attention_mask" in batch for batch in seen)
    assert all((batch["source_states"].attention_mask is not None) == padded for batch in seen)
    of_graph = {id(batch["source_states"]) for batch in seen[1:]}
    assert len(of_graph) == 1, "the states' object is made once"


def multiple_choice() -> Any:
    torch.manual_seed(0)
    config = tiny.config("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = flare.fast_lora(transformers.BertForMultipleChoice(config), r=5, source_padding="zero")
    tiny.randomize_lora(model)
    return model


def choices_of(*, seed: int) -> dict[str, Tensor]:
    """Return a batch of one row with three choices."""
    batch = {name: value[None] for name, value in batch_of("bert", seed=seed).items()}
    return {**batch, "labels": torch.tensor([seed % 3])}


@pytest.mark.parametrize(
    ("make", "make_batch"),
    [(lambda: fused("bert"), lambda seed: batch_of("bert", seed=seed)), (multiple_choice, choices_of)],
    ids=["classification", "multiple choice"],
)
def test_a_real_cache_gives_the_gradients_of_a_loop_without_one(make: Any, make_batch: Any) -> None:
    model, eager_model = make(), make()
    cache = flare.SourceStateCache(1 << 20, tiers=("host",))
    model.set_source_cache(cache)
    step, recorder = graphed(model, warmup_steps=1, source_cache=cache)
    batches, run = [make_batch(seed=seed) for seed in range(3)], eager(eager_model)
    with pytest.warns(UserWarning, match="source_cache does not return all states of a batch yet"):
        for batch in batches:
            step(batch)
    for batch in batches:
        step(batch)
    for batch in [*batches, *batches]:
        run(without_full_masks(batch))
    same_gradients(model, eager_model)
    assert recorder.captures == 1 and recorder.replays >= 1 and cache.stats().entries == {"host": 9}


def test_steps_with_a_cache_are_eager_if_the_decoder_fuses() -> None:
    model = fused("mt5")
    cache = Cache(model)
    cache.warm = True
    step, recorder = graphed(model, warmup_steps=1, source_cache=cache)
    with pytest.warns(UserWarning, match="states of a decoder are looked up inside the step"):
        step(batch_of("mt5")), step(batch_of("mt5"))
    assert recorder.captures == 0


# --- padding and masks ------------------------------------------------------------------------------------------------


def test_full_and_padded_rows_have_different_graphs() -> None:
    """Masks of ones are left out, and masks with padding are kept, for target and source separately."""
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


def test_position_ids_keep_the_mask() -> None:
    """Without a mask, transformers looks for packed texts in position_ids."""
    batch = {**full(batch_of("llama")), "position_ids": torch.arange(9).expand(3, 9)}
    assert set(batch) - set(without_full_masks(batch)) == {"source_attention_mask"}


@pytest.mark.parametrize("family", ["xlmr", "bert", "llama", "mt5"])
@pytest.mark.parametrize(
    ("source", "padding"),
    [
        (False, "no mask"),
        (False, "ones"),
        (False, "padded"),
        (True, "no mask"),
        (True, "ones"),
        (True, "padded"),
    ],
)
def test_attention_gets_the_eager_arguments(
    family: str, source: bool, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the arguments of sdpa in a normal forward and while transformers assumes that a graph is captured."""
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
    eager_calls, calls[:] = list(calls), []
    with _compat.eager_attention_masks():
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        model(**without_full_masks(batch))
    assert len(calls) == len(eager_calls) >= (1 + source) * tiny.LAYERS
    for (mask, *options), (eager_mask, *eager_options) in zip(calls, eager_calls, strict=True):
        assert options == eager_options and (mask is None) == (eager_mask is None)
        if eager_mask is not None:
            assert mask[:2] == eager_mask[:2] and torch.equal(mask[2], eager_mask[2])
    if padding != "padded" and family != "mt5":  # mt5 passes its position biases as masks
        assert all(mask is None for mask, *_ in calls)
