"""Test sites after copying and pickling, after adding and removing adapters, and in sharded blocks.

A site computes all projections of an attention module in one call. A sibling is a projection of the site without an
adapter, such as k_proj; its class is replaced so that it takes its output from the site.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from site_models import alone, assert_same, first_attention, forget, fused, parametrized, siblings, step
from torch import nn

import flare


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_deep_copy_and_pickle_have_their_own_sites(family, calls) -> None:
    inputs = tiny.batch(family)
    model = fused(family)
    expected = step(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tiny.randomize_lora(model, seed=5)
        forget(calls)
        assert_same(step(twin, inputs), expected, rtol=0, atol=0)
        assert (calls["joint"], calls["single"]) == (tiny.LAYERS, 0)
        tiny.randomize_lora(model)


def test_siblings_are_set_and_removed_with_the_adapters() -> None:
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
    assert not siblings(flare.fast_lora(merged, r=4, fusion=None, target_modules=["o_proj"])), "no adapter on q, k, v"
    model = flare.fast_lora(tiny.model("llama"), r=4)
    model.add_adapter("second", flare.FlareConfig(r=3, task_type="CAUSAL_LM"))
    model.delete_adapter("default")
    assert siblings(model) == {"k_proj"}
    model.delete_adapter("second")
    assert not siblings(model), "no other projection of the attention has an adapter"


def test_parametrised_sibling_works_without_its_site() -> None:
    model = fused("llama", fusion=None)
    k_proj = first_attention(model).k_proj
    parametrized(k_proj)
    model.unload()
    x = torch.randn(2, tiny.HIDDEN)
    assert torch.equal(k_proj(x), F.linear(x, k_proj.weight))


def test_refused_call_restores_the_class_of_siblings() -> None:
    stock = peft.get_peft_model(tiny.model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match="matches no LoRA module"):
        flare.fast_lora(stock, fusion_modules=["nope"])
    assert not siblings(stock)


def test_a_later_adapter_on_k_is_computed_in_the_joint_call(calls) -> None:
    """The joint call includes k while the adapter on k is active, and while it is inactive.

    After this adapter is deleted, the step is the same as before it was added.
    """
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
        actual = step(model, inputs)
        assert calls.names == [frozenset(targets)] * tiny.LAYERS and calls["owned"] == tiny.LAYERS
        assert_same(actual, step(twin, inputs))
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
def test_fully_sharded_blocks_give_the_same_step(checkpointing, calls) -> None:
    """The autograd node saves frozen weights. FSDP2 frees them after forward and gathers them again before backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inputs = tiny.batch("llama")
    model = fused("llama")
    expected = step(model, inputs)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with process_group():
        mesh = init_device_mesh("cpu", (1,))
        adapters = {
            p for name, p in model.named_parameters() if "lora_" in name
        }  # the source pass needs them unsharded
        for block in tiny.block_list(model.get_base_model()):
            fully_shard(block, mesh=mesh, ignored_params=adapters)
        fully_shard(model, mesh=mesh, ignored_params=adapters)
        forget(calls)
        assert_same(step(model, inputs), expected, rtol=1e-5, atol=1e-7)
    assert (calls["joint"], calls["single"]) == (tiny.LAYERS * (1 if checkpointing is None else 2), 0)
