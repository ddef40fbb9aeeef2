"""Compute a *site* in one call: the projections of one module that read the same input (query, key and value).

Modeling code calls these projections one after the other with the same tensor x. The first call computes the outputs of
all projections of the site in one autograd node, and each later call returns its stored output. The hidden states of
both texts are then read only once, and all contributions to dx (the gradient of x) are summed in one buffer. A
*sibling* is a projection of the site without an adapter, for example key next to adapted query and value. The node
computes siblings too, because they contribute to dx; their class is :class:`SiblingLinear`. An adapter layer for any
other projection is a site by itself. The *slot* (flare.source.context) is state that a thread's hooks and layers share.

Which projections are computed together depends on the modules' state. The answer is cached (:class:`_Plan`), and each
call checks that this state is unchanged. A site stores modules and never their tensors, because tensors can change
unnoticed: hot-swapping writes ``.data``, fused optimizers do not change ``_version``, and ``functional_call`` replaces
parameters.

A projection is computed separately (flare.tuner.layer) if, for example, it is hooked or patched, has several active
adapters, or has a fusion that mixes positions (cross_attention, matmul). A projection that is called outside the
model's forward is computed separately too, because adapters and weights may change before the next call.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flare_kernels import launch_mode
from flare_kernels.function import add_adapters, apply, apply_with_products, call_of, needs_plain_operators
from flare_kernels.fusion import EAGER_FUSIONS

from .._compat import in_backward, registrations, saved_tensors_are_packed
from ..source.context import THREAD, Slot, SourceContext
from .layer import MERGED, SITE, SWITCHES, FlareLayer, is_untouched, raise_lost_gradient, raise_weight_mismatch

_PLAIN = (Tensor, nn.Parameter)
_NUMBERS = (float, int)
#: A site's source. If the site projects the source's hidden state x_S itself: (x_S (B, m, d), dropout seed, (), None).
#: If the source pass has projected it: (None, None, S (B, m, r) of every projection that fuses, their stacked A).
_Source = tuple[Tensor | None, Tensor | None, tuple[Tensor, ...], Tensor | None]
_NO_SOURCE: _Source = (None, None, (), None)
_MAX_CALLS = 64  # maximum number of entries in a plan's ``calls``


class SiblingLinear(nn.Linear):
    """A frozen ``nn.Linear`` next to adapted projections. Another projection's call may have computed its output."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the output (..., n) for (..., d)."""
        slot = THREAD.slot
        if slot.frozen_pass is None and SITE in self.__dict__:
            output = self.__dict__[SITE].output(self, input, slot)
            if output is not None:
                return output  # type: ignore[no-any-return]
        return F.linear(input, self.weight, self.bias)


class _Member:
    """A projection that is computed in its site's call, with the attributes that each call reads."""

    def __init__(self, module: nn.Module, linear: nn.Module) -> None:
        self.module, self.linear = module, linear
        self.plain = type(linear) in (nn.Linear, SiblingLinear)
        self.adapter: str | None = None
        self.index = 0  # position in the list of the site's outputs

    def adapt(self, layer: FlareLayer, adapter: str) -> None:
        """Set the layer's active adapter, whose output is added to the frozen layer's output."""
        self.adapter, self.path = adapter, layer.flare_key
        self.layer = layer
        self.lora_A = cast(nn.Linear, layer.lora_A[adapter])
        self.lora_B = cast(nn.Linear, layer.lora_B[adapter])
        dropout = layer.lora_dropout[adapter]
        self.dropout = dropout if isinstance(dropout, nn.Dropout) else None
        self.fusion = layer.flare_fusion.get(adapter)


class _JointProjections:
    """The projections of a site that are computed together.

    Attributes:
        layers: the site's adapter layers.
        watched: every module that a forward of the site's projections may call. New hooks or attributes of such a
            module can change which projections are computed together.
        members: the projections that are computed together.
        adapted: the members with an active adapter, in the order in which their A are stacked: first the members that
            fuse, sorted by the name of their fusion, then the members with plain LoRA.
        plain: whether every member's frozen layer is an ``nn.Linear``.
        fuses: whether at least one member fuses.
        paths: dotted paths of the adapted members.
    """

    def __init__(self, layers: list[FlareLayer], watched: list[nn.Module], members: list[_Member]) -> None:
        self.layers, self.watched, self.members = layers, watched, members
        for index, member in enumerate(members):
            member.index = index
        adapted = [member for member in members if member.adapter is not None]
        self.adapted = sorted(adapted, key=lambda member: (member.fusion is None, member.fusion or ""))
        self.plain = all(member.plain for member in members)
        self.fuses = any(member.fusion is not None for member in self.adapted)
        self.paths = tuple(member.path for member in self.adapted)


