"""X-Mixup's block: its self-attention module runs a second time, to attend from target tokens to source tokens.

Shapes: B rows, n tokens per target, m tokens per source, d the hidden size, h heads, e the width of a head.

The block's attention module computes queries, keys, values, their positions (RoPE, T5's bias), their norms and the
output projection. Only the attention function, which transformers looks up by name, is replaced for the second call. No
modeling code is copied, and no model class is named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import _compat
from ..tuner.layer import FlareLayer
from .mixup_place import Place

_IMPLEMENTATION = "flare_x_mixup"
_RUNTIME = "_flare_x_mixup"
#: Attribute of a LoRA layer of the mixup block that holds w and b, the trained weights of lambda (see
#: flare.baselines.mixup). PEFT then saves them as it saves lora_A.
RATIO = "lora_x_mixup"

# --- one forward on both texts ---------------------------------------------------------------------------------------


@dataclass
class Streams:
    """The two texts of one forward, and the tensors that the run on the source passes to the run on the target.

    Attributes:
        visible: (B, m) bool, the source's tokens that the target may attend to.
        counted: (B, n) bool, the target's tokens over which the entropy is averaged.
        keys, values: (B, key heads, m, e), keys and values of the source at the mixup block.
        ratio: lambda (B,), which a generation computes only once.
        hidden: "source" and "target" -> last hidden states, (B, m, d) and (B, n, d).
        source_inputs: keyword arguments of the source's forward.
        source_output: output of the source's forward.
    """

    visible: Tensor
    counted: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    ratio: Tensor | None = None
    hidden: dict[str, Tensor] = field(default_factory=dict)
    source_inputs: dict[str, Any] = field(default_factory=dict)
    source_output: Any = None


@dataclass
class MixupRuntime:
    """State that the hooks of one model share. It is attached to modules, and copied and pickled with them.

    Attributes:
        model: the transformers model.
        place: the mixup block and its modules.
        adapter: name of the X-Mixup adapter.
        task: PEFT's task type of the model, such as "SEQ_CLS", or None.
        lambda0, alpha, layer_norm: arguments of flare.baselines.x_mixup.
        classifier_token: what represents a text in a classifier's MSE term: the last hidden state of the "first" or
            "last" token, or the "mean" of the last hidden states of all tokens.
        mode: "source" or "target" while the model runs on that text, otherwise None.
        streams: the two texts of the running forward or generation; None if none is running.
        generating: whether this is a generation, which runs the source once for all forwards of the target.
        checkpointed: whether gradient checkpointing of the mixup block is switched off until both texts have run.
        block_input: hidden state at the input of the mixup block.
        call: positional and keyword arguments of the first call of the block's attention module.
        in_second_call: whether the attention module runs for the second time.
        warned: the warnings that were shown.
        handles: handles of the hooks.
    """

    model: nn.Module
    place: Place
    adapter: str
    task: str | None
    lambda0: float
    alpha: float
    layer_norm: bool
    classifier_token: str = "first"
    mode: str | None = None
    streams: Streams | None = None
    generating: bool = False
    checkpointed: bool = False
    block_input: Tensor | None = None
    call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    in_second_call: bool = False
    warned: set[str] = field(default_factory=set)
    handles: list[Any] = field(default_factory=list)

    @property
    def layer(self) -> FlareLayer:
        """The LoRA layer that holds w and b."""
        for module in self.model.get_submodule(self.place.block).modules():
            if isinstance(module, FlareLayer) and self.adapter in getattr(module, RATIO, ()):
                return module
        raise AssertionError("no LoRA layer of the mixup block holds w and b")

    @property
    def ratio(self) -> nn.Linear:
        """The adapter's w (1, 1) and b (1)."""
        ratio: nn.Linear = getattr(self.layer, RATIO)[self.adapter]
        return ratio

    def is_on(self) -> bool:
        """Return whether the adapter is active, and neither disabled nor merged."""
        layer = self.layer
        return self.adapter in layer.active_adapters and not (layer.disable_adapters or layer.merged)

    def begin(self, mode: str) -> None:
        """Start the forward on a text, and switch off gradient checkpointing in the mixup block."""
        self.mode = mode
        block: Any = self.model.get_submodule(self.place.block)
        if getattr(block, "gradient_checkpointing", False):
            self.checkpointed, block.gradient_checkpointing = True, False

    def end(self) -> None:
        """Reset the state after both texts have run, or after an error."""
        if self.checkpointed:
            block: Any = self.model.get_submodule(self.place.block)
            self.checkpointed, block.gradient_checkpointing = False, True
        self.mode, self.streams, self.generating, self.in_second_call = None, None, False, False
        self.block_input, self.call = None, ((), {})


