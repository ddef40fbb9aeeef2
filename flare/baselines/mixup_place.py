"""Where X-Mixup's block keeps what: its attention, its residual, its norms, found by the names of its modules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import _compat
from ..tuner.routing import ModelMap


@dataclass(frozen=True)
class Place:
    """The mixup block and the modules in it, by their dotted names below the model.

    attention: the self-attention module. result: the module whose output is either the hidden state after
    self-attention with its residual (``post_norm``, or T5's sublayer) or, where ``adds_residual``, what the block adds
    to its input. before, after: modules that attention's input and output go through, in order. norm: a post-norm
    block's LayerNorm behind the residual, or None.
    """

    owner: str
    stack: str
    block: str
    attention: str
    result: str
    adds_residual: bool
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    norm: str | None = None

    @classmethod
    def of(cls, model: nn.Module, layer: int) -> Place:
        """The place of block ``layer``, counted from 0; of an encoder-decoder in the encoder.

        Raises:
            ValueError: no such block, or a block of another make than those of BERT, RoBERTa, DistilBERT, T5, Llama or
                Gemma.
        """
        mapped = ModelMap.of(model)
        if mapped.fused or mapped.carried:
            raise ValueError(
                f"{type(model).__name__}: X-Mixup needs query, key and value in layers of their own, in blocks that "
                "pass keyword arguments on. Use flare.fast_lora or flare.baselines.input_fusion instead"
            )
        stack, blocks = _stack(model, mapped)
        if not 0 <= layer < blocks:
            raise ValueError(f"layer={layer} is no block of {type(model).__name__}: {stack} has 0 to {blocks - 1}")
        block = f"{stack}.{layer}"
        attention = next(
            place.attention
            for place in mapped.places.values()
            if (place.stack, place.block) == (stack, layer) and not place.is_cross_attention
        )
        if not _compat.looks_up_attention(model.get_submodule(attention)):
            raise ValueError(
                f"{type(model).__name__}: {type(model.get_submodule(attention)).__name__} does not look its attention "
                "function up in transformers' AttentionInterface, through which X-Mixup reads its queries and keys"
            )
        place = _in_block(model, stack.rpartition(".")[0], stack, block, attention)
        if place is None:
            raise ValueError(
                f"{type(model).__name__}: X-Mixup does not know where a {type(model.get_submodule(block)).__name__} "
                "adds its self-attention to the hidden state; it knows blocks made like BERT's, RoBERTa's, "
                "DistilBERT's, T5's, Llama's and Gemma's. Use flare.fast_lora or flare.baselines.input_fusion instead"
            )
        return place


def _stack(model: nn.Module, mapped: ModelMap) -> tuple[str, int]:
    """The one stack that reads the text, and its number of blocks."""
    stacks = {name: count for name, count in mapped.stacks.items() if name not in mapped.decoders}
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__}: X-Mixup needs one stack of blocks that reads the text, found {sorted(stacks)}"
        )
    return next(iter(stacks.items()))


def middle(model: nn.Module) -> int:
    """The block in the middle of a model, counted from 0: half of their number."""
    return _stack(model, ModelMap.of(model))[1] // 2


def _in_block(model: nn.Module, owner: str, stack: str, block: str, attention: str) -> Place | None:
    parent = attention.rpartition(".")[0]
    has = {name for name, _ in model.get_submodule(block).named_children()}
    if parent != block:
        inside = {name for name, _ in model.get_submodule(parent).named_modules()}
        if {"output.dense", "output.dropout", "output.LayerNorm"} <= inside:  # BERT, RoBERTa, XLM-R, ELECTRA
            after = (f"{parent}.output.dense", f"{parent}.output.dropout")
            norm = f"{parent}.output.LayerNorm"
            return Place(owner, stack, block, attention, parent, False, after=after, norm=norm)
        if {"layer_norm", "dropout"} <= inside and parent.endswith(".layer.0"):  # T5, mT5
            around = (f"{parent}.layer_norm",), (f"{parent}.dropout",)
            return Place(owner, stack, block, attention, parent, False, *around)
    elif "sa_layer_norm" in has:  # DistilBERT
        norm = f"{block}.sa_layer_norm"
        return Place(owner, stack, block, attention, norm, False, norm=norm)
    elif {"input_layernorm", "post_attention_layernorm"} <= has:
        if hasattr(model.get_submodule(block), "residual_multiplier"):
            return None  # Granite scales what it adds
        pre_norm, norm = f"{block}.input_layernorm", f"{block}.post_attention_layernorm"
        if {"pre_feedforward_layernorm", "post_feedforward_layernorm"} <= has:  # Gemma 2 and 3
            return Place(owner, stack, block, attention, norm, True, (pre_norm,), (norm,))
        if not has & {"pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_mlp_layernorm"}:
            return Place(owner, stack, block, attention, attention, True, (pre_norm,))  # Llama, Mistral, Qwen
    return None