class _Plan(_JointProjections):
    """Joint projections, cached with the state of the modules that decided which projections are computed together."""

    def __init__(self, layers: list[FlareLayer], watched: list[nn.Module], members: list[_Member]) -> None:
        super().__init__(layers, watched, members)
        self.registrations = registrations.count
        self.switches = copy.deepcopy([*map(SWITCHES, layers)])
        self.merged = [*map(len, map(MERGED, layers))]
        self.dicts = [module.__dict__ for module in watched]
        self.sizes = [*map(len, self.dicts)]
        self.hook_dicts = [
            hooks
            for module in watched
            for hooks in (
                module._forward_pre_hooks,
                module._forward_hooks,
                module._backward_pre_hooks,
                module._backward_hooks,
            )
        ]
        self.hooks = [*map(len, self.hook_dicts)]
        self.calls: dict[tuple[Any, ...], Any] = {}

    def is_current(self) -> bool:
        """Return whether the state that the plan depends on is unchanged."""
        return (
            self.registrations == registrations.count
            and self.switches == [*map(SWITCHES, self.layers)]
            and self.sizes == [*map(len, self.dicts)]
            and self.merged == [*map(len, map(MERGED, self.layers))]
            and self.hooks == [*map(len, self.hook_dicts)]
        )


_JointOrPlan = TypeVar("_JointOrPlan", bound=_JointProjections)


class _PendingOutputs:
    """Outputs (..., m, n) of projections that have not been called yet, with the input they were computed from."""

    def __init__(self, site: Site, x: Tensor, outputs: dict[nn.Module, Tensor]) -> None:
        self.site, self.x, self.outputs = site, x, outputs
        try:
            self.version: int | None = x._version  # number of in-place writes to x
        except RuntimeError:  # inference tensors have no version
            self.version = None


class _TracedPendingOutputs(_PendingOutputs):
    """Pending outputs in a traced graph, where tensors have no versions."""

    def __init__(self, site: Site, x: Tensor, outputs: dict[nn.Module, Tensor]) -> None:
        self.site, self.x, self.outputs, self.version = site, x, outputs, None


