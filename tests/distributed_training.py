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

D = 7  # width of FLARE MT's latent states
LR = 0.05


def fused(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """Return a tiny fusing model. Its default rank 5 is odd, so that the processes' shards of A differ in size."""
    changes = {"dropout_rate": 0.0} if family == "mt5" else {}
    nf4 = overrides.pop("nf4", None)
    base = tiny.model(family, dtype=dtype, **changes) if nf4 is None else quantized(*nf4)
    model = flare.fast_lora(base, **{"r": 5, "lora_alpha": 7, **overrides})
    tiny.randomize_lora(model)
    return model


def quantized(folder: Path, storage: torch.dtype) -> Any:
    """Load a checkpoint with its linears in NF4, stored in tensors of dtype ``storage``. Other weights are float32."""
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
    """Return a random batch. ``index`` is its seed, which differs between ranks and micro-batches.

    All batches have the same number of labels, so that the mean of the batches' losses is the loss of their union.
    """
    inputs = tiny.batch(family, seed=index, source=not latent)
    generator = torch.Generator().manual_seed(index)
    if latent:
        shape = (*inputs["input_ids"].shape, D)
        inputs["source_states"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    elif family == "mt5":
        inputs["source_labels"] = torch.randint(2, tiny.VOCAB, inputs["labels"].shape, generator=generator)
    return inputs


def shard(model: Any, layout: str = "blocks", **options: Any) -> None:
    """Shard every block and then the whole model with FSDP2.

    Args:
        model: the fusing model.
        layout: if it contains "accelerate", accelerate's fsdp2_prepare_model shards the model instead of fully_shard
            (on a CPU, accelerate itself never calls fsdp2_prepare_model). If it contains "replicated", the adapters
            are not sharded.
        options: options of fully_shard, or of accelerate's plugin if accelerate shards the model.
    """
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
    """Return a copy of a tensor, gathered from all ranks if it is sharded."""
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
    """Run some steps of gradient descent, and return for each step a dictionary from parameter names to gradients.

    Args:
        rank: the rank whose batches are used. None: the batches of all ranks, in this one process.
        engine: "ddp", "fsdp2" or "none".
        family: name of a model family in tests/tiny.py.
        accumulate: number of micro-batches in a step. The engine synchronises gradients in the last one.
        steps: number of steps.
        reentrant: use_reentrant of gradient checkpointing; None: no checkpointing.
        between: whether to run a forward pass without gradients before each step, and all forward passes of a step
            before its backward pass.
        latent: whether the model is a FLARE MT model, which reads latent states.
        options: options of DistributedDataParallel ("ddp") or of `shard` ("fsdp2").
        **overrides: fields of FlareConfig.
    """
    model: Any = fused(family, **({"latent_dim": D} if latent else {}), **overrides)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrapped = model
    if engine == "ddp":
        wrapped = DistributedDataParallel(model, **(options or {}))
    elif engine == "fsdp2":
        shard(model, **(options or {}))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sharded = engine == "fsdp2" and "replicated" not in (options or {}).get("layout", "")
    assert all(isinstance(p, DTensor) == sharded for p in parameters.values())
    assert any(isinstance(p, DTensor) for p in model.parameters()) == (engine == "fsdp2")
    ranks = range(two_processes.WORLD) if rank is None else [rank]
    grads = []
    for step in range(steps):
        if between:
            with torch.no_grad():
                wrapped(**batch(family, 99, latent))
        losses = []
        for micro in range(accumulate):
            last = micro == accumulate - 1
            hold: Any = contextlib.nullcontext()
            if engine == "ddp" and not last:
                hold = wrapped.no_sync()
            elif engine == "fsdp2":
                model.set_requires_gradient_sync(last)
            with hold:
                for which in ranks:
                    index = (step * accumulate + micro) * two_processes.WORLD + which
                    losses.append(wrapped(**batch(family, index, latent)).loss / accumulate / len(ranks))
                    if not between:
                        losses.pop().backward()
        if between:
            sum(losses).backward()
        grads.append({name: whole(p.grad) for name, p in parameters.items()})
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= LR * parameter.grad
                parameter.grad = None
    return grads


def check(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], name: str, rtol: float = 1e-9) -> None:
    """Assert that the actual and expected gradients of all steps are equal, by default up to rounding in float64."""
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for parameter, grad in theirs.items():
            error, size = (ours[parameter] - grad).abs().max(), grad.abs().max()
            assert error <= rtol * size + 1e-14, f"{name}, step {step}, {parameter}: {error:.1e} off, of {size:.1e}"
