"""A site: its projections in one call with the numbers of separate calls, one dx buffer, and who is computed alone."""

from __future__ import annotations

import collections
import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flare
from flare.source.context import THREAD, Slot
from flare.source.source_pass import Switches
from flare.tuner import layer
from flare.tuner import site as sites
from flare.tuner.layer import SITE
from flare.tuner.site import SiblingLinear, Site
from flare_kernels import dropout as kernel_dropout
from flare_kernels import launch_mode, reference

# (query, key, value) of a family
NAMES = {
    **dict.fromkeys(("bert", "xlmr", "roberta"), ("query", "key", "value")),
    **dict.fromkeys(("llama", "gemma2", "qwen3", "mistral"), ("q_proj", "k_proj", "v_proj")),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "mt5": ("q", "k", "v"),
}
SUBSETS = {"qv": (0, 2), "qkv": (0, 1, 2), "q": (0,)}


class Counts(collections.Counter):
    """Calls since the start.

    joint, lone: calls of a site for several projections, for one. owned: those whose node makes the frozen products.
    single: calls of a layer by itself.
    """

    names: list[frozenset[str]]  # of the projections of each joint call


@pytest.fixture
def calls(monkeypatch) -> Counts:
    counts = Counts()
    counts.names = []
    outputs, owned, single = Site._outputs, sites.apply_with_products, layer.fused_lora

    def spy_outputs(site: Site, *args: Any) -> Any:
        found = outputs(site, *args)
        if found:
            counts["joint" if len(found) > 1 else "lone"] += 1
        if found and len(found) > 1:
            counts.names.append(frozenset(name for name, child in site.parent.named_children() if child in found))
        return found

    def spy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(Site, "_outputs", spy_outputs)
    monkeypatch.setattr(sites, "apply_with_products", spy("owned", owned))
    monkeypatch.setattr(layer, "fused_lora", spy("single", single))
    return counts


def forget(calls: Counts) -> None:
    calls.clear()
    calls.names.clear()


def fused(family: str, subset: str = "qv", *, dtype: torch.dtype = torch.float32, **overrides) -> peft.PeftModel:
    targets = [NAMES[family][index] for index in SUBSETS[subset]]
    made = {"r": 5, "lora_alpha": 7, "target_modules": targets, **overrides}
    no_dropout = {"dropout_rate": 0.0} if family == "mt5" else {}
    model = flare.fast_lora(tiny.model(family, dtype=dtype, **no_dropout), **made)
    tiny.randomize_lora(model)
    return model


def all_sites(model: nn.Module) -> list[Site]:
    return list({id(site): site for m in model.modules() if (site := m.__dict__.get(SITE)) is not None}.values())


def alone(model: peft.PeftModel) -> peft.PeftModel:
    """A copy whose projections are computed one by one, without sites."""
    twin = copy.deepcopy(model)
    for site in all_sites(twin):
        site.output = lambda module, x, slot: None  # type: ignore[method-assign]
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


def plain(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if not name.startswith("source")}


def first_attention(model: nn.Module) -> nn.Module:
    return next(site.parent for site in all_sites(model) if len(site.names) > 1)


def siblings(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is SiblingLinear}


def is_empty(slot: Slot) -> bool:
    return all(getattr(slot, name) is value for name, value in vars(Slot).items() if name in Slot.__annotations__)


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
    assert calls["joint"] == attentions and set(calls.names) == {frozenset(NAMES[family])}
    assert calls["lone"] == cross * len(SUBSETS[subset]), "cross-attention's q and k, v read two sequences"
    assert calls["owned"] == attentions + calls["lone"] and not calls["single"]
    forget(calls)
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


