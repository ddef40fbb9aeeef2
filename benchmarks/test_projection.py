"""What do the q and v projections of one block cost with a fusing adapter, forward and backward?

Most variants compute the frozen products and the adapters with fusion add_relu, and the gradients of x, A and B. All
variants except ``frozen`` are compared with the float64 oracle before they are timed; ``peft-bf16-dropout`` is compared
with its dropout off, and ``flare-joint-dropout`` with dropout 0.5. The variants are:

- ``frozen``: the frozen products alone, forward and dx into one buffer.
- ``peft-*``: the formula written in eager PyTorch with PEFT's lora.Linear layers, because PEFT has no second stream.
  PEFT's layers do the dropout, the scaling and the cast of x. A and B come from the inputs, which change from call to
  call, so that none is left in the L2 cache. (Whole PEFT layers are measured in test_block.py and
  test_training_step.py.) ``fp32-autocast`` has float32 adapters under bf16 autocast (PEFT's default); the other
  variants have bf16 adapters. ``dropout`` has lora_dropout 0.1, and ``compile`` runs under torch.compile.
- ``addmm-*``: plain PyTorch with addmm (this package's "torch" backend), each projection alone or both together.
- ``flare-*``: the backend that the package chooses on this device. ``separate`` calls fused_lora for each projection.
  ``joint`` calls fused_lora_qkv with the frozen weights. This call also computes the frozen products and their dx, as
  in a layer of a model. ``frozen-first`` and ``adapter-first`` force the order of products and adapters.
  ``adapter-only`` runs the adapters alone, on frozen outputs that were computed before. ``dropout`` and
  ``fp32-autocast`` have the same meaning as for ``peft-*``.

With nf4 weights, bitsandbytes computes the frozen products of every variant, and autograd computes their dx.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from dataclasses import replace
from typing import Any

import bytes_moved
import pytest
import shapes
import torch
from cases import Variant, Variants
from gate import WrongResult, exact, poisoned, require_correct
from projection_methods import (
    BF16,
    FUSION,
    SCALING,
    Frozen,
    Inputs,
    Method,
    Project,
    eager,
    float64_truth,
    forward_mode,
    gradients,
    joint,
    make_inputs,
    peft_layers,
    projection_names,
    separate,
    step,
    with_gradients,
)
from timing import Ceilings, Rotation, device_launches
from torch import Tensor

import flare_kernels
from flare.experiments.measure import count_flops, count_ops, peak_bytes, saved_bytes, transient_bytes
from flare_kernels import fused_lora_qkv, reference

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
    "bf16, add_relu, forward + backward (dx, dA, dB), q and v adapted (except in frozen), frozen products included "
    "(except in flare-adapter-only), adapters in float32 in *-fp32-autocast, dropout 0.1 in *-dropout, inputs rotated "
    "through twice the L2 cache"
)


def variants(shape: shapes.ProjectionShape, device: torch.device, ceilings: Ceilings) -> Variants:
    """Return all variants of a case. They share their inputs."""
    if shape.precision == "nf4":
        if importlib.util.find_spec("bitsandbytes") is None:
            return dict.fromkeys(VARIANTS, "bitsandbytes is not installed")
        if device.type != "cuda":
            return dict.fromkeys(VARIANTS, "nf4 weights are timed on a CUDA device only")
    torch._dynamo.reset()  # the shapes of earlier cases would count towards the recompilation limit
    torch.manual_seed(0)
    rotation = Rotation(lambda: make_inputs(shape, device), device)
    first = rotation.sets[0]
    frozen = Frozen.of(shape, first, device)
    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    plain = eager(peft_layers(shape, frozen, first, 0.0), frozen)
    dropping = eager(peft_layers(shape, frozen, first, 0.1), frozen)
    methods = {
        "peft-bf16": Method(plain),
        "peft-bf16-dropout": Method(dropping, dropout=0.1),
        "peft-fp32-autocast": Method(plain, torch.float32, autocast=True),
        "peft-bf16-compile": Method(torch.compile(plain, backend=compiler, dynamic=False, fullgraph=True)),
        "addmm-separate": Method(separate("torch", frozen)),
        "addmm-joint": Method(joint("torch", frozen)),
        "flare-separate": Method(separate("auto", frozen)),
        "flare-joint": Method(joint("auto", frozen)),
        "flare-frozen-first": Method(joint("auto", frozen), order="frozen_first"),
        "flare-adapter-first": Method(joint("auto", frozen), order="adapter_first"),
        "flare-joint-dropout": Method(
            joint("auto", frozen, 0.1), dropout=0.1, gated=joint("auto", frozen, 0.5), gated_p=0.5
        ),
        "flare-joint-fp32-autocast": Method(joint("auto", frozen), torch.float32, autocast=True),
    }
    backend = flare_kernels.select_backend(device, BF16)
    rows: dict[str, Variant | str] = {"frozen": _frozen_variant(rotation, frozen)}
    for name, method in methods.items():
        facts: dict[str, Any] = {"backend": backend if name.startswith("flare") else name.partition("-")[0]}
        if name == "peft-bf16-compile":
            facts["compiler"] = compiler
        if name.startswith(("flare-joint", *_ORDERS)) and not frozen.quantised:
            moved = bytes_moved.adapter_bytes(shape, accumulate_dx=True)
            facts |= {"adapter_floor_bytes": moved, "adapter_floor_s": moved / ceilings.copy_bytes_per_s}
        if name in _ORDERS:
            steps = bytes_moved.step_bytes(shape, method.order)
            facts |= {"order": method.order, "order_floor_bytes": sum(steps.values())}
            reads = bytes_moved.moved_reads(shape) if method.order == "adapter_first" else {}
            facts["moved_reads_bytes"] = sum(reads.values())
        rows[name] = _variant(name, method, methods["peft-bf16"], rotation, frozen, facts, device)
    moved = bytes_moved.adapter_bytes(shape, accumulate_dx=False)
    floor = {"floor_bytes": moved, "floor_s": moved / ceilings.copy_bytes_per_s, "backend": backend}
    rows["flare-adapter-only"] = _adapter_only(rotation, frozen, floor)
    return {name: rows[name] for name in VARIANTS}


def _variant(
    name: str,
    method: Method,
    plain: Method,
    rotation: Rotation,
    frozen: Frozen,
    facts: dict[str, Any],
    device: torch.device,
) -> Variant:
    sets = [with_gradients(t, method.adapters) for t in rotation.sets]
    turn = itertools.cycle(sets)

    def check() -> None:
        t = sets[0]
        if method.dropout and name.startswith("peft"):
            return _check_dropout(method, plain.project, frozen, rotation.sets[0])
        truth = float64_truth(rotation.sets[0], frozen, method.gated_p)
        no_peer = method.dropout or name.startswith("peft")
        peer = {} if no_peer else step(plain, with_gradients(rotation.sets[0], BF16))
        # Only outputs are compared element by element, because rounding changes gradients: it flips relu's derivative
        # where T is near zero.
        peer = {key: peer.get(key) if key in projection_names(t) else None for key in truth}
        torch.manual_seed(0)
        with poisoned() if "compile" not in name else contextlib.nullcontext():
            out = step(replace(method, project=method.gated or method.project), t)
        require_correct(out, truth, peer, dtype=BF16)
        return None

    def count() -> dict[str, Any]:
        if "compile" in name:
            return {}  # the hooks and modes that count would change the compiled code
        t = next(turn)
        weights = [tensor for key, tensor in t.items() if key.endswith((".W", ".A", ".B", ".b", ".G"))]
        with forward_mode(method, device):
            with saved_bytes(ignore=[weights]) as saved:
                out = method.project(t)
            del out
            transient = transient_bytes(lambda: method.project(t), device=device)
        with peak_bytes(device=device) as peak:
            step(method, t)
        with count_ops() as ops, count_flops() as flops:
            step(method, t)
        counters = {
            "saved_bytes": saved.total,
            "transient_bytes": transient,
            "peak_bytes": peak.above_start,
            "launches": device_launches(lambda: step(method, t), device) or ops.total,
        }
        return counters | ({"flops": flops.total} if facts["backend"] != "triton" else {})

    return Variant(lambda: step(method, next(turn)), check, count, facts)


def _check_dropout(method: Method, without_dropout: Project, frozen: Frozen, inputs: Inputs) -> None:
    """Check PEFT's layers without dropout, then check that dropout changes every result except k.

    k has no adapter. The oracle cannot reproduce the masks that PEFT draws.
    """
    t = with_gradients(inputs, method.adapters)
    off = step(Method(without_dropout, method.adapters), t)
    require_correct(off, float64_truth(inputs, frozen, 0.0), dtype=BF16)
    for name, result in step(method, t).items():
        if name != "k" and (not torch.isfinite(result).all() or torch.equal(result, off[name])):
            raise WrongResult(f"{name}: not finite, or nothing was dropped")


def _frozen_variant(rotation: Rotation, frozen: Frozen) -> Variant:
    turn = itertools.cycle([with_gradients(t, BF16) for t in rotation.sets])
    return Variant(lambda: frozen.step(next(turn)), lambda: None, facts={"backend": "frozen"})


def _adapter_only(rotation: Rotation, frozen: Frozen, facts: dict[str, Any]) -> Variant:
    """Return the variant of the adapters alone. They add to frozen outputs "Y", and dx has no frozen part."""
    sets = []
    for t in rotation.sets:
        with torch.no_grad():
            outputs = {f"{name}.Y": frozen(t, name) for name in projection_names(t)}
        sets.append(with_gradients(t, BF16) | outputs)
    turn = itertools.cycle(sets)

    def run(t: Inputs) -> dict[str, Tensor]:
        base = {name: t[f"{name}.Y"].detach() for name in projection_names(t) if name != "k"}
        adapters = {name: (t[f"{name}.A"], t[f"{name}.B"], SCALING) for name in base}
        out = fused_lora_qkv(t["x"], t["x_source"], base, adapters, fusion=FUSION)
        return {**out, **gradients(out, t)}

    def check() -> None:
        t = {key: value.clone() if key.endswith(".Y") else value for key, value in sets[0].items()}
        wide = with_gradients(exact(sets[0]), torch.float64)
        truth = {}
        for name in ("q", "v"):
            A, up = wide[f"{name}.A"], wide[f"{name}.B"]
            truth[name] = reference.fused_lora(
                wide["x"], wide["x_source"], wide[f"{name}.Y"], A, up, scaling=SCALING, fusion=FUSION
            )
        truth |= gradients(truth, wide)
        plain: dict[str, Tensor | None] = dict.fromkeys(truth)
        first = sets[0]
        # Outputs are compared element by element, because in a norm the frozen part would hide a wrong update.
        for name in ("q", "v"):
            A, up, Y = (first[f"{name}.{key}"] for key in ("A", "B", "Y"))
            plain[name] = reference.fused_lora(
                first["x"], first["x_source"], Y.clone(), A, up, scaling=SCALING, fusion=FUSION
            )
        with poisoned():
            out = run(t)
        require_correct({key: out[key] for key in truth}, truth, plain, dtype=BF16)

    return Variant(lambda: run(next(turn)), check, facts=facts)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", shapes.projections(shapes.grid()), ids=lambda s: s.case)
def test_projection(compare: Any, shape: shapes.ProjectionShape, variant: str, device: Any, ceilings: Ceilings) -> None:
    compare(shape, variant, lambda: variants(shape, device, ceilings), CONDITIONS)
