"""Adapter weights under FSDP2: read by the source before their blocks run, so gathered here and not by the blocks.

    gathered(A (r, d), sharded over the ranks)  ->  A (r, d), plain         and back: the mean of all ranks' dA, sharded

FSDP2 sums into a weight's gradient what its block's backward pass leaves, on a stream of its own, and waits for that
stream at the end of the backward pass. The source's share of dA is known only after the last block's, so it is added
behind that: exact in whichever order the two come, and without a race.
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
    "FLARE MT's projection serves every block, and gradient checkpointing with use_reentrant=True would send it one "
    "gradient per block, which {engine} cannot take: pass gradient_checkpointing_kwargs={{'use_reentrant': False}}"
)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in every_module(model))


def prepare_generate(model: nn.Module) -> None:
    """Let ``generate`` of a sharded model gather what its root holds (embeddings, head), as a forward does."""
    if isinstance(model, FSDPModule) and "generate" not in vars(model):
        register_fsdp_forward_method(model, "generate")


def is_split(model: nn.Module) -> bool:
    """Whether this process holds a part of the weights only, so that all processes have to run a forward together:
    FSDP, or DeepSpeed's ZeRO 3.
    """
    return (
        is_sharded(model)
        or any(isinstance(module, FullyShardedDataParallel) for module in every_module(model))
        or any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    )


def reshard_below(model: nn.Module, paths: Iterable[str]) -> None:
    """Have FSDP2 put the shards back on the modules along the paths, below ``model``: a whole weight that an earlier
    forward has left there (``reshard_after_forward=False``) would take the source's share after its gradient was
    reduced. Modules without shards, or whose shards are in place, are left as they are.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for module in {module for path in paths for module in _along(model, path) if isinstance(module, FSDPModule)}:
        module.reshard()


def _along(model: nn.Module, path: str) -> Iterable[nn.Module]:
    """The modules from a child of ``model`` to the one that the path names."""
    for name in path.split("."):
        model = getattr(model, name)
        yield model


def check_whole(parameter: Tensor, dims: int = 2) -> None:
    """Raise ValueError for a parameter that is sharded in a way that a source cannot take."""
    if not isinstance(parameter, DTensor):
        if parameter.dim() != dims or parameter.numel() == 0:
            raise ValueError(
                "an adapter's weight is not whole where the source is read: FSDP1 takes weights away between uses; a "
                "source needs FSDP2 (accelerate's fsdp_version: 2), DDP or DeepSpeed ZeRO"
            )
    elif "tp" in (parameter.device_mesh.mesh_dim_names or ()):
        raise ValueError("an adapter's weight is sharded by tensor parallelism, which is not supported with a source")


def gathered(parameter: Tensor, dims: int = 2) -> Tensor:
    """A parameter of so many dimensions as a plain tensor; one that FSDP2 has sharded is gathered from all ranks.

    Raises:
        ValueError: a parameter that is sharded in a way that cannot be gathered here (FSDP1), or over another axis
            than the data (tensor parallelism).
    """
    check_whole(parameter, dims)
    if not isinstance(parameter, DTensor):
        return parameter
    return cast(Tensor, _Gather.apply(parameter))


class _Gather(torch.autograd.Function):
    """A sharded parameter -> the whole; its gradient is added to ``parameter.grad`` when the backward pass is over."""

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
            mean = [Partial("avg")] * mesh.ndim  # what FSDP2 makes of the ranks' gradients
            share = DTensor.from_local(grad, mesh, mean, run_check=False).redistribute(mesh, parameter.placements)
            parameter.grad = share if parameter.grad is None else parameter.grad + share

        after_backward(add)
