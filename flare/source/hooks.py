"""Hooks that route a source from a model's keyword arguments to its adapter layers.

No modeling code is copied or patched:

1. Before the transformers model: remove ``source_*`` from the keyword arguments, read the source, and put its states
   into a context (flare.source.context). A decoding step instead gets the projected source states of its positions
   from the object that is stored on the KV cache (flare.generation.decoding), or appends the source's rows to the
   target's batch (flare.generation.shared_pass).
2. Before the module whose forward loops over the blocks: add the context to the keyword arguments of the blocks.
3. Before each block, and after the last one: record the hidden state if a source pass is running. In a decoding step
   whose batch also has the source's rows, compute S from these rows before each block.
4. Before a self-attention module, which gradient checkpointing calls again in the backward pass: put the context into
   the thread's slot (flare.source.context.Slot). After the module: remove the context from the slot. Blocks that do not
   pass keyword arguments on do steps 2 and 4 themselves (flare.source.carrier).
5. After the model: check that the source reached every fusing layer, clear the slot, and remove the source's rows from
   the output if a decoding step appended them to the target's batch.

The hook functions read everything from the module that they are called with, never from a closure. A deep copy of the
model, or an unpickled model, therefore passes a source to its own layers.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from flare_kernels.function import functorch_is_active

from .._compat import REPLICA_MARK, drops_blocks
from ..tuner.grouping import make_sites, remove_sites
from ..tuner.layer import weight_of
from . import carrier
from .arguments import SOURCE_ARGUMENTS, flatten_choices
from .context import KEYWORD, THREAD, SourceContext
from .inputs import decoder_shape, read_source, refuse_unknown, target_shape
from .packed_rows import CHECKED_ARGUMENTS, refuse_packed_rows
from .runtime import _RUNTIME, Runtime, runtime_of
from .source_pass import StateUse
from .states import StateKey

#: Attribute of a target's KV cache that holds the decoding state of its source (flare.generation.decoding).
SOURCE_OF_CACHE = "flare_decoding"

_BLOCK, _LAST = "_flare_block", "_flare_last_block"

NO_SOURCE_WARNING = (
    "A fusing adapter was trained without a source and is plain LoRA in this step. Pass source_input_ids and "
    "source_attention_mask to the model (with latent_dim: source_states). With transformers.Trainer, set "
    "remove_unused_columns=False (it drops columns that the base model's forward does not name) or use "
    "flare.FlareTrainer, and pad with flare.FlareDataCollator."
)
PREDICTING_WARNING = (
    "A fusing adapter predicts without a source and is plain LoRA in this call, unlike in its training. Pass "
    "source_input_ids and source_attention_mask to the model or to generate (with latent_dim: source_states), as in "
    "training. This warning appears once; filter it if the missing source is intended."
)


def attach(model: nn.Module, runtime: Runtime) -> None:
    """Install the missing hooks that ``runtime.layers`` need, and assign a site to every adapter layer.

    A site is a group of layers with the same input (flare.tuner.site).
    """
    if _RUNTIME not in model.__dict__:
        model.__dict__[_RUNTIME] = runtime
        runtime.handles += [
            model.register_forward_pre_hook(_before_model, with_kwargs=True),
            model.register_forward_hook(_check_reached),
            model.register_forward_hook(_after_model, always_call=True),
        ]
    for stack in dict.fromkeys(runtime.map.places[layer.flare_key].stack for layer in runtime.layers):
        owner, blocks = model.get_submodule(stack.rpartition(".")[0]), [*model.get_submodule(stack).children()]
        if stack in runtime.map.carried:
            for block in blocks:
                carrier.make_carrying(block)
        elif not any(hook is _before_stack for hook in owner._forward_pre_hooks.values()):
            runtime.handles.append(owner.register_forward_pre_hook(_before_stack, with_kwargs=True))
        if _BLOCK in blocks[0].__dict__:
            continue
        for index, block in enumerate(blocks):
            block.__dict__[_BLOCK] = StateKey(stack, index)
            runtime.handles.append(block.register_forward_pre_hook(_before_block, with_kwargs=True))
        handle = blocks[-1].register_forward_hook(_after_last_block)
        blocks[-1].__dict__[_LAST] = (StateKey(stack, len(blocks)), handle.id)
        runtime.handles.append(handle)
    places = [runtime.map.places[layer.flare_key] for layer in runtime.layers]
    for path in dict.fromkeys(place.attention for place in places if place.stack not in runtime.map.carried):
        attention = model.get_submodule(path)
        if not any(hook is _before_attention for hook in attention._forward_pre_hooks.values()):
            runtime.handles += [
                attention.register_forward_pre_hook(_before_attention, with_kwargs=True),
                attention.register_forward_hook(_after_attention, always_call=True),
            ]
    make_sites(model)


def detach(model: nn.Module) -> None:
    """Remove every hook and attribute that :func:`attach` added to the model."""
    runtime = model.__dict__.pop(_RUNTIME, None)
    if runtime is None:
        return
    remove_sites(model)
    for handle in runtime.handles:
        handle.remove()
    runtime.handles.clear()
    for module in model.modules():
        carrier.restore_class(module)
        for name in (_BLOCK, _LAST):
            module.__dict__.pop(name, None)


# --- around the model -------------------------------------------------------------------------------------------------


def _before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    slot = THREAD.slot
    if slot.frozen_pass is not None:
        return None
    runtime: Runtime = model.__dict__[_RUNTIME]
    # as Slot.reset, inlined to save a call; _after_model does not run after a KeyboardInterrupt
    slot.running, slot.forward, slot.context, slot.pending, slot.rows = True, None, None, None, None
    # the next two lines are needs_plain_operators, inlined to save a call in every step
    compiles = torch.compiler.is_compiling()
    slot.plain = torch.compiler.is_exporting() if compiles else functorch_is_active() or torch.jit.is_tracing()
    source = take_source(model, kwargs, SOURCE_ARGUMENTS)
    uses, cache = runtime.state_uses(), kwargs.get("past_key_values")
    if uses and source:
        _refuse_cached_steps(cache, source)
        if REPLICA_MARK in model.__dict__:
            raise ValueError(
                f"{', '.join(sorted(source))} in a model under torch.nn.DataParallel, whose threads would share one "
                "source: start one process per GPU (accelerate launch, torchrun), or make a single GPU visible to this "
                "process (CUDA_VISIBLE_DEVICES=0)"
            )
        mask = kwargs.get("attention_mask")
        if (
            len(args) > 1
            or not CHECKED_ARGUMENTS.isdisjoint(kwargs)
            or (mask is not None and getattr(mask, "ndim", 0) != 2)
        ):
            refuse_packed_rows(model, source, args, kwargs)
        ids = args[0] if args else kwargs.get("input_ids")
        if getattr(ids, "ndim", 2) == 3:  # multiple choice
            source = flatten_choices(source)
        slot.forward = read_source(
            model,
            runtime,
            source,
            target_shape(args, kwargs),
            decoder_shape(args, kwargs),
            source_cache=runtime.source_cache,
        )
        store_target_masks(runtime, uses, slot.forward, args, kwargs)
    elif uses and cache is not None and hasattr(cache, SOURCE_OF_CACHE):
        source_of = getattr(cache, SOURCE_OF_CACHE)
        step = None if args else source_of.share(model, runtime, kwargs)
        if step is not None:
            slot.forward, slot.rows = step.context, (step.rows, step.total)
            step.context.step = step
            return (), step.inputs
        shape = (decoder_shape if runtime.map.decoders else target_shape)(args, kwargs)
        slot.forward = source_of.carry(model, runtime, shape, cache.get_seq_length())
    elif uses and kwargs.get("encoder_outputs") is None:  # with encoder_outputs, the encoder ran earlier
        warn_without_source(runtime, model.training and torch.is_grad_enabled())
    elif source and runtime.layers and not any(layer.flare_fusion for layer in runtime.layers):
        raise ValueError(  # transformers' delete_adapter does not remove the hooks
            f"{', '.join(sorted(source))}: the adapters that read a source were deleted from this model; leave the "
            "source out, or load such an adapter"
        )
    return args, kwargs


def warn_without_source(runtime: Runtime, training: bool) -> None:
    """Warn that fusing adapters are plain LoRA in this call: once per model in training, and once in prediction.

    Prediction after training without a source does not warn, since the adapter was trained as plain LoRA.
    """
    message = NO_SOURCE_WARNING if training else PREDICTING_WARNING
    if message in runtime.warned or NO_SOURCE_WARNING in runtime.warned:
        return
    if torch.compiler.is_compiling():
        _warn_while_tracing(message)
    else:
        runtime.warned.add(message)
        warn_user(message)


def take_source(model: nn.Module, kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Remove the source arguments from a call's keyword arguments, and return those that are not None.

    Raises:
        TypeError: an argument starts with ``source_`` and is neither in ``names`` nor accepted by the model's forward.
    """
    source = {}
    for name in [name for name in kwargs if name[:7] == "source_"]:
        if name in names:
            value = kwargs.pop(name)
            if value is not None:
                source[name] = value
        else:
            refuse_unknown(model, (name,), names)
    return source


