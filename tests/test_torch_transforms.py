"""Test whole models on the meta device, with torch.export, torch.jit.trace and torch.func, and second derivatives."""

from __future__ import annotations

import io
from typing import Any

import peft
import pytest
import tiny
import torch
from torch.func import functional_call, grad, jvp, vmap

import flare

QV = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "mt5": ["q", "v"]}

SMALL = {
    "bert": {"attn_implementation": "eager", "num_hidden_layers": 2},
    "llama": {"attn_implementation": "eager", "num_hidden_layers": 2},
    "mt5": {"num_layers": 1, "num_decoder_layers": 1},
}


def fused(family: str, **fields: Any) -> Any:
    model = flare.fast_lora(tiny.model(family, **SMALL[family]), r=4, **fields)
    tiny.randomize_lora(model)
    model.config.use_cache = False
    return model.eval()


def stock(family: str, model: Any) -> Any:
    """Return PEFT's LoRA model with the weights of a plain LoRA model of this package."""
    config = peft.LoraConfig(
        r=4, lora_alpha=128, target_modules=QV[family], task_type=model.peft_config["default"].task_type
    )
    stock_model = peft.get_peft_model(tiny.model(family, **SMALL[family]), config)
    stock_model.config.use_cache = False
    stock_model.eval().load_state_dict(model.state_dict())
    return stock_model


def inputs_of(family: str, source: bool, masks: bool = True) -> dict[str, torch.Tensor]:
    inputs = {n: v for n, v in tiny.batch(family, source=source).items() if masks or "mask" not in n}
    if family == "mt5" and source:
        inputs["source_labels"] = inputs["labels"].flip(0)
    return inputs


def fused_gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return tiny.gradients(model)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("source_memory", [None, "recompute"])
@pytest.mark.parametrize("family", QV)
def test_forward_and_backward_run_on_the_meta_device(family, source_memory) -> None:
    """Only llama gets masks. In other models transformers reads a mask's values, which a meta tensor does not have."""
    fields = {} if source_memory is None else {"source_memory": source_memory}
    model = fused(family, lora_dropout=0.1, target_modules="all-linear", **fields).to("meta")
    batch = {name: value.to("meta") for name, value in tiny.batch(family, source=source_memory is not None).items()}
    if family != "llama":
        batch = {name: value for name, value in batch.items() if "mask" not in name}
    model.train()(**batch).loss.backward()
    with torch.no_grad():
        assert model.eval()(**batch).logits.device.type == "meta"
    assert {p.grad.device.type for p in model.parameters() if p.requires_grad} == {"meta"}


@pytest.mark.parametrize(("family", "source"), [("bert", False), ("llama", True), ("mt5", True)])
def test_export_contains_only_plain_operators(family, source) -> None:
    """The exported graph has no operator of flare_kernels, and it gives the model's logits for other inputs too."""
    model, batch = fused(family), inputs_of(family, source)
    labels = batch.pop("labels")
    if family == "mt5":
        batch["decoder_input_ids"] = labels
    other = {name: value.roll(1, 0) for name, value in batch.items()}
    with torch.no_grad():
        exported = torch.export.export(model, (), {**batch, "use_cache": False} if family != "bert" else batch)
        logits = exported.module()(**other, **({"use_cache": False} if family != "bert" else {}))["logits"]
        expected = model(**other).logits
    assert not [node for node in exported.graph.nodes if "flare" in str(node.target)]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, model(**batch).logits)


def test_export_of_an_encoder_decoder_needs_the_decoders_source() -> None:
    batch = tiny.batch("mt5")
    batch["decoder_input_ids"] = batch.pop("labels")
    with pytest.raises(ValueError, match=r"source_input_ids under torch.export.*source_decoder_input_ids"):
        torch.export.export(fused("mt5"), (), {**batch, "use_cache": False})


@pytest.mark.parametrize("source", [False, True])
def test_a_traced_model_is_saved_and_loaded(source) -> None:
    model, batch = fused("bert"), inputs_of("bert", source)
    batch.pop("labels")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(batch, values, strict=True)), return_dict=False)[0]

    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(Logits(), tuple(batch.values())), file)
        file.seek(0)
        other = tuple(value.roll(1, 0) for value in batch.values())
        torch.testing.assert_close(torch.jit.load(file)(*other), Logits()(*other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", ["add_relu", "cross_attention", None])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_by_torch_func_equal_the_fused_backward(family, fusion) -> None:
    """Compare the gradients by grad, and the first row's gradients by vmap, with the fused backward.

    No masks are passed, because transformers would read their values.
    """
    model, batch = fused(family, fusion=fusion).double(), inputs_of(family, fusion is not None, masks=False)

    def loss(weights: dict, batch: dict) -> torch.Tensor:
        return functional_call(model, weights, (), batch).loss

    close = {"rtol": 1e-5, "atol": 1e-7}  # transformers computes norms of llama in float32
    torch.testing.assert_close(grad(loss)(trained(model), batch), fused_gradients(model, batch), **close)
    rows = vmap(lambda row: grad(loss)(trained(model), {name: value[None] for name, value in row.items()}))(batch)
    first = fused_gradients(model, {name: value[:1] for name, value in batch.items()})
    torch.testing.assert_close({name: value[0] for name, value in rows.items()}, first, **close)


def test_second_derivatives_by_torch_func_equal_finite_differences() -> None:
    """Compare a Hessian-vector product with finite differences of the gradients from the fused backward."""
    model, batch = fused("bert").double(), inputs_of("bert", True, masks=False)
    direction = {name: torch.randn_like(value) for name, value in trained(model).items()}

    def gradients(weights: dict) -> dict[str, torch.Tensor]:
        return grad(lambda weights: functional_call(model, weights, (), batch).loss)(weights)

    second = jvp(gradients, (trained(model),), (direction,))[1]
    before, step = fused_gradients(model, batch), 1e-6
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(direction[name], alpha=step)
    after = fused_gradients(model, batch)
    difference = {name: (after[name] - before[name]) / step for name in second}
    torch.testing.assert_close(difference, second, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("ask", ["grad", "backward"])
def test_gradients_of_gradients_are_refused(source, ask) -> None:
    """Asking for second derivatives raises an error. First derivatives do not change with create_graph=True."""
    model, batch = fused("llama", source_memory="recompute"), inputs_of("llama", source)
    expected, parameters = fused_gradients(model, batch), [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(**batch).loss, parameters, create_graph=True)
    torch.testing.assert_close(list(grads), list(expected.values()), rtol=0, atol=0)
    penalty = sum(one.square().sum() for one in grads)
    with pytest.raises(RuntimeError, match=r"differentiated again \(create_graph=True\).*torch.func"):
        if ask == "grad":
            torch.autograd.grad(penalty, parameters, allow_unused=True)
        else:
            penalty.backward()


def test_functional_gradients_of_plain_lora_match_peft() -> None:
    model = fused("llama", fusion=None)
    other, batch = stock("llama", model), tiny.batch("llama", source=False)

    def gradients(of: Any) -> dict[str, torch.Tensor]:
        return grad(lambda weights: functional_call(of, weights, (), batch).loss)(trained(of))

    torch.testing.assert_close(gradients(model), gradients(other), rtol=1e-4, atol=1e-6)
