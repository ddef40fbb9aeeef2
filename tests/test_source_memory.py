"""Test that every mode of source_memory gives the gradients of "keep", at the documented cost."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import tiny
import torch
from states_alive import StatesAlive
from torch.utils.checkpoint import checkpoint

import flare
from flare.experiments.measure import count_calls
from flare.source import memory as source_memory
from flare.source.source_pass import FrozenPass, Preparation

FAMILIES = ("bert", "llama", "mt5")
ON_CPU = "'offload' is 'keep' here"


def model_of(family: str, memory: str, *, base: dict | None = None, **overrides):
    options = {"r": 5, "lora_alpha": 7, "source_memory": memory, **overrides}
    model = flare.fast_lora(
        tiny.model(family, **({"dropout_rate": 0.0} if family == "mt5" else {}), **(base or {})), **options
    )
    tiny.randomize_lora(model)
    return model


def inputs_of(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    inputs = tiny.batch(family, seed=seed)
    if family == "mt5":
        inputs["source_labels"] = inputs["labels"].roll(1, dims=1)
    return inputs


def gradients(model, *batches, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return the gradients of the sum of the batches' losses. All forward passes run before the one backward pass."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    sum(model(**inputs).loss for inputs in batches).backward()
    return tiny.gradients(model)


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys() and any(grad.any() for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=0, atol=0, msg=name)


def assert_close(actual, expected) -> None:
    """Compare gradients that are sums over several forward passes. The order of additions depends on the mode."""
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)


@pytest.fixture
def offload_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make "offload" work on a CPU, where the package would use "keep" instead."""
    plain = source_memory.choose_memory

    def choose(setting: str, *args, **kwargs):
        choice = plain(setting, *args, **kwargs)
        return source_memory.MemoryChoice("offload") if setting == "offload" and ON_CPU in choice.reason else choice

    monkeypatch.setattr(source_memory, "choose_memory", choose)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory", ["recompute", "offload"])
@pytest.mark.parametrize(
    "options",
    [{}, {"source_layer_offset": 0, "fusion": "mul"}, {"source_padding": "zero", "lora_dropout": 0.3}],
    ids=str,
)
@pytest.mark.usefixtures("offload_anywhere")
def test_every_mode_has_the_gradients_of_keep(family: str, memory: str, options: dict) -> None:
    """After one forward pass, gradients are equal bit for bit, also with non-reentrant checkpointing.

    The sums of the gradients of two forward passes are equal up to rounding.
    """
    first, second = inputs_of(family), inputs_of(family, seed=1)
    keep, other = model_of(family, "keep", **options), model_of(family, memory, **options)
    for model in (keep, other):
        model.train()
    assert_same(gradients(other, first), gradients(keep, first))
    assert_close(gradients(other, first, second), gradients(keep, first, second))
    for model in (keep, other):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    assert_same(gradients(other, first), gradients(keep, first))


@pytest.mark.parametrize("memory", ["recompute", "offload"])
@pytest.mark.usefixtures("offload_anywhere")
def test_a_second_source_pass_runs_under_the_autocast_state_of_the_first(memory: str, monkeypatch) -> None:
    """Backward runs outside of autocast, but a recomputed state equals the state of the forward pass bit for bit."""
    seen: list[list[torch.Tensor]] = []
    plain = Preparation.__call__

    def prepared(self, key, hidden):
        hidden_state = plain(self, key, hidden)
        seen[-1].append(hidden_state.clone())
        return hidden_state

    monkeypatch.setattr(Preparation, "__call__", prepared)
    results = []
    for mode in ("keep", memory):
        model = model_of("llama", mode)
        seen.append([])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs_of("llama")).loss
        loss.backward()
        results.append(tiny.gradients(model))
    assert_same(*results)
    kept, again = seen
    assert all(x.dtype == torch.bfloat16 for x in again)
    assert len(again) == len(kept) * (2 if memory == "recompute" else 1)
    for first, second in zip(again[: len(kept)], again[-len(kept) :], strict=True):
        assert torch.equal(first, second)


EXECUTIONS = {"keep": 2, "offload": 2, "recompute": 3}


