"""FLARE MT: the latent states of an MT encoder, given as ``source_states``, replace the source text.

One trained projection maps them to the model's width. Every block fuses with the result, and no source pass runs.
"""

from __future__ import annotations

import warnings

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flare
from flare_kernels import reference

D = 7
QV = ("q_proj", "v_proj")


def fused(family: str = "llama", *, dtype: torch.dtype = torch.float32, **overrides):
    model = flare.fast_lora(tiny.model(family, dtype=dtype), **{"r": 5, "lora_alpha": 7, "latent_dim": D, **overrides})
    tiny.randomize_lora(model)
    return model


def batch(family: str = "llama", seed: int = 2) -> dict[str, torch.Tensor]:
    inputs = tiny.batch(family, seed=seed, source=False)
    generator = torch.Generator().manual_seed(seed)
    inputs["source_states"] = torch.randn(*inputs["input_ids"].shape, D, generator=generator)
    return inputs


def projections(model) -> dict[str, nn.Linear]:
    """Return adapter name -> projection, and check that no adapter has two."""
    named_projections = [
        (name, module[name])
        for path, module in model.named_modules()
        if path.endswith("latent_proj")
        for name in module
    ]
    assert len(named_projections) == len(dict(named_projections))
    return dict(named_projections)


@pytest.mark.parametrize("fusion", ["add_relu", "mul", "matmul"])
@pytest.mark.parametrize("masked", [False, True])
def test_results_equal_the_formula(fusion, masked) -> None:
    """Logits and all gradients, including the projection's, equal the formula written with PEFT's eager layers."""
    inputs = batch()
    mask = torch.ones(3, 9)
    mask[0, 5:] = 0
    stock = peft.get_peft_model(
        tiny.model("llama"), peft.LoraConfig(r=5, lora_alpha=7, target_modules=list(QV), task_type="CAUSAL_LM")
    )
    model = fused(fusion=fusion)
    tiny.randomize_lora(stock)
    trained = projections(model)["default"]
    projection = nn.Linear(D, tiny.HIDDEN)
    projection.load_state_dict(trained.state_dict())
    x_source = projection(inputs["source_states"]) * (mask.unsqueeze(-1) if masked else 1.0)
    phi = lambda S, T: reference.fuse(S, T, fusion)  # noqa: E731
    with tiny.eager_fusion(stock, [x_source] * tiny.LAYERS, phi, QV):
        expected = stock(**{k: v for k, v in inputs.items() if k != "source_states"})
        expected.loss.backward()
    actual = model(**inputs, **({"source_attention_mask": mask} if masked else {}))
    actual.loss.backward()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    grads = tiny.gradients(model)
    for name, grad in tiny.gradients(stock).items():
        torch.testing.assert_close(grads.pop(name), grad, rtol=1e-4, atol=1e-6, msg=name)
    assert len(grads) == 2
    torch.testing.assert_close(trained.weight.grad, projection.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trained.bias.grad, projection.bias.grad, rtol=1e-4, atol=1e-6)


def test_no_source_pass_runs() -> None:
    model, runs = fused(), []
    for index, block in enumerate(tiny.block_list(model.get_base_model())):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    model(**batch())
    assert runs == [0, 1, 2]


@pytest.mark.parametrize("fusion", ["add_relu", "cross_attention"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, use_reentrant, fusion) -> None:
    inputs, model = batch(family), fused(family, fusion=fusion)
    model(**inputs).loss.backward()
    expected = tiny.gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(**inputs).loss.backward()
    actual = tiny.gradients(model)
    assert any("latent_proj" in name and grad.abs().max() > 0 for name, grad in actual.items())
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_projection_loads_unchanged(family, tmp_path) -> None:
    """The projection is float32 on a bf16 base, as A and B are, and loads under any adapter name.

    An adapter file without the projection's weights is refused.
    """
    inputs = batch(family)
    model = fused(family, dtype=torch.bfloat16, fusion="cross_attention").eval()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved["base_model.model.latent_proj.weight"].dtype == torch.float32
    for low_cpu_mem_usage in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loaded = peft.PeftModel.from_pretrained(
                tiny.model(family, dtype=torch.bfloat16),
                tmp_path,
                adapter_name="other",
                low_cpu_mem_usage=low_cpu_mem_usage,
            ).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
        assert projections(loaded)["other"].weight.dtype == torch.float32
        assert not any(p.requires_grad for p in loaded.parameters())
    del saved["base_model.model.latent_proj.bias"]
    save_file(saved, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter 'default' \(latent_dim=7\) lack latent_proj.bias"):
        peft.PeftModel.from_pretrained(tiny.model(family), tmp_path)


def test_each_adapter_has_its_own_projection(tmp_path) -> None:
    """A projection is trained and deleted with its adapter, and is inactive while adapters are disabled."""
    inputs, model = batch(), fused()
    first = model(**inputs).logits
    text = {k: v for k, v in inputs.items() if k != "source_states"}
    model.add_adapter("second", flare.FlareConfig(r=3, latent_dim=D, task_type="CAUSAL_LM"))
    assert [p.weight.requires_grad for p in projections(model).values()] == [True, False]
    torch.testing.assert_close(model(**inputs).logits, first, rtol=0, atol=0)
    model.set_adapter("second")
    assert [p.weight.requires_grad for p in projections(model).values()] == [False, True]
    assert not torch.equal(projections(model)["default"].weight, projections(model)["second"].weight)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    reloaded = peft.PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "second")
    torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    with model.disable_adapter():
        expected = tiny.model("llama")(**text).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    model.base_model.set_adapter(["default", "second"])
    model(**inputs).loss.backward()
    assert all(p.weight.grad is not None for p in projections(model).values())
    model.base_model.set_adapter("default")
    model.delete_adapter("second")
    assert set(projections(model)) == {"default"}
    torch.testing.assert_close(model(**inputs).logits, first, rtol=0, atol=0)
    model.add_adapter("text", flare.FlareConfig(r=3, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "text"])
    with pytest.raises(ValueError, match="active together must share latent_dim"):
        model(**inputs)
    assert not any("latent" in name for name, _ in model.unload().named_parameters())


def test_an_existing_peft_model_gets_a_projection() -> None:
    stock = peft.get_peft_model(tiny.model("bert"), peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    model = flare.fast_lora(stock, latent_dim=D)
    tiny.randomize_lora(model)
    model(**batch("bert")).loss.backward()
    assert projections(model)["default"].weight.grad.abs().max() > 0
