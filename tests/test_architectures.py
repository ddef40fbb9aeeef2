"""Test that families of models match FLARE's formula under every attention implementation, or are refused.

The reference computes the formula with PEFT's layers, on the model with eager attention. Texts are padded on the right,
so that every query can attend to a key. For a query without a key, attention implementations give different outputs.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from torch import Tensor

import flare
from flare_kernels import reference

QUERY_AND_VALUE = {
    "bert": ("query", "value"),
    "xlmr": ("query", "value"),
    "roberta": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma2", "gemma3"), ("q_proj", "v_proj")),
}
# changes of the config: an attention window that is shorter than the text, in all or in some layers
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
NO_SDPA = ("gemma2",)  # transformers has no sdpa for this family, because its attention logits are soft-capped


def batch(family: str, m: int = 9) -> dict[str, Tensor]:
    """Return three rows of m positions, padded on the right. Source and target of a row have different lengths."""
    inputs = tiny.batch(family, m=m)
    generator = torch.Generator().manual_seed(4)
    for prefix, lengths in (("", (m, m - 1, m - 2)), ("source_", (m - 2, m, m - 1))):
        ids = torch.randint(2, tiny.VOCAB, (3, m), generator=generator)
        mask = (torch.arange(m) < torch.tensor(lengths)[:, None]).long()
        inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"] = ids.where(mask.bool(), 1), mask
    if inputs["labels"].dim() > 1:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs


def base(family: str, attention: str) -> Any:
    return tiny.model(family, attn_implementation=attention, initializer_range=0.2, **CHANGES.get(family, {}))


def reference_step(family: str, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients of the formula, computed with PEFT's layers and eager attention."""
    names = QUERY_AND_VALUE[family]
    task = "SEQ_CLS" if inputs["labels"].dim() == 1 else "CAUSAL_LM"
    stock = peft.get_peft_model(
        base(family, "eager"), peft.LoraConfig(r=5, lora_alpha=7, target_modules=list(names), task_type=task)
    )
    tiny.randomize_lora(stock)
    states = tiny.source_hidden_states(stock, inputs, offset=1)
    with tiny.eager_fusion(stock, states, lambda S, T: reference.fuse(S, T, "add_relu"), names):
        out = stock(**{k: v for k, v in inputs.items() if not k.startswith("source_")})
        out.loss.backward()
    return out.logits.detach(), tiny.gradients(stock)


def fused(family: str, attention: str) -> Any:
    model = flare.fast_lora(base(family, attention), r=5, lora_alpha=7, strict=True)
    tiny.randomize_lora(model)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", QUERY_AND_VALUE)
def test_logits_and_gradients_match_the_formula(family, attention) -> None:
    """Every query and value projection fuses (strict), so a wrong or missing source would change all numbers."""
    if attention == "sdpa" and family in NO_SDPA:
        pytest.skip(f"transformers has no sdpa for {family}")
    inputs = batch(family)
    expected_logits, expected = reference_step(family, inputs)
    model = fused(family, attention)
    assert model.get_base_model().config._attn_implementation == attention
    assert len(model.fast_lora_report().fused) == 2 * tiny.LAYERS
    out = model(**inputs)
    out.loss.backward()
    torch.testing.assert_close(out.logits, expected_logits, rtol=1e-5, atol=1e-5)
    actual = tiny.gradients(model)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        plain = model(**{k: v for k, v in inputs.items() if not k.startswith("source_")}).logits
    assert (plain - expected_logits).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["bert", "llama", "gemma2"])
def test_flex_attention_matches_the_formula(family) -> None:
    """Only the logits are compared, because torch has no backward of flex attention on a CPU."""
    inputs = batch(family)
    expected, _ = reference_step(family, inputs)
    with torch.no_grad():
        torch.testing.assert_close(fused(family, "flex_attention")(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------

_SIZE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
}
_ENCODER_DECODER_SIZE = {
    "d_model": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
REFUSED = [
    (
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {"rotary_dim": 4},
        r"share one linear layer \(qkv_proj\).*not known for.*codegen",
    ),
    ("AlbertForSequenceClassification", "AlbertConfig", {"embedding_size": 8}, "has 3 blocks.*holds 1.*share"),
    ("XLMForSequenceClassification", "XLMConfig", {}, "attentions holds attention modules only"),
    (
        "MvpForConditionalGeneration",
        "MvpConfig",
        _ENCODER_DECODER_SIZE,
        "cannot reach its attention: MvpEncoder.*does not pass on",
    ),
]


@pytest.mark.parametrize(("model", "config", "changes", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_unsupported_model_is_refused(model, config, changes, message) -> None:
    """The error comes before the model is changed. With fusion=None, fast_lora accepts the model."""
    base_model = getattr(transformers, model)(getattr(transformers, config)(**{**_SIZE, **changes}))
    before = {name: id(module) for name, module in base_model.named_modules()}
    with pytest.raises(ValueError, match=f"{model}: .*{message}"):
        flare.fast_lora(base_model)
    assert {name: id(module) for name, module in base_model.named_modules()} == before
    flare.fast_lora(base_model, fusion=None, r=2, target_modules="all-linear")
