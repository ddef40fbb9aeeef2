"""The adapter layers: PEFT's LoRA linears, in which flare_kernels computes the adapters and the fusion.

PEFT creates each layer, with a class that depends on the frozen layer (plain or quantised). :func:`convert_layer` then
changes the layer's class to a subclass of PEFT's class. Parameters, names, hooks and optimizers are unaffected. In
a forward pass, a quantised frozen layer is called and its weight is never read, so the weight's format does not matter.

A layer finds the source's states in its thread's :class:`~flare.source.context.Slot`, the state that the hooks and the
layers share during a forward pass.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from flare_kernels import fused_lora, reference
from flare_kernels.function import needs_plain_operators
from flare_kernels.fusion import EAGER_FUSIONS

from .._compat import LoraLayer, LoraLinear, find_lora_class, is_lora_over_linear
from ..source.context import THREAD, Slot, SourceContext
from .cross_attention import CrossAttention, masked_cross_attention
from .fused_qkv import RowsOfQKV

#: State of an adapter layer that PEFT changes without a notification. A cached result that depends on this state is
#: valid only if the state is unchanged, which every call checks. A cache stores a copy, because PEFT keeps the list of
#: active adapters that its caller passed and may change.
SWITCHES = attrgetter("_active_adapter", "_disable_adapters")
MERGED = attrgetter("merged_adapters")
#: Key of a projection's site (flare.tuner.site) in its ``__dict__``.
SITE = "_flare_site"

MERGE_REFUSED = (
    "adapter {name!r} fuses two streams (fusion={fusion!r}): phi(S, T) depends on the source text and cannot be merged "
    "into the base weights. Keep the adapter separate (save_pretrained), or train with fusion=None."
)


class FlareLayer:
    """Mixin for a LoRA layer class of PEFT: the forward and the state of a converted layer.

    The mixin has no base class, so that Python allows changing the class of an existing layer to a class with the mixin
    (FSDP2 changes the class of a module in the same way).

    Attributes:
        flare_fusion: adapter name -> the fusion in this layer; None if the adapter is plain LoRA here.
        flare_unmergeable: adapter name -> the fusion in the adapter's config, also if this layer does not fuse. These
            adapters cannot be merged.
        flare_rows: the row layout of a projection that computes query, key and value together, whose key rows do not
            fuse; None for any other projection.
        flare_key: dotted path of this layer in the base model. The source pass stores S under this key.
        lora_cross_attention: adapter name -> its CrossAttention, if it fuses by cross_attention.
        latent_proj: adapter name -> FLARE MT's projection (latent_dim -> d), only in the first layer that fuses. PEFT
            saves, moves and freezes it like lora_A.
    """

    adapter_layer_names: tuple[str, ...] = (*LoraLayer.adapter_layer_names, "lora_cross_attention", "latent_proj")
    other_param_names: tuple[str, ...] = (*LoraLayer.other_param_names, "flare_fusion", "flare_unmergeable")

    flare_fusion: dict[str, str | None]
    flare_unmergeable: dict[str, str]
    flare_key: str
    flare_rows: RowsOfQKV | None
    lora_cross_attention: nn.ModuleDict
    latent_proj: nn.ModuleDict

    if TYPE_CHECKING:  # members of PEFT's class
        _modules: dict[str, nn.Module]
        base_layer: nn.Module
        lora_A: nn.ModuleDict
        lora_B: nn.ModuleDict
        lora_dropout: nn.ModuleDict
        lora_variant: dict[str, Any]
        scaling: dict[str, float]
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        merged_adapters: list[str]
        in_features: int
        r: dict[str, int]

        def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None: ...

        def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor: ...

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the frozen layer's output plus the output of each active adapter, (..., m, n), for x (..., m, d).

        During a source pass, return the frozen layer's output only, with merged weights if adapters are merged. PEFT's
        forward runs if adapters are disabled or merged, or if ``adapter_names`` assigns adapters to rows.

        Raises:
            ValueError: ``adapter_names`` (several adapters in one batch) together with a source.
        """
        slot = THREAD.slot
        if slot.frozen_pass is not None:
            base: Any = self._modules["base_layer"]
            attributes = base.__dict__
            if base.__class__ is nn.Linear and not (
                args
                or kwargs
                or attributes["_forward_hooks"]
                or attributes["_forward_pre_hooks"]
                or "forward" in attributes
            ):
                parameters = attributes["_parameters"]
                return F.linear(x, parameters["weight"], parameters["bias"])
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        if not args and not kwargs:
            output = self.__dict__[SITE].output(self, x, slot)
            if output is not None:
                return output
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            if kwargs.get("adapter_names") is not None and slot.context is not None:
                raise ValueError(
                    "adapter_names (several adapters in one batch) cannot be combined with source_input_ids or "
                    "source_states: run one adapter per batch, or leave the source out"
                )
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        self._check_forward_args(x, *args, **kwargs)
        return self._forward_separately(slot, x, args, kwargs)

    def _forward_separately(self, slot: Slot, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Compute this projection separately from the other projections of its site (flare.tuner.site)."""
        offsets = kwargs.pop("alora_offsets", None)
        active = self.active_here()
        context = slot.context
        if slot.met is not None:
            context = None if self in slot.met else context
            slot.met.add(self)
        mixes = context is not None and any(self.flare_fusion.get(name) in EAGER_FUSIONS for name in active)
        by_modules = slot.plain
        if torch.compiler.is_compiling():
            # slot.running is False when a checkpoint recomputes its block, so a graph must not depend on it
            by_modules = torch.compiler.is_exporting()
        elif not slot.running:
            by_modules = by_modules or needs_plain_operators()
        fused = not (by_modules or mixes or any(self.needs_modules(name) for name in active))
        if x.dim() > 2 and fused and not (args or kwargs) and slot.rows is None and _returns_view(self.base_layer):
            # a linear's output for a 2-d input is not a view, so adapters can add to it in place
            lead, x = x.shape[:-1], x.flatten(0, -2)
            return self._with_adapters(context, active, x, self.base_layer(x), offsets, flat=True).unflatten(0, lead)
        result = self.base_layer(x, *args, **kwargs)
        if active and self.base_layer._forward_hooks:
            result = result.clone()  # a hook may have stored this tensor, and the adapters add to it in place
        if slot.rows is None or not active:
            return self._with_adapters(context, active, x, result, offsets, by_modules=by_modules)
        rows = self.target_rows(slot, x)
        result[:rows] = self._with_adapters(context, active, x[:rows], result[:rows], offsets, by_modules=by_modules)
        return result

    def target_rows(self, slot: Slot, x: Tensor) -> int:
        """Return the number of target rows in a decoding step that runs both texts in one batch, target rows first.

        Raises:
            ValueError: the number of rows of x is not the number of target and source rows.
        """
        assert slot.rows is not None
        rows, total = slot.rows
        if len(x) != total:
            raise ValueError(
                f"{self.flare_key} was called with {len(x)} rows in a pass that source and target share, which has "
                f"{total} rows: pass source_pass='separate' to generate"
            )
        return rows

    def needs_modules(self, adapter: str) -> bool:
        """Return whether the adapter's modules must be called, as PEFT does, instead of the kernels.

        They must be called if the adapter is a LoRA variant (such as DoRA), if one of them is hooked or patched, or if
        the scaling is a tensor, which PEFT changes in place (prepare_model_for_compiled_hotswap).
        """
        if adapter in self.lora_variant:
            return True
        return isinstance(self.scaling[adapter], Tensor) or not self.is_untouched_adapter(adapter)

    def is_untouched_adapter(self, adapter: str) -> bool:
        """Return whether none of an adapter's modules is hooked or patched."""
        return all(map(is_untouched, (self.lora_A[adapter], self.lora_B[adapter], self.lora_dropout[adapter])))

    def source_of(self, adapter: str, context: SourceContext | None) -> tuple[str | None, Tensor | None, Tensor | None]:
        """Return (fusion, x_source (..., m, d), S (..., m, r)) for an adapter; all three are None for plain LoRA.

        An adapter is plain LoRA if it does not fuse in this layer or if the call has no source. With a fusion, only one
        of x_source and S is a tensor, and the other is None.
        """
        fusion = self.flare_fusion.get(adapter)
        if context is None or fusion is None:
            return None, None, None
        x_source, S = context.of_layer(self.__dict__[SITE].path, self.flare_key, adapter)
        return (None if x_source is None and S is None else fusion), x_source, S

    def active_here(self) -> list[str]:
        """Return the active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.lora_A]

    def _with_adapters(
        self,
        context: SourceContext | None,
        active: list[str],
        x: Tensor,
        result: Tensor,
        offsets: list[int | None] | None,
        flat: bool = False,
        by_modules: bool = False,
    ) -> Tensor:
        if x.requires_grad and not result.requires_grad and active and torch.is_grad_enabled():
            raise_lost_gradient(self.flare_key, self.base_layer)
        for name in active:
            if name in self.lora_variant:
                variant, A = self.lora_variant[name], cast(nn.Linear, self.lora_A[name])
                x_cast, dtype = self._cast_input_dtype(x, A.weight.dtype), result.dtype
                result = variant.forward(self, active_adapter=name, x=x_cast, result=result, alora_offsets=offsets)
                result = result.to(dtype)
            else:
                result = self._add_adapter(context, name, x, result, flat, by_modules)
        return result

    def _add_adapter(
        self, context: SourceContext | None, name: str, x: Tensor, result: Tensor, flat: bool, by_modules: bool
    ) -> Tensor:
        lora_A, lora_B = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        fusion, x_source, bottleneck = self.source_of(name, context)
        if fusion != "cross_attention" and (by_modules or self.needs_modules(name)):
            return self._through_modules(name, fusion, x, x_source, bottleneck, result)
        if flat:
            x_source = None if x_source is None else x_source.flatten(0, -2)
            bottleneck = None if bottleneck is None else bottleneck.flatten(0, -2)
        call: Any = fused_lora
        if fusion == "cross_attention":
            if not self.is_untouched_adapter(name):
                raise ValueError(
                    f"{self.flare_key}: hooks (also accelerate's) on lora_A, lora_B or lora_dropout cannot be "
                    "combined with fusion='cross_attention': remove them, or use another fusion"
                )
            attention = cast(CrossAttention, self.lora_cross_attention[name])
            weights = dict(attention.named_parameters())
            call = partial(reference.fused_lora, weights=weights, heads=attention.heads)
            if attention.masked:
                mask = None if context is None else context.target_masks.get(self.flare_key)
                if mask is None:
                    raise ValueError(
                        f"cross_attention_mask=True of adapter {name!r}: the target's mask is not known; pass "
                        "attention_mask (B, m) as a keyword argument. generate with source_alignment='release' cannot "
                        "use cross_attention_mask=True"
                    )
                causal = bool(getattr(self.__dict__[SITE].parent, "is_causal", False))
                call = partial(masked_cross_attention, weights=weights, heads=attention.heads, mask=(mask, causal))
        A, B = lora_A.weight, lora_B.weight
        options: dict[str, Any] = {
            "scaling": self.scaling[name],
            "dropout_p": getattr(self.lora_dropout[name], "p", 0.0),
            "training": self.lora_dropout[name].training,
        }
        if fusion is not None and self.flare_rows is not None:  # the key's rows are plain LoRA
            key_mask = self.flare_rows.key_mask(B)
            result = fused_lora(x, None, result, A, B.where(key_mask, 0), fusion=None, **options)
            B = B.masked_fill(key_mask, 0)
        result = call(x, x_source, result, A, B, fusion=fusion, source_bottleneck=bottleneck, **options)
        if lora_B.bias is not None:  # PEFT's lora_bias
            result = result + (self.scaling[name] * lora_B.bias).to(result.dtype)
        return result

    def _through_modules(
        self, name: str, fusion: str | None, x: Tensor, x_source: Tensor | None, S: Tensor | None, result: Tensor
    ) -> Tensor:
        """Add the adapter's output by calling lora_A, lora_B and lora_dropout as PEFT does, with hooks and patches."""
        T = self.project(name, x)
        lora_B = self.lora_B[name]
        if fusion is None:
            update = lora_B(T)
        else:
            S = self.project(name, cast(Tensor, x_source)) if S is None else S.to(T.dtype)
            update = lora_B(reference.fuse(S, T, fusion))
            if self.flare_rows is not None:
                update = torch.where(self.flare_rows.key_mask(update).T, lora_B(T), update)
        return result + (self.scaling[name] * update).to(result.dtype)

    def project(self, adapter: str, x: Tensor) -> Tensor:
        """Return lora_A(lora_dropout(x)), (..., r), for x (..., d) by calling the two modules, with their hooks."""
        x = self.lora_dropout[adapter](self._cast_input_dtype(x, cast(nn.Linear, self.lora_A[adapter]).weight.dtype))
        return cast(Tensor, self.lora_A[adapter](x))

    def add_cross_attention(self, adapter: str, heads: int, masked: bool) -> None:
        """Add an adapter's query, key and value layers for fusion='cross_attention' if they do not exist."""
        if adapter not in self.lora_cross_attention:
            self._add_module(self.lora_cross_attention, adapter, CrossAttention(self.r[adapter], heads, masked))

    def add_latent_projection(self, adapter: str, latent_dim: int) -> None:
        """Add an adapter's projection of FLARE MT (latent_dim -> d) if it does not exist."""
        if adapter not in self.latent_proj:
            self._add_module(self.latent_proj, adapter, nn.Linear(latent_dim, self.in_features))

    def _add_module(self, modules: nn.ModuleDict, adapter: str, module: nn.Module) -> None:
        """Add a module of an adapter, with the device, dtype and requires_grad of the adapter's lora_A."""
        A = weight_of(self, adapter)
        modules[adapter] = module.to(A.device, A.dtype).requires_grad_(A.requires_grad)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters as PEFT does. Raise ValueError for an adapter that fuses, because phi cannot be merged."""
        self.check_mergeable(adapter_names)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return scaling * B A. Raise ValueError for an adapter that fuses: its update is not a single matrix."""
        self.check_mergeable([adapter])
        return cast(Tensor, super().get_delta_weight(adapter))  # type: ignore[misc]

    def check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError if one of the adapters (default: the active adapters) fuses."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.flare_unmergeable:
                raise ValueError(MERGE_REFUSED.format(name=name, fusion=self.flare_unmergeable[name]))


def _returns_view(base_layer: nn.Module) -> bool:
    """Return whether a frozen layer returns a view for an input of more than two dimensions.

    torch.nn.Linear with a bias returns a view of addmm's output. Adapters add to the output in place, and a view would
    have to be copied first. The result is False for a hooked layer, because its hooks must see the input's original
    shape.
    """
    hooked = base_layer._forward_hooks or base_layer._forward_pre_hooks
    return type(base_layer) is nn.Linear and base_layer.bias is not None and not hooked


class FlareLinear(FlareLayer, LoraLinear):
    """FLARE's adapter layer for a plain ``torch.nn.Linear``."""


_CLASSES: dict[type, type] = {LoraLinear: FlareLinear}


def _flare_class(cls: type) -> type | None:
    """Return FLARE's subclass of a LoRA class of PEFT; None if that class is not supported."""
    if cls not in _CLASSES and is_lora_over_linear(cls):
        _CLASSES[cls] = type(f"Flare{cls.__name__}", (FlareLayer, cls), {"__module__": __name__})
    return _CLASSES.get(cls)


def __getattr__(name: str) -> type:
    """Return the class ``Flare<name of PEFT's class>`` for a quantised linear, created on first use.

    Unpickling a layer looks its class up in this module.
    """
    cls = find_lora_class(name.removeprefix("Flare")) if name.startswith("Flare") else None
    flare_class = None if cls is None else _flare_class(cls)
    if flare_class is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return flare_class


def convert_layer(module: nn.Module, key: str) -> str:
    """Change the class of a PEFT LoRA layer to FLARE's, in place.

    Args:
        module: the layer.
        key: its dotted path in the base model.

    Returns:
        "" if the layer is converted now or was converted before; otherwise the reason why it is not supported. An
        unsupported layer keeps its class.
    """
    if isinstance(module, FlareLayer):
        module.flare_key = key
        return ""
    if not isinstance(module, LoraLayer):
        return f"{type(module).__name__} is not a LoRA layer"
    cls = _flare_class(type(module))
    if cls is None:
        return f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__} is not supported"
    if module.lora_variant:
        return f"it uses a LoRA variant ({', '.join(type(v).__name__ for v in module.lora_variant.values())})"
    module.__class__ = cls
    module.flare_fusion, module.flare_unmergeable = {}, {}
    module.flare_key, module.flare_rows = key, None
    module.lora_cross_attention, module.latent_proj = nn.ModuleDict(), nn.ModuleDict()
    # PEFT's hotswap removes the last three parts of a weight's path and reads ``scaling`` of the module at that path,
    # which for the weights of cross-attention is this ModuleDict
    module.lora_cross_attention.scaling = module.scaling
    return ""