class _Copies(TorchDispatchMode):
    """Copies of tensors, and products of frozen weights, by number."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("train", [True, False])
def test_no_output_is_copied(family, train) -> None:
    model, seen = fused(family, fusion=None), {}
    inputs = plain(tiny.batch(family))
    for name in ("adapter", "frozen"):
        off = model.disable_adapter() if name == "frozen" else contextlib.nullcontext()
        with torch.set_grad_enabled(train), off, _Copies() as mode:
            model(**inputs)
        seen[name] = mode.counts
    for name in ("clone", "copy_", "_to_copy"):
        assert seen["adapter"][name] == seen["frozen"][name], name


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


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_adapters_first_gives_the_same_step(family, dropout) -> None:
    """Over a whole model, with the biases of XLM-R and a key without an adapter."""
    model, inputs, results = fused(family, dtype=torch.float64, lora_dropout=dropout), tiny.batch(family), []
    for form in ("frozen_first", "adapter_first"):
        with launch_mode.forcing(form=form):
            torch.manual_seed(3)
            results.append(step(model, inputs))
            orders = [plan for key, plan in launch_mode.current.plans.items() if key[0] == "order"]
        assert orders and all((order is not None) == (form == "adapter_first") for order in orders)
    assert_same(*reversed(results))


def by_the_oracle(call, sizes, x, x_source, source_seed, Ss, A, As, Bs, Ws, biases) -> tuple[torch.Tensor, ...]:
    """apply_with_products by the reference, with the same seeds."""
    x = x.flatten(0, -2)
    dropped = reference.drop(x, call.p, kernel_dropout.draw_seed(x.device), kernel_dropout.TARGET_STREAM)
    if x_source is not None:
        x_source = reference.drop(x_source.flatten(0, -2), call.p, source_seed, kernel_dropout.SOURCE_STREAM)
    outputs = [F.linear(x, W, bias) for W, bias in zip(Ws, biases, strict=True)]
    for projection, A_i, B_i in zip(call.projections, As, Bs, strict=True):
        fusing = projection.fusion is not None
        outputs[projection.output] = reference.fused_lora(
            dropped,
            x_source if fusing else None,
            outputs[projection.output],
            A_i,
            B_i,
            scaling=projection.scaling,
            fusion=projection.fusion,
        )
    assert not Ss
    return tuple(outputs)


def test_dropout_draws_one_mask_for_all_projections(monkeypatch) -> None:
    """With the same seeds, the oracle's numbers, which drops x once and hands it to every projection."""
    inputs = tiny.batch("llama")
    model = fused("llama", "qkv", dtype=torch.float64, lora_dropout=0.4)
    torch.manual_seed(3)
    got = step(model, inputs)
    monkeypatch.setattr(sites, "apply_with_products", by_the_oracle)
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
    forget(calls)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(step(model, inputs), want)
    assert (calls["joint"], calls["single"]) == (2 * tiny.LAYERS, 0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_compile_the_numbers_are_those_of_separate_calls(backend) -> None:
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
    assert set(calls.names) == {frozenset({"q_proj", "v_proj"})} and not calls["owned"]
    for name, value in step(twin, inputs).items():  # the sum of dx is taken in bf16, in another order
        assert (got[name] - value).abs().max() <= 0.02 * value.abs().max(), name


# --- who computes alone -----------------------------------------------------------------------------------------------


class _Subclassed(nn.Parameter):
    """A subclass, as sharded and quantised weights are."""


def _patch_forward(module: nn.Module) -> None:
    module.forward = type(module).forward.__get__(module)


def _subclass_weight(module: nn.Module) -> None:
    module.weight = _Subclassed(module.weight.detach(), requires_grad=False)


def _parametrize(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", nn.Identity())


SPOILERS = {
    "a pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "a backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "a forward of its own": _patch_forward,
    "accelerate": lambda m: setattr(m, "_hf_hook", object()),
    "a tensor subclass": _subclass_weight,
    "a parametrisation": _parametrize,
}


@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize("whom", ["q_proj.base_layer", "k_proj"])
def test_who_is_hooked_or_patched_is_called_as_ever(spoiler, whom, calls) -> None:
    """It stays out of the call, also where the plan was made before; the others are still computed together."""
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64)
    want = step(alone(model), inputs)
    assert_same(step(model, inputs), want)
    forget(calls)
    attention = first_attention(model)
    SPOILERS[spoiler](attention.get_submodule(whom))
    assert_same(step(model, inputs), want)
    if spoiler == "a tensor subclass" or (spoiler, whom[0]) == ("a parametrisation", "q"):
        # the frozen products keep their graphs, the adapters are joined
        assert calls.names[0] == {"q_proj", "v_proj"} and not calls["single"]
        assert calls["owned"] == calls["joint"] - 1
        return
    assert calls.names[0] == {"q_proj", "k_proj", "v_proj"} - {whom.partition(".")[0]}
    assert calls["single"] == (1 if whom.startswith("q") else 0)


@pytest.mark.parametrize("how", ["hook", "scaled by a hook", "pruning", "parametrisation", "scaled forward"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_what_hooks_or_patches_lora_A_and_lora_B_takes_part_as_in_peft(how, part) -> None:
    """In two steps of SGD, after a step without it; gone again, all is computed together again."""
    seen: collections.Counter[str] = collections.Counter()
    kept: list[Any] = []
    inputs = plain(tiny.batch("llama"))

    def spoil(name: str, module: nn.Module) -> None:
        if how == "hook":
            kept.append(module.register_forward_hook(lambda *_: seen.update([name])))
        elif how == "scaled by a hook":
            kept.append(module.register_forward_hook(lambda module, args, output: output * 1.5))
        elif how == "pruning":
            prune.l1_unstructured(module, "weight", 0.4)
        elif how == "parametrisation":
            parametrize.register_parametrization(module, "weight", _Doubled())
        else:
            forward = module.forward
            module.forward = lambda x: 2 * forward(x)

    def trained(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
        tiny.randomize_lora(model)
        step(model, inputs)
        for path, module in list(model.named_modules()):
            if path.endswith(f"{part}.default"):
                spoil(name, module)
        found = {}
        for index in range(2):
            found |= {f"{index} {key}": value for key, value in step(model, inputs).items()}
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.5 * p.grad
        return found

    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    stock = peft.get_peft_model(tiny.model("llama"), config).double()
    model = fused("llama", fusion=None, dtype=torch.float64).double()
    assert_same(trained("ours", model), trained("peft", stock))
    assert seen["ours"] == seen["peft"] and bool(seen) == (how == "hook")


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_a_pruned_A_reads_both_streams(memory) -> None:
    """Its weight is made anew for each step, the source's share included."""
    inputs, found = tiny.batch("llama"), []
    for pruned in (True, False):
        model = fused("llama", dtype=torch.float64, source_memory=memory).double()
        layers = [module for path, module in model.named_modules() if path.endswith("lora_A.default")]
        for one in layers:
            prune.l1_unstructured(one, "weight", 0.4)
        with torch.no_grad():
            for one in layers:
                one.weight_orig *= 1.1
        if not pruned:  # the same weights without the hook that masks them
            for one in layers:
                prune.remove(one, "weight")
        found += [step(model, inputs)["loss"], step(model, inputs)["loss"]]
    torch.testing.assert_close(torch.stack(found), found[-1].expand(4), rtol=1e-12, atol=0)


def test_a_trained_base_weight_keeps_its_own_graph(calls) -> None:
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64)
    attention = first_attention(model)
    attention.q_proj.base_layer.weight.requires_grad_(True)
    want = step(alone(model), inputs)
    forget(calls)
    got = step(model, inputs)
    assert any(name.endswith("base_layer.weight") for name in got)
    assert_same(got, want)
    assert calls.names == [{"q_proj", "v_proj"}, *[{"q_proj", "k_proj", "v_proj"}] * (tiny.LAYERS - 1)]
    assert calls["owned"] == tiny.LAYERS - 1
    attention.q_proj.base_layer.weight.requires_grad_(False)
    forget(calls)
    step(model, inputs)
    assert calls["owned"] == tiny.LAYERS, "frozen again"


def test_eager_fusions_and_different_dropouts_compute_alone(calls) -> None:
    inputs = tiny.batch("llama")
    for overrides in ({"fusion": "matmul"}, {"fusion": "cross_attention", "r": 4}):
        step(fused("llama", **overrides), inputs)
        assert calls["joint"] == 0
    model = fused("llama", lora_dropout=0.3)
    for module in model.modules():
        if getattr(module, "flare_key", "").endswith("q_proj"):
            module.lora_dropout["default"].eval()
    forget(calls)
    step(model, inputs)
    assert (calls["joint"], calls["single"]) == (0, 2 * tiny.LAYERS)


def test_lora_bias_and_several_active_adapters_compute_alone(calls) -> None:
    inputs = tiny.batch("llama")
    step(fused("llama", lora_bias=True), inputs)
    assert (calls["joint"], calls["single"]) == (0, 2 * tiny.LAYERS)
    model = fused("llama")
    model.add_adapter("second", flare.FlareConfig(r=3, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    forget(calls)
    step(model, inputs)
    assert (calls["joint"], calls["single"]) == (0, 4 * tiny.LAYERS)


# --- several adapters, and adapters that are off ----------------------------------------------------------------------


def stock_twin(model: peft.PeftModel, adapters: dict[str, dict]) -> peft.PeftModel:
    """PEFT's own LoRA model with the same weights."""
    first, *others = (peft.LoraConfig(task_type="CAUSAL_LM", **fields) for fields in adapters.values())
    twin = peft.get_peft_model(tiny.model("llama"), first, adapter_name=next(iter(adapters)))
    for name, config in zip(list(adapters)[1:], others, strict=True):
        twin.add_adapter(name, config)
    twin.double().load_state_dict(model.state_dict())
    return twin


TWO = {
    "default": {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "second": {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "o_proj"]},
}


def scale(model: peft.PeftModel) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 3.0)


@contextlib.contextmanager
def merged(model: peft.PeftModel) -> Iterator[None]:
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def unmerged(model: peft.PeftModel) -> None:
    with merged(model):
        pass


@contextlib.contextmanager
def after(change: Callable[[Any], Any], model: peft.PeftModel) -> Iterator[None]:
    change(model)
    yield


STATES: dict[str, Callable[[Any], Any]] = {
    "the first": lambda model: contextlib.nullcontext(),
    "off": lambda model: model.disable_adapter(),
    "the first again": lambda model: contextlib.nullcontext(),
    "merged": merged,
    "scaled by set_scale": lambda model: after(scale, model),
    "scaled by a helper": lambda model: peft.helpers.rescale_adapter_scale(model, 0.5),
    "the second": lambda model: after(lambda m: m.set_adapter("second"), model),
    "the second merged": merged,
    "both": lambda model: after(lambda m: m.base_model.set_adapter(["default", "second"]), model),
    "both merged": merged,
    "both unmerged": lambda model: after(unmerged, model),
    "layers switched off": lambda model: after(lambda m: m.base_model.disable_adapter_layers(), model),
    "layers switched on": lambda model: after(lambda m: m.base_model.enable_adapter_layers(), model),
    "without the second": lambda model: after(lambda m: m.delete_adapter("second"), model),
}


def test_adapters_that_are_switched_merged_and_scaled_have_pefts_numbers() -> None:
    """One model through all states in a row, so that none of a plan outlives what it was worked out from."""
    inputs = plain(tiny.batch("llama"))
    model = fused("llama", fusion=None, **{k: v for k, v in TWO["default"].items() if k not in ("r", "lora_alpha")})
    model.add_adapter("second", flare.FlareConfig(fusion=None, task_type="CAUSAL_LM", **TWO["second"]))
    tiny.randomize_lora(model)
    twin = stock_twin(model.double(), TWO)
    logits: list[torch.Tensor] = []
    for name, state in STATES.items():
        with state(model), state(twin):
            got, want = model(**inputs), twin(**inputs)
            torch.testing.assert_close(got.logits, want.logits, rtol=1e-9, atol=1e-10, msg=name)
            assert all(not torch.equal(got.logits, one) for one in logits[-1:]) or "again" in name or "merged" in name
            logits.append(got.logits)
            if "merged" not in name and "off" not in name:
                assert_same(step(model, inputs), step(twin, inputs))


def test_a_batch_that_mixes_adapters_by_name(calls) -> None:
    model = fused("llama", fusion=None, target_modules=TWO["default"]["target_modules"])
    model.add_adapter("second", flare.FlareConfig(fusion=None, task_type="CAUSAL_LM", **TWO["second"]))
    tiny.randomize_lora(model)
    twin, inputs = stock_twin(model.double(), TWO).eval(), plain(tiny.batch("llama"))
    model.eval()
    forget(calls)
    names = ["default", "second", "__base__"]
    got = model(**inputs, adapter_names=names).logits
    torch.testing.assert_close(got, twin(**inputs, adapter_names=names).logits, rtol=1e-9, atol=1e-10)
    assert not calls


def test_weights_are_read_at_each_call() -> None:
    """Written through .data, exchanged by functional_call, loaded and hot-swapped: no call sees earlier ones."""
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64)
    step(model, inputs)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data * 1.5
    want = step(alone(model), inputs)
    assert_same(step(model, inputs), want)
    swapped = {n: p.detach().flip(0).requires_grad_() for n, p in model.named_parameters() if "lora_" in n}
    loss = torch.func.functional_call(model, swapped, (), inputs).loss
    grads = torch.autograd.grad(loss, list(swapped.values()))
    with torch.no_grad():
        for name, value in swapped.items():
            model.get_parameter(name).copy_(value)
    want = step(alone(model), inputs)
    assert_same({"loss": loss.detach(), **dict(zip(swapped, grads, strict=True))}, want)
    assert_same(step(model, inputs), want)


def test_each_projection_has_dropout_and_requires_grad_of_its_own(calls) -> None:
    """Both are read at each call: a p that is changed, a dropout in eval mode, an A that is frozen."""
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64, lora_dropout=0.5)
    attention = first_attention(model)
    for dropout in (m.lora_dropout["default"] for m in model.modules() if hasattr(m, "lora_dropout")):
        dropout.p = 0.0
    attention.v_proj.lora_dropout["default"].p = 0.5
    step(model, inputs)
    assert (calls["joint"], calls["single"]) == (tiny.LAYERS - 1, 2)
    attention.v_proj.lora_dropout["default"].eval()
    attention.q_proj.lora_A["default"].weight.requires_grad_(False)
    want = step(alone(model), inputs)
    forget(calls)
    got = step(model, inputs)
    assert (calls["joint"], calls["single"]) == (tiny.LAYERS, 0)
    assert not any("layers.0.self_attn.q_proj.lora_A" in name for name in got)
    assert_same(got, want)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_on_another_device_is_named(part) -> None:
    model = fused("llama", fusion=None)
    q_proj = first_attention(model).q_proj
    getattr(q_proj, part)["default"].to("meta")
    with pytest.raises(ValueError, match=r"self_attn\.q_proj: .*meta.*move the adapter to the device of its layer"):
        model(**plain(tiny.batch("llama")))
    assert is_empty(THREAD.slot)


def test_matrices_that_do_not_fit_are_named() -> None:
    model = fused("llama")
    first_attention(model).q_proj.lora_A["default"].weight.data = torch.zeros(4, tiny.HIDDEN)
    with pytest.raises(ValueError, match=r"q_proj: lora_A is \(4, 32\) and lora_B \(32, 5\), expected"):
        model(**plain(tiny.batch("llama")))


# --- which input a projection is called with --------------------------------------------------------------------------


class Attention(nn.Module):
    """Projections of one input or of two, one of them written to in between; nothing in its name says so."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 6) for _ in range(3))
        self.order, self.how = "kvq", "same"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        other = hidden_states * 2 if self.how == "another" else hidden_states
        found = {}
        for name in self.order:
            if name == "q" and self.how == "written to":
                hidden_states += 1
            found[name] = getattr(self, f"{name}_proj")(hidden_states if name == "q" else other)
        q = found["q"]
        q *= 2  # in place, as modeling code may
        return q + found["k"] * found["v"]


class Model(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.checkpointed = Attention(), Attention(), checkpointed
        self.out = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention in (self.first, self.second):
            y = checkpoint(attention, x, use_reentrant=False) if self.checkpointed else attention(x)
            x = x + self.out(y)
        return x


def of_any_input(how: str, order: str, checkpointed: bool = False) -> peft.PeftModel:
    torch.manual_seed(0)
    model = flare.fast_lora(Model(checkpointed), fusion=None, r=2, target_modules=["q_proj", "v_proj"]).double()
    tiny.randomize_lora(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.how, module.order = how, order
    return model


def forward_and_back(model: nn.Module, graph: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 3, 8)
    if not graph:  # autograd would refuse what writes to an input
        with torch.no_grad():
            return {"y": model(x.clone())}
    y = model(x.requires_grad_())
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad, **tiny.gradients(model)}


@pytest.mark.parametrize("order", ["kvq", "qkv", "vqk"])
@pytest.mark.parametrize("how", ["same", "another", "written to"])
def test_another_input_is_never_given_anothers_output(how, order, calls) -> None:
    """Whoever is called first begins, a sibling too; the site learns where they read two inputs."""
    model = of_any_input(how, order)
    twin = alone(model)
    assert siblings(model) == {"k_proj"}
    for _ in range(2):
        forget(calls)
        got = forward_and_back(model, how != "written to")
        joint = calls["joint"]
        assert_same(got, forward_and_back(twin, how != "written to"))
    two_inputs = how == "another" or (how == "written to" and order != "qkv")
    assert joint == (0 if two_inputs else 2)
    shared = [site for site in all_sites(model) if len(site.names) > 1]
    assert [site.separate for site in shared] == [two_inputs] * 2
    assert is_empty(THREAD.slot)


@pytest.mark.parametrize("how", ["same", "another"])
def test_a_recompute_takes_the_way_that_its_forward_took(how) -> None:
    """Where projections read two inputs too, which a site finds out in the first forward."""
    model = of_any_input(how, "qkv", checkpointed=True)
    twin = alone(model)
    for _ in range(2):
        assert_same(forward_and_back(model, True), forward_and_back(twin, True))


def test_outputs_do_not_outlive_the_models_forward(calls) -> None:
    """Projections called by hand, with one tensor, see what is switched between them."""
    model = of_any_input("same", "qkv").eval()
    attention, x = model.get_submodule("base_model.model.first"), torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        adapted = attention.v_proj(x)
        attention.q_proj(x)
        with model.disable_adapter():
            base = attention.v_proj(x)
            attention.q_proj(x)
        again = attention.v_proj(x)
    assert torch.equal(base, attention.v_proj.base_layer(x)) and not torch.allclose(base, adapted)
    assert torch.equal(again, adapted) and is_empty(THREAD.slot) and not calls["joint"]


@pytest.mark.parametrize("shape", [(5, 8), (0, 8), (2, 0, 8), (2, 3, 4, 8)])
def test_inputs_of_any_rank_and_without_rows(shape) -> None:
    model = of_any_input("same", "qkv")
    twin = alone(model)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_made_in_inference_mode(mode) -> None:
    model = of_any_input("same", "qkv").eval()
    twin = alone(model)
    with torch.inference_mode():
        x = torch.randn(2, 3, 8, dtype=torch.float64)
    with mode():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


# --- what a forward leaves behind -------------------------------------------------------------------------------------


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {path: {*module.__dict__} for path, module in model.named_modules()}


def fail_in_attention(model: nn.Module, inputs: dict) -> None:
    attention = first_attention(model)
    o_proj, attention.o_proj = attention.o_proj, None
    with pytest.raises(TypeError):
        model(**inputs)
    attention.o_proj = o_proj


def checkpointed_step(use_reentrant: bool) -> Callable[[nn.Module, dict], None]:
    def run(model: Any, inputs: dict) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        before = attributes(model)
        step(model, inputs)
        assert attributes(model) == before and is_empty(THREAD.slot)
        model.gradient_checkpointing_disable()

    return run


RUNS: dict[str, Callable[[Any, dict], Any]] = {
    "a forward": lambda model, inputs: model(**inputs),
    "a step": step,
    "an attention that raises": fail_in_attention,
    "checkpointing": checkpointed_step(False),
    "reentrant checkpointing": checkpointed_step(True),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("fusion", [None, "add_relu"])
def test_nothing_of_a_forward_stays_on_a_module(run, fusion) -> None:
    inputs = tiny.batch("llama", source=fusion is not None)
    model = fused("llama", fusion=fusion)
    want = step(model, inputs)  # what is found once is kept with the model
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    before, state = attributes(model), {path: module.training for path, module in model.named_modules()}
    RUNS[run](model, inputs)
    assert is_empty(THREAD.slot)
    if "checkpointing" not in run:  # transformers' own attributes; ours were compared in between
        assert attributes(model) == before
    assert {path: module.training for path, module in model.named_modules()} == state
    assert not any(getattr(module, "_disable_adapters", False) for module in model.modules())
    assert_same(step(model, inputs), want, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["bert", "llama", "mt5"])
def test_a_plan_is_made_once_until_something_changes(family, monkeypatch) -> None:
    """Also in models that slice their list of blocks in each forward, which registers modules."""
    made: list[str] = []
    find = Site._find
    monkeypatch.setattr(Site, "_find", lambda site, kind: made.append(site.path) or find(site, kind))
    inputs, model = tiny.batch(family), fused(family)
    model.add_adapter("second", flare.FlareConfig(r=3, task_type=model.peft_config["default"].task_type))
    tiny.randomize_lora(model)
    paths = {site.path for site in all_sites(model)}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)

    def plans() -> list[str]:
        made.clear()
        for _ in range(5):
            if model(**inputs).loss.requires_grad:  # not where adapters are off
                step(model, inputs)
                optimizer.step()
            model.eval()(**plain(inputs))
            model.train()
        return sorted(made)

    assert len(paths) == (tiny.LAYERS + 2 + 2 * 2 if family == "mt5" else tiny.LAYERS) and plans() == sorted(paths)
    assert plans() == []
    attention = first_attention(model)
    for change in (
        lambda: model.set_adapter("second"),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.delete_adapter("default"),
    ):
        change()
        assert plans() == sorted(paths) and plans() == []
    handle = attention._modules[NAMES[family][0]].register_forward_hook(lambda *_: None)
    assert plans() == [next(site.path for site in all_sites(model) if site.parent is attention)]
    handle.remove()
    assert len(plans()) == 1
    for module in (m for m in model.modules() if hasattr(m, "set_scale")):
        module.set_scale("second", 2.0)
    assert plans() == []


# --- threads ----------------------------------------------------------------------------------------------------------


def in_threads(*runs: Callable[[], None]) -> None:
    """Run at the same time, starting together; an error in one of them is raised here."""
    barrier, errors = threading.Barrier(len(runs)), []

    def run(one: Callable[[], None]) -> None:
        try:
            barrier.wait()
            one()
            assert is_empty(THREAD.slot)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def switching(monkeypatch) -> None:
    """Threads change places after a microsecond instead of five milliseconds."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("fusion", [None, "add_relu"])
def test_threads_that_share_a_model_in_eval_mode(family, fusion, switching) -> None:
    """Each with two batches, one of them with a source or not; BERT has a head that is saved beside the adapter."""
    model = fused(family, fusion=fusion, dtype=torch.float64).eval()
    if family == "bert":
        assert any(type(m).__name__ == "ModulesToSaveWrapper" for m in model.modules())
        torch.nn.init.normal_(model.get_submodule("base_model.model.classifier.modules_to_save.default").weight)
    state = {path: module.training for path, module in model.named_modules()}

    def forwards(seed: int) -> Callable[[], None]:
        batches = [tiny.batch(family, m=9 + seed, seed=10 * seed + i, source=fusion is not None) for i in range(2)]
        batches.append(plain(batches[0]))
        with torch.no_grad():
            want = [model(**inputs).logits for inputs in batches]

        def run() -> None:
            with torch.no_grad():
                for _ in range(21):
                    for inputs, logits in zip(batches, want, strict=True):
                        assert torch.equal(model(**inputs).logits, logits)

        return run

    in_threads(*map(forwards, range(3)))
    assert is_empty(THREAD.slot)
    assert {path: module.training for path, module in model.named_modules()} == state
    assert not any(getattr(module, "_disable_adapters", False) for module in model.modules())
    assert not any(one._passes for m in model.modules() for one in vars(m).values() if isinstance(one, Switches))


@pytest.mark.parametrize("fusion", [None, "add_relu"])
def test_threads_that_take_gradients_in_train_mode(fusion, switching) -> None:
    model = fused("llama", fusion=fusion, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def steps(seed: int) -> Callable[[], None]:
        inputs = tiny.batch("llama", m=9 + seed, seed=seed, source=fusion is not None)
        want = torch.autograd.grad(model(**inputs).loss, parameters)

        def run() -> None:
            for _ in range(20):
                got = torch.autograd.grad(model(**inputs).loss, parameters)
                assert all(map(torch.equal, got, want))

        return run

    in_threads(steps(0), steps(1))
    assert is_empty(THREAD.slot) and all(module.training for module in model.modules())
    assert not any(getattr(module, "_disable_adapters", False) for module in model.modules())


# --- the life cycle ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_deep_copy_and_a_pickle_compute_their_own(family, calls) -> None:
    inputs = tiny.batch(family)
    model = fused(family)
    want = step(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tiny.randomize_lora(model, seed=5)
        forget(calls)
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
    assert not siblings(flare.fast_lora(merged, r=4, fusion=None, target_modules=["o_proj"])), "q, k and v have none"
    model = flare.fast_lora(tiny.model("llama"), r=4)
    model.add_adapter("second", flare.FlareConfig(r=3, task_type="CAUSAL_LM"))
    model.delete_adapter("default")
    assert siblings(model) == {"k_proj"}
    model.delete_adapter("second")
    assert not siblings(model), "nothing to be a sibling of"


def test_a_parametrised_sibling_survives_its_site() -> None:
    model = fused("llama", fusion=None)
    k_proj = first_attention(model).k_proj
    _parametrize(k_proj)
    model.unload()
    x = torch.randn(2, tiny.HIDDEN)
    assert torch.equal(k_proj(x), F.linear(x, k_proj.weight))


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
    for adapter in ("second", "default"):
        model.set_adapter(adapter)
        twin = alone(model)
        forget(calls)
        got = step(model, inputs)
        assert calls.names == [frozenset(targets)] * tiny.LAYERS and calls["owned"] == tiny.LAYERS
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
        forget(calls)
        assert_same(step(model, inputs), want, rtol=1e-5, atol=1e-7)
    assert (calls["joint"], calls["single"]) == (tiny.LAYERS * (1 if checkpointing is None else 2), 0)