def runtime_of(module: nn.Module) -> MixupRuntime:
    """Return the runtime attached to a module."""
    runtime: MixupRuntime = module.__dict__[_RUNTIME]
    return runtime


def is_attached(model: nn.Module) -> bool:
    """Return whether a transformers model has X-Mixup's hooks."""
    return _RUNTIME in model.__dict__


def add_ratio(model: nn.Module, block: str, adapter: str) -> None:
    """Add w = 1 and b = 0 for an adapter to the first LoRA layer of a block.

    Raises:
        ValueError: the block has no LoRA layer.
    """
    for module in model.get_submodule(block).modules():
        if isinstance(module, FlareLayer) and adapter in module.lora_A:
            break
    else:
        raise ValueError(f"target_modules: no LoRA module is in {block}, the mixup layer; choose another layer")
    layer: Any = module
    if not hasattr(layer, RATIO):
        setattr(layer, RATIO, nn.ModuleDict())
        getattr(layer, RATIO).scaling = layer.scaling  # PEFT's hotswap reads ``scaling`` from this module
        layer.adapter_layer_names = (*layer.adapter_layer_names, RATIO)
    A = layer.lora_A[adapter].weight
    ratio = nn.Linear(1, 1)
    nn.init.ones_(ratio.weight)
    nn.init.zeros_(ratio.bias)
    getattr(layer, RATIO)[adapter] = ratio.to(A.device, A.dtype).requires_grad_(A.requires_grad)


def attach_layer(model: nn.Module, runtime: MixupRuntime) -> None:
    """Install the hooks of the mixup block and of the module that loops over the blocks."""
    place = runtime.place
    modules = {name: model.get_submodule(name) for name in (place.owner, place.block, place.attention, place.result)}
    for module in (model, *modules.values()):
        module.__dict__[_RUNTIME] = runtime
    runtime.handles += [
        modules[place.owner].register_forward_hook(_keep_last_hidden_state),
        modules[place.block].register_forward_pre_hook(_keep_block_input, with_kwargs=True),
        modules[place.attention].register_forward_pre_hook(_keep_call, with_kwargs=True),
        modules[place.result].register_forward_hook(_mix),
    ]


def detach(model: nn.Module) -> None:
    """Remove the hooks, the attributes, w and b from the model."""
    runtime = model.__dict__.pop(_RUNTIME, None)
    if runtime is None:
        return
    for handle in runtime.handles:
        handle.remove()
    for module in model.modules():
        module.__dict__.pop(_RUNTIME, None)
        if hasattr(module, RATIO):
            delattr(module, RATIO)
            module.__dict__.pop("adapter_layer_names", None)


def _keep_last_hidden_state(owner: nn.Module, args: Any, output: Any) -> None:
    runtime = runtime_of(owner)
    if runtime.mode is not None and runtime.streams is not None and not runtime.generating:
        runtime.streams.hidden[runtime.mode] = output[0]


