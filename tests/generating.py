"""Fusing models, prompts, and a reference without a KV cache, for the tests of generation."""

from __future__ import annotations

from typing import Any

import tiny
import torch

import flare

TOLERANCE = {"rtol": 0, "atol": 2e-6}  # generate returns logits in float32; rotary angles are float32 too


def fused(family: str = "llama", *, base: dict | None = None, **overrides: Any) -> Any:
    base_model = tiny.model(family, **(base or {}))
    base_model.generation_config.eos_token_id = None
    embeddings = base_model.get_input_embeddings().weight
    embeddings.data[1] = embeddings.data[2]  # a zero embedding of the pad token would hide errors
    model = flare.fast_lora(base_model, **{"r": 5, "lora_alpha": 7, "source_padding": "zero", **overrides})
    tiny.randomize_lora(model)
    return model.double().eval()


def prompts(B: int = 3, m: int = 7, seed: int = 5, *, pads: bool = True) -> dict[str, torch.Tensor]:
    """Return prompts for the target and the source, B rows of m columns each.

    If ``pads``, most rows are left-padded, and the source is shorter than the target in some rows and longer in others.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for prefix, shift in (("", 0), ("source_", 2)):
        ids = torch.randint(3, tiny.VOCAB, (B, m), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(B if pads else 0):
            mask[row, : (row + shift) % 4] = 0
        inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"] = ids.where(mask.bool(), 1), mask
    return inputs


def plain(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs without their source."""
    return {name: value for name, value in inputs.items() if not name.startswith("source")}


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Return one row, without the columns in which both its target and its source are padding."""
    alone = {name: value[row : row + 1] for name, value in inputs.items()}
    used = (alone["attention_mask"] + alone["source_attention_mask"])[0] > 0
    return {name: value[:, used] for name, value in alone.items()}


def source_text(model: Any, inputs: dict[str, torch.Tensor], new: int, ends: list[int]) -> torch.Tensor:
    """Return the source prompts with the frozen model's greedy continuation, from transformers' generate.

    Continuations are padded with token 1 to ``new`` tokens.
    """
    with model.disable_adapter():
        text = model.generate(
            input_ids=inputs["source_input_ids"],
            attention_mask=inputs["source_attention_mask"],
            max_new_tokens=new,
            min_new_tokens=new if not ends else None,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=1,
        )
    short = inputs["source_input_ids"].shape[1] + new - text.shape[1]
    return torch.nn.functional.pad(text, (0, short), value=1)


def teacher_forced(model: Any, inputs: dict, sequences: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Return logits (B, new, V) of one forward pass without a KV cache.

    New position t of the target fuses with new position t of the source. After the source's end token, the
    target fuses with the state of the end token.
    """
    B, m = inputs["input_ids"].shape
    new = sequences.shape[1] - m
    text = source_text(model, inputs, new, ends)[:, : m + new - 1]
    mask = torch.cat([inputs["source_attention_mask"], torch.ones(B, new - 1, dtype=torch.long)], dim=1)
    states = model.encode_source(text, mask)
    continued_states = {}
    for key, state in states.states.items():
        state = state.clone()
        for row in range(B):
            ended = [j for j in range(m, m + new - 1) if text[row, j] in ends]
            if ended:
                state[row, ended[0] + 1 :] = state[row, ended[0]]
        continued_states[key] = state
    target_mask = torch.cat([inputs["attention_mask"], torch.ones(B, new - 1, dtype=torch.long)], dim=1)
    out = model(
        input_ids=sequences[:, :-1],
        attention_mask=target_mask,
        position_ids=(target_mask.cumsum(1) - 1).clamp(min=0),
        source_states=flare.SourceStates(continued_states, states.offset, mask),
        use_cache=False,
    )
    return out.logits[:, m - 1 :]


def generated(model: Any, inputs: dict, new: int = 6, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequences, and the logits (B, new, V) of every step."""
    options = {"do_sample": False, "pad_token_id": 1, "max_new_tokens": new, **options}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, dim=1)


def ends_of(model: Any, inputs: dict, new: int) -> list[int]:
    """Return two tokens that end the source continuations of rows 0 and 1 and do not occur in row 2's continuation.

    Row 0 ends at new token 1 and row 1 at new token 3, counted from 0.
    """
    text = source_text(model, inputs, new, [])[:, inputs["input_ids"].shape[1] :]
    ends = [int(text[0, 1]), int(text[1, 3])]
    stops = [[j for j in range(new) if row[j] in ends] for row in text.tolist()]
    assert stops[0][0] == 1 and stops[1][0] == 3 and not stops[2], "choose another seed"
    return ends


ENDING = 45  # a seed of ``prompts`` with which ``ends_of`` finds such end tokens
