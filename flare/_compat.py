"""Every private or semi-private symbol of PEFT and transformers that this package leans on, in one place.

Each stands here under a name of ours, so that an upgrade that moves one fails in ``tests/test_compat.py`` with its
name, and not somewhere in training.
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

# PEFT imports bitsandbytes where it is installed, which warns on every CPU of an optional package that nobody needs.
_BNB_LOGGER = logging.getLogger("bitsandbytes.backends.cpu.ops")
_BNB_LEVEL = _BNB_LOGGER.level
_BNB_LOGGER.setLevel(logging.ERROR)

# --- PEFT: a tuner type of our own ------------------------------------------------------------------------------------
# register_peft_method refuses names outside the closed enum PeftType; these maps are what it would fill.
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

__all__ = [
    "COMPILED_CALL",
    "GROWING_CACHE_LAYERS",
    "QUANTIZERS",
    "REPLICA_MARK",
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "LoraLayer",
    "LoraLinear",
    "after_backward",
    "attention_function",
    "checkpoints_save_random_state",
    "copy_each",
    "drops_blocks",
    "eager_attention_masks",
    "enable_checkpointing",
    "end_failed_capture",
    "every_module",
    "execution_device",
    "find_lora_class",
    "gradient_hooks",
    "in_backward",
    "inside_ddp",
    "is_compiled",
    "is_linear",
    "is_lora_over_linear",
    "is_quantized_linear",
    "looks_up_attention",
    "mixes_rows",
    "module_hooks",
    "out_features",
    "register_attention",
    "register_tuner",
    "registrations",
    "saved_tensors_are_packed",
    "set_adapters_disabled",
    "shift_labels",
    "synchronizes_gradients",
    "unit_classes",
    "warn_of_shards",
    "without_torch_function",
]


class FlareType(str):
    """ "FLARE" where PEFT expects a member of its enum: equal to the string, with the ``value`` that is read of it."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)


FLARE = FlareType("FLARE")
X_MIXUP = FlareType("FLARE_X_MIXUP")


def register_tuner(config: type, tuner: type, hotswap_keys: list[str], name: FlareType = FLARE) -> None:
    """Make PEFT find our config and tuner by ``peft_type``; adapter weights keep LoRA's names."""
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = "lora_"  # type: ignore[index]
    CONFIG_KEYS_TO_CHECK[name] = [*CONFIG_KEYS_TO_CHECK["LORA"], *hotswap_keys]  # type: ignore[index]


#: What PEFT writes onto a transformers model when it wraps it, also under gradient checkpointing.
SET_BY_PEFT = ("peft_config", "_require_grads_hook", "_require_grads_hooks")


def set_adapters_disabled(module: nn.Module, disabled: bool) -> bool:
    """Switch a tuner layer or a modules_to_save wrapper without touching requires_grad; the former state."""
    before: bool = module._disable_adapters  # type: ignore[assignment]
    module._disable_adapters = disabled  # type: ignore[assignment]
    return before


# --- torch ------------------------------------------------------------------------------------------------------------


class Registrations:
    """How many submodules were registered in this process, apart from those appended to a list of modules.

    What was worked out from a module tree holds until then.
    """

    count = 0


registrations = Registrations()


def _note_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if torch.compiler.is_compiling():  # a traced forward that slices a ModuleList would guard on the count
        return
    # decoders of transformers slice their list of blocks in each forward, which fills a new list
    if type(module) is not nn.ModuleList or name != str(len(module._modules)):
        registrations.count += 1


register_module_module_registration_hook(_note_registration)


def every_module(model: nn.Module) -> list[nn.Module]:
    """``list(model.modules())`` in a third of the time: every pass over the source asks for it."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting += reversed(module._modules.values())
    return list(found)


#: Where torch keeps the compiled call of a module that was compiled in place (``block.compile()``).
COMPILED_CALL = "_compiled_call_impl"
#: Copies each tensor of a list into the tensor at its place in another, in one call.
copy_each = torch._foreach_copy_
#: Within it, reading an attribute of a tensor subclass does not run the subclass's Python code.
without_torch_function = torch._C.DisableTorchFunctionSubclass


def in_backward() -> bool:
    """Whether a backward pass runs in this thread, as it does around a checkpoint's recompute."""
    return torch._C._current_graph_task_id() != -1


