"""Query, key and value in one call: the numbers of separate calls, one dx buffer, and who computes alone after all."""

from __future__ import annotations

import collections
import contextlib
import copy
import pickle
from collections.abc import Iterator
from functools import partial

import peft
import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flare
from flare.tuner import layer
from flare.tuner import site as joint_attention
from flare.tuner.site import SiblingLinear
from flare_kernels import fused_lora_qkv

# (query, key, value) of a family
NAMES = {
    **dict.fromkeys(("bert", "xlmr", "roberta"), ("query", "key", "value")),
    **dict.fromkeys(("llama", "gemma2", "qwen3", "mistral"), ("q_proj", "k_proj", "v_proj")),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "mt5": ("q", "k", "v"),
}
SUBSETS = {"qv": (0, 2), "qkv": (0, 1, 2), "q": (0,)}


class Counts(collections.Counter):
    """Calls since the start: joint ones, separate ones (``fused_lora``); and what the joint ones were given."""

    given: list[dict]


@pytest.fixture
def calls(monkeypatch) -> Counts:
    counts = Counts()
    counts.given = []
    joint, single = joint_attention.fused_lora_qkv, layer.fused_lora

    def spy_joint(*args, **kwargs):
        counts["joint"] += 1
        counts.given.append({"x": args[0], "base": dict(args[2]), "adapters": args[3], **kwargs})
        counts.given[-1]["result"] = joint(*args, **kwargs)
        return counts.given[-1]["result"]

    def spy_single(*args, **kwargs):
        counts["single"] += 1
        return single(*args, **kwargs)

    monkeypatch.setattr(joint_attention, "fused_lora_qkv", spy_joint)
    monkeypatch.setattr(layer, "fused_lora", spy_single)
    return counts


def fused(family: str, subset: str = "qv", *, dtype: torch.dtype = torch.float32, **overrides) -> peft.PeftModel:
    targets = [NAMES[family][index] for index in SUBSETS[subset]]
    made = {"r": 5, "lora_alpha": 7, "target_modules": targets, **overrides}
    no_dropout = {"dropout_rate": 0.0} if family == "mt5" else {}
    model = flare.fast_lora(tiny.model(family, dtype=dtype, **no_dropout), **made)
    tiny.randomize_lora(model)
    return model


def alone(model: peft.PeftModel) -> peft.PeftModel:
    """A copy whose projections are computed one by one."""
    twin = copy.deepcopy(model)
    joint_attention.unwire(twin)
    return twin


def step(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """Loss and every gradient of one step."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **tiny.gradients(model)}


def assert_same(got: dict, want: dict, **tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name, **(tolerance or {"rtol": 1e-9, "atol": 1e-10}))


def first_attention(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if joint_attention._WIRING in m.__dict__)


def siblings(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is SiblingLinear}


# --- the numbers and the counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("source", [True, False], ids=["source", "plain"])
def test_one_call_per_attention_with_the_numbers_of_separate_calls(family, subset, source, calls) -> None:
    inputs = tiny.batch(family, source=source)
    exact = family != "gemma2"  # in float64 its left-padded rows are NaN
    model = fused(family, subset, dtype=torch.float64 if exact else torch.float32)
    twin = alone(model)
    got = step(model, inputs)
    attentions, cross = (tiny.LAYERS + 2, 2) if family == "mt5" else (tiny.LAYERS, 0)
    assert calls["joint"] == attentions
    assert calls["single"] == cross * len(SUBSETS[subset]), "cross-attention's q and k, v read two sequences"
    assert all(set(call["base"]) == set(call["weights"]) == set(NAMES[family]) for call in calls.given)
    calls.clear()
    assert_same(got, step(twin, inputs), **({} if exact else {"rtol": 1e-5, "atol": 1e-7}))
    assert (calls["joint"], calls["single"]) == (0, (attentions + cross) * len(SUBSETS[subset]))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_float32_to_rounding(family) -> None:
    inputs, model = tiny.batch(family), fused(family)
    twin = alone(model)
    assert_same(step(model, inputs), step(twin, inputs), rtol=1e-5, atol=1e-7)


class _Buffers(TorchDispatchMode):
    """Operations whose result has as many elements as the hidden state: sums of two tensors, and matrix products."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.counts = numel, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("add", "add_", "mm", "addmm_") and isinstance(out, torch.Tensor) and out.numel() == self.numel:
            self.counts[name] += 1
        return out


@pytest.mark.parametrize(("subset", "apart"), [("qv", 5), ("qkv", 6), ("q", 4)])
def test_backward_has_one_dx_buffer_and_no_additions_of_its_own(subset, apart, calls) -> None:
    """Apart, each frozen product and each adapter makes a dx of its own, and autograd adds them up."""
    inputs = tiny.batch("llama", B=2, m=7)
    model = fused("llama", subset)
    found = {}
    for name, each in (("joint", model), ("apart", alone(model))):
        each.enable_input_require_grads()
        loss = each(**inputs).loss
        with _Buffers(2 * 7 * tiny.HIDDEN) as seen:
            loss.backward()
        found[name] = seen.counts
    sums = {name: counts["add"] + counts["add_"] for name, counts in found.items()}
    assert found["joint"]["addmm_"] == 3 * tiny.LAYERS, "two frozen products and all adapters: into what q's made"
    assert found["apart"]["mm"] - found["joint"]["mm"] == (apart - 1) * tiny.LAYERS
    assert sums["apart"] - sums["joint"] == (apart - 1) * tiny.LAYERS


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("train", [True, False])
def test_every_result_stands_where_the_frozen_output_stood(family, train, calls) -> None:
    model = fused(family)
    with torch.set_grad_enabled(train):
        model(**tiny.batch(family))
    assert calls["joint"] == tiny.LAYERS and not calls["single"]
    for call in calls.given:
        for name, y in call["result"].items():
            assert y.data_ptr() == call["base"][name].data_ptr(), name


def test_autocast_is_no_further_from_the_truth_than_separate_calls() -> None:
    for family in ("bert", "llama"):
        inputs = tiny.batch(family)
        model = fused(family)
        twin, truth = alone(model), step(alone(model).double(), inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, plain = step(model, inputs), step(twin, inputs)
        for name, value in truth.items():
            allowed = 2 * (plain[name] - value).abs().max() + torch.finfo(torch.bfloat16).eps * value.abs().max()
            assert (got[name] - value).abs().max() <= allowed, name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode, calls) -> None:
    inputs = tiny.batch("llama")
    model = fused("llama").eval()
    twin = alone(model)
    with mode():
        torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits)
    assert calls["joint"] == tiny.LAYERS
    plain = {k: v for k, v in inputs.items() if not k.startswith("source") and k != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**plain, **options), twin.generate(**plain, **options))


