"""Collect the private symbols of torch, PEFT and transformers that this package uses.

Other modules import these symbols from here. If an upgrade moves or removes a symbol, ``tests/test_compat.py`` fails
and names it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_module_registration_hook

from ._versions import check_versions

check_versions()  # before any symbol below is looked up

# PEFT imports bitsandbytes if it is installed. On a CPU, bitsandbytes then warns about another optional package, so the
# logger of bitsandbytes is silenced during this import.
_BNB_LOGGER = logging.getLogger("bitsandbytes.backends.cpu.ops")
_BNB_LEVEL = _BNB_LOGGER.level
_BNB_LOGGER.setLevel(logging.ERROR)

# --- PEFT: registering a tuner type -----------------------------------------------------------------------------------
# register_peft_method accepts only members of the enum PeftType, so register_tuner fills PEFT's mappings directly.
from peft.mapping import (  # noqa: E402
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK  # noqa: E402
from peft.utils.other import AuxiliaryTrainingWrapper  # noqa: E402
from peft.utils.save_and_load import _validate_lora_adapter_state_dict as warn_of_shards  # noqa: E402
from transformers import AttentionInterface  # noqa: E402
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: E402

_BNB_LOGGER.setLevel(_BNB_LEVEL)

# names of PEFT that other modules import from here
__all__ = ["AuxiliaryTrainingWrapper", "BaseTunerLayer", "LoraLayer", "LoraLinear", "warn_of_shards"]


class FlareType(str):
    """A string with the attribute ``value``, which PEFT reads from the members of its enum PeftType."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)


FLARE = FlareType("FLARE")
X_MIXUP = FlareType("FLARE_X_MIXUP")


def register_tuner(config: type, tuner: type, hotswap_keys: list[str], name: FlareType = FLARE) -> None:
    """Register a config and a tuner class with PEFT under a ``peft_type``. Weight names have LoRA's prefix ``lora_``.

    Args:
        config: the config class.
        tuner: the tuner class.
        hotswap_keys: config fields that must be equal for a hot-swap, in addition to LoRA's.
        name: the ``peft_type``.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = "lora_"  # type: ignore[index]
    CONFIG_KEYS_TO_CHECK[name] = [*CONFIG_KEYS_TO_CHECK["LORA"], *hotswap_keys]  # type: ignore[index]


#: Attributes that PEFT sets on a transformers model when it wraps the model. The last two are for checkpointing.
SET_BY_PEFT = ("peft_config", "_require_grads_hook", "_require_grads_hooks")


def set_adapters_disabled(module: nn.Module, disabled: bool) -> bool:
    """Switch the adapters of a tuner layer or a modules_to_save wrapper on or off. Return the previous state.

    ``requires_grad`` does not change.
    """
    previous: bool = module._disable_adapters  # type: ignore[assignment]
    module._disable_adapters = disabled  # type: ignore[assignment]
    return previous


# --- torch ------------------------------------------------------------------------------------------------------------


class Registrations:
    """Counter of the submodules registered in this process, without submodules appended to a ModuleList.

    A result computed from a module tree is valid as long as ``count`` has not changed.
    """

    count = 0


registrations = Registrations()


def _note_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if torch.compiler.is_compiling():  # otherwise a graph that slices a ModuleList would guard on the count
        return
    # Appending to a ModuleList is not counted. The decoders of transformers slice their list of blocks in each forward,
    # and this appends the blocks to a new ModuleList.
    if type(module) is not nn.ModuleList or name != str(len(module._modules)):
        registrations.count += 1


register_module_module_registration_hook(_note_registration)


def every_module(model: nn.Module) -> list[nn.Module]:
    """Return the same list as ``list(model.modules())``, in a third of its time."""
    modules: dict[nn.Module, None] = {}
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None and module not in modules:
            modules[module] = None
            stack += reversed(module._modules.values())
    return list(modules)


#: The attribute with the compiled call of a module that was compiled in place (``block.compile()``).
COMPILED_CALL = "_compiled_call_impl"
#: Copies each tensor of the second list into the tensor of the first list at the same index, in one call.
copy_each = torch._foreach_copy_
#: Context manager in which reading an attribute of a tensor subclass does not run the subclass's Python code.
without_torch_function = torch._C.DisableTorchFunctionSubclass


def in_backward() -> bool:
    """Return whether a backward pass runs in this thread, for example to recompute a checkpointed block."""
    return torch._C._current_graph_task_id() != -1


def saved_tensors_are_packed() -> bool:
    """Return whether saved-tensor hooks are active, as under non-reentrant gradient checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_compiled(model: nn.Module) -> bool:
    """Return whether a module of the model was compiled in place."""
    return any(module.__dict__.get(COMPILED_CALL) for module in every_module(model))


# --- quantised linears ------------------------------------------------------------------------------------------------