@pytest.mark.parametrize("memory", EXECUTIONS)
@pytest.mark.usefixtures("offload_anywhere")
def test_recompute_runs_the_source_blocks_once_more(memory: str) -> None:
    """The target pass and the source pass run each block once. With "recompute", the source pass runs twice."""
    model = model_of("llama", memory)
    blocks = tiny.block_list(model.get_base_model())
    with count_calls(blocks) as calls:
        model(**inputs_of("llama")).loss.backward()
    assert calls.total == EXECUTIONS[memory] * tiny.LAYERS
    frozen = model_of("llama", memory)
    for name, parameter in frozen.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    with count_calls(tiny.block_list(frozen.get_base_model())) as calls:
        frozen(**inputs_of("llama")).loss.backward()
    assert calls.total == 2 * tiny.LAYERS, "with a frozen A there is no second source pass"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory", ["keep", "recompute", "inference"])
def test_only_keep_holds_a_state_for_each_block(family: str, memory: str, monkeypatch) -> None:
    """ "keep" holds one state for each block; "recompute" and inference hold at most two, at any time and depth."""
    alive = StatesAlive()
    monkeypatch.setattr(FrozenPass, "record", alive.recording())
    depth = "num_layers" if family == "mt5" else "num_hidden_layers"
    for layers in (2, 6):
        model = model_of(family, "keep" if memory == "inference" else memory, base={depth: layers})
        inputs = inputs_of(family)
        inputs.pop("source_labels", None)
        alive.clear()
        if memory == "inference":
            with torch.no_grad():
                model(**inputs)
        else:
            loss = model(**inputs).loss
            gc.collect()
            assert alive.now == (layers if memory == "keep" else 0)
            loss.backward()
        assert max(alive.counts) == layers if memory == "keep" else max(alive.counts) <= 2


@pytest.mark.parametrize(("offset", "way"), [(1, "separate"), (0, "separate"), (0, "shared")])
def test_states_alive_while_generating_do_not_grow_with_depth(offset: int, way: str, monkeypatch) -> None:
    """At most two states exist at any time, for the prompt and for new tokens. Between tokens,
    each layer keeps only S of the last new source token.

    With offset 0 the embeddings are a state too. They are not counted, because transformers' forward keeps them anyway.
    """
    alive, plain = StatesAlive(), Preparation.rows

    def rows(self, key, hidden):
        if key.position:
            alive.follow(hidden)
        alive.count()
        return plain(self, key, hidden)

    monkeypatch.setattr(Preparation, "rows", rows)
    for layers in (2, 6):
        model = model_of("llama", "auto", base={"num_hidden_layers": layers}, source_layer_offset=offset).eval()
        inputs = {name: value for name, value in inputs_of("llama").items() if name != "labels"}
        alive.clear()
        out = model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, pad_token_id=1, return_dict_in_generate=True, source_pass=way
        )
        assert len(alive.counts) == 4 * layers and max(alive.counts) <= 2
        assert alive.now == 0
        last_states = out.past_key_values.flare_decoding.last_states
        assert len(last_states) == 2 * layers
        assert {tuple(S.shape) for by_adapter in last_states.values() for S in by_adapter.values()} == {(3, 1, 5)}
        assert all(
            S.untyped_storage().nbytes() <= 3 * 2 * 5 * 4
            for by_adapter in last_states.values()
            for S in by_adapter.values()
        )


