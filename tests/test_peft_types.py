"""Features that PEFT and transformers offer for the type LORA work for the type FLARE too, or are refused."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import tiny
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils import hotswap
from peft.utils.warning import PeftWarning
from transformers import LlamaConfig, MambaConfig, MambaForCausalLM

import flare

QV = ["query", "value"]


def text(family: str = "bert") -> dict:
    return tiny.batch(family, source=False)


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("kind", ["pissa", "olora", "corda"])
def test_an_adapter_that_changed_the_base_is_converted_when_saved(kind, tmp_path) -> None:
    base = tiny.model("bert").eval()
    untouched = copy.deepcopy(base)
    config = flare.FlareConfig(r=3, lora_alpha=6, target_modules=QV, init_lora_weights=kind, fusion=None)
    if kind == "corda":
        pytest.importorskip("attr", reason="PEFT's CorDA needs the package attrs")
        from peft.tuners.lora.corda import preprocess_corda

        config.corda_config = CordaConfig(verbose=False)
        preprocess_corda(
            base, config, run_model=lambda: [base(**tiny.batch("bert", seed=i, B=1, m=32)) for i in range(8)]
        )
    model = peft.get_peft_model(base, config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = kind
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(**text()).logits
        model.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
        torch.testing.assert_close(model(**text()).logits, expected, rtol=0, atol=0)
        back = peft.PeftModel.from_pretrained(untouched, tmp_path / "converted").eval()
        torch.testing.assert_close(back(**text()).logits, expected, rtol=1e-5, atol=1e-6)
    assert list(model.peft_config) == ["default"]
    saved = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["init_lora_weights"]) == (6, 12, True)


@pytest.mark.parametrize("remaining", [None, "plain", "fusing"])
def test_deleting_an_adapter_removes_its_hooks(remaining) -> None:
    base = tiny.model("bert").eval()
    expected, before = base(**text()).logits, hook_count(base)
    model = flare.fast_lora(base, r=4).eval()
    fusing = hook_count(base)
    if remaining is not None:
        model.add_adapter(
            "other", flare.FlareConfig(r=4, target_modules=QV, fusion="mul" if remaining == "fusing" else None)
        )
        model.set_adapter("other")
    model.delete_adapter("default")
    after = hook_count(base)
    if remaining is None:
        assert after == before and not [n for n in base.__dict__ if n.startswith("_flare")]
        with pytest.raises(ValueError, match="no adapter that could read a source"):
            model.encode_source(tiny.batch("bert")["source_input_ids"])
        assert torch.equal(base(**text()).logits, expected)
        return  # PEFT cannot add an adapter to a head whose adapters were all deleted
    elif remaining == "plain":
        assert before < after < fusing
    else:
        assert after == fusing
        tiny.randomize_lora(model)
        assert not torch.equal(model(**tiny.batch("bert")).logits, model(**text()).logits)
        return
    assert torch.equal(base(**text()).logits, expected)
    model.add_adapter("again", flare.FlareConfig(r=4, target_modules=QV))
    model.set_adapter("again")
    tiny.randomize_lora(model)
    assert hook_count(base) == fusing
    assert not torch.equal(model(**tiny.batch("bert")).logits, model(**text()).logits)


def test_a_source_is_refused_after_transformers_deleted_the_adapter(tmp_path) -> None:
    flare.fast_lora(tiny.model("bert"), r=4).save_pretrained(tmp_path)
    base = tiny.model("bert").eval()
    expected = base(**text()).logits
    base.load_adapter(str(tmp_path))
    base.add_adapter(peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]), "x")
    base.delete_adapter("default")
    base.eval()
    assert torch.equal(base(**text()).logits, expected)
    with pytest.raises(ValueError, match="source_input_ids: the adapters that read a source were deleted"):
        base(**tiny.batch("bert"))


def test_adapters_of_another_type_next_to_a_fusing_adapter_are_refused(tmp_path) -> None:
    model = flare.fast_lora(tiny.model("bert"), r=4)
    lora = peft.LoraConfig(r=4, target_modules=QV)
    with pytest.raises(ValueError, match=r"different peft types\. Found FLARE and PeftType\.LORA"):
        model.add_adapter("x", lora)
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="'FLARE' is not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(tiny.model("bert"), flare.FlareConfig(r=4, target_modules=QV), mixed=True)
    mixed = peft.get_peft_model(tiny.model("bert"), lora, mixed=True)
    with pytest.raises(ValueError, match="'FLARE' is not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("x", flare.FlareConfig(r=4, target_modules=QV))


def test_transformers_hotswap_is_refused(tmp_path) -> None:
    """peft.utils.hotswap accepts FLARE adapters; see tests/test_fast_lora.py."""
    flare.fast_lora(tiny.model("bert"), r=4).save_pretrained(tmp_path)
    base = tiny.model("bert")
    base.load_adapter(str(tmp_path), adapter_name="default")
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        base.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)


@pytest.mark.parametrize(("backend", "source"), [(None, False), (None, True), ("aot_eager", True)])
def test_hotswap_after_compiling_needs_no_recompilation(backend, source, tmp_path) -> None:
    """Swapping changes weights, rank and scaling without a recompilation. It also works in an eager model."""
    batch, expected = tiny.batch("llama", source=source), []
    for name, r, alpha in (("one", 4, 8), ("two", 2, 20)):
        model = flare.fast_lora(tiny.model("llama", num_hidden_layers=1), r=r, lora_alpha=alpha).eval()
        tiny.randomize_lora(model, seed=r)
        model.save_pretrained(tmp_path / name)
        expected.append(model(**batch).logits.detach())
    model = peft.PeftModel.from_pretrained(tiny.model("llama", num_hidden_layers=1), tmp_path / "one").eval()
    with torch.no_grad():
        model(**batch)
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
        run = model if backend is None else torch.compile(model, backend=backend)
        torch.testing.assert_close(run(**batch).logits, expected[0])
        hotswap.hotswap_adapter(run, tmp_path / "two", "default")
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(run(**batch).logits, expected[1])


def test_target_parameters_add_the_same_targets_as_peft(monkeypatch) -> None:
    """PEFT adds its default targets if it knows the model type, and no targets otherwise."""
    for kind, count in (("llama", 3), ("a_new_type", 1)):
        targets = []
        monkeypatch.setattr(LlamaConfig, "model_type", kind)
        for config in (peft.LoraConfig, flare.FlareConfig):
            fields = {"fusion": None} if config is flare.FlareConfig else {}
            model = peft.get_peft_model(
                tiny.model("llama"), config(r=4, target_parameters=["mlp.down_proj.weight"], **fields)
            )
            targets.append(sorted(name for name, _ in model.named_parameters() if ".lora_A." in name))
        assert targets[0] == targets[1] and len(targets[0]) == count * tiny.LAYERS
    with pytest.raises(ValueError, match="target_parameters cannot be combined with a fusion"):
        flare.FlareConfig(target_parameters=["mlp.down_proj.weight"])


@pytest.mark.parametrize("fusion", ["add_relu", None])
def test_saving_shards_that_were_not_gathered_warns(fusion, tmp_path) -> None:
    model = flare.fast_lora(tiny.model("llama"), r=4, fusion=fusion)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model.save_pretrained(tmp_path)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = torch.nn.Parameter(torch.zeros(0))
    with pytest.warns(PeftWarning, match="1 LoRA tensor.*shards were not gathered before save_pretrained"):
        model.save_pretrained(tmp_path)


def test_peft_helpers_for_the_type_lora_work_or_are_refused() -> None:
    """convert_to_lora merges, so it refuses a fusing adapter. reduce_intruder_dimension only accepts the type LORA."""
    plain = flare.fast_lora(tiny.model("llama"), r=4, fusion=None)
    tiny.randomize_lora(plain)
    config, weights = peft.convert_to_lora(plain, rank=4)
    assert config.peft_type == "LORA" and len(weights) == 2 * 2 * tiny.LAYERS
    fused = flare.fast_lora(tiny.model("llama"), r=4)
    with pytest.raises(ValueError, match=r"phi.*cannot be merged"):
        peft.convert_to_lora(fused, rank=4)
    with pytest.raises(ValueError, match="not using LoRA"):
        reduce_intruder_dimension(fused)
    with peft.helpers.rescale_adapter_scale(plain, 0.0), torch.no_grad():
        torch.testing.assert_close(plain(**text("llama")).logits, tiny.model("llama")(**text("llama")).logits)


def test_modules_of_mamba_that_lora_does_not_support_are_refused() -> None:
    size = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    for config in (peft.LoraConfig, flare.FlareConfig):
        fields = {"fusion": None} if config is flare.FlareConfig else {}
        with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
            peft.get_peft_model(MambaForCausalLM(MambaConfig(**size)), config(target_modules=["out_proj"], **fields))