class Site:
    """The projections of a module that read the same input.

    Args:
        path: dotted path of ``parent``; for a site with a single projection, the path of this projection.
        parent: the module that calls the projections.
        names: names of the projections in ``parent``.
    """

    def __init__(self, path: str, parent: nn.Module, names: tuple[str, ...]) -> None:
        self.path, self.parent, self.names = path, parent, names
        self.plan: _Plan | None = None
        self.separate = len(names) == 1  # True: this site computes no two projections together

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        twin = Site.__new__(Site)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def output(self, module: nn.Module, x: Tensor, slot: Slot) -> Tensor | None:
        """Return a projection's output (..., m, n) for x (..., m, d); None if it must be computed separately."""
        pending = slot.pending
        if pending is not None and pending.site is self and module in pending.outputs:
            if pending.x is x and (pending.version is None or pending.version == x._version):
                output: Tensor = pending.outputs[module]
                del pending.outputs[module]
                if not pending.outputs:
                    slot.pending = None
                if slot.met is not None:
                    slot.met.add(module)
                return output
            slot.pending = None  # the projections were called with different inputs
            if not saved_tensors_are_packed():  # a checkpoint's recompute must run the same operations as its forward
                self.separate = True
        if slot.met is not None and module in slot.met:
            return None  # only the first call in a block reads tokens; DeBERTa's second reads relative positions
        outputs = self._outputs(module, x, slot)
        if outputs is None:
            return None
        if slot.met is not None:
            slot.met.add(module)
        output = outputs[module]
        del outputs[module]
        if outputs:
            slot.pending = _PendingOutputs(self, x, outputs)
        return output

    # --- the plan -----------------------------------------------------------------------------------------------------

    def _find(self, kind: type[_JointOrPlan]) -> _JointOrPlan:
        """Return the projections that can currently be computed together, as an instance of ``kind``."""
        children = {name: self.parent._modules.get(name) for name in self.names}
        modules = [child for child in children.values() if isinstance(child, FlareLayer | SiblingLinear)]
        layers = [module for module in modules if isinstance(module, FlareLayer)]
        watched: list[nn.Module] = []
        members: list[_Member] = []
        for module in modules:
            parts = _parts(module)
            watched += parts
            if not all(map(is_untouched, parts)):
                continue
            if isinstance(module, SiblingLinear):
                if type(module) is not SiblingLinear:
                    continue  # torch.nn.utils.parametrize has changed its class
                members.append(_Member(module, module))
                continue
            active = [] if module.disable_adapters or module.merged else module.active_here()
            member = _Member(module, module.base_layer)
            if len(active) == 1 and _fits(module, active[0]):
                member.adapt(module, active[0])
            elif active or not member.plain or module.disable_adapters or module.merged:
                continue
            members.append(member)
        if not all(member.plain for member in members if member.adapter is not None):
            # the frozen layers then run outside the autograd node, so a sibling has no part in this node
            members = [member for member in members if member.adapter is not None]
        if len({member.adapter for member in members if member.adapter is not None}) != 1:
            members = []  # no active adapter, or different active adapters in different layers
        return kind(cast(list[FlareLayer], layers), watched, members)

    # --- the call -----------------------------------------------------------------------------------------------------

    def _outputs(self, module: nn.Module, x: Tensor, slot: Slot) -> dict[nn.Module, Tensor] | None:
        """Return the outputs of the projections computed together; None if ``module`` must be computed separately."""
        if torch.compiler.is_compiling():  # slot.running is False in a recompute, so a graph must not depend on it
            return None if torch.compiler.is_exporting() else self._traced(module, x, slot)
        if slot.plain or (not slot.running and needs_plain_operators()):
            return None
        plan = self.plan
        if plan is None or not plan.is_current():
            plan = self.plan = self._find(_Plan)
        members, adapted = plan.members, plan.adapted
        if (self.separate or not (slot.running or in_backward())) and len(members) > 1:
            return None
        As: tuple[Tensor, ...] = ()
        Bs: tuple[Tensor, ...] = ()
        Ws: tuple[Tensor, ...] = ()
        biases: tuple[Tensor | None, ...] = ()
        # with_products: whether the autograd node also computes the frozen layers' products x W^T
        with_products, is_member = plan.plain, False
        for member in members:
            is_member |= member.module is module
            if plan.plain:
                parameters = member.linear._parameters
                W, bias = parameters["weight"], parameters["bias"]
                Ws += (W,)  # type: ignore[operator, assignment]
                biases += (bias,)
                if W.__class__ not in _PLAIN or W.requires_grad or (bias is not None and bias.requires_grad):  # type: ignore[union-attr]
                    with_products = False
        if not is_member:
            return None
        p: float | None = None
        key: tuple[Any, ...] = ()
        width, device = x.shape[-1], x.device
        for member in adapted:
            A, B = member.lora_A._parameters["weight"], member.lora_B._parameters["weight"]
            dropout = member.dropout
            member_p = dropout.p if dropout is not None and dropout.training else 0.0
            if p is None:
                p = member_p
            if A is None or B is None or A.__class__ not in _PLAIN or B.__class__ not in _PLAIN or member_p != p:
                return None
            rank, n = A.shape[0], Ws[member.index].shape[0] if with_products else B.shape[0]
            if A.shape[1] != width or B.shape != (n, rank) or A.device != device or B.device != device:
                raise_weight_mismatch(member.path, x, A, B)
            As += (A,)
            Bs += (B,)
            scaling = member.layer.scaling[member.adapter]  # type: ignore[index]
            if scaling.__class__ not in _NUMBERS:  # it has become a tensor since the plan was made
                return None
            key += (rank, scaling)
        if not with_products:
            has_adapter = isinstance(module, FlareLayer) and slot.rows is None
            return self._over_modules(plan, x, slot, p or 0.0, As, Bs) if has_adapter else None
        context = slot.context if plan.fuses else None
        x_source, source_seed, Ss, A_stacked = _NO_SOURCE if context is None else self._source(plan, context)
        if x_source is not None and (x_source.shape != x.shape or x_source.device != device):
            x_source = _checked_source(self.path, x_source, x)
        autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
        dtype = x.dtype
        if autocast and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(device.type)
        # the launch mode decides which primitives (kernels or PyTorch operations) a call uses
        key += (launch_mode.current, dtype, p, device, x_source is not None, Ss != ())
        if key not in plan.calls:
            if len(plan.calls) >= _MAX_CALLS:  # for example, the scaling changes in every step
                plan.calls.clear()
            sizes = (0, len(Ss), len(Ws))
            plan.calls[key] = (_call(plan, key, dtype, p or 0.0, device), sizes)
        call, sizes = plan.calls[key]
        if slot.rows is not None:
            return self._with_target_adapters(plan, x, slot, call, Ss, As, Bs)
        if A_stacked is not None and A_stacked.dtype != dtype:
            A_stacked = None
        ys = apply_with_products(call, sizes, x, x_source, source_seed, Ss, A_stacked, As, Bs, Ws, biases)
        lead, outputs = x.shape[:-1], {}
        for member in members:
            y = ys[member.index]
            outputs[member.module] = y if x.ndim == 2 else y.view((*lead, y.shape[-1]))
        return outputs

    def _traced(self, module: nn.Module, x: Tensor, slot: Slot) -> dict[nn.Module, Tensor] | None:
        """Return {module: output} while torch.compile traces; None if ``module`` must be computed separately.

        No plan is used, so that the graph gets guards on the adapters' state. The frozen layers' products x W^T are
        operations of the graph, whose dx the compiler computes, so siblings do not take part.
        """
        joint = self._find(_JointProjections)
        modules = [member.module for member in joint.adapted]
        if module not in modules or (self.separate and len(modules) > 1) or slot.rows is not None:
            return None
        As = tuple(member.lora_A.weight for member in joint.adapted)
        Bs = tuple(member.lora_B.weight for member in joint.adapted)
        ps = [member.dropout.p if member.dropout and member.dropout.training else 0.0 for member in joint.adapted]
        if any(p != ps[0] for p in ps):
            return None
        for member, A, B in zip(joint.adapted, As, Bs, strict=True):
            if A.shape[1] != x.shape[-1] or B.shape[1] != A.shape[0] or A.device != x.device or B.device != x.device:
                raise_weight_mismatch(member.path, x, A, B)
        outputs = self._over_modules(joint, x, slot, ps[0], As, Bs)
        output = outputs.pop(module)
        if outputs:
            slot.pending = _TracedPendingOutputs(self, x, outputs)
        return {module: output}

    def _source(self, plan: _JointProjections, context: SourceContext) -> _Source:
        """Return what this site reads from the source of the forward pass, in the form of ``_Source``."""
        if self.path not in context.sites:
            return _NO_SOURCE
        source = context.sites[self.path]
        source.seen = True
        if source.states is not None:
            return source.states[plan.adapted[0].adapter], source.seed, (), None  # type: ignore[index]
        if context.is_reentrant():
            return context.make_state(plan.adapted[0].path, cast(str, plan.adapted[0].adapter)), None, (), None
        bottlenecks = source.bottlenecks or {}
        Ss = tuple(bottlenecks[m.path][cast(str, m.adapter)] for m in plan.adapted if m.fusion is not None)
        return None, None, Ss, context.stacked_A.get(plan.paths)

    def _with_target_adapters(
        self,
        plan: _Plan,
        x: Tensor,
        slot: Slot,
        call: Any,
        Ss: tuple[Tensor, ...],
        As: tuple[Tensor, ...],
        Bs: tuple[Tensor, ...],
    ) -> dict[nn.Module, Tensor]:
        """Return the frozen outputs of t + s rows (target and source), with adapters added to the t target rows."""
        target = plan.layers[0].target_rows(slot, x)
        outputs = {m.module: F.linear(x, *m.linear._parameters.values()) for m in plan.members}  # type: ignore[arg-type]
        add_adapters(call, x[:target], Ss, [y[:target] for y in outputs.values()], As, Bs)
        return outputs

    def _over_modules(
        self, plan: _JointProjections, x: Tensor, slot: Slot, p: float, As: tuple[Tensor, ...], Bs: tuple[Tensor, ...]
    ) -> dict[nn.Module, Tensor]:
        """Return the outputs if the frozen layers run outside the autograd node (quantised, trained or traced)."""
        adapted = plan.adapted
        context = slot.context if plan.fuses else None
        x_source, _, Ss, _ = _NO_SOURCE if context is None else self._source(plan, context)
        lead, flat = x.shape[:-1], plan.plain and x.dim() > 2
        if flat:  # a linear's output for a 2-d input is not a view, so adapters can add to it in place
            x = x.flatten(0, -2)
            x_source = None if x_source is None else x_source.flatten(0, -2)
            Ss = tuple(S.flatten(0, -2) for S in Ss)
        ys = [nn.Linear.forward(m.linear, x) if m.plain else m.linear(x) for m in adapted]  # type: ignore[arg-type]
        if x.requires_grad and not ys[0].requires_grad and torch.is_grad_enabled():
            raise_lost_gradient(adapted[0].path, adapted[0].linear)
        dtype = ys[0].dtype if x.dtype == torch.float32 and ys[0].dtype in (torch.float16, torch.bfloat16) else x.dtype
        fused = x_source is not None or bool(Ss)
        adapters = [
            (index, A.shape[0], float(member.layer.scaling[member.adapter]), member.fusion if fused else None)  # type: ignore[index]
            for index, (member, A) in enumerate(zip(adapted, As, strict=True))
        ]
        outputs = apply("auto", dtype, adapters, p, x, x_source, Ss, ys, As, Bs, ())
        return {member.module: y.unflatten(0, lead) if flat else y for member, y in zip(adapted, outputs, strict=True)}


