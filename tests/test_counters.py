"""Tests of what a step and an adapter cost. Arithmetic, bytes and launches are counted and compared with formulas.

Nothing is timed, so a change that makes the package do more work or use more memory fails here without a GPU.
Shape letters: B rows, m tokens a row, M = B m, d width, f inner width of a block, L blocks, r rank, n output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

import flare
from flare.experiments.measure import count_calls, count_flops, count_ops, saved_bytes, transient_bytes
from flare_kernels import fused_lora, fused_lora_qkv, reference
from flare_kernels.launch_mode import recording

B, m, d, f, L, r, CLASSES = 3, 16, 32, 48, 3, 4, 3
M = B * m


# --- the counters themselves ------------------------------------------------------------------------------------------


def test_flops_of_products_in_place_and_out_of_place() -> None:
    a, b, c = torch.randn(4, 5), torch.randn(5, 6), torch.randn(4, 6)
    with count_flops() as flops:
        a @ b
        torch.addmm(c, a, b)
        c.addmm_(a, b)
        c * c
    assert flops.total == 3 * 2 * 4 * 5 * 6


def test_flops_of_attention_do_not_depend_on_its_implementation() -> None:
    q = torch.randn(2, 4, 16, 8)
    with count_flops() as fused:
        F.scaled_dot_product_attention(q, q, q)
    with count_flops() as eager:
        torch.softmax(q @ q.transpose(-1, -2), -1) @ q
    assert fused.total == eager.total == 2 * (2 * 2 * 4 * 16 * 16 * 8)


def test_only_ops_that_compute_are_counted() -> None:
    x = torch.randn(4, 6)
    with count_ops() as ops:
        x.view(6, 4).t()[1:].detach()
        torch.empty(3)
        torch.empty(0, 2) + 1
        (x + 1).mul_(2).sum()
    assert ops.ops == ["add", "mul_", "sum"]


def test_ops_of_a_backward_pass_are_seen() -> None:
    x = torch.randn(4, requires_grad=True)
    y = x.exp().sum()
    with count_ops() as ops:
        y.backward()
    assert "mul" in ops.ops


def test_transient_bytes_leave_out_what_stays() -> None:
    def call() -> Tensor:
        a = torch.empty(256)
        b = torch.empty(512)
        return a + b[:256]

    # while the sum is computed, a, b and the result are in memory; the result stays and is not counted
    assert transient_bytes(call) == 4 * (256 + 512)


def test_calls_are_counted_with_a_checkpoints_recompute() -> None:
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(2, 4, requires_grad=True)
    with count_calls([layer]) as calls:
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert calls.total == 2
    layer(x)
    assert calls.total == 2, "calls after the with statement are not counted"


# --- a whole step -----------------------------------------------------------------------------------------------------


def make(fusion: str | None) -> Any:
    size = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": L, "num_labels": CLASSES}
    model = flare.fast_lora(tiny.model("xlmr", **size), fusion=fusion, r=r, lora_alpha=2 * r)
    model.get_base_model().set_attn_implementation("eager")
    tiny.randomize_lora(model)
    return model


def batch(width: int, source: bool) -> dict[str, Tensor]:
    names = ("input_ids", "source_input_ids") if source else ("input_ids",)
    ids = {name: torch.randint(2, tiny.VOCAB, (B, width)) for name in names}
    return {**ids, "labels": torch.randint(0, CLASSES, (B,))}


def block_forward(width: int) -> int:
    """Return the FLOPs of a frozen block on B rows: four (d, d) linears, two (d, f) linears, attention."""
    return 2 * B * width * (4 * d * d + 2 * d * f) + 4 * B * width**2 * d


def lora_step(width: int) -> int:
    """Return the FLOPs of a plain LoRA step: query and value have adapters, and a head on one position is trained."""
    tokens = B * width
    head = 3 * 2 * B * (d * d + d * CLASSES)  # forward, weight and input gradient
    frozen = 3 * L * block_forward(width) - L * 2 * tokens * (4 * d * d + 2 * d * f)  # no gradient of frozen weights
    adapter = 2 * tokens * r * (3 * d + 3 * d)  # products with A: T, dA, dx; products with B: phi B^T, dphi, dB
    first = 2 * tokens * 3 * d * d + 2 * 2 * tokens * r * d  # the first block needs no gradient of its input or key
    first += 2 * B * width**2 * d
    return head + frozen + 2 * L * adapter - first


def flare_step(width: int) -> int:
    """Return the FLOPs of plain LoRA, the source's forward pass, and two products per adapter.

    These products compute S and the source's part of dA.
    """
    return lora_step(width) + L * block_forward(width) + 2 * L * 2 * (2 * B * width * r * d)


def warm_step(width: int) -> int:
    """Return the FLOPs of a FLARE step with all source states in a cache, so without the source's forward pass."""
    return flare_step(width) - L * block_forward(width)