#: Packages whose linears hold a quantised weight. Some of these linears read their ``training`` flag, or change their
#: weight when the flag changes.
QUANTIZERS = (
    "bitsandbytes",
    "hqq",
    "gptqmodel",
    "aqlm",
    "eetq",
    "neural_compressor",
    "transformer_engine",
    "transformers.integrations",
)
_QUANTIZER_PREFIXES = tuple(f"{package}." for package in QUANTIZERS)


def is_lora_over_linear(cls: type) -> bool:
    """Return whether a class is PEFT's LoRA layer for another library's linear, judged by the class's module name.

    PEFT has one module per library. Its ``layer`` module is for torch's own modules, and ``tp_layer`` is for
    Megatron's, which return tuples.
    """
    package, _, name = cls.__module__.rpartition(".")
    return package == "peft.tuners.lora" and name not in ("layer", "tp_layer") and issubclass(cls, LoraLayer)


def find_lora_class(name: str) -> type | None:
    """Return PEFT's class of this name that :func:`is_lora_over_linear` accepts; None if PEFT has not imported one."""
    import peft.tuners.lora as lora

    modules = [lora, *(module for path, module in sys.modules.items() if path.startswith(f"{lora.__name__}."))]
    candidates = (getattr(module, name, None) for module in modules)
    return next((cls for cls in candidates if isinstance(cls, type) and is_lora_over_linear(cls)), None)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module has the attributes of a linear layer (plain, quantised or with adapters)."""
    if isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
        return True
    # these two classes have no attribute for their input width
    known_by_name = type(module).__name__ in ("EetqLinear", "Conv1D")
    return known_by_name or hasattr(module, "in_features") or hasattr(module, "infeatures")


def out_features(module: nn.Module) -> int | None:
    """Return the output width of a layer that :func:`is_linear` accepts; None if no attribute has it."""
    widths = (getattr(module, name, None) for name in ("out_features", "outfeatures", "nf"))
    return next((width for width in widths if isinstance(width, int)), None)


def is_quantized_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear of a quantising library, whose ``training`` flag must not be changed."""
    return type(module).__module__.startswith(_QUANTIZER_PREFIXES)


def row_mixing_reason(module: nn.Module) -> str:
    """Return why a quantised linear's output for a row depends on the batch's other rows; "" if it does not."""
    if is_quantized_linear(module) and getattr(getattr(module, "state", None), "threshold", 0.0) > 0.0:
        return "selects its 16-bit columns over all rows of a batch (llm_int8_threshold)"
    activations = getattr(getattr(module, "weight", None), "act_quant_kwargs", None)  # torchao
    if type(getattr(activations, "granularity", None)).__name__ == "PerTensor":
        return "quantises activations with one scale for all rows of a batch (granularity PerTensor)"
    return ""


# --- transformers -----------------------------------------------------------------------------------------------------


#: Layers of a KV cache that append to ``keys`` and ``values`` (rows, heads, positions, head width) with ``torch.cat``.
GROWING_CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def enable_checkpointing(model: Any, kwargs: dict[str, Any]) -> None:
    """Enable gradient checkpointing. In newer transformers the method is ``activation_checkpointing_enable``."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


class _ConfigWithAttention:
    """View of a model's config that names another attention function, for a single attention module."""

    def __init__(self, config: Any, name: str) -> None:
        self.__dict__.update(_config=config, _attn_implementation=name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


def shift_labels(model: nn.Module, labels: torch.Tensor) -> torch.Tensor | None:
    """Return the decoder input ids that an encoder-decoder makes from its labels; None if no known function makes them.

    Labels and decoder input ids are (B, u): B rows of u tokens. Most models have a method for this. M2M100 (NLLB) has a
    function in its Python module.
    """
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels=labels)  # type: ignore[no-any-return, operator]
    shift = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    if shift is None or list(inspect.signature(shift).parameters)[1:] != ["pad_token_id", "decoder_start_token_id"]:
        return None
    config: Any = model.config
    return shift(labels, config.pad_token_id, config.decoder_start_token_id)  # type: ignore[no-any-return]


def drops_blocks(model: nn.Module) -> bool:
    """Return whether a training step skips blocks at random (LayerDrop: M2M100, BART, OPT)."""
    return any(module.training and module.__dict__.get("layerdrop", 0.0) > 0.0 for module in every_module(model))


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Register an attention function with transformers."""
    AttentionInterface.register(name, function)


def looks_up_attention(module: nn.Module) -> bool:
    """Return whether an attention module looks up its attention function by the name in its config."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


@contextlib.contextmanager
def attention_function(module: Any, name: str) -> Iterator[None]:
    """Let one attention module of a model run with a registered attention function."""
    config = module.config
    module.config = _ConfigWithAttention(config, name)
    try:
        yield
    finally:
        module.config = config


# --- torch: distributed training --------------------------------------------------------------------------------------


def after_backward(callback: Callable[[], None]) -> None:
    """Call a function at the end of the running backward pass, after callbacks queued earlier (FSDP2's come first)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def synchronizes_gradients(model: nn.Module) -> bool:
    """Return whether FSDP2 reduces gradients in this backward pass; True if FSDP2 is not used.

    ``set_requires_gradient_sync(False)`` switches the reduction off.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # before torch 2.13
            if groups[0] is not None:
                return bool(groups[0].reduce_grads)
    return True


