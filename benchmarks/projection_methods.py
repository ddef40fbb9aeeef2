"""Compute the q and v projections of one block with a fusing adapter in several ways, and in float64 as a reference.

A method computes the output of each projection from the inputs of a case (one shape). :func:`step` adds the backward
pass. Inputs, with M tokens, input width d, output width n and rank r: x, x_source (M, d); per projection the weight
W (n, d), the bias b (n), the output gradient G (M, n), and for adapted projections A (r, d) and B (n, r).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import shapes
import torch
import torch.nn.functional as F
from gate import exact
from torch import Tensor, nn

from flare_kernels import fused_lora, fused_lora_qkv, launch_mode, reference
from flare_kernels.launch_mode import forcing, using

FUSION = "add_relu"
SCALING = 2.0
BF16 = torch.bfloat16
Inputs = dict[str, Tensor]
Project = Callable[[Inputs], dict[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A way to compute the projections, and its settings.

    Attributes:
        project: computes the output of each projection.
        adapters: dtype of A and B.
        dropout: lora_dropout of ``project``.
        autocast: whether the forward pass runs under bf16 autocast.
        order: the forced order of frozen products and adapters. Empty: the package chooses it.
        gated: replaces ``project`` in the comparison with the float64 result (gate.py). None: ``project`` is compared.
        gated_p: lora_dropout of ``gated``. Use 0 or 0.5, because 1 / (1 - p) is then exact in bf16. With 0.1, rounding
            x / (1 - p) flips the sign of some elements of T near zero, and thereby the derivative of relu.
    """

    project: Project
    adapters: torch.dtype = BF16
    dropout: float = 0.0
    autocast: bool = False
    order: str = ""
    gated: Project | None = None
    gated_p: float = 0.0


# --- inputs -----------------------------------------------------------------------------------------------------------


def make_inputs(shape: shapes.ProjectionShape, device: torch.device) -> Inputs:
    """Return random inputs and output gradients for the projections of one block. B is random too."""
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


def projection_names(t: Inputs) -> list[str]:
    """Return the names of the projections: "q", "v", and "k" if the frozen key is included."""
    return [key.partition(".")[0] for key in t if key.endswith(".W")]


def trained_names(t: Inputs) -> list[str]:
    """Return the names of the inputs that get a gradient."""
    return ["x", *(key for key in t if key.endswith((".A", ".B")))]


def with_gradients(t: Inputs, adapters: torch.dtype) -> Inputs:
    """Return the inputs with A and B cast to a dtype, and with x, A and B requiring gradients."""
    leaves = dict(t)
    leaves["x"] = t["x"].detach().requires_grad_()
    for key in t:
        if key.endswith((".A", ".B")):
            leaves[key] = t[key].detach().to(adapters).requires_grad_()
    return leaves


# --- frozen products --------------------------------------------------------------------------------------------------


class Frozen:
    """Frozen linears of a case. They have the bf16 weights of the inputs, or nf4 weights in bitsandbytes' layers.

    Attributes:
        layers: bitsandbytes' layers by the projection's name; empty for bf16 weights.
    """

    def __init__(self, layers: dict[str, nn.Module] | None = None) -> None:
        self.layers = layers or {}

    @classmethod
    def of(cls, shape: shapes.ProjectionShape, t: Inputs, device: torch.device) -> Frozen:
        """Return the frozen linears of a case, quantised if its precision is nf4."""
        if shape.precision != "nf4":
            return cls()
        import bitsandbytes as bnb

        layers: dict[str, nn.Module] = {}
        for name in projection_names(t):
            W = t[f"{name}.W"]
            layer = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, compute_dtype=BF16, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(W.cpu(), requires_grad=False, quant_type="nf4")
            layers[name] = layer.to(device)
        return cls(layers)

    @property
    def quantised(self) -> bool:
        return bool(self.layers)

    def __call__(self, t: Inputs, name: str) -> Tensor:
        """Return the frozen output of one projection."""
        layer = self.layers.get(name)
        return F.linear(t["x"], t[f"{name}.W"], t.get(f"{name}.b")) if layer is None else layer(t["x"])

    def step(self, t: Inputs) -> None:
        """Compute the frozen products and their dx. With bf16 weights, dx is accumulated in one buffer."""
        names = projection_names(t)
        if self.quantised:
            out = [self(t, name) for name in names]
            torch.autograd.grad(out, [t["x"]], [t[f"{name}.G"] for name in names])
            return
        with torch.no_grad():
            for name in names:
                self(t, name)
            dx: Tensor | None = None
            for name in names:
                G, W = t[f"{name}.G"], t[f"{name}.W"]
                dx = G @ W if dx is None else dx.addmm_(G, W)


