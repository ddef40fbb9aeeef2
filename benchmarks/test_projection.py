"""What do the q and v projections of one block cost with a fusing adapter, forward and backward?

Frozen product + adapter, fusion add_relu, gradients of x, A and B. Rows, each against the float64 oracle before it is
timed:

- ``frozen``: the products alone, forward and dx, into one buffer. What is above it is the adapter's.
- ``peft-*``: the formula as an eager user would write it over PEFT's lora.Linear layers, since PEFT has no second
  stream: dropout, scaling and input cast are the layers' own, the weights are passed in so that they can rotate (whole
  PEFT layers stand in test_block.py and test_training_step.py). bf16 adapters; with lora_dropout 0.1; float32 adapters
  under bf16 autocast (PEFT's default); bf16 adapters under torch.compile.
- ``addmm-*``: the hand-written addmm form (this package's "torch" backend), each projection alone or jointly.
- ``flare-*``: what the package picks on this device. ``joint`` is fused_lora_qkv with the frozen weights, which makes
  the frozen products and their dx, as a layer of a model does; ``frozen-first`` and ``adapter-first`` are the same with
  the order of product and adapter forced; ``adapter-only`` is the adapters' share alone, on frozen outputs that are
  there already.

With nf4 weights (bitsandbytes) the frozen product stays with its library, and no row owns its dx.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import bytes_moved
import peft
import pytest
import shapes
import torch
import torch.nn.functional as F
from cases import Variant, Variants
from gate import WrongResult, exact, poisoned, require_correct
from timing import Ceilings, Rotation, device_launches
from torch import Tensor, nn

import flare_kernels
from flare.experiments.measure import count_flops, count_ops, peak_bytes, saved_bytes, transient_bytes
from flare_kernels import fused_lora, fused_lora_qkv, launch_mode, reference
from flare_kernels.launch_mode import forcing, using

FUSION = "add_relu"
SCALING = 2.0
BF16 = torch.bfloat16
Inputs = dict[str, Tensor]
Project = Callable[[Inputs], dict[str, Tensor]]
VARIANTS = (
    "frozen",
    "peft-bf16",
    "peft-bf16-dropout",
    "peft-fp32-autocast",
    "peft-bf16-compile",
    "addmm-separate",
    "addmm-joint",
    "flare-separate",
    "flare-joint",
    "flare-frozen-first",
    "flare-adapter-first",
    "flare-joint-dropout",
    "flare-joint-fp32-autocast",
    "flare-adapter-only",
)
_ORDERS = ("flare-frozen-first", "flare-adapter-first")
CONDITIONS = (
    "bf16, add_relu, forward + backward (dx, dA, dB), q and v adapted, frozen products included, "
    "inputs rotated through twice the L2 cache"
)


@dataclass(frozen=True)
class Row:
    """What distinguishes a variant: how it projects, its adapters' dtype, dropout, autocast, the order that is forced.

    ``gated`` stands in for ``project`` in the comparison with the oracle, at ``gated_p``: p = 0.5, where 1 / (1 - p) is
    exact in bf16. At 0.1 the rounding of x / (1 - p) flips the sign of some T near zero, and relu's derivative with it.
    """

    project: Project
    adapters: torch.dtype = BF16
    dropout: float = 0.0
    autocast: bool = False
    order: str = ""
    gated: Project | None = None
    gated_p: float = 0.0


def make(shape: shapes.ProjectionShape, device: torch.device) -> Inputs:
    """Inputs and output gradients of one block; the adapters' values are representable in bf16, B is not zero."""
    d, n_v = shape.model.d, shape.model.n_v
    widths = {"q": shape.model.n_q, "v": n_v, **({"k": n_v} if shape.key else {})}

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device, dtype=BF16) * scale

    t = {"x": randn(shape.M, d), "x_source": randn(shape.M, d)}
    for name, n in widths.items():
        t[f"{name}.W"] = randn(n, d, scale=d**-0.5)
        t[f"{name}.G"] = randn(shape.M, n)
        if shape.model.bias:
            t[f"{name}.b"] = randn(n)
        if name != "k":
            t[f"{name}.A"] = randn(shape.r, d, scale=d**-0.5)
            t[f"{name}.B"] = randn(n, shape.r, scale=shape.r**-0.5)
    return t