def saved_tensors_are_packed() -> bool:
    """Whether hooks receive the tensors that autograd saves, as under non-reentrant gradient checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_compiled(model: nn.Module) -> bool:
    """Whether a module of the model was compiled in place."""
    return any(module.__dict__.get(COMPILED_CALL) for module in every_module(model))


# --- quantised linears ------------------------------------------------------------------------------------------------

#: Packages whose linears hold a quantised weight. Some of them look at ``training``, or change their weight with it.
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
    """Whether the class is a LoRA layer of PEFT's over a linear of another library (told by its module alone).

    PEFT has one module for each library; ``layer`` has those over torch's modules, ``tp_layer`` those over Megatron's,
    which return tuples.
    """
    package, _, name = cls.__module__.rpartition(".")
    return package == "peft.tuners.lora" and name not in ("layer", "tp_layer") and issubclass(cls, LoraLayer)


def find_lora_class(name: str) -> type | None:
    """Return the class of PEFT's with this name that :func:`is_lora_over_linear` accepts, if its library is here."""
    import peft.tuners.lora as lora

    modules = [lora, *(module for path, module in sys.modules.items() if path.startswith(f"{lora.__name__}."))]
    found = (getattr(module, name, None) for module in modules)
    return next((cls for cls in found if isinstance(cls, type) and is_lora_over_linear(cls)), None)


def is_linear(module: nn.Module) -> bool:
    """Whether the module maps (..., d) to (..., n) as far as its attributes tell: plain, quantised or with adapters."""
    if isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
        return True
    # the two have no attribute for their widths
    named = type(module).__name__ in ("EetqLinear", "Conv1D")
    return named or hasattr(module, "in_features") or hasattr(module, "infeatures")


def out_features(module: nn.Module) -> int | None:
    """Return n of a layer that :func:`is_linear` accepts; None where it does not say."""
    found = (getattr(module, name, None) for name in ("out_features", "outfeatures", "nf"))
    return next((width for width in found if isinstance(width, int)), None)


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether the module is a linear of a quantising library, whose ``training`` flag must never be flipped."""
    return type(module).__module__.startswith(_QUANTIZER_PREFIXES)


def mixes_rows(module: nn.Module) -> str:
    """Return why a quantised linear's result for a row depends on the rows beside it; empty where it does not."""
    if is_quantized_linear(module) and getattr(getattr(module, "state", None), "threshold", 0.0) > 0.0:
        return "chooses the columns that it keeps in 16 bit over all rows of a batch (llm_int8_threshold)"
    activations = getattr(getattr(module, "weight", None), "act_quant_kwargs", None)  # torchao
    if type(getattr(activations, "granularity", None)).__name__ == "PerTensor":
        return "quantises activations with one scale for all rows of a batch (granularity PerTensor)"
    return ""


# --- transformers -----------------------------------------------------------------------------------------------------


#: Layers of a KV cache that hold ``keys`` and ``values`` (rows, heads, positions, c), longer by a ``cat`` at each step.
GROWING_CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def enable_checkpointing(model: Any, kwargs: dict[str, Any]) -> None:
    """Gradient checkpointing by the name that this transformers has for it (``activation_checkpointing_enable``)."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


class _ConfigWithAttention:
    """A model's config as one attention module sees it: all the same, but for the attention function's name."""

    def __init__(self, config: Any, name: str) -> None:
        self.__dict__.update(_config=config, _attn_implementation=name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


def shift_labels(model: nn.Module, labels: torch.Tensor) -> torch.Tensor | None:
    """Return the decoder's input ids (B, u) that an encoder-decoder makes of labels (B, u); None where it is unknown.

    M2M100 (NLLB) has a function of its module where others have a method.
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
    """Whether a training step leaves blocks out at random (LayerDrop: M2M100, BART, OPT)."""
    return any(module.training and module.__dict__.get("layerdrop", 0.0) > 0.0 for module in every_module(model))


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Give transformers an attention function by a name."""
    AttentionInterface.register(name, function)


def looks_up_attention(module: nn.Module) -> bool:
    """Whether an attention module takes its attention function by the name in its config."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


@contextlib.contextmanager
def attention_function(module: Any, name: str) -> Iterator[None]:
    """One attention module runs with a registered attention function; no other module of the model does."""
    config = module.config
    module.config = _ConfigWithAttention(config, name)
    try:
        yield
    finally:
        module.config = config