def _refuse_cached_steps(cache: Any, source: dict[str, Any]) -> None:
    """Raise ValueError for a source with a filled KV cache: new positions would fuse with wrong source positions."""
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0):
        raise ValueError(
            f"past_key_values holds earlier positions and {', '.join(sorted(source))} was given: new positions would "
            "fuse with the wrong source positions; use model.generate, or pass the whole text at once"
        )


def store_target_masks(
    runtime: Runtime, uses: list[StateUse], context: SourceContext, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Store the target's masks (B, m) in the context for layers whose fusion reads them (cross_attention_mask).

    B is the number of rows, m the number of positions, and n the number of choices of a row.

    Raises:
        ValueError: the attention mask has neither the shape (B, m) nor, for multiple choice, (B, n, m).
    """
    masked_adapters = {name for name, config in runtime.configs.items() if config.cross_attention_mask}
    if not masked_adapters:
        return
    for key, adapter, layer in uses:
        if adapter not in masked_adapters:
            continue
        in_decoder = key.stack in runtime.map.decoders
        name = "decoder_attention_mask" if in_decoder else "attention_mask"
        mask, shape = kwargs.get(name), (decoder_shape if in_decoder else target_shape)(args, kwargs)
        if mask is None and shape is not None:
            mask = torch.ones(shape, device=weight_of(layer, adapter).device)
        if isinstance(mask, Tensor) and mask.dim() == 3:  # multiple choice: (B, n, m)
            mask = mask.flatten(0, 1)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            what = str(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name} is {what}: cross_attention_mask=True of adapter {adapter!r} needs it as (B, m)")
        context.target_masks[layer.flare_key] = mask


def _check_reached(model: nn.Module, args: Any, output: Any) -> None:
    slot = THREAD.slot
    if slot.forward is not None and slot.frozen_pass is None:
        check_reached(model, slot.forward)


def check_reached(model: nn.Module, context: SourceContext) -> None:
    """Raise ValueError if the source did not reach a fusing layer.

    Models that skip blocks at random in training (LayerDrop) are not checked.
    """
    if context.missed and not drops_blocks(model):
        runtime = runtime_of(model)
        layers = {} if runtime is None else runtime.active_uses().sites
        expected = [layer for layer, site in layers.items() if site in context.sites]
        missed = sorted(layer for layer in expected if layers[layer] in context.missed)
        raise ValueError(
            f"the source did not reach {len(missed)} of {len(expected)} fusing layers (first: {missed[0]}): "
            f"they did not run, or {type(model).__name__} does not pass unknown keyword arguments from its blocks to "
            "its attention"
        )


def _after_model(model: nn.Module, args: Any, output: Any) -> Any:
    slot = THREAD.slot
    if slot.frozen_pass is not None:
        return None
    context = slot.forward
    slot.running, slot.forward, slot.context, slot.pending, slot.plain = False, None, None, None, False
    if slot.rows is None:
        return None
    slot.rows = None
    assert context is not None and context.step is not None
    return None if output is None else context.step.finish(output)


# --- around the module that loops over the blocks, a block, and its attention -----------------------------------------


def _before_stack(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    slot = THREAD.slot
    if slot.frozen_pass is None and slot.forward is not None:
        kwargs[KEYWORD] = slot.forward


def _before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    slot = THREAD.slot
    if slot.frozen_pass is not None:
        # _after_last_block must be the last hook, because it may end the source pass by an exception. The hook is moved
        # only if necessary, because torch.compile cannot trace the move.
        if _LAST in block.__dict__ and [*block._forward_hooks][-1] != block.__dict__[_LAST][1]:
            block._forward_hooks.move_to_end(block.__dict__[_LAST][1])  # type: ignore[attr-defined]
        slot.frozen_pass.record(block.__dict__[_BLOCK], args[0] if args else kwargs["hidden_states"])
    elif slot.forward is not None and slot.forward.step is not None:
        slot.forward.step.enter_block(block.__dict__[_BLOCK], args[0] if args else kwargs["hidden_states"])


def _after_last_block(block: nn.Module, args: Any, output: Any) -> None:
    slot = THREAD.slot
    if slot.frozen_pass is not None:
        slot.frozen_pass.record(block.__dict__[_LAST][0], output if isinstance(output, Tensor) else output[0])


def _before_attention(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    slot = THREAD.slot
    if KEYWORD in kwargs:
        slot.context = kwargs[KEYWORD]
        del kwargs[KEYWORD]
    else:
        slot.context = None


def _after_attention(attention: nn.Module, args: Any, output: Any) -> None:
    slot = THREAD.slot
    slot.context = slot.pending = None


#: Packages whose frames may lie between the user's line and this module.
_LIBRARIES = {"flare", "torch", "peft", "transformers", "accelerate", "trl", "contextlib"}


@torch.compiler.disable
def warn_user(message: str) -> None:
    """Warn at the innermost line outside of libraries, because the user can change this line."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


@torch.compiler.assume_constant_result
def _warn_while_tracing(message: str) -> None:
    """Warn once per graph, when torch.compile traces it, without a graph break."""
    warn_user(message)