def raise_weight_mismatch(path: str, x: Tensor, A: Tensor, B: Tensor) -> NoReturn:
    """Raise ValueError for A (r, d) and B (n, r) whose devices or shapes do not match each other or x (..., d)."""
    if A.device != x.device or B.device != x.device:
        raise ValueError(
            f"{path}: lora_A is on {A.device}, lora_B is on {B.device} and their input is on {x.device}: move the "
            "adapter to its layer's device"
        )
    raise ValueError(
        f"{path}: lora_A has shape {tuple(A.shape)} and lora_B {tuple(B.shape)}, expected (r, d) and (n, r) with the "
        f"input's width d = {x.shape[-1]}"
    )


def raise_lost_gradient(path: str, base_layer: nn.Module) -> NoReturn:
    """Raise ValueError for a frozen layer whose output does not require grad although its input does."""
    weight = type(getattr(base_layer, "weight", None)).__name__
    raise ValueError(
        f"{path}: its frozen layer ({type(base_layer).__name__}, weight {weight}) passes no gradient to its input, so "
        "adapters in earlier layers would be trained with an incomplete gradient. This format supports only inference "
        "(for example, torchao's dynamic int8 activations): train on a base in a weight-only format, or predict under "
        "torch.no_grad()"
    )


def is_untouched(module: nn.Module) -> bool:
    """Return whether calling a module runs its class's forward and nothing else."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in module.__dict__ and "_hf_hook" not in module.__dict__


def weight_of(layer: FlareLayer, adapter: str) -> torch.nn.Parameter:
    """Return the weight (r, d) of an adapter's lora_A, computed anew if it is pruned."""
    A = layer.lora_A[adapter]
    for hook in A._forward_pre_hooks.values() if A._forward_pre_hooks else ():
        if isinstance(hook, BasePruningMethod):  # pruning computes the weight before each call of lora_A
            hook(A, ())
    return cast(torch.nn.Parameter, A.weight)