# --- torch: engines for many GPUs -------------------------------------------------------------------------------------


def after_backward(callback: Callable[[], None]) -> None:
    """Call back when the backward pass that runs now is over; behind those that asked before (FSDP2 asks first)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def synchronizes_gradients(model: nn.Module) -> bool:
    """Whether FSDP2 reduces gradients in this backward pass: not under set_requires_gradient_sync(False)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch before 2.13: one
            if groups[0] is not None:
                return bool(groups[0].reduce_grads)
    return True


def unit_classes(model: nn.Module) -> list[str]:
    """Return the names of the classes that transformers would not split, without those that hold the token embeddings:
    accelerate's FSDP2 shards these by themselves, and a weight twice is an error.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    owners = {type(module).__name__ for module in model.modules() if embeddings in module.children()}
    return [name for name in getattr(model, "_no_split_modules", None) or () if name not in owners]


def inside_ddp() -> bool:
    """Whether this is the forward of a model in DistributedDataParallel."""
    return torch.nn.parallel.DistributedDataParallel._active_ddp_module is not None


#: What torch.nn.DataParallel sets on the copies that it makes in every forward.
REPLICA_MARK = "_is_replica"


# --- transformers.Trainer ---------------------------------------------------------------------------------------------

#: Private methods of Trainer that FlareTrainer extends: the first decides which columns of a data set are kept, the
#: second counts tokens. An override of a method that is gone would be silence, so FlareTrainer checks.
TRAINER_METHODS = ("_set_signature_columns_if_needed", "_track_num_input_tokens", "evaluation_loop")


def check_trainer(trainer: type) -> None:
    """Raises ImportError, naming the methods, where a Trainer class lacks one that FlareTrainer extends."""
    gone = [name for name in TRAINER_METHODS if not callable(getattr(trainer, name, None))]
    if gone:
        raise ImportError(
            f"transformers {importlib.metadata.version('transformers')}: {trainer.__name__} has no {', '.join(gone)}, "
            "which FlareTrainer extends; install a version that pyproject.toml admits"
        )


def signature_columns(trainer: Any) -> list[str]:
    """The data set columns a Trainer keeps, once ``_set_signature_columns_if_needed`` has run; the list itself."""
    columns: list[str] = trainer._signature_columns
    return columns


def loss_shifts_labels(trainer: Any) -> bool:
    """Whether the Trainer found that the model's loss predicts the next token (the first label is then no target)."""
    shifts: bool = trainer._loss_shifts_labels
    return shifts


def uses_reentrant_checkpointing(model: Any) -> bool:
    """Whether transformers' activation checkpointing is on somewhere in a model, in its reentrant form."""
    for module in every_module(model):
        if module.__dict__.get("gradient_checkpointing"):
            options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if options.get("use_reentrant"):
                return True
    return False


# --- steps captured in CUDA graphs ------------------------------------------------------------------------------------


@contextlib.contextmanager
def eager_attention_masks() -> Iterator[None]:
    """While a stream captures, make transformers decide about a missing attention mask as it does in eager mode.

    It takes a capture for tracing, and then makes a mask where none is given (5.17 for every model, later releases for
    a causal model without a KV cache, whose positions might be packed texts). Attention would leave its fast kernel. A
    mask that is given is made as before; ``position_ids`` of the user's must not come without one.
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


def checkpoints_save_random_state(model: Any) -> bool:
    """Whether transformers' activation checkpointing is on somewhere in a model and keeps the random state."""
    for module in every_module(model):
        if module.__dict__.get("gradient_checkpointing"):
            options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if options.get("preserve_rng_state", True):
                return True
    return False


def execution_device(module: nn.Module) -> torch.device:
    """Where a linear layer computes: where its weight is, or where accelerate's hook puts an offloaded one."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if weight.device.type != "meta":
        return weight.device
    hook = module.__dict__.get("_hf_hook")
    devices = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    return next((torch.device(device) for device in devices if device is not None), weight.device)


def module_hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The tables of a module's hooks; they stay the same objects."""
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


def gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether a leaf has hooks on its gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def end_failed_capture(device: torch.device, pool: Any) -> None:
    """Take the allocator out of the capture that failed; ``torch.cuda.graph`` leaves it there where the end fails."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
