"""Test DDP and FSDP2 on two processes: each gradient equals the gradient of one process that trains on both batches.

This includes the part of the gradient that comes from the source. Unsupported setups raise an error.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import two_processes
from distributed_training import batch, check, fused, train
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import flare
from flare.source import projected
from flare.source.fsdp import full_parameter
from flare.training.replicated import _GradientAverage, exclude_adapters_from_fsdp
from flare.tuner import site

ENGINES = ("ddp", "fsdp2")


def train_all(rank: int, engine: str, family: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train all cases on one rank. Return case -> gradients of each step.

    The key "joint" has the number of calls in which several projections were computed together.
    """
    calls: list[int] = []
    joint = site.apply_with_products

    def counted(call: Any, *args: Any) -> Any:
        if call.outputs > 1:
            calls.append(1)
        return joint(call, *args)

    site.apply_with_products = counted
    return {name: train(rank, engine, family, **case) for name, case in cases.items()} | {"joint": len(calls)}


CASES: dict[str, dict[str, Any]] = {
    "plain": {"steps": 2},
    "checkpointing and accumulation": {"reentrant": False, "accumulate": 2},
    "reentrant": {"reentrant": True},
    "FLARE MT, checkpointing and accumulation": {"latent": True, "reentrant": False, "accumulate": 2},
}
MORE_CASES: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate": 2},
    "checkpointing": {"reentrant": False},
    "mul, all linear": {"fusion": "mul", "target_modules": "all-linear"},
    "cross-attention": {"fusion": "cross_attention"},
    "FLARE MT": {"latent": True},
}
ENGINE_CASES: dict[str, dict[str, dict[str, Any]]] = {
    "ddp": {
        "find_unused_parameters": {"options": {"find_unused_parameters": True}},
        "static graph": {"options": {"static_graph": True}},
        "recompute": {"source_memory": "recompute", "steps": 2},
        "recompute, checkpointing and accumulation": {
            "source_memory": "recompute",
            "reentrant": False,
            "accumulate": 2,
        },
    },
    "fsdp2": {
        "accelerate's layout": {"options": {"layout": "accelerate"}, "reentrant": False, "accumulate": 2},
        "accelerate's layout, FLARE MT": {"options": {"layout": "accelerate"}, "latent": True},
        "replicated": {"options": {"layout": "replicated"}, "reentrant": False, "accumulate": 2, "steps": 2},
        "replicated, reentrant": {"options": {"layout": "replicated"}, "reentrant": True, "steps": 2},
        "replicated, by accelerate, FLARE MT": {"options": {"layout": "accelerate, replicated"}, "latent": True},
        "not resharded after the forward": {"options": {"reshard_after_forward": False}},
        "not resharded, with more forwards": {"options": {"reshard_after_forward": False}, "between": True, "steps": 2},
        "with more forwards": {"between": True},
        "FLARE MT, not resharded, with more forwards": {
            "options": {"reshard_after_forward": False},
            "between": True,
            "latent": True,
        },
    },
}


@pytest.mark.parametrize("family", ["llama", "bert", "mt5"])
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_equal_the_gradients_of_one_process(engine, family, tmp_path) -> None:
    cases = {**CASES, **(MORE_CASES | ENGINE_CASES[engine] if family == "llama" else {})}
    ranks = two_processes.run(tmp_path, train_all, engine, family, cases)
    expected: dict[str, list[dict[str, Tensor]]] = {}
    without_effect = ("options", "reentrant", "between", "source_memory")  # arguments that do not change gradients
    for name, case in cases.items():
        arguments = {key: value for key, value in case.items() if key not in without_effect}
        if str(arguments) not in expected:
            expected[str(arguments)] = train(None, "none", family, **arguments)
        for rank in ranks:
            check(rank[name], expected[str(arguments)], name)
    assert all(rank["joint"] > 0 for rank in ranks)


def train_without_the_sources_gradient(rank: int) -> list[dict[str, Tensor]]:
    projected.SourcePass.backward = staticmethod(lambda ctx, *grads: (None,) * len(ctx.needs_input_grad))
    return train(rank, "ddp", "bert", source_memory="recompute")


def test_a_gradient_without_the_sources_part_is_detected(tmp_path) -> None:
    ranks = two_processes.run(tmp_path, train_without_the_sources_gradient)
    with pytest.raises(AssertionError, match=r"lora_A.* off, of"):
        check(ranks[0], train(None, "none", "bert"), "without the source's gradient")