def test_overwritten_inputs_raise_an_error() -> None:
    """The second source pass would read the new tokens, and silently give wrong gradients."""
    model = model_of("llama", "recompute")
    inputs = inputs_of("llama")
    loss = model(**inputs).loss
    inputs["source_input_ids"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_reentrant_checkpointing_uses_keep_and_warns_once() -> None:
    inputs = inputs_of("llama")
    expected = gradients(model_of("llama", "keep"), inputs)
    model = model_of("llama", "recompute")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model.train()
    with pytest.warns(UserWarning, match="'recompute' is 'keep' here: with reentrant checkpointing"):
        actual = gradients(model, inputs)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*source_memory.*")
        gradients(model, inputs)


def test_reentrant_checkpointing_by_the_user_raises_an_error() -> None:
    model = model_of("llama", "recompute")
    block = tiny.block_list(model.get_base_model())[0]
    plain = block.forward
    block.forward = lambda hidden, **kwargs: checkpoint(lambda h: plain(h, **kwargs), hidden, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"use_reentrant=False, or source_memory=.keep."):
        model(**inputs_of("llama"))


def test_auto_decides_by_the_size_of_the_states_and_warns_about_recompute(monkeypatch) -> None:
    model, inputs = model_of("llama", "auto"), inputs_of("llama")
    blocks = tiny.block_list(model.get_base_model())
    expected = gradients(model, inputs)
    states = tiny.LAYERS * inputs["source_input_ids"].numel() * tiny.HIDDEN * 4
    for total, executions in ((8 * states, 2), (8 * states - 8, 3)):
        monkeypatch.setattr(source_memory, "memory_of", lambda device, total=total: total)
        with warnings.catch_warnings(record=True) as caught, count_calls(blocks) as calls:
            warnings.simplefilter("always")
            assert_same(gradients(model, inputs), expected)
        assert calls.total == executions * tiny.LAYERS, "the choice does not run the model"
        warned = [str(one.message) for one in caught if "source_memory" in str(one.message)]
        assert len(warned) == (executions == 3)
        assert all("'auto' chose 'recompute'" in one and "to override" in one for one in warned)


def test_offload_on_a_cpu_uses_keep_and_warns_once() -> None:
    model, inputs = model_of("bert", "offload"), inputs_of("bert")
    with pytest.warns(UserWarning, match=ON_CPU):
        actual = gradients(model, inputs)
    assert_same(actual, gradients(model_of("bert", "keep"), inputs))


def test_states_passed_by_the_caller_need_no_source_pass() -> None:
    """The caller keeps the states in memory, so even "recompute" runs no source pass."""
    model, inputs = model_of("llama", "recompute"), inputs_of("llama")
    expected = gradients(model, inputs)
    source = {name: inputs.pop(name) for name in list(inputs) if name.startswith("source")}
    states = model.encode_source(**source)
    with count_calls(tiny.block_list(model.get_base_model())) as calls:
        assert_same(gradients(model, {**inputs, "source_states": states}), expected)
    assert calls.total == tiny.LAYERS


def test_padding_is_neither_kept_nor_read(monkeypatch) -> None:
    """With source_padding="zero" only the source's tokens are kept, and trailing columns of padding are cut off."""
    model, inputs = model_of("llama", "keep", source_padding="zero"), inputs_of("llama")
    mask = torch.ones_like(inputs["source_attention_mask"])
    mask[:, -3:] = 0
    mask[0, :2] = 0
    mask[1, 4:] = 0
    inputs["source_attention_mask"] = mask
    seen: list[tuple[int, ...]] = []
    plain = Preparation.rows
    monkeypatch.setattr(
        Preparation,
        "rows",
        lambda self, key, hidden: seen.append((hidden.shape[1], len(x := plain(self, key, hidden)))) or x,
    )
    actual = gradients(model, inputs)
    assert seen == [(mask.shape[1] - 3, int(mask.sum()))] * tiny.LAYERS
    # token ids at padding have no effect
    changed = {**inputs, "source_input_ids": torch.where(mask == 0, 5, inputs["source_input_ids"])}
    assert_same(gradients(model, changed), actual)
    # without padding, source_padding="zero" and "keep" give the same gradients
    inputs["source_attention_mask"] = torch.ones_like(mask)
    assert_same(gradients(model, inputs), gradients(model_of("llama", "keep"), inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_memory": "disk"}, "source_memory='disk'"),
        ({"source_memory": "recompute", "source_dropout": True}, "other dropout masks"),
        ({"source_memory": "offload", "latent_dim": 8}, "FLARE MT"),
    ],
    ids=["name", "dropout", "latent"],
)
def test_wrong_settings_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flare.FlareConfig(**options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_are_freed_after_backward_even_if_the_loss_is_held(checkpointing: bool, monkeypatch) -> None:
    """A training loop may hold a batch's output after backward. The source states of the batch must be freed anyway."""
    alive: list[weakref.ref] = []
    plain = FrozenPass.record

    def note(self, key, hidden):
        if key in self.missing:
            alive.append(weakref.ref(hidden.untyped_storage()))
        plain(self, key, hidden)

    monkeypatch.setattr(FrozenPass, "record", note)
    model = model_of("llama", "keep")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    output = model(**inputs_of("llama"))
    output.loss.backward()
    gc.collect()
    assert len(alive) == tiny.LAYERS and not any(one() is not None for one in alive)