def _keep_block_input(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    runtime = runtime_of(block)
    if runtime.mode is not None:
        runtime.block_input = args[0] if args else kwargs["hidden_states"]


def _keep_call(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    runtime = runtime_of(attention)
    if runtime.mode is not None and not runtime.in_second_call:
        runtime.call = (args, dict(kwargs))


def _mix(result: nn.Module, args: Any, output: Any) -> Any:
    """Hook after self-attention: keep keys and values in the run on the source, mix in the run on the target."""
    runtime = runtime_of(result)
    if runtime.mode is None or runtime.in_second_call or runtime.lambda0 == 0:
        return None
    place, streams = runtime.place, runtime.streams
    assert streams is not None
    first = output[0] if isinstance(output, tuple) else output
    hidden = first
    if place.adds_residual:
        assert runtime.block_input is not None
        hidden = runtime.block_input + first
    attended = _attend_again(runtime, hidden)
    if runtime.mode == "source":
        return None
    ratio = _of_rows(streams.ratio, len(hidden))[:, None, None].to(hidden.dtype)
    mixed = first + ratio * (attended.to(hidden.dtype) - hidden)
    if place.norm is not None and runtime.layer_norm:
        with _second_call(runtime):
            mixed = runtime.model.get_submodule(place.norm)(mixed)
    has_both = _of_rows(streams.visible.any(1) & streams.counted.any(1), len(hidden))[:, None, None]
    mixed = torch.where(has_both, mixed, first)
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def _attend_again(runtime: MixupRuntime, hidden: Tensor) -> Tensor:
    """Call the block's attention a second time, on the hidden state (B, n, d) after self-attention.

    Return the result (B, n, d) without residual. In the run on the source, the result is not used: the call only keeps
    the keys and values.
    """
    model, place = runtime.model, runtime.place
    attention: Any = model.get_submodule(place.attention)
    args, kwargs = runtime.call
    with _second_call(runtime), _compat.attention_function(attention, _IMPLEMENTATION):
        for name in place.before:
            hidden = model.get_submodule(name)(hidden)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        if kwargs.get("past_key_values") is not None:
            kwargs = {**kwargs, "past_key_values": None}  # the cache holds the target's keys
        attended: Tensor = attention(*args, **kwargs)[0]
        for name in place.after:
            attended = model.get_submodule(name)(attended)
    return attended


@contextlib.contextmanager
def _second_call(runtime: MixupRuntime) -> Iterator[None]:
    runtime.in_second_call = True
    try:
        yield
    finally:
        runtime.in_second_call = False


# --- attention from target to source ---------------------------------------------------------------------------------


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for the second call, as transformers calls it: query (B, h, n, e) -> (B, n, h, e).

    In the run on the source, keep the keys and values, and return the query unchanged, because the result is not used.
    The mask and the window that the module passes belong to self-attention on the target. They are ignored, because a
    target token attends to all visible source tokens.
    """
    runtime = runtime_of(module)
    streams = runtime.streams
    assert streams is not None
    if runtime.mode == "source":
        streams.keys, streams.values = key, value
        return query.transpose(1, 2).contiguous(), None
    assert streams.keys is not None and streams.values is not None
    rows, heads = query.shape[:2]
    keys, values = (_heads(_of_rows(part, rows), heads) for part in (streams.keys, streams.values))
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    visible = _of_rows(streams.visible, rows)
    if streams.ratio is None:
        entropy = pair_entropy(scores, _of_rows(streams.counted, rows), visible)
        streams.ratio = mixup_ratio(entropy, runtime.ratio.weight, runtime.ratio.bias, runtime.lambda0)
    weights = _masked(scores, visible).softmax(-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ values).transpose(1, 2).contiguous(), None


_compat.register_attention(_IMPLEMENTATION, _attention)


def pair_entropy(scores: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Return (B,): the entropy of attention from target to source plus the entropy of attention from source to target.

    Each entropy is a mean over heads and query tokens.

    Args:
        scores: (B, h, n, m), from target to source, before masks and softmax. Transposed, they are the scores from
            source to target.
        target, source: (B, n) and (B, m) bool, True for the tokens that count. Other tokens are not attended to and do
            not enter the means.
    """
    return _entropy(scores, target, source) + _entropy(scores.transpose(2, 3), source, target)


def _entropy(scores: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    log_p = _masked(scores, keys).log_softmax(-1)
    # For a masked key p = 0 and p log p = 0, but the gradient of p log p would be 0 times infinity.
    entropy = -(log_p.exp() * log_p.masked_fill(~keys[:, None, None], 0)).sum(-1).mean(1)  # (B, queries)
    return (entropy * queries).sum(1) / queries.sum(1).clamp(min=1)


def mixup_ratio(entropy: Tensor, weight: Tensor, bias: Tensor, lambda0: float) -> Tensor:
    """Return lambda = lambda0 * sigmoid(w * entropy + b), (B,) -> (B,)."""
    dtype = entropy.dtype
    return lambda0 * torch.sigmoid(weight.to(dtype).squeeze() * entropy + bias.to(dtype).squeeze())


def _masked(scores: Tensor, keys: Tensor) -> Tensor:
    """Mask scores (B, h, queries, keys) at keys (B, keys) that are False. If all keys are False, softmax is uniform."""
    return scores.masked_fill(~keys[:, None, None], torch.finfo(scores.dtype).min)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head of keys or values (B, key heads, m, e), and return (B, heads, m, e)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _of_rows(x: Tensor | None, rows: int) -> Tensor:
    """Repeat a tensor of B texts for the rows of a beam search, which has several rows per text."""
    assert x is not None
    return x if len(x) == rows else x.repeat_interleave(rows // len(x), dim=0)
