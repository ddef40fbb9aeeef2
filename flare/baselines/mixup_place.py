"""Find the attention, residual and norms of X-Mixup's block by module names.

X-Mixup (see flare.baselines.mixup) mixes the hidden states of source and target in one block of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import _compat
from ..tuner.routing import ModelMap


@dataclass(frozen=True)
class Place:
    """The mixup block and its modules, by their dotted names in the model.

    Attributes:
        owner: the module that loops over the blocks.
        stack: the list of blocks.
        block: the block that mixes.
        attention: the block's self-attention module.
        result: the module whose output is mixed. If ``adds_residual`` is False, this output is the hidden state after
            self-attention and residual.
        adds_residual: True if the output of ``result`` does not include the residual, because the block adds the output
            to its input afterwards.
        before: modules that the input of the attention goes through, in order.
        after: modules that the output of the attention goes through, in order.
        norm: the LayerNorm that follows the residual in a post-norm block, or None.
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
        """Return the place of block ``layer``, counted from 0. In an encoder-decoder this is a block of the encoder.

        Raises:
            ValueError: the block does not exist; it is built differently from the blocks of BERT, RoBERTa, DistilBERT,
                T5, Llama and Gemma; the model does not have exactly one stack of blocks that reads the text; query, key
                and value are one layer; the blocks do not pass keyword arguments on; or the attention module does not
                look up its attention function in transformers' AttentionInterface.
        """
        mapped = ModelMap.of(model)
        if mapped.fused or mapped.carried:
            raise ValueError(
                f"{type(model).__name__}: X-Mixup needs separate query, key and value layers, in blocks that pass "
                "keyword arguments on. Use flare.fast_lora or flare.baselines.input_fusion instead"
            )
        stack, blocks = _stack(model, mapped)
        if not 0 <= layer < blocks:
            raise ValueError(
                f"layer={layer} is not a block of {type(model).__name__}: {stack} has blocks 0 to {blocks - 1}"
            )
        block = f"{stack}.{layer}"
        attention = next(
            place.attention
            for place in mapped.places.values()
            if (place.stack, place.block) == (stack, layer) and not place.is_cross_attention
        )
        if not _compat.looks_up_attention(model.get_submodule(attention)):
            raise ValueError(
                f"{type(model).__name__}: {type(model.get_submodule(attention)).__name__} does not look up its "
                "attention function in transformers' AttentionInterface, which X-Mixup needs to read queries and keys. "
                "Use flare.fast_lora or flare.baselines.input_fusion instead"
            )
        place = _in_block(model, stack.rpartition(".")[0], stack, block, attention)
        if place is None:
            raise ValueError(
                f"{type(model).__name__}: X-Mixup does not know where a {type(model.get_submodule(block)).__name__} "
                "adds its self-attention to the hidden state; it knows blocks like those of BERT, RoBERTa, DistilBERT, "
                "T5, Llama and Gemma. Use flare.fast_lora or flare.baselines.input_fusion instead"
            )
        return place


def _stack(model: nn.Module, mapped: ModelMap) -> tuple[str, int]:
    """Return the name of the only stack that reads the text, and its number of blocks."""
    stacks = {name: count for name, count in mapped.stacks.items() if name not in mapped.decoders}
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__}: X-Mixup needs one stack of blocks that reads the text, found {sorted(stacks)}"
        )
    return next(iter(stacks.items()))


def middle(model: nn.Module) -> int:
    """Return the index of the middle block, counted from 0: half the number of blocks, rounded down."""
    return _stack(model, ModelMap.of(model))[1] // 2


def _in_block(model: nn.Module, owner: str, stack: str, block: str, attention: str) -> Place | None:
    parent = attention.rpartition(".")[0]
    children = {name for name, _ in model.get_submodule(block).named_children()}
    if parent != block:
        inside = {name for name, _ in model.get_submodule(parent).named_modules()}
        if {"output.dense", "output.dropout", "output.LayerNorm"} <= inside:  # BERT, RoBERTa, XLM-R, ELECTRA
            after = (f"{parent}.output.dense", f"{parent}.output.dropout")
            norm = f"{parent}.output.LayerNorm"
            return Place(owner, stack, block, attention, parent, False, after=after, norm=norm)
        if {"layer_norm", "dropout"} <= inside and parent.endswith(".layer.0"):  # T5, mT5
            norm, dropout = f"{parent}.layer_norm", f"{parent}.dropout"
            return Place(owner, stack, block, attention, parent, False, before=(norm,), after=(dropout,))
    elif "sa_layer_norm" in children:  # DistilBERT
        norm = f"{block}.sa_layer_norm"
        return Place(owner, stack, block, attention, norm, False, norm=norm)
    elif {"input_layernorm", "post_attention_layernorm"} <= children:
        if hasattr(model.get_submodule(block), "residual_multiplier"):
            return None  # Granite scales the output of attention before adding it
        pre_norm, norm = f"{block}.input_layernorm", f"{block}.post_attention_layernorm"
        if {"pre_feedforward_layernorm", "post_feedforward_layernorm"} <= children:  # Gemma 2 and 3
            return Place(owner, stack, block, attention, norm, True, (pre_norm,), (norm,))
        if not children & {"pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_mlp_layernorm"}:
            return Place(owner, stack, block, attention, attention, True, (pre_norm,))  # Llama, Mistral, Qwen
    return None
