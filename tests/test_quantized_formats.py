"""Test adapters on quantised linear layers: the formats of PEFT's LoRA layers, and the fp8 layer of transformers.

test_quantized.py tests bitsandbytes. HQQ and torchao run on a CPU if they are installed. The other libraries need a
GPU. For these, PEFT's layer for the library wraps a replacement of the library's frozen layer. The replacement has an
int8 weight and no floating-point parameter.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from peft.tuners.lora import aqlm, awq, gptq, te
from torch import Tensor, nn

import flare
from flare_kernels import reference

LORA = {"r": 4, "lora_alpha": 8}
NAMES = ["q_proj", "v_proj"]


# --- a base with replaced linear layers, and the FLARE formula on PEFT's layers ---------------------------------------


def base_with(exchange: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a tiny Llama in which `exchange` replaces every linear layer of the blocks."""
    model = tiny.model("llama", hidden_size=64, intermediate_size=64, dtype=dtype)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".layers." in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, exchange(module))
    return model


def without_source(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not name.startswith("source_")}


def steps(stock: Any, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Run forward and backward of PEFT's model with the FLARE formula, and of the FLARE model. Return both outputs."""
    plain = without_source(inputs)
    states = tiny.source_hidden_states(stock, inputs, offset=1)
    with tiny.eager_fusion(stock, states, lambda S, T: reference.fuse(S, T, "add_relu"), tuple(NAMES)):
        expected = stock(**plain)
        expected.loss.backward()
    actual = model(**inputs)
    actual.loss.backward()
    return expected, actual


def compare_with_eager(make: Callable[[], nn.Module]) -> Any:
    """Compare logits and gradients of fast_lora with the FLARE formula on PEFT's layers. Return the FLARE model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about layers that it does not know
        stock = peft.get_peft_model(make(), peft.LoraConfig(**LORA, target_modules=NAMES, task_type="CAUSAL_LM"))
        model = flare.fast_lora(make(), **LORA)
    for each in (stock, model):
        tiny.randomize_lora(each)
        for name, parameter in each.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.float64)
    inputs = tiny.batch("llama")
    expected, actual = steps(stock, model, inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-9, atol=1e-9)
    expected_grads, grads = tiny.gradients(stock), tiny.gradients(model)
    assert expected_grads.keys() == grads.keys() and len(grads) == 4 * tiny.LAYERS
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, expected_grads[name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    with torch.no_grad():
        assert (model(**without_source(inputs)).logits - actual.logits).abs().max() > 1e-3, "the source must matter"
        model.set_source_cache(flare.SourceStateCache(10**7))
        for _ in ("fills the cache", "reads the cache"):
            torch.testing.assert_close(model(**inputs).logits, actual.logits, rtol=1e-9, atol=1e-9)
        model.set_source_cache(None)
    return model


# --- formats that need a GPU ------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """Replacement for a library's linear layer: an int8 weight, no floating-point parameter, and dx by autograd."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype)).T


class NoGradient(Int8Linear):
    """Replacement whose output passes no gradient to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def dispatch_to(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make PEFT wrap every Int8Linear in `cls`, which is PEFT's layer for a library that is not installed."""

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        return cls(target, adapter_name, config=config, **kwargs) if isinstance(target, Int8Linear) else None

    monkeypatch.setattr(peft.tuners.lora.model, "dispatch_gptq", dispatch)


def gated(name: str, package: str, **symbols: Any) -> types.ModuleType:
    """Return PEFT's module `name`, imported with a replacement for the `package` that it needs."""
    fakes = {}
    for depth in range(package.count(".") + 1):
        path = ".".join(package.split(".")[: depth + 1])
        fakes[path] = types.ModuleType(path)
    vars(fakes[package]).update(symbols)
    import peft.import_utils as gates

    gate = f"is_{name}_available"
    before, modules_before = getattr(gates, gate), {path: sys.modules.get(path) for path in fakes}
    spec = importlib.util.spec_from_file_location(
        f"peft.tuners.lora.{name}", Path(peft.__file__).parent / "tuners" / "lora" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    setattr(gates, gate, lambda: True)
    sys.modules.update(fakes)
    try:
        spec.loader.exec_module(module)
    finally:
        setattr(gates, gate, before)
        for path, module_before in modules_before.items():
            if module_before is None:
                del sys.modules[path]
            else:
                sys.modules[path] = module_before
    return module


FORMATS: dict[str, Callable[[], type]] = {
    "gptq": lambda: gptq.GPTQLoraLinear,
    "awq": lambda: awq.AwqLoraLinear,
    "aqlm": lambda: aqlm.AqlmLoraLinear,
    "te": lambda: te.TeLinear,
    "eetq": lambda: gated("eetq", "eetq", EetqLinear=Int8Linear).EetqLoraLinear,
    "inc": lambda: gated("inc", "neural_compressor").IncLoraLinear,
}


@pytest.mark.parametrize("name", FORMATS)
def test_layer_of_each_format_fuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = FORMATS[name]()
    dispatch_to(cls, monkeypatch)
    model = compare_with_eager(lambda: base_with(Int8Linear))
    fused = model.fast_lora_report().fused
    assert len(fused) == 2 * tiny.LAYERS and {row.backend_layer for row in fused} == {f"Flare{cls.__name__}"}
    with pytest.raises(ValueError, match="phi"):
        model.merge_adapter()


def test_merging_a_format_that_peft_cannot_merge_raises_as_in_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch_to(gptq.GPTQLoraLinear, monkeypatch)
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        model = flare.fast_lora(base_with(Int8Linear), **LORA, fusion=None, target_modules=NAMES)
    layer = next(module for module in model.modules() if isinstance(module, gptq.GPTQLoraLinear))
    with pytest.raises(NotImplementedError):
        layer.merge()


@pytest.mark.parametrize("fusion", ["add_relu", "cross_attention"])
def test_a_frozen_layer_without_a_gradient_is_refused_in_training(fusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """add_relu computes query and value in one call, cross_attention in separate calls. Both raise the error."""
    dispatch_to(gptq.GPTQLoraLinear, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = [*NAMES, "o_proj"]  # with an adapter on o_proj, the input of the next block needs a gradient
        model = flare.fast_lora(base_with(NoGradient, torch.float32), **LORA, fusion=fusion, target_modules=targets)
    tiny.randomize_lora(model)
    with torch.no_grad():
        model(**tiny.batch("llama"))
    with pytest.raises(ValueError, match=r"self_attn\..*_proj: .*NoGradient.* passes no gradient"):
        model(**tiny.batch("llama"))


def test_fine_grained_fp8_of_transformers_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT uses its ordinary layer for FP8Linear. The test replaces FP8Linear's kernel, which needs a GPU."""
    from transformers.integrations import finegrained_fp8 as fp8

    if not hasattr(fp8, "FP8LinearFunction"):
        pytest.skip("this transformers has no backward pass of FP8Linear")

    def product(x: Tensor, weight: Tensor, scale: Tensor, block_size: Any, bias: Any, *_: Any) -> Tensor:
        return x @ fp8._dequantize_fp8_weight(weight, scale, block_size, x.dtype).T

    def exchange(linear: nn.Linear) -> nn.Module:
        quantized = fp8.FP8Linear(linear.in_features, linear.out_features, block_size=(32, 32))
        quantized.weight = nn.Parameter(linear.weight.detach().float().to(torch.float8_e4m3fn), requires_grad=False)
        quantized.weight_scale_inv = nn.Parameter(torch.ones_like(quantized.weight_scale_inv), requires_grad=False)
        return quantized

    monkeypatch.setattr(fp8, "fp8_linear", product)
    model = compare_with_eager(lambda: base_with(exchange))
    assert {row.backend_layer for row in model.fast_lora_report().fused} == {"FlareLinear"}


# --- formats that run on a CPU ----------------------------------------------------------------------------------------


def hqq_base(dtype: torch.dtype = torch.float64) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed", exc_type=ImportError)
    settings = quantize.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    return base_with(
        lambda linear: quantize.HQQLinear(linear, settings, compute_dtype=dtype, device="cpu", del_orig=False), dtype
    )


def torchao_base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed", exc_type=ImportError)
    config = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "float8": lambda: ao.Float8WeightOnlyConfig(),
        "dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
    }[kind]()
    model = tiny.model("llama", hidden_size=64, intermediate_size=64, dtype=dtype)
    ao.quantize_(model, config, filter_fn=lambda module, path: isinstance(module, nn.Linear) and ".layers." in path)
    return model


def test_hqq_fuses() -> None:
    model = compare_with_eager(hqq_base)
    assert {row.backend_layer for row in model.fast_lora_report().fused} == {"FlareHqqLoraLinear"}


def test_hqq_merges_and_unmerges_as_in_peft() -> None:
    """Merging quantises the sum of weight and update again, in PEFT and in FLARE's layer with fusion=None."""
    stock = peft.get_peft_model(hqq_base(torch.float32), peft.LoraConfig(**LORA, target_modules=NAMES))
    model = flare.fast_lora(hqq_base(torch.float32), **LORA, fusion=None, target_modules=NAMES)
    inputs = tiny.batch("llama", source=False)
    for each in (stock, model):
        tiny.randomize_lora(each)
    for method in ("merge_adapter", "unmerge_adapter"):
        for each in (stock, model):
            getattr(each, method)()
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_hqq_bases_with_different_scales_have_different_fingerprints() -> None:
    first, second = hqq_base(torch.float32), hqq_base(torch.float32)
    from flare.source_cache.fingerprint import fingerprint

    for base in (first, second):
        base.requires_grad_(False)
    assert fingerprint(first) == fingerprint(second)
    layer = second.get_submodule("model.layers.0.self_attn.q_proj")
    layer.meta["scale"] = layer.meta["scale"] * 2
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_torchao_fuses(kind: str) -> None:
    """Compare with the FLARE formula on PEFT's layers, in float32, because torchao's products have no other dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that such a base cannot be merged
        stock = peft.get_peft_model(torchao_base(kind), peft.LoraConfig(**LORA, target_modules=NAMES))
        model = flare.fast_lora(torchao_base(kind), **LORA)
    for each in (stock, model):
        tiny.randomize_lora(each)
    inputs = tiny.batch("llama")
    expected, actual = steps(stock, model, inputs)
    assert {row.backend_layer for row in model.fast_lora_report().fused} == {"FlareTorchaoLoraLinear"}
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    expected_grads = tiny.gradients(stock)
    for name, grad in tiny.gradients(model).items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.set_source_cache(flare.SourceStateCache(10**7))
        for _ in ("fills the cache", "reads the cache"):
            torch.testing.assert_close(model(**inputs).logits, actual.logits, rtol=1e-5, atol=1e-5)


def test_torchao_dynamic_activations_support_only_inference() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = flare.fast_lora(torchao_base("dynamic"), **LORA, target_modules="all-linear")
    tiny.randomize_lora(model)
    inputs = tiny.batch("llama")
    with torch.no_grad():
        plain = model(**{k: v for k, v in inputs.items() if not k.startswith("source")}).logits
        assert (model(**inputs).logits - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="passes no gradient to its input"):
        model(**inputs)


def test_generation_with_hqq_can_read_source_and_target_in_one_pass() -> None:
    model = flare.fast_lora(hqq_base(torch.float32), **LORA, source_layer_offset=0).eval()
    tiny.randomize_lora(model)
    inputs = {k: v for k, v in tiny.batch("llama").items() if k != "labels"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**inputs, **options, source_pass="separate")
    actual = model.generate(**inputs, **options, source_pass="shared")
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)


def test_a_torchao_base_loaded_by_transformers_merges_as_in_peft(tmp_path: Path) -> None:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed", exc_type=ImportError)
    tiny.model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)

    def load() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            quantization_config=transformers.TorchAoConfig(ao.Int8WeightOnlyConfig()),
            device_map={"": "cpu"},
            dtype=torch.float32,
        )

    stock = peft.get_peft_model(load(), peft.LoraConfig(**LORA, target_modules=NAMES))
    model = flare.fast_lora(load(), **LORA, fusion=None, target_modules=NAMES)
    for each in (stock, model):
        tiny.randomize_lora(each)
        each.merge_adapter()
    inputs = tiny.batch("llama", source=False)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=1e-5, atol=1e-6)
    fusing = flare.fast_lora(load(), **LORA)
    fusing(**tiny.batch("llama")).loss.backward()
    assert len(tiny.gradients(fusing)) == 4 * tiny.LAYERS
