"""Gather adapter weights under FSDP2, which gathers a block's weights only when the block runs.

The source's states are projected with A, the weight of lora_A, before the blocks run. This module therefore gathers A:

    forward     full_parameter(A (r, d), sharded over the processes)  ->  A (r, d), a plain tensor
    backward    the mean of all processes' dA, sharded

Shapes: rank r of the adapter, hidden states of width d.

FSDP2 accumulates each block's gradients on a separate CUDA stream and waits for that stream at the end of the backward
pass. The source's contribution to dA is complete only after the backward of all blocks, so it is added after this wait.
The sum is therefore exact, and the two CUDA streams do not race.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial

from .._compat import after_backward, every_module

REENTRANT = (
    "gradient checkpointing with use_reentrant=True is not supported for FLARE MT under {engine}: the projection "
    "serves all blocks and would receive one gradient per block, which {engine} cannot reduce; pass "
    "gradient_checkpointing_kwargs={{'use_reentrant': False}}"
)


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 has sharded a model or a part of it."""
    return any(isinstance(module, FSDPModule) for module in every_module(model))


def prepare_generate(model: nn.Module) -> None:
    """Make ``generate`` of a sharded model gather the root's weights (embeddings, head), as a forward pass does."""
    if isinstance(model, FSDPModule) and "generate" not in vars(model):
        register_fsdp_forward_method(model, "generate")


def is_partitioned(model: nn.Module) -> bool:
    """Return whether each process holds only a part of the weights (FSDP, DeepSpeed's ZeRO 3).

    All processes then have to run a forward pass together.
    """
    return (
        is_sharded(model)
        or any(isinstance(module, FullyShardedDataParallel) for module in every_module(model))
        or any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    )


def reshard_below(model: nn.Module, paths: Iterable[str]) -> None:
    """Make FSDP2 reshard the modules along the paths below ``model``.

    With ``reshard_after_forward=False`` an earlier forward pass leaves unsharded weights. The source's contribution to
    the gradient of these weights would then be added after FSDP2 has averaged this gradient over the processes. Modules
    that are on none of the paths do not change.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for module in {module for path in paths for module in _along(model, path) if isinstance(module, FSDPModule)}:
        module.reshard()


def _along(model: nn.Module, path: str) -> Iterable[nn.Module]:
    """Yield the modules along a path, from a child of ``model`` to the named module."""
    for name in path.split("."):
        model = getattr(model, name)
        yield model


def check_gatherable(parameter: Tensor, dims: int = 2) -> None:
    """Raise ValueError for a parameter whose sharding is not supported with a source (FSDP1, tensor parallelism)."""
    if not isinstance(parameter, DTensor):
        if parameter.dim() != dims or parameter.numel() == 0:
            raise ValueError(
                "an adapter's weight is not available when the source is read: FSDP1 frees weights between uses; a "
                "source needs FSDP2 (accelerate's fsdp_version: 2), DDP or DeepSpeed ZeRO"
            )
    elif "tp" in (parameter.device_mesh.mesh_dim_names or ()):
        raise ValueError("an adapter's weight is sharded by tensor parallelism, which is not supported with a source")


def full_parameter(parameter: Tensor, dims: int = 2) -> Tensor:
    """Return a parameter as a plain tensor, gathered from all processes if FSDP2 has sharded it.

    Args:
        parameter: an adapter's weight or bias.
        dims: its number of dimensions.

    Raises:
        ValueError: the parameter is sharded by FSDP1 or by tensor parallelism.
    """
    check_gatherable(parameter, dims)
    if not isinstance(parameter, DTensor):
        return parameter
    return cast(Tensor, _Gather.apply(parameter))


class _Gather(torch.autograd.Function):
    """Gather a sharded parameter; add its gradient to ``parameter.grad`` at the end of the backward pass."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:  # type: ignore[override]
        ctx.parameter = parameter
        return cast(DTensor, parameter.detach()).full_tensor()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
        parameter = ctx.parameter

        def add() -> None:
            mesh = parameter.device_mesh
            mean = [Partial("avg")] * mesh.ndim  # FSDP2 averages over the processes
            share = DTensor.from_local(grad, mesh, mean, run_check=False).redistribute(mesh, parameter.placements)
            parameter.grad = share if parameter.grad is None else parameter.grad + share

        after_backward(add)
