"""DDP and FSDP2 on two processes: every gradient is one process's over both batches, the source's share included."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import tiny
import torch
import two_processes
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import flare
from flare import joint_attention, source_pass

D = 7  # of FLARE MT's latent states
LR = 0.05
ENGINES = ("ddp", "fsdp2")


def fused(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A tiny fusing model; r=5 does not divide by two, so that one rank's shard of A is the smaller."""
    changes = {"dropout_rate": 0.0} if family == "mt5" else {}
    base = tiny.model(family, dtype=dtype, **changes)
    model = flare.fast_lora(base, **{"r": 5, "lora_alpha": 7, **overrides})
    tiny.randomize_lora(model)
    return model


def batch(family: str, index: int, latent: bool = False) -> dict[str, Tensor]:
    """The batch of one rank in one micro-step; labels of one count, so that the mean of means is the mean."""
    inputs = tiny.batch(family, seed=index, source=not latent)
    generator = torch.Generator().manual_seed(index)
    if latent:
        shape = (*inputs["input_ids"].shape, D)
        inputs["source_states"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    elif family == "mt5":
        inputs["source_labels"] = torch.randint(2, tiny.VOCAB, inputs["labels"].shape, generator=generator)
    return inputs


def shard(model: Any, **options: Any) -> None:
    """FSDP2 as accelerate applies it: every block, then the root."""
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, **options)
    fully_shard(model, **options)


def whole(tensor: Tensor) -> Tensor:
    """A tensor or all shards of it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(
    rank: int | None,
    engine: str,
    family: str,
    *,
    accumulate: int = 1,
    steps: int = 2,
    reentrant: bool | None = None,
    between: bool = False,
    latent: bool = False,
    options: dict[str, Any] | None = None,
    **overrides: Any,
) -> list[dict[str, Tensor]]:
    """The gradients of some steps of gradient descent, by name.

    Args:
        rank: whose batches; None: those of all ranks, their losses' mean, in this one process.
        engine: "ddp", "fsdp2" or "none".
        accumulate: micro-batches of a step; the engine synchronises in the last one.
        reentrant: use_reentrant of gradient checkpointing; None is without.
        between: evaluate before each step and run two forwards before one backward.
        options: of the engine.
    """
    model: Any = fused(family, **({"latent_dim": D} if latent else {}), **overrides)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    engined = model
    if engine == "ddp":
        engined = DistributedDataParallel(model, **(options or {}))
    elif engine == "fsdp2":
        shard(model, **(options or {}))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(isinstance(p, DTensor) == (engine == "fsdp2") for p in parameters.values())
    ranks = range(two_processes.WORLD) if rank is None else [rank]
    found = []
    for step in range(steps):
        if between:
            with torch.no_grad():
                engined(**batch(family, 99, latent))
        losses = []
        for micro in range(accumulate):
            last = micro == accumulate - 1
            hold: Any = contextlib.nullcontext()
            if engine == "ddp" and not last:
                hold = engined.no_sync()
            elif engine == "fsdp2":
                model.set_requires_gradient_sync(last)
            with hold:
                for which in ranks:
                    index = (step * accumulate + micro) * two_processes.WORLD + which
                    losses.append(engined(**batch(family, index, latent)).loss / accumulate / len(ranks))
                    if not between:
                        losses.pop().backward()
        if between:
            sum(losses).backward()
        found.append({name: whole(p.grad) for name, p in parameters.items()})
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= LR * parameter.grad
                parameter.grad = None
    return found


def train_all(rank: int, engine: str, family: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every case, and how often the joint node ran in all."""
    calls = []
    joint = joint_attention.fused_lora_qkv
    joint_attention.fused_lora_qkv = lambda *args, **kwargs: calls.append(1) or joint(*args, **kwargs)
    return {name: train(rank, engine, family, **case) for name, case in cases.items()} | {"joint": len(calls)}