def unit_classes(model: nn.Module) -> list[str]:
    """Return the names of the classes in ``_no_split_modules`` that do not hold the token embeddings.

    accelerate's FSDP2 shards the embeddings separately, and sharding a weight twice is an error.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    owners = {type(module).__name__ for module in model.modules() if embeddings in module.children()}
    return [name for name in getattr(model, "_no_split_modules", None) or () if name not in owners]


def inside_ddp() -> bool:
    """Return whether a forward pass of a model in DistributedDataParallel is running."""
    return torch.nn.parallel.DistributedDataParallel._active_ddp_module is not None


#: The attribute that torch.nn.DataParallel sets on the copies that it makes in each forward.
REPLICA_MARK = "_is_replica"


# --- transformers.Trainer ---------------------------------------------------------------------------------------------

#: Private methods of Trainer that FlareTrainer overrides: choice of the data set columns, token count, evaluation loop.
#: FlareTrainer checks that they exist, because an override of a removed method would never be called.
TRAINER_METHODS = ("_set_signature_columns_if_needed", "_track_num_input_tokens", "evaluation_loop")


def check_trainer(trainer: type) -> None:
    """Raise ImportError if a Trainer class lacks a method that FlareTrainer overrides."""
    missing = [name for name in TRAINER_METHODS if not callable(getattr(trainer, name, None))]
    if missing:
        raise ImportError(
            f"transformers {importlib.metadata.version('transformers')}: {trainer.__name__} has no "
            f"{', '.join(missing)}, which FlareTrainer extends; install a version that pyproject.toml allows"
        )


def signature_columns(trainer: Any) -> list[str]:
    """Return the list of data set columns that a Trainer keeps. It is the Trainer's own list, and not a copy.

    Trainer's method ``_set_signature_columns_if_needed`` fills the list.
    """
    columns: list[str] = trainer._signature_columns
    return columns


def loss_shifts_labels(trainer: Any) -> bool:
    """Return whether the model's loss predicts the next token, so that the first label is not a target."""
    shifts: bool = trainer._loss_shifts_labels
    return shifts


def use_one_gpu(arguments: Any) -> None:
    """Let a Trainer in one process use one GPU, instead of all visible GPUs through ``torch.nn.DataParallel``."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


# --- activation checkpointing -----------------------------------------------------------------------------------------


def _checkpointing_options(model: Any) -> Iterator[dict[str, Any]]:
    """Yield, for each module that checkpoints its activations, the options of the checkpointing."""
    for module in every_module(model):
        if module.__dict__.get("gradient_checkpointing"):
            yield getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})


def uses_reentrant_checkpointing(model: Any) -> bool:
    """Return whether a module of a model uses reentrant activation checkpointing."""
    return any(options.get("use_reentrant") for options in _checkpointing_options(model))


def checkpoints_save_random_state(model: Any) -> bool:
    """Return whether a module of a model checkpoints activations and saves the random state."""
    return any(options.get("preserve_rng_state", True) for options in _checkpointing_options(model))


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def eager_attention_masks() -> Iterator[None]:
    """During a CUDA graph capture, let transformers treat a missing attention mask as in eager mode.

    transformers treats a capture like tracing, and creates a mask if none is given. Release 5.17 does this for every
    model; later releases do it for a causal model without a KV cache, because a row might hold packed texts. With a
    mask, attention does not use its fast kernel. A given mask is processed as usual. If ``position_ids`` are given, a
    mask must be given too, because this function also switches off the search for packed texts.
    """
    from transformers import masking_utils
    from transformers.utils import import_utils

    is_tracing, packed_indices = masking_utils.is_tracing, masking_utils.find_packed_sequence_indices

    def traces(tensor: Any = None) -> bool:
        return False if tensor is None and import_utils.is_cuda_stream_capturing() else bool(is_tracing(tensor))

    def packed(position_ids: torch.Tensor) -> torch.Tensor | None:
        return None if import_utils.is_cuda_stream_capturing() else packed_indices(position_ids)

    masking_utils.is_tracing, masking_utils.find_packed_sequence_indices = traces, packed
    try:
        yield
    finally:
        masking_utils.is_tracing, masking_utils.find_packed_sequence_indices = is_tracing, packed_indices


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a linear layer computes.

    It is the weight's device, or, if accelerate has offloaded the weight, the device that accelerate loads it to.
    """
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if weight.device.type != "meta":
        return weight.device
    hook = module.__dict__.get("_hf_hook")
    devices = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    return next((torch.device(device) for device in devices if device is not None), weight.device)


def module_hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the dicts that hold a module's hooks; torch never replaces these objects."""
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Return whether a parameter has hooks on its gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def end_failed_capture(device: torch.device, pool: Any) -> None:
    """Stop the allocator from using the pool of a failed capture.

    ``torch.cuda.graph`` does not do this if an error is raised when its context ends.
    """
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
