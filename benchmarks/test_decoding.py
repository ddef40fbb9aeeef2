"""What do the adapters cost during generation?

``decode`` measures launches and device seconds of the adapters of one block's q and v on M new tokens. Only the forward
pass runs, and the source's bottleneck S is an input. On a GPU, a CUDA graph of the call is also measured; its replay
must be bitwise equal to the call.

``generate`` measures tokens per second and block executions of whole greedy `generate` calls on models of full width
(small models in the grid ``tiny``).
The source has a separate pass (with source_layer_offset 0 or 1) or shares one pass with the target (offset 0). To add a
way to generate, add it to PROVIDERS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import shapes
import torch
from cases import Variant, Variants
from gate import WrongResult, exact, poisoned, require_correct
from models import FUSION, Models, base_model, blocks_of, quiet
from steps import dtype_of
from timing import Effort, Rotation, device_launches
from torch import Tensor

from flare.experiments.measure import count_calls, count_ops, peak_bytes, transient_bytes
from flare_kernels import fused_lora_qkv, reference

BF16 = torch.bfloat16
SCALING = 2.0
Inputs = dict[str, Tensor]

# --- the adapters alone -----------------------------------------------------------------------------------------------

DECODE_VARIANTS = ("eager", "addmm", "flare", "flare-graph")
DECODE_CONDITIONS = "bf16, add_relu, q and v adapters of one block, forward, S given, no frozen product"


def decode_inputs(shape: shapes.DecodeShape, device: torch.device) -> Inputs:
    """Return x (M, d), and per projection the frozen output y (M, n), S (M, r), A (r, d), B (n, r)."""
    d = shape.model.d

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device, dtype=BF16) * scale

    t = {"x": randn(shape.M, d)}
    for name, n in (("q", shape.model.n_q), ("v", shape.model.n_v)):
        t[f"{name}.y"] = randn(shape.M, n)
        t[f"{name}.S"] = randn(shape.M, shape.r)
        t[f"{name}.A"] = randn(shape.r, d, scale=d**-0.5)
        t[f"{name}.B"] = randn(n, shape.r, scale=shape.r**-0.5)
    return t


def decode_moved(shape: shapes.DecodeShape) -> int:
    """Return the least bytes that must be moved: x, S, A and B are read; y of q and of v is read and written."""
    d, n = shape.model.d, shape.model.n_q + shape.model.n_v
    return 2 * (shape.M * d + 2 * shape.M * shape.r + 2 * shape.r * d + n * shape.r + 2 * shape.M * n)


def decode_eager(t: Inputs) -> dict[str, Tensor]:
    """Compute the formula with one PyTorch operation at a time."""
    return {
        name: reference.fused_lora(
            t["x"],
            None,
            t[f"{name}.y"],
            t[f"{name}.A"],
            t[f"{name}.B"],
            scaling=SCALING,
            fusion=FUSION,
            source_bottleneck=t[f"{name}.S"],
        )
        for name in ("q", "v")
    }


def decode_fused(backend: str) -> Callable[[Inputs], dict[str, Tensor]]:
    """Return a function that calls `fused_lora_qkv` with a backend. The call adds to y in place."""

    def run(t: Inputs) -> dict[str, Tensor]:
        return fused_lora_qkv(
            t["x"],
            None,
            {name: t[f"{name}.y"] for name in ("q", "v")},
            {name: (t[f"{name}.A"], t[f"{name}.B"], SCALING) for name in ("q", "v")},
            fusion=FUSION,
            source_bottleneck={name: t[f"{name}.S"] for name in ("q", "v")},
            backend=backend,
        )

    return run


def decode_variants(shape: shapes.DecodeShape, device: torch.device, ceilings: Any) -> Variants:
    """Return the variants: eager formula, "torch" backend (addmm), backend "auto", and "auto" as a CUDA graph."""
    rotation = Rotation(lambda: decode_inputs(shape, device), device)
    moved = decode_moved(shape)
    floor = {"floor_bytes": moved, "floor_s": moved / ceilings.copy_bytes_per_s}

    def variant(run: Callable[[Inputs], dict[str, Tensor]]) -> Variant:
        def check() -> None:
            t = decode_inputs(shape, device)
            truth = decode_eager(exact(t))
            plain = decode_eager(t)
            with torch.no_grad(), poisoned():
                require_correct(run(t), truth, plain, dtype=BF16)

        def call() -> None:
            with torch.no_grad():
                run(rotation.next())

        def count() -> dict[str, Any]:
            with count_ops() as launched:
                call()
            return {
                "launches": device_launches(call, device) or launched.total,
                "transient_bytes": transient_bytes(lambda: run(rotation.next()), device=device),
            }

        return Variant(call, check, count, dict(floor))

    rows: dict[str, Variant | str] = {
        "eager": variant(decode_eager),
        "addmm": variant(decode_fused("torch")),
        "flare": variant(decode_fused("auto")),
    }
    rows["flare-graph"] = "CUDA graphs need a CUDA device" if device.type != "cuda" else _graphed(rotation, floor)
    return rows


def _graphed(rotation: Rotation, floor: dict[str, Any]) -> Variant:
    """Return a variant with one CUDA graph per set of inputs. A replay is compared bitwise with the call."""
    run = decode_fused("auto")
    sets = rotation.sets
    outputs = ("q.y", "v.y")
    graphs: list[Any] = []

    def capture() -> None:
        for t in sets:
            run({k: v.clone() for k, v in t.items()})  # compiles the kernels before the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(t)
            graphs.append(graph)

    def check() -> None:
        with torch.no_grad():
            capture()
            t = sets[0]
            before = {name: t[name].clone() for name in outputs}
            graphs[0].replay()
            torch.cuda.synchronize()
            replayed = {name: t[name].clone() for name in outputs}
            for name in outputs:
                t[name].copy_(before[name])
            run(t)
        for name in outputs:
            if not torch.equal(t[name], replayed[name]) or torch.equal(replayed[name], before[name]):
                raise WrongResult(
                    f"{name}: the graph's replay differs from the call it captured, or it changed nothing"
                )

    turn = itertools.count()
    return Variant(lambda: graphs[next(turn) % len(graphs)].replay(), check, facts=dict(floor))


@pytest.mark.parametrize("variant", DECODE_VARIANTS)
@pytest.mark.parametrize("shape", shapes.decoding(shapes.grid()), ids=lambda s: s.case)
def test_decode_adapters(compare: Any, shape: shapes.DecodeShape, variant: str, device: Any, ceilings: Any) -> None:
    compare(shape, variant, lambda: decode_variants(shape, device, ceilings), DECODE_CONDITIONS)


# --- generate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """A way to generate.

    Attributes:
        name: name of the variant.
        model: returns the model that generates.
        source_pass: argument of `generate`: "separate" or "shared". None: there is no source.
        adapters: whether the adapters are enabled.
        offset: source_layer_offset of the model.
    """

    name: str
    model: Callable[[Models], Any]
    source_pass: str | None = None
    adapters: bool = True
    offset: int = 1

    def generate(self, model: Any, batch: Inputs, options: dict[str, Any]) -> Tensor:
        """Return prompt and new tokens (B, m + new)."""
        if self.source_pass is not None:
            return model.generate(**batch, **options, source_pass=self.source_pass)  # type: ignore[no-any-return]
        with nullcontext() if self.adapters else model.disable_adapter():
            return model.generate(input_ids=batch["input_ids"], **options)  # type: ignore[no-any-return]


PROVIDERS = (
    Provider("no-adapters", lambda models: models.stock, adapters=False),
    Provider("peft-lora", lambda models: models.stock),
    Provider("lora", lambda models: models.lora),
    Provider("flare", lambda models: models.flare, "separate"),
    Provider("flare-offset0", lambda models: models.with_offset(0), "separate", offset=0),
    Provider("flare-shared", lambda models: models.with_offset(0), "shared", offset=0),
)
GENERATE_CONDITIONS = "greedy, key-value cache, random weights, full rows, prompt included in the time"


def generate_variants(shape: shapes.GenerateShape, device: torch.device) -> Variants:
    """Return the variants of all providers on one set of weights.

    If generating with a source raises ValueError, the provider is skipped, and the error's message is the reason.
    """
    dtype = dtype_of(device)
    with quiet():
        base = base_model(shape.model, shape.depth, shape.m + shape.new, device, dtype)
        base.generation_config.pad_token_id = 0
        models = Models.of(base, shape.model.family, shape.r, dtype)
    size = (shape.B, shape.m)
    batch = {
        k: torch.randint(5, shape.model.vocabulary, size, device=device) for k in ("input_ids", "source_input_ids")
    }
    options = {"max_new_tokens": shape.new, "min_new_tokens": shape.new, "do_sample": False}

    def variant(provider: Provider) -> Variant | str:
        with quiet():
            model = provider.model(models).eval()

        def call() -> Tensor:
            with torch.no_grad(), quiet():
                return provider.generate(model, batch, options)

        try:
            call()
        except ValueError as error:
            if provider.source_pass is None:
                raise
            return str(error)

        def check() -> None:
            ids = call()
            if ids.shape != (shape.B, shape.m + shape.new) or not torch.equal(ids[:, : shape.m], batch["input_ids"]):
                raise WrongResult(f"the result has shape {tuple(ids.shape)}, or does not begin with the prompt")
            _require_next_token(provider, models, model, batch, ids[:, shape.m])

        def count() -> dict[str, Any]:
            with count_ops() as ops:
                call()
            with peak_bytes(device=device) as peak, count_calls(blocks_of(model)) as blocks:
                call()
            return {
                "launches": device_launches(call, device) or ops.total,
                "block_executions": blocks.total,
                "peak_bytes_above_start": peak.above_start,
            }

        facts = {"target_tokens": shape.B * shape.new, "depth": shape.depth, "dtype": str(dtype).removeprefix("torch.")}
        facts |= {} if provider.source_pass is None else {"source_layer_offset": provider.offset}
        return Variant(call, check, count, facts)

    return {provider.name: variant(provider) for provider in PROVIDERS}


def _require_next_token(provider: Provider, models: Models, model: Any, batch: Inputs, token: Tensor) -> None:
    """Check that the first new token has the largest logit of a forward pass on the prompt, up to rounding."""
    with torch.no_grad(), quiet():
        if provider.source_pass is not None:
            logits = model(**batch).logits[:, -1]
        elif not provider.adapters:
            with models.stock.disable_adapter():
                logits = models.stock(input_ids=batch["input_ids"]).logits[:, -1]
        else:
            logits = models.stock(input_ids=batch["input_ids"]).logits[:, -1]
    best, chosen = logits.amax(-1), logits.gather(-1, token[:, None])[:, 0]
    slack = 8 * torch.finfo(logits.dtype).eps * logits.abs().amax(-1)
    if not bool((best - chosen <= slack).all()):
        raise WrongResult("the first new token does not have the largest logit")


@pytest.mark.parametrize("variant", [provider.name for provider in PROVIDERS])
@pytest.mark.parametrize("shape", shapes.generation(shapes.grid()), ids=lambda s: s.case)
def test_generate(compare: Any, shape: shapes.GenerateShape, variant: str, device: Any) -> None:
    how = Effort(5.0, 3, 10, 1) if device.type == "cuda" else Effort(0.5, 3, 5, 1)
    build = lambda: generate_variants(shape, device)  # noqa: E731
    compare(shape, variant, build, GENERATE_CONDITIONS, queue_ahead=False, how=how)