def _checked_source(path: str, x_source: Tensor, x: Tensor) -> Tensor:
    """Return x_source on x's device. Raise ValueError if its number of positions or its width differs from x's."""
    if x_source.shape[:-1].numel() != x.shape[:-1].numel() or x_source.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{path}: the source's state has shape {tuple(x_source.shape)} and the input {tuple(x.shape)}; both need "
            "the same number of positions and the same width"
        )
    return x_source.to(x.device)


def _call(plan: _Plan, key: tuple[Any, ...], dtype: torch.dtype, p: float, device: torch.device) -> Any:
    """Return the constants of a call.

    ``key`` begins with the rank and scaling of each adapted member, and ends with two flags: whether x_source is given,
    and whether S is given.
    """
    adapters = tuple(
        (member.index, key[2 * i], float(key[2 * i + 1]), member.fusion if key[-1] or key[-2] else None)
        for i, member in enumerate(plan.adapted)
    )
    return call_of("auto", device, dtype, adapters, len(plan.members), p)


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return the modules that a projection's forward may call, and the projection itself."""
    if not isinstance(module, FlareLayer):
        return [module]
    parts = [module, module.base_layer]
    for name in module.active_here():
        parts += [module.lora_A[name], module.lora_B[name], module.lora_dropout[name]]
    return parts


def _fits(layer: FlareLayer, adapter: str) -> bool:
    """Return whether an adapter can take part in a site's call.

    It must not be a LoRA variant (such as DoRA). lora_A and lora_B must be plain linears without bias, lora_dropout
    nn.Dropout or nn.Identity, and the scaling a number. A fusion must act on each position separately, and on all
    output rows (not only on the query and value rows of a projection that computes query, key and value).
    """
    if adapter in layer.lora_variant or isinstance(layer.scaling[adapter], Tensor):
        return False
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    plain = type(A) is nn.Linear and type(B) is nn.Linear and A.bias is None and B.bias is None
    dropout = type(layer.lora_dropout[adapter]) in (nn.Dropout, nn.Identity)
    fusion = layer.flare_fusion.get(adapter)
    return plain and dropout and fusion not in EAGER_FUSIONS and (fusion is None or layer.flare_rows is None)
