"""What does a whole training step cost: plain LoRA, FLARE, FLARE as its authors run it, input-level fusion at 2m?

XLM-R with random weights and a classification head, r on query and value, forward + backward + AdamW. Block executions
and saved bytes are exact on any device; seconds are reported with their spread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shapes
import torch
import transformers
from torch import Tensor, nn

import flare
from flare.measure import peak_bytes, saved_bytes
from flare_kernels import reference

Batch = dict[str, Tensor]
METHODS = ("lora", "flare", "flare-as-released", "input-fusion")


def model_of(shape: shapes.StepShape, device: torch.device, attention: str = "sdpa") -> nn.Module:
    """A random XLM-R classifier in bf16 on a GPU, float32 on a CPU."""
    config = transformers.XLMRobertaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=2 * shape.m + 2,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = attention
    made = transformers.XLMRobertaForSequenceClassification(config)
    return made.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def batch_of(shape: shapes.StepShape, device: torch.device) -> Batch:
    """Full rows, so that every method reads the same tokens."""
    size = (shape.B, shape.m)
    return {
        "input_ids": torch.randint(5, shape.vocabulary, size, device=device),
        "source_input_ids": torch.randint(5, shape.vocabulary, size, device=device),
        "labels": torch.randint(0, 3, (shape.B,), device=device),
    }


def prepared(method: str, shape: shapes.StepShape, device: torch.device) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """The model of a method and its loss on a batch."""
    fusion = {"flare": "add_relu"}.get(method)
    attention = "eager" if method == "flare-as-released" else "sdpa"
    model = flare.fast_lora(
        model_of(shape, device, attention), r=shape.r, lora_alpha=2 * shape.r, fusion=fusion
    ).train()
    if method == "lora":
        return model, lambda b: model(input_ids=b["input_ids"], labels=b["labels"]).loss
    if method == "flare":
        return model, lambda b: model(**b).loss
    if method == "input-fusion":
        return (
            model,
            lambda b: (
                model(input_ids=torch.cat([b["source_input_ids"], b["input_ids"]], dim=1), labels=b["labels"]).loss
            ),
        )
    return model, lambda b: _as_released(model, b)


def _as_released(model: Any, b: Batch) -> Tensor:
    """Eager attention, all hidden states of a source pass with its head, phi over eager layers, offset 0."""
    base = model.get_base_model()
    with torch.no_grad(), model.disable_adapter():
        states = base(input_ids=b["source_input_ids"], output_hidden_states=True).hidden_states
    patched = []
    for block, state in zip(base.roberta.encoder.layer, states, strict=False):
        for layer in (block.attention.self.query, block.attention.self.value):

            def forward(x: Tensor, layer: Any = layer, state: Tensor = state) -> Tensor:
                A, B = layer.lora_A["default"], layer.lora_B["default"]
                H = reference.fuse(A(state.to(A.weight.dtype)), A(x.to(A.weight.dtype)), "add_relu")
                result = layer.base_layer(x)
                return (result + B(H) * layer.scaling["default"]).to(result.dtype)

            layer.forward = forward
            patched.append(layer)
    try:
        return model(input_ids=b["input_ids"], labels=b["labels"]).loss
    finally:
        for layer in patched:
            del layer.forward


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", shapes.STEPS, ids=lambda s: f"{s.name}-m{s.m}")
def test_training_step(benchmark: Any, measure: Any, method: str, shape: shapes.StepShape, device: Any) -> None:
    model, loss_of = prepared(method, shape, device)
    batch = batch_of(shape, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    blocks = []
    handles = [
        b.register_forward_hook(lambda *_: blocks.append(1)) for b in model.get_base_model().roberta.encoder.layer
    ]
    step()  # the optimizer's state exists from here on
    for handle in handles:
        handle.remove()
    # one pass over each stream; input-level fusion is one pass over a stream twice as long
    assert len(blocks) == shape.layers * (1 if method in ("lora", "input-fusion") else 2)
    with saved_bytes(ignore=[model.parameters(), batch]) as saved:
        kept = loss_of(batch)
    del kept
    with peak_bytes(live=[model.parameters(), optimizer.state_dict()], device=device) as peak:
        step()
    benchmark.group = f"training step, {shape.name}, B={shape.B}, m={shape.m}, r={shape.r}"
    benchmark.extra_info.update(
        method=method,
        target_tokens=shape.B * shape.m,
        block_executions=len(blocks),
        saved_bytes=saved.total,
        peak_bytes=peak.peak,
        conditions="random weights, no padding, AdamW, no checkpointing, source states not kept across steps",
    )
    measure(step)
