"""Query, key and value of one attention module in one call of the joint node: each stream read once, one dx buffer.

Modeling code calls its projections one after the other with the same tensor. A hook before the attention notes that
tensor; the first adapted projection that is called with it computes the outputs of all (``fused_lora_qkv``), and each
of the others finds its own ready. A sibling without an adapter (k beside q and v) takes part where the node owns dx of
the frozen products, so that its share goes to the same buffer: its class is exchanged for :class:`SiblingLinear`.

This changes how often memory is read, not what is computed. A projection that somebody hooks or patches, that runs
several adapters at once, whose fusion mixes positions, or that is called with another tensor computes alone; so do all
of them while torch.compile traces, which has its own ways of adding gradients up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from flare_kernels import fused_lora_qkv
from flare_kernels.fusion import EAGER_FUSIONS

from .layer import FlareLayer
from .routing import KEY_NAMES, QUERY_NAMES, VALUE_NAMES, is_cross_attention

_NAMES = QUERY_NAMES + KEY_NAMES + VALUE_NAMES
_WIRING = "_flare_wiring"
# keyword arguments under which an attention module is given another sequence for its keys and values
_OTHER_INPUTS = ("key_value_states", "encoder_hidden_states")


class SiblingLinear(nn.Linear):
    """A frozen projection beside adapted ones: ``nn.Linear``, unless one of them has computed its output already."""

    _flare_joint: partial[Tensor | None] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(..., d) -> (..., n)."""
        output = None if self._flare_joint is None else self._flare_joint(input)
        return super().forward(input) if output is None else output


class JointCall:
    """The projections of one attention module in one forward, and the input (..., m, d) they are expected to share.

    Lives from the hook before the attention to the hook after it.
    """

    def __init__(self, x: Tensor, waiting: dict[str, nn.Module]) -> None:
        self.x, self.version = x, _version(x)
        self.waiting = waiting
        self.outputs: dict[str, Tensor] | None = None

    def take(self, name: str, x: Tensor) -> Tensor | None:
        """The output (..., m, n) of a projection for the input it was called with; None: it has to compute its own.

        Only an adapted projection starts the joint computation; one that was called before takes no part in it.
        """
        if torch.compiler.is_compiling() or x is not self.x or _version(x) != self.version:
            return None
        if self.outputs is None and isinstance(self.waiting.get(name), FlareLayer):
            self.outputs = _outputs(x, self.waiting)
        self.waiting.pop(name, None)
        return None if self.outputs is None else self.outputs.pop(name, None)


def _version(x: Tensor) -> int:
    """How often x was written to in place. Not known of inference tensors: there an attention that wrote to its input
    between its projections (none of transformers' does) would get the later ones of the input as it was.
    """
    return 0 if x.is_inference() else x._version


# --- what a projection brings to the call -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """A projection that can take part: its frozen layer, and what ``fused_lora_qkv`` is told of its adapter.

    owned: the frozen layer is a plain linear with frozen weights, so the node can compute its dx.
    adapter: A (r, d), B (n, r) and the scaling.
    x_source (..., m, d), bottleneck (..., m, r): the source, as one of the two.
    """

    linear: nn.Module
    owned: bool
    adapter: tuple[Tensor, Tensor, float] | None = None
    fusion: str | None = None
    x_source: Tensor | None = None
    bottleneck: Tensor | None = None
    dropout_p: float = 0.0


def _member(module: nn.Module) -> _Member | None:
    """What a projection brings; None where it must be called as it would be without us."""
    if type(module) is SiblingLinear:
        return _Member(module, owned=True) if _is_untouched(module) and _is_frozen(module) else None
    if not isinstance(module, FlareLayer) or module.disable_adapters or module.merged:
        return None
    base = module.base_layer
    active = module.active_here()
    if len(active) > 1 or not _is_untouched(cast(nn.Module, module)) or not _is_untouched(base):
        return None
    owned = type(base) is nn.Linear and _is_frozen(base)
    if not active:
        return _Member(base, owned=True) if owned else None
    name = active[0]
    A, B, bias = module.lora_A[name].weight, module.lora_B[name].weight, module.lora_B[name].bias
    fusion, x_source, bottleneck = module.source_of(name)
    if fusion in EAGER_FUSIONS or bias is not None or not _is_plain(A) or not _is_plain(B):
        return None
    dropout = module.lora_dropout[name]
    p = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    return _Member(base, owned, (A, B, module.scaling[name]), fusion, x_source, bottleneck, p)


def _is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in module.__dict__ and not hasattr(module, "_hf_hook")


def _is_frozen(linear: nn.Module) -> bool:
    """Whether a linear's weight (n, d) and bias are plain tensors that ask for no gradient."""
    return all(p is None or (_is_plain(p) and not p.requires_grad) for p in (linear.weight, linear.bias))