def names_of(t: Inputs) -> list[str]:
    return [key.partition(".")[0] for key in t if key.endswith(".W")]


def prepared(t: Inputs, adapters: torch.dtype) -> Inputs:
    """The same inputs with adapters in a dtype, and gradients asked for where training asks for them."""
    own = dict(t)
    own["x"] = t["x"].detach().requires_grad_()
    for key in t:
        if key.endswith((".A", ".B")):
            own[key] = t[key].detach().to(adapters).requires_grad_()
    return own


def trained(t: Inputs) -> list[str]:
    return ["x", *(key for key in t if key.endswith((".A", ".B")))]


# --- the frozen products ----------------------------------------------------------------------------------------------


class Frozen:
    """The frozen linears of a case: bf16 weights out of the inputs, or nf4 weights that bitsandbytes holds."""

    def __init__(self, shape: shapes.ProjectionShape, t: Inputs, device: torch.device) -> None:
        self.layers: dict[str, nn.Module] = {}
        if shape.precision == "nf4":
            import bitsandbytes as bnb

            for name in names_of(t):
                W = t[f"{name}.W"]
                layer = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, compute_dtype=BF16, quant_type="nf4")
                layer.weight = bnb.nn.Params4bit(W.cpu(), requires_grad=False, quant_type="nf4")
                self.layers[name] = layer.to(device)

    @property
    def quantised(self) -> bool:
        return bool(self.layers)

    def __call__(self, t: Inputs, name: str, x: Tensor | None = None) -> Tensor:
        x = t["x"] if x is None else x
        layer = self.layers.get(name)
        return F.linear(x, t[f"{name}.W"], t.get(f"{name}.b")) if layer is None else layer(x)


# --- the variants -----------------------------------------------------------------------------------------------------