def test_dropout_draws_one_mask_for_all_projections(monkeypatch) -> None:
    """With the same seeds, the oracle's numbers, which drops x once and hands it to every projection."""
    inputs = tiny.batch("llama")
    model = fused("llama", "qkv", dtype=torch.float64, lora_dropout=0.4)
    torch.manual_seed(3)
    got = step(model, inputs)
    monkeypatch.setattr(joint_attention, "fused_lora_qkv", partial(fused_lora_qkv, backend="reference"))
    torch.manual_seed(3)
    assert_same(got, step(model, inputs))
    torch.manual_seed(4)
    assert not torch.equal(step(model, inputs)["loss"], got["loss"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("subset", ["qv", "qkv"])
def test_gradient_checkpointing(family, use_reentrant, subset, calls) -> None:
    inputs = tiny.batch(family)
    model = fused(family, subset, dtype=torch.float64)
    want = step(alone(model), inputs)
    calls.clear()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(step(model, inputs), want)
    assert (calls["joint"], calls["single"]) == (2 * tiny.LAYERS, 0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_compile_each_projection_computes_alone(backend) -> None:
    inputs = tiny.batch("llama")
    model = fused("llama")
    want = step(alone(model), inputs)
    torch._dynamo.reset()
    assert_same(step(torch.compile(model, backend=backend), inputs), _compiled(want), rtol=1e-5, atol=1e-7)


def _compiled(values: dict) -> dict:
    return {name if name == "loss" else f"_orig_mod.{name}": value for name, value in values.items()}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantised_base_the_library_keeps_its_dx(kind, tmp_path, calls) -> None:
    """q and v in one call, without weights; k is bitsandbytes' alone."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: bnb)")
    from test_quantized import quantized

    tiny.model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = flare.fast_lora(quantized(tmp_path, kind), r=4, lora_alpha=8)
    tiny.randomize_lora(model)
    model.train()
    inputs, twin = tiny.batch("llama"), alone(model)
    got = step(model, inputs)
    assert (calls["joint"], calls["single"]) == (tiny.LAYERS, 0) and not siblings(model)
    assert all(set(call["base"]) == {"q_proj", "v_proj"} and call["weights"] is None for call in calls.given)
    plain = step(twin, inputs)
    for name, value in plain.items():  # the sum of dx is taken in bf16, in another order
        assert (got[name] - value).abs().max() <= 0.02 * value.abs().max(), name


# --- who computes alone -----------------------------------------------------------------------------------------------


class _Subclassed(nn.Parameter):
    """A subclass, as sharded and quantised weights are."""


def _patch_forward(module: nn.Module) -> None:
    module.forward = type(module).forward.__get__(module)


def _subclass_weight(module: nn.Module) -> None:
    module.weight = _Subclassed(module.weight.detach(), requires_grad=False)


SPOILERS = {
    "a pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "a backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "a forward of its own": _patch_forward,
    "accelerate": lambda m: setattr(m, "_hf_hook", object()),
    "a tensor subclass": _subclass_weight,
}


@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize("whom", ["q_proj.base_layer", "k_proj"])
def test_who_is_hooked_or_patched_is_called_as_ever(spoiler, whom, calls) -> None:
    """It stays out of the call; the others are still computed together."""
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64)
    want = step(alone(model), inputs)
    calls.clear(), calls.given.clear()
    attention = first_attention(model)
    SPOILERS[spoiler](attention.get_submodule(whom))
    assert_same(step(model, inputs), want)
    members = {frozenset(call["base"]) for call in calls.given[:1]}
    if spoiler == "a tensor subclass" and whom == "q_proj.base_layer":  # q's adapter is joined with v's, W stays out
        assert members == {frozenset({"q_proj", "v_proj"})} and calls.given[0]["weights"] is None
        assert calls["single"] == 0
        return
    assert members == {frozenset({"q_proj", "k_proj", "v_proj"} - {whom.partition(".")[0]})}
    assert calls["single"] == (1 if whom.startswith("q") else 0)


def test_a_trained_base_weight_keeps_its_own_graph(calls) -> None:
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64)
    attention = first_attention(model)
    attention.q_proj.base_layer.weight.requires_grad_(True)
    want = step(alone(model), inputs)
    calls.clear(), calls.given.clear()
    got = step(model, inputs)
    assert any(name.endswith("base_layer.weight") for name in got)
    assert_same(got, want)
    assert calls.given[0]["weights"] is None and calls.given[1]["weights"] is not None


def test_eager_fusions_and_different_dropouts_compute_alone(calls) -> None:
    inputs = tiny.batch("llama")
    for overrides in ({"fusion": "matmul"}, {"fusion": "cross_attention", "r": 4}):
        step(fused("llama", **overrides), inputs)
        assert calls["joint"] == 0
    model = fused("llama", lora_dropout=0.3)
    for module in model.modules():
        if getattr(module, "flare_key", "").endswith("q_proj"):
            module.lora_dropout["default"].eval()
    calls.clear()
    step(model, inputs)
    assert (calls["joint"], calls["single"]) == (0, 2 * tiny.LAYERS)


def test_lora_bias_and_several_active_adapters_compute_alone(calls) -> None:
    inputs = tiny.batch("llama")
    step(fused("llama", lora_bias=True), inputs)
    assert (calls["joint"], calls["single"]) == (0, 2 * tiny.LAYERS)
    model = fused("llama")
    model.add_adapter("second", flare.FlareConfig(r=3, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    calls.clear()
    step(model, inputs)
    assert (calls["joint"], calls["single"]) == (0, 4 * tiny.LAYERS)


def test_disabled_and_named_adapters(calls) -> None:
    model = fused("llama").eval()
    model.add_adapter("second", flare.FlareConfig(r=3, task_type="CAUSAL_LM"))
    tiny.randomize_lora(model)
    plain, twin = tiny.batch("llama", source=False), alone(model)
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(model(**plain).logits, twin(**plain).logits)
    names = ["default", "second", "__base__"]
    assert torch.equal(model(**plain, adapter_names=names).logits, twin(**plain, adapter_names=names).logits)
    assert not calls


class Attention(nn.Module):
    """Query from one sequence, key and value from another one that it makes itself; nothing in its name says so."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 6) for _ in range(3))

    def forward(self, hidden_states: torch.Tensor, how: str) -> torch.Tensor:
        other = hidden_states * 2 if how == "another" else hidden_states
        k, v = self.k_proj(other), self.v_proj(other)
        if how == "written to":
            hidden_states += 1
        q = self.q_proj(hidden_states)
        q *= 2  # in place, as modeling code may
        return q + k * v


@pytest.mark.parametrize("how", ["same", "another", "written to"])
def test_another_input_is_never_given_anothers_output(how) -> None:
    """k is called before any adapted projection, v and q with the same tensor or not: always the plain numbers."""
    torch.manual_seed(0)
    model = flare.fast_lora(nn.Sequential(Attention()), fusion=None, r=2, target_modules=["q_proj", "v_proj"]).double()
    tiny.randomize_lora(model)
    twin, results = alone(model), []
    assert siblings(model) == {"k_proj"}
    for each in (model, twin):
        x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 3, 8)
        attention = each.get_submodule("base_model.model.0")
        if how == "written to":  # autograd would refuse it
            with torch.no_grad():
                results.append({"y": attention(x, how)})
            continue
        y = attention(x.requires_grad_(), how)
        y.square().sum().backward()
        results.append({"y": y.detach(), "dx": x.grad, **tiny.gradients(each)})
    assert_same(*results)


def test_an_attention_that_raises_leaves_nothing_behind() -> None:
    model = fused("llama")
    attention = first_attention(model)
    o_proj, attention.o_proj = attention.o_proj, None
    with pytest.raises(TypeError):
        model(**tiny.batch("llama"))
    assert all(getattr(module, "_flare_joint", None) is None for module in model.modules())
    attention.o_proj = o_proj
    assert_same(step(model, tiny.batch("llama")), step(alone(model), tiny.batch("llama")), rtol=1e-5, atol=1e-7)


# --- the life cycle ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_deep_copy_and_a_pickle_compute_their_own(family, calls) -> None:
    inputs = tiny.batch(family)
    model = fused(family)
    want = step(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tiny.randomize_lora(model, seed=5)
        calls.clear()
        assert_same(step(twin, inputs), want, rtol=0, atol=0)
        assert (calls["joint"], calls["single"]) == (tiny.LAYERS, 0)
        tiny.randomize_lora(model)


def test_siblings_come_and_go_with_the_adapters() -> None:
    base = tiny.model("llama")
    names, keys = [name for name, _ in base.named_modules()], list(base.state_dict())
    model = flare.fast_lora(base, r=4)
    assert siblings(model) == {"k_proj"}
    unloaded = model.unload()
    assert not siblings(unloaded) and all(type(m) is nn.Linear for m in unloaded.modules() if isinstance(m, nn.Linear))
    assert [name for name, _ in unloaded.named_modules()] == names and list(unloaded.state_dict()) == keys
    assert not any("_flare" in name for m in unloaded.modules() for name in m.__dict__)
    merged = flare.fast_lora(unloaded, r=4, fusion=None).merge_and_unload()
    assert not siblings(merged) and not any(m._forward_pre_hooks for m in merged.modules())
    model = flare.fast_lora(merged, r=4)
    model.add_adapter("second", flare.FlareConfig(r=3, task_type="CAUSAL_LM"))
    model.delete_adapter("default")
    assert siblings(model) == {"k_proj"}
    model.delete_adapter("second")
    assert not siblings(model), "nothing to be a sibling of"


def test_a_refused_call_gives_siblings_their_class_back() -> None:
    stock = peft.get_peft_model(tiny.model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match="matches no LoRA module"):
        flare.fast_lora(stock, fusion_modules=["nope"])
    assert not siblings(stock)


def test_an_adapter_on_k_later(calls) -> None:
    """k is joined as what it is now: frozen, adapted, or carrying an adapter that is not active."""
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64)
    first = step(model, inputs)
    targets = ["q_proj", "k_proj", "v_proj"]
    model.add_adapter("second", flare.FlareConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"))
    assert not siblings(model)
    assert type(first_attention(model).k_proj.base_layer) is nn.Linear
    model.double()
    tiny.randomize_lora(model)
    model.set_adapter("second")
    twin = alone(model)
    calls.clear(), calls.given.clear()
    got = step(model, inputs)
    assert all(set(call["adapters"]) == set(targets) for call in calls.given) and calls["joint"] == tiny.LAYERS
    assert_same(got, step(twin, inputs))
    for each in (model, twin):
        each.set_adapter("default")
    calls.clear(), calls.given.clear()
    got = step(model, inputs)
    for call in calls.given:
        assert (set(call["adapters"]), set(call["weights"])) == ({"q_proj", "v_proj"}, set(targets))
    assert_same(got, step(twin, inputs))
    model.delete_adapter("second")
    tiny.randomize_lora(model)
    assert_same(step(model, inputs), first)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_fully_sharded_blocks(checkpointing, calls) -> None:
    """FSDP2: the weights that the node saves are freed after forward and gathered again before backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inputs = tiny.batch("llama")
    model = fused("llama")
    want = step(model, inputs)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with process_group():
        mesh = init_device_mesh("cpu", (1,))
        adapters = {p for name, p in model.named_parameters() if "lora_" in name}  # the source pass reads them whole
        for block in tiny.block_list(model.get_base_model()):
            fully_shard(block, mesh=mesh, ignored_params=adapters)
        fully_shard(model, mesh=mesh, ignored_params=adapters)
        calls.clear()
        assert_same(step(model, inputs), want, rtol=1e-5, atol=1e-7)
    assert (calls["joint"], calls["single"]) == (tiny.LAYERS * (1 if checkpointing is None else 2), 0)