def check(got: list[dict[str, Tensor]], want: list[dict[str, Tensor]], name: str, rtol: float = 1e-9) -> None:
    """Every gradient of every step; by default to float64's rounding."""
    for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours.keys() == theirs.keys()
        for parameter, grad in theirs.items():
            error, size = (ours[parameter] - grad).abs().max(), grad.abs().max()
            assert error <= rtol * size + 1e-14, f"{name}, step {step}, {parameter}: {error:.1e} off, of {size:.1e}"


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
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
        "unused parameters looked for": {"options": {"find_unused_parameters": True}},
        "static graph": {"options": {"static_graph": True}},
    },
    "fsdp2": {
        "kept whole": {"options": {"reshard_after_forward": False}},
        "kept whole, forwards between": {"options": {"reshard_after_forward": False}, "between": True},
        "forwards between": {"between": True},
        "FLARE MT, kept whole, forwards between": {
            "options": {"reshard_after_forward": False},
            "between": True,
            "latent": True,
        },
    },
}


@pytest.mark.parametrize("family", ["llama", "bert", "mt5"])
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_one_processs(engine, family, tmp_path) -> None:
    cases = {**CASES, **(MORE_CASES | ENGINE_CASES[engine] if family == "llama" else {})}
    found = two_processes.run(tmp_path, train_all, engine, family, cases)
    wanted: dict[str, list[dict[str, Tensor]]] = {}
    for name, case in cases.items():
        mathematics = {key: value for key, value in case.items() if key not in ("options", "reentrant", "between")}
        if str(mathematics) not in wanted:
            wanted[str(mathematics)] = train(None, "none", family, **mathematics)
        for rank in found:
            check(rank[name], wanted[str(mathematics)], name)
    assert all(rank["joint"] > 0 for rank in found)


def without_the_source(rank: int) -> list[dict[str, Tensor]]:
    source_pass.SourcePass.backward = staticmethod(lambda ctx, *grads: (None,) * len(ctx.needs_input_grad))
    return train(rank, "ddp", "bert", steps=1)


def test_a_missing_share_of_the_source_would_be_seen(tmp_path) -> None:
    found = two_processes.run(tmp_path, without_the_source)
    with pytest.raises(AssertionError, match=r"lora_A.* off, of"):
        check(found[0], train(None, "none", "bert", steps=1), "cut")


@pytest.mark.parametrize("latent", [False, True])
def test_fsdp2_with_mixed_precision(latent, tmp_path) -> None:
    """float32 shards computed in float64: exact where the source arrives in every block, in FSDP2's dtype."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)
    case = {"engine": "fsdp2", "family": "llama", "steps": 1, "latent": latent}
    case |= {"dtype": torch.float32, "options": {"mp_policy": policy}}
    want = train(None, "none", "llama", steps=1, latent=latent)
    for got in two_processes.run(tmp_path, train_case, case):
        check(got, want, "mixed precision", rtol=1e-6)


def train_case(rank: int, case: dict[str, Any]) -> list[dict[str, Tensor]]:
    return train(rank, **case)


# --- what cannot be trained is refused, before a step is lost ---------------------------------------------------------


def errors(rank: int) -> dict[str, str]:
    """Name -> the error that a training step raises."""

    def fsdp1() -> None:
        sharded = FullyShardedDataParallel(
            fused("llama"),
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        sharded(**batch("llama", rank))

    steps = {
        "ddp": lambda: train(rank, "ddp", "bert", latent=True, reentrant=True),
        "fsdp2": lambda: train(rank, "fsdp2", "bert", latent=True, reentrant=True),
        "fsdp1": fsdp1,
    }
    found = {}
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_what_an_engine_cannot_take_is_refused(tmp_path) -> None:
    for found in two_processes.run(tmp_path, errors):
        assert "DistributedDataParallel" in found["ddp"] and "'use_reentrant': False" in found["ddp"]
        assert "FSDP2" in found["fsdp2"] and "'use_reentrant': False" in found["fsdp2"]
        assert "FSDP1" in found["fsdp1"] and "fsdp_version: 2" in found["fsdp1"]


def test_data_parallel_threads_are_refused() -> None:
    model, inputs = fused("bert"), batch("bert", 0)
    model.get_base_model()._is_replica = True
    with pytest.raises(ValueError, match=r"source_input_ids in a model under torch.nn.DataParallel.*accelerate launch"):
        model(**inputs)
    model(**{name: value for name, value in inputs.items() if not name.startswith("source")})