def _is_plain(tensor: Any) -> bool:
    """Neither of a tensor subclass (sharded, quantised) nor without memory."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


# --- the call ---------------------------------------------------------------------------------------------------------


def _outputs(x: Tensor, projections: dict[str, nn.Module]) -> dict[str, Tensor]:
    """name -> output (..., m, n) of every projection of x (..., m, d) that can take part; empty for fewer than two."""
    members = {name: member for name, module in projections.items() if (member := _member(module)) is not None}
    adapted = {name: member for name, member in members.items() if member.adapter is not None}
    owned = all(member.owned for member in adapted.values())
    if not owned:  # the frozen products keep their own graphs; a sibling would have nothing to do in the node
        members = adapted
    sources = [member.x_source for member in adapted.values() if member.x_source is not None]
    bottlenecks = {name: member.bottleneck for name, member in adapted.items() if member.bottleneck is not None}
    dropouts = {member.dropout_p for member in adapted.values()}
    if len(members) < 2 or len(dropouts) != 1 or any(other is not sources[0] for other in sources):
        return {}
    x_source = sources[0] if sources else None
    # flat rows: a linear's output then stands in memory of its own and can be accumulated into
    plain = all(type(member.linear) in (nn.Linear, SiblingLinear) for member in members.values())
    lead = x.shape[:-1]
    rows = next((m.target_rows(x) for m in projections.values() if isinstance(m, FlareLayer)), None)
    if plain:
        x = x.flatten(0, -2)
        x_source = None if x_source is None else x_source.flatten(0, -2)
        bottlenecks = {name: S.flatten(0, -2) for name, S in bottlenecks.items()}
    if owned:
        with torch.no_grad():
            base_outputs = {name: nn.Linear.forward(cast(nn.Linear, m.linear), x) for name, m in members.items()}
    else:
        base_outputs = {name: member.linear(x) for name, member in members.items()}
    whole = base_outputs
    if rows is not None:  # behind them stand the source's, which meet no adapter
        rows *= lead[1:].numel() if plain else 1
        x, base_outputs = x[:rows], {name: y[:rows] for name, y in base_outputs.items()}
    outputs = fused_lora_qkv(
        x,
        x_source,
        base_outputs,
        {name: member.adapter for name, member in adapted.items() if member.adapter is not None},
        fusion={name: member.fusion for name, member in adapted.items()},
        source_bottleneck=bottlenecks or None,
        weights={name: cast(Tensor, m.linear.weight) for name, m in members.items()} if owned else None,
        dropout_p=dropouts.pop(),
        training=True,  # what is not in training has no dropout here
    )
    if rows is not None:
        for name in adapted:
            whole[name][:rows] = outputs[name]
        outputs = whole
    return {name: y.unflatten(0, lead) for name, y in outputs.items()} if plain else outputs


# --- wiring -----------------------------------------------------------------------------------------------------------


def wire(model: nn.Module) -> None:
    """Fit hooks and siblings to the adapters that the model has now, whatever was wired before."""
    unwire(model)
    adapted = [path for path, module in model.named_modules() if isinstance(module, FlareLayer) and module.lora_A]
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in adapted if path.rpartition(".")[2] in _NAMES):
        attention = model.get_submodule(parent)
        children = {
            name: child
            for name, child in attention.named_children()
            if name in _NAMES and (isinstance(child, FlareLayer) or type(child) is nn.Linear)
        }
        if len(children) < 2 or is_cross_attention(parent, attention):
            continue
        for child in children.values():
            if type(child) is nn.Linear:
                child.__class__ = SiblingLinear
        handles = [
            attention.register_forward_pre_hook(_before_attention, with_kwargs=True),
            attention.register_forward_hook(_after_attention, always_call=True),
        ]
        attention.__dict__[_WIRING] = (tuple(children), handles)


def unwire(model: nn.Module) -> None:
    """Take every hook and attribute of :func:`wire` off the model, and give the siblings their class back."""
    for module in model.modules():
        for handle in module.__dict__.pop(_WIRING, ((), ()))[1]:
            handle.remove()
        module.__dict__.pop("_flare_joint", None)
        if type(module) is SiblingLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _wired(attention: nn.Module) -> dict[str, nn.Module]:
    """The projections that may be computed together, as they are now: a child may have been exchanged since."""
    names, _ = attention.__dict__[_WIRING]
    children = {name: attention._modules.get(name) for name in names}
    return {name: child for name, child in children.items() if isinstance(child, FlareLayer | SiblingLinear)}


def _before_attention(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor) or x.dim() < 2 or any(kwargs.get(name) is not None for name in _OTHER_INPUTS):
        return
    projections = _wired(attention)
    call = JointCall(x, dict(projections))
    for name, projection in projections.items():
        projection._flare_joint = partial(call.take, name)  # type: ignore[assignment]


def _after_attention(attention: nn.Module, args: Any, output: Any) -> None:
    for projection in _wired(attention).values():
        projection._flare_joint = None  # type: ignore[assignment]
