"""Replicate the trained weights on every rank while FSDP2 shards the frozen base.

A block's adapters of rank 64 are about 1 % of its weights. Sharding them saves little memory and costs collectives,
above all in the source pass, which gathers the A of each layer separately.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .._compat import after_backward, synchronizes_gradients, unit_classes


def replicate_adapters(model: nn.Module) -> set[nn.Parameter]:
    """Replicate a model's trained weights under FSDP2, and average their gradients after each backward pass.

    Call this function on every rank before ``fully_shard``, and exclude the returned parameters from sharding::

        trained = flare.replicate_adapters(model)
        for block in blocks:
            fully_shard(block, ignored_params=trained)
        fully_shard(model, ignored_params=trained)

    All ranks start from rank 0's weights. Gradients are averaged by one all-reduce per dtype. FSDP2's
    ``set_requires_gradient_sync(False)`` postpones this averaging too, for gradient accumulation. A second call on the
    same model changes nothing and returns the same parameters. FlareTrainer calls this function itself.

    Args:
        model: a model with adapters, not sharded yet.

    Returns:
        The parameters that require a gradient.

    Raises:
        ValueError: no process group is initialised, the model has no trained weights, or they are already sharded.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("replicate_adapters needs a group of processes: start them with accelerate launch or torchrun")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"{type(model).__name__} has no trained weights: call replicate_adapters after fast_lora")
    if any(isinstance(parameter, DTensor) for parameter in trained):
        raise ValueError("the trained weights are already sharded: call replicate_adapters before fully_shard")
    if not all(hasattr(parameter, _MARK) for parameter in trained):
        average = _GradientAverage(model, trained)
        for parameter in trained:
            dist.broadcast(parameter.data, src=0)
            parameter.register_post_accumulate_grad_hook(average)
            setattr(parameter, _MARK, True)
    return set(trained)


_MARK = "_flare_replicated"


class _GradientAverage:
    """Hook that averages the gradients over all ranks after a backward pass, with one all-reduce per dtype."""

    def __init__(self, model: nn.Module, trained: list[nn.Parameter]) -> None:
        self.model, self.trained = model, trained
        # Only the backward pass holds the callback. A pass that fails frees it without a call, and the next pass must
        # schedule another.
        self.scheduled: Callable[[], Any] = lambda: None

    def __call__(self, parameter: Tensor) -> None:
        if self.scheduled() is None:
            callback = functools.partial(self.average)
            self.scheduled = weakref.ref(callback)
            after_backward(callback)

    def average(self) -> None:
        self.scheduled = lambda: None
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


def exclude_adapters_from_fsdp(model: nn.Module, plugin: Any) -> None:
    """Replicate the trained weights, and let accelerate's FSDP2 shard only the frozen weights.

    Do nothing for FSDP1, or if the user has set ``ignored_modules``. Replace ``ignored_modules`` that an earlier call
    of this function has set.

    Args:
        model: a model with adapters, not prepared by accelerate yet.
        plugin: accelerate's FullyShardedDataParallelPlugin. Its ``ignored_modules`` are set, and also its
            ``transformer_cls_names_to_wrap`` if this is None.

    Raises:
        ValueError: the base is quantised to 8 bits, and FSDP2 would lose its scales.
    """
    if plugin.fsdp_version == 2 and any(type(one).__name__ == "Int8Params" for one in model.parameters()):
        raise ValueError(
            "FSDP2 cannot shard a base in 8 bits (load_in_8bit): it loses the scales of the weights. Load it in 4 "
            "bits (load_in_4bit), or use DDP"
        )
    # All trainers of a process share the plugin, so its ignored_modules may belong to an earlier model.
    set_before = getattr(plugin, _MARK, False)
    if plugin.fsdp_version == 2 and (set_before or plugin.ignored_modules is None):
        replicate_adapters(model)
        plugin.ignored_modules = trained_modules(model)
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = unit_classes(model) or None
        setattr(plugin, _MARK, True)


def trained_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold the trained weights directly, for accelerate's ``ignored_modules``.

    Raises:
        ValueError: a module holds both trained and frozen weights.
    """
    modules = []
    for name, module in model.named_modules():
        requires_grad = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
        if any(requires_grad) and not all(requires_grad):
            raise ValueError(f"{name} holds trained and frozen weights, and FSDP2 cannot shard only some of them")
        modules += [module] if any(requires_grad) else []
    return modules