# method -> fusion, tokens of a text, whether a source is given, formula of the FLOPs, and block executions in a step
STEPS: dict[str, tuple[str | None, int, bool, Callable[[int], int], int]] = {
    "lora": (None, m, False, lora_step, L),
    "flare": ("add_relu", m, True, flare_step, 2 * L),
    "flare, warm cache": ("add_relu", m, True, warm_step, L),
    "input-fusion": (None, 2 * m, False, lora_step, L),
}


@pytest.mark.parametrize("method", STEPS)
def test_a_step_does_the_arithmetic_of_the_method_and_no_more(method: str) -> None:
    fusion, width, source, theory, executions = STEPS[method]
    model, inputs = make(fusion), batch(width, source)
    if method.endswith("warm cache"):
        model.set_source_cache(flare.SourceStateCache(1 << 20))
        model(**inputs)
    blocks = tiny.block_list(model.get_base_model())
    with count_calls(blocks) as calls, count_flops() as flops:
        model(**inputs).loss.backward()
    assert calls.total == executions
    assert flops.total == theory(width)


def test_the_source_pass_ends_after_the_last_state_that_is_read() -> None:
    """With the release's offset (0), the last block's output is not read, so the last block does not run."""
    model = flare.fast_lora(tiny.model("xlmr"), r=r, source_layer_offset=0)
    with count_calls(tiny.block_list(model.get_base_model())) as calls:
        model(**batch(m, source=True))
    assert calls.total == 2 * tiny.LAYERS - 1


def test_flare_does_less_than_input_level_fusion() -> None:
    """In the frozen model, FLARE takes 3/4 of the FLOPs of input-level fusion, and 2/4 with cached states.

    FLARE runs a forward pass of the source, and a forward and a backward pass of the target, over m tokens each.
    Input-level fusion runs a forward and a backward pass over 2m tokens. Adapters, head and attention change the ratios
    a little.
    """
    assert flare_step(512) < 0.76 * lora_step(2 * 512)
    assert warm_step(512) < 0.55 * lora_step(2 * 512)


# --- one adapter ------------------------------------------------------------------------------------------------------

TOKENS, WIDTH, RANK = 512, 256, 8
BF16 = 2


