"""Trained weights that FSDP2 leaves whole on every rank, beside a frozen base that it shards.

A block's adapters of rank 64 are a hundredth of its weights: sharding them saves little memory and costs collectives,
most of all where the source is read, which gathers the A of each layer by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .._compat import after_backward, synchronizes_gradients, unit_classes


def replicate_adapters(model: nn.Module) -> set[nn.Parameter]:
    """Keep a model's trained weights whole on every rank, and average their gradients after each backward pass.

    Call it before ``fully_shard``, on every rank, and pass on what it returns::

        trained = flare.replicate_adapters(model)
        for block in blocks:
            fully_shard(block, ignored_params=trained)
        fully_shard(model, ignored_params=trained)

    The weights become rank 0's. ``set_requires_gradient_sync(False)`` on the model holds the averaging back, as it does
    FSDP2's own. A second call on a model returns the same weights and changes nothing.

    Returns:
        The parameters that require a gradient.

    Raises:
        ValueError: there is no group of processes, no trained weight, or one that is sharded already.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("replicate_adapters needs a group of processes: start them by accelerate launch or torchrun")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"{type(model).__name__} has no trained weights; call replicate_adapters after fast_lora")
    if any(isinstance(parameter, DTensor) for parameter in trained):
        raise ValueError("the trained weights are sharded already; call replicate_adapters before fully_shard")
    if not all(hasattr(parameter, _MARK) for parameter in trained):
        mean = _Mean(model, trained)
        for parameter in trained:
            dist.broadcast(parameter.data, src=0)
            parameter.register_post_accumulate_grad_hook(mean)
            setattr(parameter, _MARK, True)
    return set(trained)


_MARK = "_flare_replicated"


class _Mean:
    """Averages the gradients of all ranks when a backward pass is over: one collective per dtype."""

    def __init__(self, model: nn.Module, trained: list[nn.Parameter]) -> None:
        self.model, self.trained = model, trained
        self.asked = False

    def __call__(self, parameter: Tensor) -> None:
        if not self.asked:
            self.asked = True
            after_backward(self.average)

    def average(self) -> None:
        self.asked = False
        if not synchronizes_gradients(self.model):
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.trained:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for grads in by_dtype.values():
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))


def leave_adapters_whole(model: nn.Module, plugin: Any) -> None:
    """Have accelerate's FSDP2 shard the frozen weights only; FSDP1 and a plugin with the user's modules are left alone.

    Args:
        model: not prepared yet.
        plugin: accelerate's FullyShardedDataParallelPlugin; its ``ignored_modules`` are set, and the classes of
            its units where it names none.

    Raises:
        ValueError: the base is in 8 bits, whose scales FSDP2 does not keep.
    """
    if plugin.fsdp_version == 2 and any(type(one).__name__ == "Int8Params" for one in model.parameters()):
        raise ValueError(
            "FSDP2 cannot shard a base in 8 bits (load_in_8bit): the scales beside its weights are lost; load it in 4 "
            "bits (load_in_4bit), or use DDP"
        )
    ours = getattr(plugin, _MARK, False)  # of an earlier model: all trainers of a process share the plugin
    if plugin.fsdp_version == 2 and (ours or plugin.ignored_modules is None):
        replicate_adapters(model)
        plugin.ignored_modules = trained_modules(model)
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = unit_classes(model) or None
        setattr(plugin, _MARK, True)


def trained_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold the trained weights directly, for accelerate's ``ignored_modules``.

    Raises:
        ValueError: one of them holds a frozen weight as well.
    """
    found = []
    for name, module in model.named_modules():
        own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
        if any(own) and not all(own):
            raise ValueError(f"{name} holds trained and frozen weights: FSDP2 cannot shard the one and leave the other")
        found += [module] if any(own) else []
    return found
