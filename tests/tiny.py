"""Tiny random models of each family, batches with a target and a source text, and an eager reference of FLARE."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB, HIDDEN, LAYERS = 64, 32, 3

_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 1,
}
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}

FAMILIES = ("bert", "xlmr", "llama")
_CAUSAL = ("llama", "gemma2", "gemma3", "qwen3", "mistral")


def config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    """Return the tiny configuration of a family, with transformers' default dropouts."""
    configs = {
        "bert": lambda: transformers.BertConfig(**{**_ENCODER, **changes}),
        "xlmr": lambda: transformers.XLMRobertaConfig(**{**_ENCODER, **changes}),
        "llama": lambda: transformers.LlamaConfig(**{**_DECODER, **changes}),
        "roberta": lambda: transformers.RobertaConfig(**{**_ENCODER, **changes}),
        "distilbert": lambda: transformers.DistilBertConfig(
            **{
                "vocab_size": VOCAB,
                "dim": HIDDEN,
                "n_layers": LAYERS,
                "n_heads": 4,
                "hidden_dim": 48,
                "max_position_embeddings": 64,
                "num_labels": 3,
                "pad_token_id": 1,
                **changes,
            }
        ),
        "qwen3": lambda: transformers.Qwen3Config(**{**_DECODER, "head_dim": 8, **changes}),
        "mistral": lambda: transformers.MistralConfig(**{**_DECODER, "head_dim": 8, **changes}),
        "gemma2": lambda: transformers.Gemma2Config(**{**_DECODER, "head_dim": 8, **changes}),
        "gemma3": lambda: transformers.Gemma3TextConfig(**{**_DECODER, "head_dim": 8, **changes}),
        "mt5": lambda: transformers.MT5Config(
            **{
                "vocab_size": VOCAB,
                "d_model": HIDDEN,
                "d_kv": 8,
                "d_ff": 48,
                "num_layers": LAYERS,
                "num_decoder_layers": 2,
                "num_heads": 4,
                "decoder_start_token_id": 0,
                **changes,
            }
        ),
    }
    return configs[family]()


CLASSES = {
    "bert": transformers.BertForSequenceClassification,
    "xlmr": transformers.XLMRobertaForSequenceClassification,
    "llama": transformers.LlamaForCausalLM,
    "roberta": transformers.RobertaForSequenceClassification,
    "distilbert": transformers.DistilBertForSequenceClassification,
    "qwen3": transformers.Qwen3ForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "gemma2": transformers.Gemma2ForCausalLM,
    "gemma3": transformers.Gemma3ForCausalLM,
    "mt5": transformers.MT5ForConditionalGeneration,
}


def model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a random tiny model in train mode, without dropout unless ``changes`` sets it.

    mT5 keeps the default dropout of its attention weights, unless ``changes`` has dropout_rate=0.0.
    """
    torch.manual_seed(seed)
    instance = CLASSES[family](config(family, **changes))
    if "hidden_dropout_prob" not in changes and "dropout_rate" not in changes:
        for module in instance.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        instance.config.hidden_dropout_prob = instance.config.attention_probs_dropout_prob = 0.0
    return instance.to(dtype).train()


def multimodal(**changes: Any) -> Any:
    """Return a random tiny Gemma 3 with a vision tower. ``changes`` are fields of its text config."""
    torch.manual_seed(0)
    text = {**_DECODER, "head_dim": 8, **changes}
    vision = {"num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 70, "boi_token_index": 71, "eoi_token_index": 72}
    configuration = transformers.Gemma3Config(text_config=text, vision_config={**vision, **sizes}, **tokens)
    return transformers.Gemma3ForConditionalGeneration(configuration)


def randomize_lora(model: nn.Module, seed: int = 1) -> None:
    """Set A and B to random values, because a zero B hides errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


def batch(family: str, *, B: int = 3, m: int = 9, seed: int = 2, source: bool = True) -> dict[str, Tensor]:
    """Return a batch whose target and source texts have different lengths, padded on the family's usual side."""
    generator = torch.Generator().manual_seed(seed)
    left = family in _CAUSAL

    def stream(shortest: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(2, VOCAB, (B, m), generator=generator)
        mask = torch.ones(B, m, dtype=torch.long)
        for row in range(B):
            pads = min(row, m - shortest)
            where = slice(0, pads) if left else slice(m - pads, m)
            mask[row, where] = 0
        return ids.where(mask.bool(), torch.ones_like(ids)), mask

    ids, mask = stream(3)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if source:
        inputs["source_input_ids"], inputs["source_attention_mask"] = (t.flip(0) for t in stream(2))
    if family in _CAUSAL:
        inputs["labels"] = ids.where(mask.bool(), torch.full_like(ids, -100))
    elif family == "mt5":
        inputs["labels"] = torch.randint(2, VOCAB, (B, 5), generator=generator)
    else:
        inputs["labels"] = torch.randint(0, 3, (B,), generator=generator)
    return inputs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all trained parameters by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


# --- eager FLARE: the formula in plain PyTorch, with PEFT's own layers ------------------------------------------------


def source_hidden_states(peft_model: Any, inputs: dict[str, Tensor], offset: int) -> list[Tensor]:
    """Return the source state that each block fuses with, read by hooks from a pass of the frozen base model.

    The models have no dropout, so a pass in train mode gives the states of a pass in eval mode.
    """
    base = peft_model.get_base_model()
    blocks = block_list(base)
    states: list[Tensor] = []

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).detach())

    def on_output(module: nn.Module, args: Any, output: Any) -> None:
        states.append((output if isinstance(output, Tensor) else output[0]).detach())

    handles = [
        block.register_forward_pre_hook(on_input, with_kwargs=True)
        if offset == 0
        else block.register_forward_hook(on_output)
        for block in blocks
    ]
    with torch.no_grad(), peft_model.disable_adapter():
        base.base_model(input_ids=inputs["source_input_ids"], attention_mask=inputs["source_attention_mask"])
    for handle in handles:
        handle.remove()
    return states


def block_list(base: nn.Module) -> nn.ModuleList:
    """Return the block stack of an encoder or decoder model (not mT5)."""
    return next(m for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and n.endswith(("layer", "layers")))


@contextlib.contextmanager
def eager_fusion(peft_model: Any, states: list[Tensor], phi: Any, names: tuple[str, ...]) -> Iterator[None]:
    """Replace the forward of PEFT's LoRA layers by the formula, in eager PyTorch."""
    base = peft_model.get_base_model()
    patched = []
    for block, state in zip(block_list(base), states, strict=True):
        for path, layer in block.named_modules():
            if path.rpartition(".")[2] in names and hasattr(layer, "lora_A"):

                def forward(x: Tensor, layer: Any = layer, state: Tensor = state) -> Tensor:
                    A, B = layer.lora_A["default"], layer.lora_B["default"]
                    result = layer.base_layer(x)
                    T = A(x.to(A.weight.dtype))
                    S = A(state.to(A.weight.dtype))
                    return (result + B(phi(S, T)) * layer.scaling["default"]).to(result.dtype)

                patched.append(layer)
                layer.forward = forward
    try:
        yield
    finally:
        for layer in patched:
            del layer.forward