# --- methods ----------------------------------------------------------------------------------------------------------


class _Pair(nn.Module):
    """Query and value linears that PEFT wraps with LoRA layers."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.q, self.v = layers["q"], layers["v"]


def peft_layers(shape: shapes.ProjectionShape, frozen: Frozen, t: Inputs, p: float) -> Any:
    """Return PEFT's LoRA layers around the frozen linears.

    Their weights A and B are not used, because :func:`eager` takes A and B from the inputs.
    """
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
    """Return the function `Method.project` on PEFT's layers.

    It casts x and x_source to the adapters' dtype, and every product and sum is one operation.
    """

    def project(t: Inputs) -> dict[str, Tensor]:
        out = {}
        for name in projection_names(t):
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
    """Return the function `Method.project` with one autograd node per projection."""

    def project(t: Inputs) -> dict[str, Tensor]:
        out = {}
        for name in projection_names(t):
            y = frozen(t, name)
            if name != "k":
                A, up = t[f"{name}.A"], t[f"{name}.B"]
                y = fused_lora(t["x"], t["x_source"], y, A, up, scaling=SCALING, fusion=FUSION, backend=backend)
            out[name] = y
        return out

    return project


def joint(backend: str, frozen: Frozen, p: float = 0.0) -> Project:
    """Return the function `Method.project` with one autograd node for all projections.

    With bf16 weights, the node also computes dx of the frozen products. With bf16 weights and backend "auto", it
    computes the frozen products too, as in a layer of a model.
    """
    owns_products = backend == "auto" and not frozen.quantised

    def project(t: Inputs) -> dict[str, Tensor]:
        names = projection_names(t)
        weights = None if frozen.quantised else {name: t[f"{name}.W"] for name in names}
        base = None
        if not owns_products:
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
            biases={name: t.get(f"{name}.b") for name in names} if owns_products else None,
            dropout_p=p,
            training=True,
            backend=backend,
        )

    return project


# --- forward and backward ---------------------------------------------------------------------------------------------


def step(method: Method, t: Inputs) -> dict[str, Tensor]:
    """Run forward and backward. Return the outputs and the gradients by name, such as "q" and "dq.A"."""
    with forward_mode(method, t["x"].device):
        out = method.project(t)
    with using(_launch_mode(method.order)):
        return {**out, **gradients(out, t)}


def gradients(out: dict[str, Tensor], t: Inputs) -> dict[str, Tensor]:
    """Return the gradients of the trained inputs, each under its name with a "d" in front."""
    trained = trained_names(t)
    grads = torch.autograd.grad(list(out.values()), [t[key] for key in trained], [t[f"{name}.G"] for name in out])
    return {f"d{key}": grad for key, grad in zip(trained, grads, strict=True)}


def float64_truth(t: Inputs, frozen: Frozen, p: float) -> dict[str, Tensor]:
    """Return outputs and gradients in float64. Dropout uses the masks drawn after torch.manual_seed(0)."""
    wide = exact(t)
    if frozen.quantised:
        import bitsandbytes.functional as quantised

        for name, layer in frozen.layers.items():
            weight: Any = layer.weight
            wide[f"{name}.W"] = quantised.dequantize_4bit(weight.data, weight.quant_state).double()
    torch.manual_seed(0)
    return step(Method(joint("reference", Frozen(), p)), with_gradients(wide, torch.float64))


@contextlib.contextmanager
def forward_mode(method: Method, device: torch.device) -> Any:
    """Enter the autocast and the launch order of a method's forward pass."""
    autocast = torch.autocast(device.type, BF16) if method.autocast else contextlib.nullcontext()
    with autocast, using(_launch_mode(method.order)):
        yield


@functools.cache
def _launch_mode(order: str) -> launch_mode.Mode:
    """Return the mode that forces an order ("": no order). It is cached, so that later calls reuse its launch plans."""
    with forcing(form=order or None):
        return launch_mode.current
