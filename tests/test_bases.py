"""Test that logits and gradients of many model families match FLARE's formula in float64.

The reference runs PEFT's layers on the same tiny random model: hooks read the source's states, and each projection's
forward is the formula. The reference does not use flare's code that finds blocks, projections and the key's rows in
layers that compute query, key and value.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import peft
import pytest
import torch
import transformers
from base_models import BASES, HEADS, HIDDEN, LAYERS, LORA, VOCAB, Base, M, thirds
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import flare

# --- the formula in plain PyTorch -------------------------------------------------------------------------------------


def add_relu(S: Tensor, T: Tensor) -> Tensor:
    return S.relu() + T.relu()


def randomize(model: nn.Module) -> None:
    """Set A and B to random float64 values. Models with the same parameter names get the same values."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.15


def read_states(base: Base, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return each block's output on the source.

    Hooks read it as the input of the next block. Of the last block, they read the output itself.
    """
    blocks = model.get_base_model().get_submodule(base.stack)
    states: dict[int, Tensor] = {}
    handles = []
    for index, block in enumerate(blocks):
        if index:
            handles.append(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, i=index: states.__setitem__(
                        i - 1, (args[0] if args else kwargs["hidden_states"]).detach()
                    ),
                    with_kwargs=True,
                )
            )
    last = len(blocks) - 1
    handles.append(
        blocks[-1].register_forward_hook(
            lambda _, args, output: states.__setitem__(
                last, (output if isinstance(output, Tensor) else output[0]).detach()
            )
        )
    )
    with torch.no_grad(), model.disable_adapter():
        model.get_base_model().base_model(
            input_ids=inputs["source_input_ids"], attention_mask=inputs["source_attention_mask"]
        )
    for handle in handles:
        handle.remove()
    return [states[index] for index in range(len(blocks))]


def reference_step(base: Base, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients of the formula, computed with PEFT's layers."""
    task = "CAUSAL_LM" if base.causal else "SEQ_CLS"
    stock = peft.get_peft_model(base.make(), peft.LoraConfig(**LORA, target_modules=list(base.names), task_type=task))
    randomize(stock)
    states = read_states(base, stock, inputs)
    for block, state in zip(stock.get_base_model().get_submodule(base.stack), states, strict=True):
        for path, layer in block.named_modules():
            if path.rpartition(".")[2] not in base.names or not hasattr(layer, "lora_A"):
                continue

            def forward(x: Tensor, layer: Any = layer, state: Tensor = state) -> Tensor:
                A, B, s = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
                T, y = A(x), layer.base_layer(x)
                if x.shape[:2] != (3, M):  # DeBERTa also projects its relative positions, which get plain LoRA
                    return y + s * B(T)
                H = add_relu(A(state), T)
                if base.key_rows is None:
                    return y + s * B(H)
                return y + s * torch.where(base.key_rows(y.shape[-1]), B(T), B(H))

            layer.forward = forward
    out = stock(**{name: value for name, value in inputs.items() if not name.startswith("source_")})
    out.loss.backward()
    return out.logits.detach(), gradients(stock)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "lora_" in name}