def tensors(adapter_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return x, x_source and a frozen weight W in bf16, and A and B of the adapters q and v in adapter_dtype."""

    def randn(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*size).to(dtype)

    by_name = {"x": randn(TOKENS, WIDTH).requires_grad_(), "x_source": randn(TOKENS, WIDTH), "W": randn(WIDTH, WIDTH)}
    for name in ("q", "v"):
        by_name[f"{name}.A"] = randn(RANK, WIDTH, dtype=adapter_dtype).requires_grad_()
        by_name[f"{name}.B"] = randn(WIDTH, RANK, dtype=adapter_dtype).requires_grad_()
    return by_name


def eager(t: dict[str, Tensor]) -> Tensor:
    """Return the output, computed as PEFT does: inputs cast to the adapter's dtype, one operation for each step."""
    A, up = t["q.A"], t["q.B"]
    base = F.linear(t["x"].detach(), t["W"])
    T, S = F.linear(t["x"].to(A.dtype), A), F.linear(t["x_source"].to(A.dtype), A)
    return (base + F.linear(reference.fuse(S, T, "add_relu"), up) * 2.0).to(base.dtype)


def fused(t: dict[str, Tensor], **options: Any) -> Tensor:
    base = F.linear(t["x"].detach(), t["W"])
    return fused_lora(t["x"], t["x_source"], base, t["q.A"], t["q.B"], scaling=2.0, backend="torch", **options)


def joint(t: dict[str, Tensor]) -> dict[str, Tensor]:
    base = {name: F.linear(t["x"].detach(), t["W"]) for name in ("q", "v")}
    adapters = {name: (t[f"{name}.A"], t[f"{name}.B"], 2.0) for name in ("q", "v")}
    return fused_lora_qkv(t["x"], t["x_source"], base, adapters, backend="torch")


def test_transient_memory_is_at_most_a_twentieth_of_eager_pytorch() -> None:
    """Compare an adapter's forward pass by backend="torch" with the same formula in eager PyTorch.

    At its peak, eager PyTorch holds the frozen output and 2 phi(S, T) B^T, each as large as y, and T and S.
    backend="torch" holds relu(S), relu(T) and their sum phi(S, T), which the Triton kernels compute in registers. S and
    T are counted only for eager PyTorch, because backend="torch" keeps them for backward. Here r / n = 1 / 32; in the
    paper's models it is 1 / 64 to 1 / 16.
    """
    t = tensors()
    y = TOKENS * WIDTH * BF16
    theirs, ours = transient_bytes(lambda: eager(t)), transient_bytes(lambda: fused(t))
    assert theirs == 2 * y + 2 * TOKENS * RANK * BF16, "frozen output, scaled product, T, S; not the result"
    assert ours == 3 * TOKENS * RANK * BF16
    assert ours <= 0.05 * theirs


def test_saved_bytes_are_the_streams_and_their_bottlenecks() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        t = tensors(dtype)
        weights = [tensor for name, tensor in t.items() if name[0] in "qvW"]
        with saved_bytes(ignore=[weights]) as saved:
            output: Any = fused(t)
        # copies are saved too: float32 weights that were cast to bf16, and the stacked A of q and v
        cast, stacked = (2 * WIDTH * RANK * BF16 if dtype == torch.float32 else 0), 2 * WIDTH * RANK * BF16
        assert saved.total == 2 * TOKENS * WIDTH * BF16 + 2 * TOKENS * RANK * BF16 + cast
        with saved_bytes(ignore=[weights]) as saved:
            output = joint(t)
        bottlenecks = 2 * 2 * TOKENS * RANK * BF16
        assert saved.total == 2 * TOKENS * WIDTH * BF16 + bottlenecks + cast + stacked, "q and v share x"
        with saved_bytes(ignore=[weights]) as saved:
            output = eager(t)
        del output
        if dtype == torch.float32:
            assert saved.total > 2 * 2 * TOKENS * WIDTH * BF16, "eager PyTorch must save float32 copies"


def test_one_adapter_call_computes_each_product_once() -> None:
    """The fallback in PyTorch computes every product once, and its only operation on y is the addition."""
    t, dtype = tensors(), torch.bfloat16
    G = torch.randn(TOKENS, WIDTH).to(dtype)
    inputs = [t["x"], t["q.A"], t["q.B"]]
    base = F.linear(t["x"].detach(), t["W"])
    with count_ops() as forward:
        y = fused_lora(t["x"], t["x_source"], base, t["q.A"], t["q.B"], scaling=2.0, backend="torch")
    assert forward.by_op == {"mm": 2, "relu": 2, "add": 1, "addmm_": 1}
    with count_ops() as backward:
        torch.autograd.grad(y, inputs, G)
    # addmm: dH and dB, scaled. relu, add: phi again. le, masked_fill, copy_: dT and dS, copied into one buffer.
    # mm, add_: dA of both streams, and dx.
    assert backward.by_op == {
        "addmm": 2,
        "le": 2,
        "masked_fill": 2,
        "copy_": 2,
        "relu": 2,
        "add": 1,
        "mm": 3,
        "add_": 1,
    }


def test_joint_call_projects_each_input_once() -> None:
    t = tensors()
    base = {name: F.linear(t["x"].detach(), t["W"]) for name in ("q", "v")}
    adapters = {name: (t[f"{name}.A"], t[f"{name}.B"], 2.0) for name in ("q", "v")}
    with count_ops() as one, torch.no_grad():
        fused_lora_qkv(t["x"], t["x_source"], {"q": base["q"].clone()}, {"q": adapters["q"]}, backend="torch")
    with count_ops() as two, torch.no_grad():
        fused_lora_qkv(t["x"], t["x_source"], base, adapters, backend="torch")
    assert one.by_op["mm"] == two.by_op["mm"] == 2, "x and x_source are read once"
    assert two.by_op["addmm_"] == 2


@pytest.mark.parametrize(("name", "forward", "backward"), [("one", 2, 5), ("joint", 3, 5)])
def test_kernel_launches_stay_within_their_limits(name: str, forward: int, backward: int) -> None:
    """At most ``forward`` and ``backward`` Triton kernels are launched (recorded, not run). PyTorch runs no product."""
    pytest.importorskip("triton", reason="Triton is not installed")
    t = tensors()
    names = ("q", "v") if name == "joint" else ("q",)
    leaves = [t["x"], *(t[f"{each}.{part}"] for each in names for part in "AB")]
    base = {each: torch.randn(TOKENS, WIDTH).bfloat16() for each in names}
    G = [torch.randn(TOKENS, WIDTH).bfloat16() for _ in names]
    adapters = {each: (t[f"{each}.A"], t[f"{each}.B"], 2.0) for each in names}

    def call() -> list[Tensor]:
        if name == "one":
            y = fused_lora(t["x"], t["x_source"], base["q"], t["q.A"], t["q.B"], scaling=2.0, backend="triton")
            return [y]
        return list(fused_lora_qkv(t["x"], t["x_source"], base, adapters, backend="triton").values())

    with recording(227 * 1024) as launches, count_ops() as ops:
        ys = call()
        in_forward = len(launches)
        torch.autograd.grad(ys, leaves, G)
    assert 2 <= in_forward <= forward
    assert 4 <= len(launches) - in_forward <= backward
    assert not {"mm", "addmm", "addmm_", "mul", "relu"} & set(ops.ops)


def test_decoding_launches_two_kernels() -> None:
    """With 1 to 64 tokens and a given S, query and value together need one down- and one up-projection launch."""
    pytest.importorskip("triton", reason="Triton is not installed")
    t = tensors()
    adapters = {each: (t[f"{each}.A"], t[f"{each}.B"], 2.0) for each in ("q", "v")}
    for tokens in (1, 16, 64):
        base = {each: torch.randn(tokens, WIDTH).bfloat16() for each in adapters}
        S = {each: torch.randn(tokens, RANK).bfloat16() for each in adapters}
        with torch.no_grad(), recording(227 * 1024) as launches:
            fused_lora_qkv(
                torch.randn(tokens, WIDTH).bfloat16(), None, base, adapters, source_bottleneck=S, backend="triton"
            )
        assert [one.kernel.fn.__name__ for one in launches] == ["shrink_decode_kernel", "expand_decode_kernel"]


def test_launches_are_counted_as_kernels() -> None:
    """Without a GPU, the kernels run in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    t = {name: tensor.detach().half() for name, tensor in tensors().items()}
    base = torch.randn(64, WIDTH).half()
    with count_ops() as ops, torch.no_grad():
        fused_lora(t["x"][:64], t["x_source"][:64], base, t["q.A"], t["q.B"], scaling=2.0, backend="triton")
    assert len(ops.kernels) == 2, ops.kernels
