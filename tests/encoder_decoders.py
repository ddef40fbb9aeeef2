"""Helpers for tests of encoder-decoders: models, batches, FLARE's formula in plain PyTorch, and generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tiny
import torch
from torch import nn

import flare

TOLERANCE = {"rtol": 0, "atol": 2e-6}  # generate returns logits in float32
START = 0


def mt5(**changes: Any) -> Any:
    """Return a random mT5 without dropout. Its head is not tied, because a tied head would repeat the input."""
    model = tiny.model("mt5", dropout_rate=0.0, tie_word_embeddings=False, **changes)
    model.lm_head.weight = nn.Parameter(torch.randn(model.lm_head.weight.shape) / 6)
    return model


def fused(*, base: dict | None = None, **overrides: Any) -> Any:
    base_model = mt5(**(base or {}))
    base_model.generation_config.eos_token_id = None
    base_model.generation_config.decoder_start_token_id = START
    model = flare.fast_lora(base_model, **{"r": 5, "lora_alpha": 7, **overrides})
    tiny.randomize_lora(model)
    return model.double()


def batch(B: int = 3, m: int = 7, u: int = 5, seed: int = 5) -> dict[str, torch.Tensor]:
    """Return right-padded texts and labels. Source and target of a row have different lengths."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for prefix, shift in (("", 0), ("source_", 2)):
        ids = torch.randint(3, tiny.VOCAB, (B, m), generator=generator)
        labels = torch.randint(3, tiny.VOCAB, (B, u), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(B):
            mask[row, m - (row + shift) % 4 :] = 0
            labels[row, u - (row + shift) % 3 :] = -100
        inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"] = ids.where(mask.bool(), 0), mask
        inputs[f"{prefix}labels"] = labels
    return inputs


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Return mT5's decoder input for labels."""
    return torch.cat([labels.new_full((len(labels), 1), START), labels[:, :-1]], dim=1).masked_fill_(
        torch.cat([labels.new_zeros(len(labels), 1), labels[:, :-1]], dim=1) == -100, 0
    )


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the inputs except the named ones."""
    return {name: value for name, value in inputs.items() if name not in names}


def states_of(model: Any, inputs: dict, offset: int) -> dict[str, list[torch.Tensor]]:
    """Return the source states of all blocks, by stack ("encoder", "decoder").

    Hooks record them in a forward pass of the frozen model: before each block if ``offset`` is 0, otherwise after it.
    """
    base, stack_states, handles = model.get_base_model(), {"encoder": [], "decoder": []}, []
    for name, states in stack_states.items():
        for block in getattr(base, name).block:
            if offset == 0:
                handles.append(block.register_forward_pre_hook(lambda m, a, s=states: s.append(a[0].detach())))
            else:
                handles.append(block.register_forward_hook(lambda m, a, y, s=states: s.append(y[0].detach())))
    with torch.no_grad(), model.disable_adapter():
        base(
            input_ids=inputs["source_input_ids"],
            attention_mask=inputs["source_attention_mask"],
            decoder_input_ids=shifted(inputs["source_labels"]),
        )
    for handle in handles:
        handle.remove()
    return stack_states


@contextlib.contextmanager
def by_hand(model: Any, states: dict[str, list[torch.Tensor]], phi: Any) -> Iterator[None]:
    """In the given stacks, compute self-attention's q and v by FLARE's formula, calling PEFT's lora_A and lora_B."""
    base, patched = model.get_base_model(), []
    for name, stack_states in states.items():
        for block, state in zip(getattr(base, name).block, stack_states, strict=True):
            for layer in (block.layer[0].SelfAttention.q, block.layer[0].SelfAttention.v):

                def forward(x: torch.Tensor, layer: Any = layer, state: torch.Tensor = state) -> torch.Tensor:
                    A, B = layer.lora_A["default"], layer.lora_B["default"]
                    return layer.base_layer(x) + B(phi(A(state), A(x))) * layer.scaling["default"]

                patched.append(layer)
                layer.forward = forward
    try:
        yield
    finally:
        for layer in patched:
            del layer.forward


def step(model: Any, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss, logits and gradients of a training step."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), tiny.gradients(model)


def add_relu(S: torch.Tensor, T: torch.Tensor) -> torch.Tensor:
    return S.relu() + T.relu()


def generated(model: Any, inputs: dict, new: int = 6, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequences (with their prompts) and the logits (B, new, V) of every step."""
    options = {"do_sample": False, "pad_token_id": 1, "max_new_tokens": new, **options}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, dim=1)


def frozen_text(model: Any, inputs: dict, new: int, ends: list[int], prompt: torch.Tensor | None = None) -> Any:
    """Return the frozen decoder's greedy text for the source: the decoder's prompt and ``new`` - 1 tokens.

    A text that ends early is padded with token 1.
    """
    with model.disable_adapter():
        text = model.generate(
            input_ids=inputs["source_input_ids"],
            attention_mask=inputs["source_attention_mask"],
            decoder_input_ids=prompt,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=1,
        )
    prompt_length = 1 if prompt is None else prompt.shape[1]
    text = nn.functional.pad(text, (0, prompt_length + new - text.shape[1]), value=1)
    return text[:, :-1]


def teacher_forced(model: Any, inputs: dict, sequences: torch.Tensor, source_text: torch.Tensor | None) -> torch.Tensor:
    """Return the logits of one forward pass, without a KV cache, over the sequences except their last token."""
    source = {} if source_text is None else {"source_decoder_input_ids": source_text}
    return model(**inputs, decoder_input_ids=sequences[:, :-1], **source, use_cache=False).logits