def check(model: Any, inputs: dict[str, Tensor], logits: Tensor, grads: dict[str, Tensor]) -> None:
    """Assert that a training step of a model has these logits and gradients."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    torch.testing.assert_close(out.logits, logits, rtol=1e-9, atol=1e-9)
    model_grads = gradients(model)
    assert model_grads.keys() == grads.keys() and len(grads) > 0
    for name, grad in grads.items():
        torch.testing.assert_close(
            model_grads[name], grad, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", BASES)
def test_training_step_matches_the_formula(family: str) -> None:
    """The step also matches in a copy, with cached states, and with checkpointing and recomputed states."""
    base = BASES[family]
    inputs = base.batch()
    logits, grads = reference_step(base, inputs)
    model = flare.fast_lora(base.make(), **LORA, strict=True)
    randomize(model)
    assert len(model.fast_lora_report().fused) == LAYERS * len(base.names)
    check(model, inputs, logits, grads)
    with torch.no_grad():
        plain = model(**{name: value for name, value in inputs.items() if not name.startswith("source_")}).logits
    assert (plain - logits).abs().max() > 1e-3, "the source must matter"
    check(copy.deepcopy(model), inputs, logits, grads)
    model.set_source_cache(flare.SourceStateCache(10**7))
    for _ in ("fills the cache", "reads it"):
        check(model, inputs, logits, grads)
    model.set_source_cache(None)
    model.peft_config["default"].source_memory = "recompute"
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    check(model, inputs, logits, grads)


# --- encoder-decoders -------------------------------------------------------------------------------------------------


# family -> model class, config class, changes of the config, paths of both stacks, names of query and value
ENCODER_DECODERS = {
    "m2m_100 (NLLB)": (
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        {
            "d_model": HIDDEN,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "decoder_start_token_id": 2,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
        },
        ("model.encoder.layers", "model.decoder.layers"),
        ("q_proj", "v_proj"),
    ),
    "mt5 (mT0)": (
        "MT5ForConditionalGeneration",
        "MT5Config",
        {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS, "decoder_start_token_id": 0},
        ("encoder.block", "decoder.block"),
        ("q", "v"),
    ),
}
_CROSS = ("encoder_attn", "EncDecAttention")


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoder_matches_the_formula(family: str) -> None:
    """In both stacks, self-attention fuses with the source state at its depth. Cross-attention is plain LoRA."""
    name, config, changes, stacks, names = ENCODER_DECODERS[family]
    size = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "tie_word_embeddings": False}
    base = Base(name, config, stacks[0], names)

    def make() -> Any:
        torch.manual_seed(0)
        base_model = getattr(transformers, name)(
            getattr(transformers, config)(**size, **changes, attn_implementation="eager")
        )
        for module in base_model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            module.__dict__.update({each: 0.0 for each in ("dropout", "activation_dropout") if each in module.__dict__})
        return base_model.to(torch.float64).train()

    inputs = base.batch()
    generator = torch.Generator().manual_seed(5)
    inputs["labels"], inputs["source_labels"] = (torch.randint(3, VOCAB, (3, 6), generator=generator) for _ in range(2))
    target = {each: value for each, value in inputs.items() if not each.startswith("source_")}
    stock = peft.get_peft_model(make(), peft.LoraConfig(**LORA, target_modules=list(names), task_type="SEQ_2_SEQ_LM"))
    randomize(stock)
    inner = stock.get_base_model()
    states: dict[str, Tensor] = {}
    handles = [
        block.register_forward_hook(
            lambda _, args, output, key=f"{stack}.{index}": states.__setitem__(
                key, (output if isinstance(output, Tensor) else output[0]).detach()
            )
        )
        for stack in stacks
        for index, block in enumerate(inner.get_submodule(stack))
    ]
    with torch.no_grad(), stock.disable_adapter():
        inner(
            input_ids=inputs["source_input_ids"],
            attention_mask=inputs["source_attention_mask"],
            decoder_input_ids=torch.cat(
                [torch.full((3, 1), changes["decoder_start_token_id"]), inputs["source_labels"][:, :-1]], dim=1
            ),
        )
    for handle in handles:
        handle.remove()
    for path, layer in inner.named_modules():
        source_state = next((state for key, state in states.items() if path.startswith(f"{key}.")), None)
        if source_state is None or not hasattr(layer, "lora_A") or any(mark in path for mark in _CROSS):
            continue

        def forward(x: Tensor, layer: Any = layer, state: Tensor = source_state) -> Tensor:
            A, B = layer.lora_A["default"], layer.lora_B["default"]
            return layer.base_layer(x) + layer.scaling["default"] * B(add_relu(A(state), A(x)))

        layer.forward = forward
    expected = stock(**target)
    expected.loss.backward()
    model = flare.fast_lora(make(), **LORA)
    randomize(model)
    check(model, inputs, expected.logits.detach(), gradients(stock))
    model.set_source_cache(flare.SourceStateCache(10**7))
    for _ in ("fills the cache", "reads it"):
        check(model, inputs, expected.logits.detach(), gradients(stock))


@pytest.mark.parametrize(("memory", "dropout"), [("keep", False), ("recompute", False), ("keep", True)])
def test_training_steps_run_if_layerdrop_skips_blocks(memory: str, dropout: bool) -> None:
    """M2M100's LayerDrop skips random blocks in the target pass. The source pass runs every block."""
    name, config, changes, _, _ = ENCODER_DECODERS["m2m_100 (NLLB)"]
    size = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    torch.manual_seed(3)
    settings = getattr(transformers, config)(**size, **{**changes, "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3})
    options = {"source_memory": memory, "source_dropout": dropout}
    model = flare.fast_lora(getattr(transformers, name)(settings), **LORA, **options).train()
    inputs = Base(name, config, "", ()).batch()
    inputs["labels"] = inputs["source_labels"] = torch.randint(3, VOCAB, (3, 6))
    gradient_counts = set()
    for _ in range(6):
        model.zero_grad()
        loss = model(**inputs).loss
        if loss.requires_grad:  # otherwise every block was skipped
            loss.backward()
        gradient_counts.add(len(gradients(model)))
    assert len(gradient_counts) > 1, "no step skipped a block"
    stacks = [module for module in model.modules() if "layerdrop" in vars(module)]
    assert [stack.layerdrop for stack in stacks] == [0.3, 0.3]


# --- blocks that do not pass on keyword arguments, and layers that compute query, key and value -----------------------


def test_block_that_carries_the_source_is_pickled_and_restored() -> None:
    """The block does not pass on keyword arguments, so flare replaces its class by one that carries the source."""
    base = BASES["mdeberta"]
    inputs = base.batch()
    model = flare.fast_lora(base.make(), **LORA)
    randomize(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(**inputs).logits, expected, rtol=0, atol=0)
    block = model.get_base_model().deberta.encoder.layer[0]
    assert type(block).__name__ == "CarryingDebertaV2Layer"
    model.delete_adapter("default")
    assert type(block).__name__ == "DebertaV2Layer"


def test_reentrant_checkpoint_around_a_block_that_carries_the_source_is_refused() -> None:
    """transformers' checkpointing, which runs inside the block, gives the same gradients in both modes."""
    base = BASES["bloom"]
    model = flare.fast_lora(base.make(), **LORA)
    randomize(model)
    model.config.use_cache = False
    inputs, expected = base.batch(), None
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model.zero_grad()
        model(**inputs).loss.backward()
        expected = expected or gradients(model)
        torch.testing.assert_close(gradients(model), expected)
    model.gradient_checkpointing_disable()
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: type(module).__name__ == "CarryingBloomBlock"
    )
    with pytest.raises(ValueError, match=r"BloomBlock.*Use model\.gradient_checkpointing_enable\(\)"):
        model(**inputs)
    model(**{name: value for name, value in inputs.items() if not name.startswith("source_")}).loss.backward()


def test_relative_positions_as_long_as_the_text_do_not_fuse() -> None:
    """With as many tokens as relative positions, only the order of calls shows which of the two is projected."""
    base = BASES["mdeberta"]
    width = base.changes["position_buckets"] * 2
    inputs = {name: value[:1, :width] for name, value in base.batch().items() if name != "labels"}
    model = flare.fast_lora(base.make(), **LORA)
    randomize(model)
    stock = peft.get_peft_model(base.make(), peft.LoraConfig(**LORA, target_modules=list(base.names)))
    randomize(stock)
    states = read_states(base, stock, inputs)
    for block, state in zip(stock.get_base_model().get_submodule(base.stack), states, strict=True):
        for layer in (block.attention.self.query_proj, block.attention.self.value_proj):
            calls: list[int] = []

            def forward(x: Tensor, layer: Any = layer, state: Tensor = state, calls: list[int] = calls) -> Tensor:
                A, B = layer.lora_A["default"], layer.lora_B["default"]
                calls.append(1)
                H = add_relu(A(state), A(x)) if len(calls) == 1 else A(x)
                return layer.base_layer(x) + layer.scaling["default"] * B(H)

            layer.forward = forward
    with torch.no_grad():
        expected = stock(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "bloom"])
