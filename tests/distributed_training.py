"""Models, batches and training steps for the tests on two processes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
import two_processes
from accelerate.utils.dataclasses import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import flare
from flare.training.replicated import trained_modules

D = 7  # of FLARE MT's latent states
LR = 0.05


def fused(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A tiny fusing model; r=5 does not divide by two, so that one rank's shard of A is the smaller."""
    changes = {"dropout_rate": 0.0} if family == "mt5" else {}
    nf4 = overrides.pop("nf4", None)
    base = tiny.model(family, dtype=dtype, **changes) if nf4 is None else quantized(*nf4)
    model = flare.fast_lora(base, **{"r": 5, "lora_alpha": 7, **overrides})
    tiny.randomize_lora(model)
    return model


def quantized(folder: Path, storage: torch.dtype) -> Any:
    """A checkpoint's linears in NF4, kept in numbers of a dtype; the other weights are float32."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    ).requires_grad_(False)


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


def shard(model: Any, layout: str = "blocks", **options: Any) -> None:
    """FSDP2 on every block, then the root; or by accelerate's own rule, which it does not follow on a CPU by itself."""
    if "replicated" in layout:
        ignored = flare.replicate_adapters(model)
        assert flare.replicate_adapters(model) == ignored
        options |= (
            {"ignored_modules": trained_modules(model)} if "accelerate" in layout else {"ignored_params": ignored}
        )
    if "accelerate" in layout:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options)
        state = SimpleNamespace(fsdp_plugin=plugin)
        accelerator = SimpleNamespace(
            state=state, mixed_precision="no", is_main_process=True, torch_device_mesh=None, device=torch.device("cpu")
        )
        fsdp2_prepare_model(accelerator, model)
        return
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
    steps: int = 1,
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
    sharded = engine == "fsdp2" and "replicated" not in (options or {}).get("layout", "")
    assert all(isinstance(p, DTensor) == sharded for p in parameters.values())
    assert any(isinstance(p, DTensor) for p in model.parameters()) == (engine == "fsdp2")
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


def check(got: list[dict[str, Tensor]], want: list[dict[str, Tensor]], name: str, rtol: float = 1e-9) -> None:
    """Every gradient of every step; by default to float64's rounding."""
    for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours.keys() == theirs.keys()
        for parameter, grad in theirs.items():
            error, size = (ours[parameter] - grad).abs().max(), grad.abs().max()
            assert error <= rtol * size + 1e-14, f"{name}, step {step}, {parameter}: {error:.1e} off, of {size:.1e}"