@pytest.mark.parametrize("latent", [False, True])
def test_gradients_under_fsdp2_with_mixed_precision_equal_one_process(latent, tmp_path) -> None:
    """Shards are float32, computation is float64. The gradients match to 1e-6 only if source states are float64."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)
    case = {"engine": "fsdp2", "family": "llama", "latent": latent}
    case |= {"dtype": torch.float32, "options": {"mp_policy": policy}}
    expected = train(None, "none", "llama", latent=latent)
    for actual in two_processes.run(tmp_path, train_case, case):
        check(actual, expected, "mixed precision", rtol=1e-6)


def train_case(rank: int, case: dict[str, Any]) -> list[dict[str, Tensor]]:
    return train(rank, **case)


def test_gradients_of_qlora_under_fsdp2_equal_one_process(tmp_path) -> None:
    folder = tmp_path / "llama"
    tiny.model("llama", dtype=torch.float32).save_pretrained(folder)
    cases: dict[str, dict[str, Any]] = {
        f"{layout}, {storage}": {"options": {"layout": layout}, "nf4": (folder, storage), "reentrant": False}
        for layout in ("accelerate", "accelerate, replicated")
        for storage in (torch.uint8, torch.float32)
    }
    expected = train(None, "none", "llama", nf4=(folder, torch.uint8))
    (tmp_path / "run").mkdir()
    for rank in two_processes.run(tmp_path / "run", train_all, "fsdp2", "llama", cases):
        for name in cases:
            check(rank[name], expected, name, rtol=1e-5)


# --- unsupported setups raise -----------------------------------------------------------------------------------------


def errors(rank: int) -> dict[str, str]:
    """Return a dictionary: name of a setup -> type and message of the error that it raises."""

    def fsdp1() -> None:
        sharded = FullyShardedDataParallel(
            fused("llama"),
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        sharded(**batch("llama", rank))

    def tensor_parallel() -> None:
        mesh = init_device_mesh("cpu", (two_processes.WORLD,), mesh_dim_names=("tp",))
        full_parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))

    steps = {
        "tp": tensor_parallel,
        "ddp": lambda: train(rank, "ddp", "bert", latent=True, reentrant=True),
        "fsdp2": lambda: train(rank, "fsdp2", "bert", latent=True, reentrant=True),
        "fsdp1": fsdp1,
    }
    messages = {}
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def test_unsupported_setups_raise(tmp_path) -> None:
    for messages in two_processes.run(tmp_path, errors):
        assert "tensor parallelism" in messages["tp"]
        assert "DistributedDataParallel" in messages["ddp"] and "'use_reentrant': False" in messages["ddp"]
        assert "FSDP2" in messages["fsdp2"] and "'use_reentrant': False" in messages["fsdp2"]
        assert "FSDP1" in messages["fsdp1"] and "fsdp_version: 2" in messages["fsdp1"]


def test_an_8_bit_base_raises_under_fsdp2() -> None:
    class Int8Params(torch.nn.Parameter):
        """Stand-in that has the name of bitsandbytes' class for 8-bit weights."""

    model = fused("bert")
    model.get_base_model().classifier.weight8 = Int8Params(torch.zeros(2), requires_grad=False)
    plugin = SimpleNamespace(fsdp_version=2, ignored_modules=None)
    with pytest.raises(ValueError, match=r"8 bits.*load_in_4bit.*DDP"):
        exclude_adapters_from_fsdp(model, plugin)
    plugin.fsdp_version = 1  # FSDP1 is refused later, in a forward with a source
    exclude_adapters_from_fsdp(model, plugin)
    assert plugin.ignored_modules is None
    with pytest.raises(ValueError, match=r"group of processes.*accelerate launch"):
        flare.replicate_adapters(model)


def test_gradients_are_averaged_after_a_backward_pass_that_failed(monkeypatch) -> None:
    """A backward pass that fails, for example for lack of memory, never reaches its end."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(3))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    weight = torch.nn.Parameter(torch.ones(3))
    weight.register_post_accumulate_grad_hook(_GradientAverage(torch.nn.Module(), [weight]))
    below = torch.ones(3, requires_grad=True)
    below.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (weight * torch.relu(below.exp())).sum().backward()
    weight.grad = None
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 1.5))


def test_gradients_are_averaged_once_in_a_pass_with_reentrant_checkpoints(monkeypatch) -> None:
    """A reentrant checkpoint runs a backward pass inside the backward pass."""
    reduced = []
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced.append)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    first, last = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    average = _GradientAverage(torch.nn.Module(), [first, last])
    for weight in (first, last):
        weight.register_post_accumulate_grad_hook(average)
    for steps in (1, 2):
        hidden = torch.ones(3, requires_grad=True)
        for _ in range(2):
            hidden = checkpoint(lambda x: x * first, hidden, use_reentrant=True)
        (hidden * last).sum().backward()
        assert len(reduced) == steps
    assert torch.equal(first.grad, torch.full((3,), 4.0)) and torch.equal(last.grad, torch.full((3,), 2.0))


def test_data_parallel_with_a_source_raises() -> None:
    model, inputs = fused("bert"), batch("bert", 0)
    model.get_base_model()._is_replica = True
    with pytest.raises(ValueError, match=r"source_input_ids in a model under torch.nn.DataParallel.*accelerate launch"):
        model(**inputs)
    model(**{name: value for name, value in inputs.items() if not name.startswith("source")})