@pytest.mark.parametrize("source_pass", ["separate", "shared"])
def test_generation_with_a_fused_qkv_layer_matches_a_forward_pass(family: str, source_pass: str) -> None:
    """The first step's logits match a forward pass of the prompts. Both kinds of source pass agree in all steps."""
    base = BASES[family]
    model = flare.fast_lora(base.make(), **LORA, source_layer_offset=0, source_padding="zero").eval()
    randomize(model)
    generator = torch.Generator().manual_seed(6)
    inputs = {name: torch.randint(3, VOCAB, (2, M), generator=generator) for name in ("input_ids", "source_input_ids")}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**inputs, **options, output_logits=True, source_pass=source_pass, pad_token_id=1)
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        plain = model(input_ids=inputs["input_ids"]).logits[:, -1]
    torch.testing.assert_close(out.logits[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
    other = model.generate(**inputs, **options, output_logits=True, source_pass="separate", pad_token_id=1)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(other.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", ["cross_attention", "mul"])
def test_key_of_a_fused_qkv_layer_is_plain_lora(fusion: str) -> None:
    """In a layer that computes query, key and value, only the key's outputs equal plain LoRA.

    With a hook on lora_A, the layer calls the module lora_A instead of the kernels, with the same result.
    """
    base = BASES["modernbert"]
    inputs = base.batch()
    model = flare.fast_lora(base.make(), **LORA, fusion=fusion).eval()
    randomize(model)
    layer = model.get_base_model().model.layers[1].attn.Wqkv
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    with torch.no_grad():
        expected = model(**inputs).logits
        x, y = seen[-2:]  # the source pass calls the layer too
        plain = layer.base_layer(x) + layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x))
        equals_plain = (y - plain).abs().amax(dim=(0, 1)) < 1e-12
        assert torch.equal(equals_plain, thirds(3 * HIDDEN))
        if fusion != "cross_attention":
            layer.lora_A["default"].register_forward_hook(lambda *_: None)
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-9, atol=1e-9)
