"""Test the source pass, in which the frozen model reads the source.

The tests check which blocks run, that the model's state is restored, and that gradients are exact.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

import flare
from flare.source.context import THREAD
from flare.source.runtime import runtime_of


def fused(family: str, *, base: dict | None = None, **overrides):
    model = flare.fast_lora(tiny.model(family, **(base or {})), **{"r": 5, "lora_alpha": 7, **overrides})
    tiny.randomize_lora(model)
    return model


def loss_and_gradients(model, *batches) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    losses = [model(**inputs).loss for inputs in batches]
    sum(losses).backward()
    return torch.stack(losses).detach(), tiny.gradients(model)


def assert_same_gradients(actual, expected, *, exact: bool = False) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(actual[name], grad, msg=name, **tolerance)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_keeps_the_fusion(family, use_reentrant, dropout) -> None:
    """Loss and gradients equal the results without checkpointing. The gradients differ from the gradients of
    plain LoRA.

    With dropout under reentrant checkpointing, dropout masks differ, so the test only requires a gradient that is not
    zero.
    """
    inputs = tiny.batch(family)
    model = fused(family, lora_dropout=dropout)
    torch.manual_seed(11)
    expected_loss, expected = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(11)
    loss, actual = loss_and_gradients(model, inputs)
    if use_reentrant and dropout:  # the source's dropout mask is drawn in another order, so it differs
        assert not torch.allclose(actual[next(iter(actual))], torch.zeros(()))
        return
    torch.testing.assert_close(loss, expected_loss)
    assert_same_gradients(actual, expected)
    _, plain = loss_and_gradients(model, {k: v for k, v in inputs.items() if not k.startswith("source")})
    assert any(not torch.allclose(plain[name], expected[name], rtol=1e-2) for name in expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fusion", ["cross_attention", "matmul"])
def test_gradient_checkpointing_matches_for_fusions_that_mix_positions(family, use_reentrant, fusion) -> None:
    inputs, model = tiny.batch(family), fused(family, fusion=fusion)
    expected_loss, expected = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss, actual = loss_and_gradients(model, inputs)
    torch.testing.assert_close(loss, expected_loss)
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_two_forwards_before_one_backward_add_their_gradients(family) -> None:
    first, second = tiny.batch(family, seed=3), tiny.batch(family, seed=4)
    model = fused(family)
    (_, a), (_, b) = loss_and_gradients(model, first), loss_and_gradients(model, second)
    _, both = loss_and_gradients(model, first, second)
    assert_same_gradients(both, {name: a[name] + b[name] for name in a})


def test_two_runs_give_the_same_bits() -> None:
    inputs = tiny.batch("llama")
    model = fused("llama")
    (loss_a, a), (loss_b, b) = loss_and_gradients(model, inputs), loss_and_gradients(model, inputs)
    assert torch.equal(loss_a, loss_b)
    assert_same_gradients(a, b, exact=True)


@pytest.mark.parametrize(("family", "head"), [("llama", "lm_head"), ("bert", "classifier"), ("bert", "bert.pooler")])
@pytest.mark.parametrize("offset", [1, 0])
def test_only_the_required_blocks_run(family, head, offset) -> None:
    model = fused(family, source_layer_offset=offset)
    base = model.get_base_model()
    counts: dict[str, int] = {}

    def count(name: str):
        return lambda *_: counts.__setitem__(name, counts.get(name, 0) + 1)

    for index, block in enumerate(tiny.block_list(base)):
        block.register_forward_hook(count(f"block {index}"))
    base.get_submodule(head).register_forward_hook(count("head"))
    model(**tiny.batch(family)).loss.backward()
    last = 2 if offset == 1 else 1
    assert counts == {"block 0": 2, "block 1": 2, "block 2": last, "head": 1}


def test_dropout_is_off_and_the_state_is_restored() -> None:
    """In train mode with dropout and NEFTune, source states are deterministic. Random state and flags do not change."""
    model = fused("bert", base={"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3})
    assert model.training
    inputs = tiny.batch("bert")
    ids, mask = inputs["source_input_ids"], inputs["source_attention_mask"]
    model.get_base_model().bert.encoder.layer[1].eval()
    embeddings = model.get_base_model().get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    flags = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    first, second = model.encode_source(ids, mask), model.encode_source(ids, mask)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert flags == {name: module.training for name, module in model.named_modules()}
    model.eval()
    for a, b, c in zip(first, second, model.encode_source(ids, mask), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    noisy = fused("bert", base={"hidden_dropout_prob": 0.3}, source_dropout=True)
    assert not torch.equal(next(iter(noisy.encode_source(ids, mask))), next(iter(noisy.encode_source(ids, mask))))


def test_a_failing_pass_leaves_the_model_usable() -> None:
    model = fused("llama")
    inputs = tiny.batch("llama")
    expected, _ = loss_and_gradients(model, inputs)

    def fail(*_) -> None:
        raise RuntimeError("simulated failure")

    handle = tiny.block_list(model.get_base_model())[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="simulated failure"):
        model(**inputs)
    handle.remove()
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(loss_and_gradients(model, inputs)[0], expected)


def test_trained_weights_do_not_change_source_states() -> None:
    """Source states do not change if the weights of the adapters and of the head change."""
    model = fused("bert")
    inputs = tiny.batch("bert")
    ids, mask = inputs["source_input_ids"], inputs["source_attention_mask"]
    before = list(model.encode_source(ids, mask))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    assert all(torch.equal(a, b) for a, b in zip(before, model.encode_source(ids, mask), strict=True))


def test_the_source_pass_does_not_use_trained_embeddings() -> None:
    model = fused("llama", modules_to_save=["embed_tokens"])
    inputs = tiny.batch("llama")
    before = list(model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"]))
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.modules_to_save["default"].weight.add_(1.0)
    after = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("offset", [1, 0])
def test_encode_source_returns_the_states_that_the_blocks_read(offset) -> None:
    inputs = tiny.batch("llama")
    model = fused("llama", source_layer_offset=offset)
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    expected = tiny.source_hidden_states(model, inputs, offset)
    assert (len(states), states.offset, states.shape) == (tiny.LAYERS, offset, (3, 9))
    assert states.nbytes == tiny.LAYERS * 3 * 9 * tiny.HIDDEN * 4
    for actual, x in zip(states, expected, strict=True):
        torch.testing.assert_close(actual, x, rtol=0, atol=0)
    expected_loss, expected_grads = loss_and_gradients(model, inputs)
    rest = {k: v for k, v in inputs.items() if not k.startswith("source")}
    loss, grads = loss_and_gradients(model, {**rest, "source_states": states})
    assert torch.equal(loss, expected_loss)
    assert_same_gradients(grads, expected_grads, exact=True)


def test_a_missing_mask_means_all_ones() -> None:
    inputs = tiny.batch("bert")
    inputs["source_attention_mask"] = torch.ones_like(inputs["source_input_ids"])
    model = fused("bert").eval()
    expected = model(**inputs).logits
    del inputs["source_attention_mask"]
    assert torch.equal(model(**inputs).logits, expected)


def test_token_types_of_a_pair_reach_the_source_pass() -> None:
    inputs = tiny.batch("bert")
    model = fused("bert").eval()
    expected = model(**inputs).logits
    types = torch.zeros_like(inputs["source_input_ids"])
    assert torch.equal(model(**inputs, source_token_type_ids=types).logits, expected)
    types[:, 4:] = 1
    assert not torch.allclose(model(**inputs, source_token_type_ids=types).logits, expected)


@pytest.mark.parametrize("fusion", ["add", "add_relu", "mul"])
def test_zero_padding_sets_S_to_zero(fusion) -> None:
    """At positions without a source token, add gives T, add_relu gives relu(T), and mul gives 0."""
    inputs = tiny.batch("bert")
    inputs["source_attention_mask"] = torch.zeros_like(inputs["source_attention_mask"])
    inputs["source_attention_mask"][:, 0] = 1  # one token, so that the source pass itself is defined
    outputs = {}

    def run(**overrides) -> torch.Tensor:
        model = fused("bert", **overrides).eval()
        layer = model.get_base_model().bert.encoder.layer[0].attention.self.value
        handle = layer.register_forward_hook(lambda m, a, y: outputs.update(x=a[0], y=y, layer=m))
        model(**inputs)
        handle.remove()
        return outputs["y"]

    y = run(fusion=fusion, source_padding="zero")
    layer, x = outputs["layer"], outputs["x"]
    T = x @ layer.lora_A["default"].weight.T
    H = {"add": T, "add_relu": T.relu(), "mul": torch.zeros_like(T)}[fusion]
    expected = layer.base_layer(x) + layer.scaling["default"] * H @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(y[:, 1:], expected[:, 1:])
    assert not torch.allclose(y[:, 0], expected[:, 0])
    assert not torch.allclose(run(fusion=fusion, source_padding="keep")[:, 1:], expected[:, 1:])


def test_states_are_kept_once_and_only_if_a_gradient_needs_them() -> None:
    inputs = tiny.batch("llama")
    model = fused("llama", base={"dtype": torch.bfloat16})
    seen = []
    attention = tiny.block_list(model.get_base_model())[0].self_attn
    attention.register_forward_hook(lambda *_: seen.append(THREAD.slot.forward))

    def kept() -> list[torch.Tensor]:
        return [state for site in seen[-1].sites.values() for state in (site.states or {}).values()]

    model(**inputs)
    assert len(kept()) == tiny.LAYERS and all(state.dtype == torch.bfloat16 for state in kept())
    with torch.no_grad():
        model(**inputs)
    assert not kept()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    model(**inputs)
    assert not kept(), "a frozen A needs no source states for backward"


def test_source_states_under_autocast_have_the_autocast_dtype() -> None:
    inputs = tiny.batch("bert")
    model = fused("bert")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
        loss, grads = loss_and_gradients(model, inputs)
        rest = {k: v for k, v in inputs.items() if not k.startswith("source")}
        same, same_grads = loss_and_gradients(model, {**rest, "source_states": states})
    assert all(state.dtype == torch.bfloat16 for state in states)
    assert torch.equal(loss, same)
    assert_same_gradients(same_grads, grads, exact=True)
    assert all(grad.dtype == torch.float32 for grad in grads.values())


def test_the_pass_ends_with_the_last_required_state() -> None:
    """With adapters on the first block only, the source pass ends after the first block."""
    model = fused("llama", layers_to_transform=[0], target_modules=["q_proj", "v_proj"])
    runs = []
    for index, block in enumerate(tiny.block_list(model.get_base_model())):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    model(**tiny.batch("llama"))
    assert runs == [0, 0, 1, 2]


def test_a_model_that_drops_keyword_arguments_raises_an_error(monkeypatch) -> None:
    model = fused("llama")
    block = tiny.block_list(model.get_base_model())[1]
    monkeypatch.setattr(type(block), "forward", _without_source(type(block).forward))
    with pytest.raises(ValueError, match=r"did not reach 6 of 6 fusing layers.*LlamaForCausalLM"):
        model(**tiny.batch("llama"))


def _without_source(forward):
    def narrowed(self, *args, **kwargs):
        kwargs.pop("flare_source", None)
        return forward(self, *args, **kwargs)

    return narrowed


def test_a_copy_has_its_own_layers_and_sites() -> None:
    """The copy is made after a forward pass. A site computes the projections of one attention module."""
    model = fused("bert")
    inputs = tiny.batch("bert")
    model(**inputs)
    twin = copy.deepcopy(model)
    assert runtime_of(twin.get_base_model()) is not runtime_of(model.get_base_model())
    assert THREAD.slot.forward is None and THREAD.slot.context is None and THREAD.slot.pending is None
    assert all(isinstance(layer, nn.Module) for layer in runtime_of(twin.get_base_model()).layers)
    modules_of_twin = {id(m) for m in twin.modules()}
    assert all(id(layer) in modules_of_twin for layer in runtime_of(twin.get_base_model()).layers)
    sites = {layer.__dict__["_flare_site"] for layer in runtime_of(twin.get_base_model()).layers}
    assert len(sites) == tiny.LAYERS and all(id(site.parent) in modules_of_twin for site in sites)


def test_outputs_seen_by_a_hook_on_the_frozen_layer_do_not_change() -> None:
    model = fused("llama").eval()
    layer = tiny.block_list(model.get_base_model())[0].self_attn.q_proj
    seen = []
    layer.base_layer.register_forward_hook(lambda m, a, y: seen.append((y, y.clone())))
    model(**tiny.batch("llama"))
    assert seen and all(torch.equal(kept, copied) for kept, copied in seen)


def test_a_source_next_to_a_filled_kv_cache_is_refused() -> None:
    model = fused("llama").eval()
    inputs = {k: v for k, v in tiny.batch("llama").items() if k != "labels"}
    rest = {k: v for k, v in inputs.items() if not k.startswith("source")}
    cache = model(**rest, use_cache=True).past_key_values
    step = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache}
    with pytest.raises(ValueError, match="would fuse with the wrong source positions; use model"):
        model(**step, source_input_ids=inputs["source_input_ids"][:, -1:])
    model(**step)


def test_dropout_of_a_module_that_is_set_later_is_off_too() -> None:
    model = fused("bert")
    inputs = tiny.batch("bert")
    ids, mask = inputs["source_input_ids"], inputs["source_attention_mask"]
    model.encode_source(ids, mask)
    model.get_base_model().bert.embeddings.dropout = nn.Dropout(0.5)
    first, second = model.encode_source(ids, mask), model.encode_source(ids, mask)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_states_encoded_in_inference_mode_can_be_trained_on() -> None:
    model = fused("llama")
    inputs = tiny.batch("llama")
    expected_loss, expected = loss_and_gradients(model, inputs)
    with torch.inference_mode():
        states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    rest = {k: v for k, v in inputs.items() if not k.startswith("source")}
    loss, actual = loss_and_gradients(model, {**rest, "source_states": states})
    assert torch.equal(loss, expected_loss)
    assert_same_gradients(actual, expected, exact=True)


def test_zeroed_padding_replaces_nan_and_inf() -> None:
    from flare.source.source_pass import zero_pads

    hidden = torch.tensor([[[1.0, float("nan")], [float("inf"), 2.0], [3.0, 4.0]]])
    assert zero_pads(hidden, torch.tensor([[0, 0, 1]])).tolist() == [[[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]]


def test_forward_and_backward_apply_the_same_dropout_to_the_source() -> None:
    """S is linear in A. For a gradient G of S, <dA, A> = <G, S> holds only if backward drops what forward dropped."""
    from flare.source.projected import project_states
    from flare.source.source_pass import Preparation, read_from_states

    model = fused("llama", lora_dropout=0.4).double()
    inputs = tiny.batch("llama")
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    reads = runtime_of(model.get_base_model()).active_uses().of_text
    assert all(group.dropout_p == 0.4 for group in reads.groups)
    reader, weights = read_from_states(states, reads.keys), reads.weights()
    first = project_states(reader, Preparation(), reads.groups).bottlenecks
    S = [part for by_adapter in first.values() for part in by_adapter.values()]
    G = [torch.randn_like(part) for part in S]
    dA = torch.autograd.grad(S, weights, G)
    for weight, grad, part, g in zip(weights, dA, S, G, strict=True):
        torch.testing.assert_close((grad * weight).sum(), (g * part).sum())
    again = project_states(reader, Preparation(), reads.groups).bottlenecks
    assert any(not torch.equal(part, again[layer]["default"]) for layer, part in zip(first, S, strict=True))