class _Pair(nn.Module):
    """Query and value linears, for PEFT to put its layers over."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.q, self.v = layers["q"], layers["v"]


def peft_layers(shape: shapes.ProjectionShape, frozen: Frozen, t: Inputs, p: float, device: torch.device) -> Any:
    """PEFT's own LoRA layers over the frozen linears; the adapters' weights are set at each call."""
    linears: dict[str, Any] = {}
    for name in ("q", "v"):
        W = t[f"{name}.W"]
        linear = nn.Linear(W.shape[1], W.shape[0], bias=f"{name}.b" in t, device="meta", dtype=BF16)
        linears[name] = frozen.layers.get(name, linear)
    pair: Any = _Pair(linears)
    pair.is_loaded_in_4bit = frozen.quantised
    config = peft.LoraConfig(r=shape.r, lora_alpha=SCALING * shape.r, lora_dropout=p, target_modules=["q", "v"])
    peft.inject_adapter_in_model(config, pair)
    return pair.train()


def eager(pair: Any, frozen: Frozen) -> Project:
    """The method over PEFT's layers: x cast to the adapters' dtype, every product and sum its own operation."""

    def project(t: Inputs) -> dict[str, Tensor]:
        out = {}
        for name in names_of(t):
            base = frozen(t, name)
            if name != "k":
                layer = getattr(pair, name)
                A, up = t[f"{name}.A"], t[f"{name}.B"]
                dropout = layer.lora_dropout["default"]
                T = F.linear(dropout(layer._cast_input_dtype(t["x"], A.dtype)), A)
                S = F.linear(dropout(layer._cast_input_dtype(t["x_source"], A.dtype)), A)
                H = reference.fuse(S, T, FUSION)
                base = (base + F.linear(H, up) * layer.scaling["default"]).to(base.dtype)
            out[name] = base
        return out

    return project


def separate(backend: str, frozen: Frozen) -> Project:
    """One node per projection."""

    def project(t: Inputs) -> dict[str, Tensor]:
        out = {}
        for name in names_of(t):
            y = frozen(t, name)
            if name != "k":
                A, up = t[f"{name}.A"], t[f"{name}.B"]
                y = fused_lora(t["x"], t["x_source"], y, A, up, scaling=SCALING, fusion=FUSION, backend=backend)
            out[name] = y
        return out

    return project


def joint(backend: str, frozen: Frozen, p: float = 0.0, *, own_products: bool = False) -> Project:
    """One node for all projections, which owns dx of the frozen products where their weights are plain.

    own_products: whether it makes these products too; "auto" always does, as in a model.
    """
    own_products = (own_products or backend == "auto") and not frozen.quantised

    def project(t: Inputs) -> dict[str, Tensor]:
        names = names_of(t)
        weights = None if frozen.quantised else {name: t[f"{name}.W"] for name in names}
        base = None
        if not own_products:
            with torch.no_grad() if weights is not None else contextlib.nullcontext():
                base = {name: frozen(t, name) for name in names}
        adapters = {name: (t[f"{name}.A"], t[f"{name}.B"], SCALING) for name in names if name != "k"}
        return fused_lora_qkv(
            t["x"],
            t["x_source"],
            base,
            adapters,
            fusion=FUSION,
            weights=weights,
            biases={name: t.get(f"{name}.b") for name in names} if own_products else None,
            dropout_p=p,
            training=True,
            backend=backend,
        )

    return project


def step(row: Row, t: Inputs) -> dict[str, Tensor]:
    """Forward and backward: outputs and gradients by name."""
    with _conditions(row, t["x"].device):
        out = row.project(t)
    asked = trained(t)
    with using(_mode(row.order)):
        grads = torch.autograd.grad(list(out.values()), [t[key] for key in asked], [t[f"{name}.G"] for name in out])
    return {**out, **{f"d{key}": grad for key, grad in zip(asked, grads, strict=True)}}


def frozen_step(frozen: Frozen, t: Inputs) -> None:
    """The frozen products and their dx, in one buffer where the weights are plain."""
    names = names_of(t)
    if frozen.quantised:
        out = [frozen(t, name) for name in names]
        torch.autograd.grad(out, [t["x"]], [t[f"{name}.G"] for name in names])
        return
    with torch.no_grad():
        for name in names:
            frozen(t, name)
        dx: Tensor | None = None
        for name in names:
            G, W = t[f"{name}.G"], t[f"{name}.W"]
            dx = G @ W if dx is None else dx.addmm_(G, W)


def truth_of(t: Inputs, frozen: Frozen, p: float) -> dict[str, Tensor]:
    """Outputs and gradients in float64; with dropout, by the masks of the seed that torch.manual_seed(0) gives."""
    wide = exact(t)
    if frozen.quantised:  # the weights that bitsandbytes made of them
        import bitsandbytes.functional as quantised

        for name, layer in frozen.layers.items():
            weight: Any = layer.weight
            wide[f"{name}.W"] = quantised.dequantize_4bit(weight.data, weight.quant_state).double()
    wide = prepared(wide, torch.float64)
    plain = Frozen.__new__(Frozen)
    plain.layers = {}
    torch.manual_seed(0)
    return step(Row(joint("reference", plain, p)), wide)


# --- the case ---------------------------------------------------------------------------------------------------------


def variants(shape: shapes.ProjectionShape, device: torch.device, ceilings: Ceilings) -> Variants:
    """Every row of a case, on inputs that all of them share."""
    if shape.precision == "nf4":
        if importlib.util.find_spec("bitsandbytes") is None:
            return dict.fromkeys(VARIANTS, "bitsandbytes is not installed")
        if device.type != "cuda":
            return dict.fromkeys(VARIANTS, "nf4 weights are timed on a CUDA device only")
    torch._dynamo.reset()  # a case of another shape would count towards its limit of recompilations
    torch.manual_seed(0)
    rotation = Rotation(lambda: make(shape, device), device)
    first = rotation.sets[0]
    frozen = Frozen(shape, first, device)
    pair = peft_layers(shape, frozen, first, 0.0, device)
    dropping = peft_layers(shape, frozen, first, 0.1, device)
    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    plain = eager(pair, frozen)
    rows = {
        "peft-bf16": Row(plain),
        "peft-bf16-dropout": Row(eager(dropping, frozen), dropout=0.1),
        "peft-fp32-autocast": Row(plain, torch.float32, autocast=True),
        "peft-bf16-compile": Row(torch.compile(plain, backend=compiler, dynamic=False, fullgraph=True)),
        "addmm-separate": Row(separate("torch", frozen)),
        "addmm-joint": Row(joint("torch", frozen)),
        "flare-separate": Row(separate("auto", frozen)),
        "flare-joint": Row(joint("auto", frozen)),
        "flare-frozen-first": Row(joint("auto", frozen), order="frozen_first"),
        "flare-adapter-first": Row(joint("auto", frozen), order="adapter_first"),
        "flare-joint-dropout": Row(
            joint("auto", frozen, 0.1), dropout=0.1, gated=joint("auto", frozen, 0.5), gated_p=0.5
        ),
        "flare-joint-fp32-autocast": Row(joint("auto", frozen), torch.float32, autocast=True),
    }
    picked = flare_kernels.select_backend(device, BF16)
    made: dict[str, Variant | str] = {"frozen": _frozen_variant(rotation, frozen)}
    for name, row in rows.items():
        facts: dict[str, Any] = {"backend": picked if name.startswith("flare") else name.partition("-")[0]}
        if name == "peft-bf16-compile":
            facts["compiler"] = compiler
        if name.startswith(("flare-joint", *_ORDERS)) and not frozen.quantised:
            moved = bytes_moved.adapter_bytes(shape, accumulate_dx=True)
            facts |= {"adapter_floor_bytes": moved, "adapter_floor_s": moved / ceilings.copy_bytes_per_s}
        if name in _ORDERS:
            steps = bytes_moved.step_bytes(shape, row.order)
            facts |= {"order": row.order, "order_floor_bytes": sum(steps.values())}
            reads = bytes_moved.moved_reads(shape) if row.order == "adapter_first" else {}
            facts["moved_reads_bytes"] = sum(reads.values())
        made[name] = _variant(name, row, rows["peft-bf16"], rotation, frozen, facts, device)
    moved = bytes_moved.adapter_bytes(shape, accumulate_dx=False)
    floor = {"floor_bytes": moved, "floor_s": moved / ceilings.copy_bytes_per_s, "backend": picked}
    made["flare-adapter-only"] = _adapter_only(rotation, frozen, floor)
    return {name: made[name] for name in VARIANTS}


def _variant(
    name: str,
    row: Row,
    plain: Row,
    rotation: Rotation,
    frozen: Frozen,
    facts: dict[str, Any],
    device: torch.device,
) -> Variant:
    own = [prepared(t, row.adapters) for t in rotation.sets]
    turn = iter(_forever(own))

    def check() -> None:
        t = own[0]
        if row.dropout and name.startswith("peft"):
            return _check_dropout(row, plain.project, frozen, rotation.sets[0])
        truth = truth_of(rotation.sets[0], frozen, row.gated_p)
        peer = {} if row.dropout or name.startswith("peft") else step(plain, prepared(rotation.sets[0], BF16))
        # outputs element by element; gradients by norm, since one T at zero flips relu's derivative for a whole row
        peer = {key: peer.get(key) if key in names_of(t) else None for key in truth}
        torch.manual_seed(0)
        with poisoned() if "compile" not in name else contextlib.nullcontext():
            out = step(replace(row, project=row.gated or row.project), t)
        require_correct(out, truth, peer, dtype=BF16)
        return None

    def count() -> dict[str, Any]:
        if "compile" in name:
            return {}  # the modes and hooks that count would change what is compiled
        t = next(turn)
        weights = [tensor for key, tensor in t.items() if key.endswith((".W", ".A", ".B", ".b", ".G"))]
        with _conditions(row, device):
            with saved_bytes(ignore=[weights]) as saved:
                kept = row.project(t)
            del kept
            transient = transient_bytes(lambda: row.project(t), device=device)
        with peak_bytes(device=device) as peak:
            step(row, t)
        with count_ops() as launched, count_flops() as flops:
            step(row, t)
        found = {
            "saved_bytes": saved.total,
            "transient_bytes": transient,
            "peak_bytes": peak.above_start,
            "launches": device_launches(lambda: step(row, t), device) or launched.total,
        }
        return found | ({"flops": flops.total} if facts["backend"] != "triton" else {})

    return Variant(lambda: step(row, next(turn)), check, count, facts)


def _check_dropout(row: Row, undropped: Project, frozen: Frozen, inputs: Inputs) -> None:
    """PEFT draws masks of its own, which the oracle cannot know: its layers are right with dropout off, and dropout,
    once on, changes every result.
    """
    t = prepared(inputs, row.adapters)
    off = step(Row(undropped, row.adapters), t)
    require_correct(off, truth_of(inputs, frozen, 0.0), dtype=BF16)
    for name, result in step(row, t).items():
        if name != "k" and (not torch.isfinite(result).all() or torch.equal(result, off[name])):
            raise WrongResult(f"{name}: not finite, or nothing was dropped")


def _frozen_variant(rotation: Rotation, frozen: Frozen) -> Variant:
    own = [prepared(t, BF16) for t in rotation.sets]
    turn = iter(_forever(own))
    return Variant(lambda: frozen_step(frozen, next(turn)), lambda: None, facts={"backend": "frozen"})


def _adapter_only(rotation: Rotation, frozen: Frozen, facts: dict[str, Any]) -> Variant:
    """The joint adapters alone: base outputs that are there already are accumulated into, dx is the adapters' share."""
    own = []
    for t in rotation.sets:
        made = prepared(t, BF16)
        with torch.no_grad():
            made |= {f"{name}.Y": frozen(t, name) for name in names_of(t)}
        own.append(made)
    turn = iter(_forever(own))

    def run(t: Inputs) -> dict[str, Tensor]:
        base = {name: t[f"{name}.Y"].detach() for name in names_of(t) if name != "k"}
        adapters = {name: (t[f"{name}.A"], t[f"{name}.B"], SCALING) for name in base}
        out = fused_lora_qkv(t["x"], t["x_source"], base, adapters, fusion=FUSION)
        asked = trained(t)
        grads = torch.autograd.grad(list(out.values()), [t[key] for key in asked], [t[f"{name}.G"] for name in out])
        return {**out, **{f"d{key}": grad for key, grad in zip(asked, grads, strict=True)}}

    def check() -> None:
        t = {key: value.clone() if key.endswith(".Y") else value for key, value in own[0].items()}
        wide = prepared(exact(own[0]), torch.float64)
        truth = {}
        for name in ("q", "v"):
            A, up = wide[f"{name}.A"], wide[f"{name}.B"]
            truth[name] = reference.fused_lora(
                wide["x"], wide["x_source"], wide[f"{name}.Y"], A, up, scaling=SCALING, fusion=FUSION
            )
        asked = trained(wide)
        grads = torch.autograd.grad(
            list(truth.values()), [wide[key] for key in asked], [wide[f"{name}.G"] for name in truth]
        )
        truth |= {f"d{key}": grad for key, grad in zip(asked, grads, strict=True)}
        plain: dict[str, Tensor | None] = dict.fromkeys(truth)
        for name in ("q", "v"):  # outputs element by element: the frozen part would hide a wrong share
            A, up = own[0][f"{name}.A"].to(BF16), own[0][f"{name}.B"].to(BF16)
            plain[name] = reference.fused_lora(
                own[0]["x"], own[0]["x_source"], own[0][f"{name}.Y"].clone(), A, up, scaling=SCALING, fusion=FUSION
            )
        with poisoned():
            out = run(t)
        require_correct({key: out[key] for key in truth}, truth, plain, dtype=BF16)

    return Variant(lambda: run(next(turn)), check, facts=facts)


def _forever(sets: list[Inputs]) -> Any:
    while True:
        yield from sets


@contextlib.contextmanager
def _conditions(row: Row, device: torch.device) -> Any:
    """Autocast and order of a row's forward."""
    with torch.autocast(device.type, BF16) if row.autocast else contextlib.nullcontext(), using(_mode(row.order)):
        yield


@functools.cache
def _mode(order: str) -> launch_mode.Mode:
    """The mode in which an order is forced, made once, so that its plans are kept from call to call."""
    with forcing(form=order or None):
        return launch_mode.current


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", shapes.projections(shapes.grid()), ids=lambda s: s.case)
def test_projection(compare: Any, shape: shapes.ProjectionShape, variant: str, device: Any, ceilings: Ceilings) -> None:
    compare(shape, variant, lambda: variants(shape, device, ceilings), CONDITIONS)
