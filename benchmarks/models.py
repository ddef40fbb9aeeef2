"""Build whole models with random weights, and run the methods that train them on source and target texts.

All methods share one set of weights. Their models are copies of the base or of one PEFT model. A copy has separate
modules that refer to the same tensors, and some copies get this package's layers. The methods can therefore be timed in
turn, although the weights of a big model are in memory only once. A method is one row in the tables of results:

===============  =====================================================================================================
frozen           the frozen model: forward, and backward to its embeddings
peft-lora        plain LoRA on PEFT's layers; no source
lora             plain LoRA on this package's layers; no source
input-fusion     this package's layers on source and target concatenated to one text of 2m tokens
authors          FLARE as its authors run it: PEFT's layers, eager attention, a source pass through the whole model
                 with its head and all hidden states, x_S = the input of each block
eager-sdpa       the row authors with PyTorch's fused attention
flare            this package, source states kept on the device (source_memory="keep")
flare-offload    the row flare with source_memory="offload": states are kept in host memory (CUDA only)
flare-recompute  the row flare with source_memory="recompute": the source pass runs again in backward
flare-warm       the row flare with all source states in a SourceStateCache on the device: no source pass
===============  =====================================================================================================
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import liger
import peft
import torch
import transformers
from batches import Batch
from shapes import ModelShape
from torch import Tensor, nn

import flare
from flare.tuner.routing import ModelMap
from flare_kernels import reference

FUSION = "add_relu"
#: source_memory of the rows that run this package's FLARE.
MEMORY = {"flare": "keep", "flare-offload": "offload", "flare-recompute": "recompute", "flare-warm": "keep"}
METHODS = ("frozen", "peft-lora", "lora", "input-fusion", "authors", "eager-sdpa", *MEMORY)
#: Cost of a step in units of the frozen model's forward pass over m tokens. Methods that are not listed cost 3 units:
#: forward and backward of the target (no weight gradients) cost 2, and each source pass costs 1. Input-level fusion has
#: 2m tokens, so its forward and backward cost 4, plus the quadratic part of attention.
UNITS = {"frozen": 2, "peft-lora": 2, "lora": 2, "input-fusion": 4, "flare-recompute": 4, "flare-warm": 2}
#: How often a step runs each block. Methods that are not listed run it twice.
EXECUTIONS = {"frozen": 1, "peft-lora": 1, "lora": 1, "input-fusion": 1, "flare-recompute": 3, "flare-warm": 1}
PRECISION = torch.bfloat16

_TARGETS = {
    "xlmr": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "mt5": ["q", "v"],
}
_TASKS = {"xlmr": "SEQ_CLS", "llama": "CAUSAL_LM", "gemma2": "CAUSAL_LM", "mt5": "SEQ_2_SEQ_LM"}


def config_of(model: ModelShape, depth: int, positions: int) -> Any:
    """Return the transformers configuration of a model of a given depth, without dropout."""
    if model.family == "xlmr":
        return transformers.XLMRobertaConfig(
            vocab_size=model.vocabulary,
            hidden_size=model.d,
            intermediate_size=model.inner,
            num_hidden_layers=depth,
            num_attention_heads=model.heads,
            max_position_embeddings=positions + 2,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    if model.family == "mt5":
        return transformers.MT5Config(
            vocab_size=model.vocabulary,
            d_model=model.d,
            d_ff=model.inner,
            d_kv=model.head_dim,
            num_heads=model.heads,
            num_layers=depth,
            num_decoder_layers=depth,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    make = {"llama": transformers.LlamaConfig, "gemma2": transformers.Gemma2Config}[model.family]
    return make(
        vocab_size=model.vocabulary,
        hidden_size=model.d,
        intermediate_size=model.inner,
        num_hidden_layers=depth,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=max(positions, 8192),
    )


_CLASSES = {
    "xlmr": transformers.XLMRobertaForSequenceClassification,
    "llama": transformers.LlamaForCausalLM,
    "gemma2": transformers.Gemma2ForCausalLM,
    "mt5": transformers.MT5ForConditionalGeneration,
}


def base_model(
    model: ModelShape, depth: int, positions: int, device: torch.device, dtype: torch.dtype, precision: str = "plain"
) -> Any:
    """Return a model with random weights on the device. With "nf4" its blocks have bitsandbytes' linears."""
    with torch.device(device):
        base = _CLASSES[model.family](config_of(model, depth, positions))
    base = base.to(device, dtype)
    if precision == "nf4":
        quantise(base, device, dtype)
    return base


def quantise(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Replace every linear inside the blocks by one with nf4 weights."""
    import bitsandbytes as bnb

    for stack in ModelMap.of(model).stacks:
        blocks = model.get_submodule(stack)
        for path, linear in list(blocks.named_modules()):
            if type(linear) is not nn.Linear:
                continue
            new = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
            )
            new.weight = bnb.nn.Params4bit(linear.weight.data.to(dtype).cpu(), requires_grad=False, quant_type="nf4")
            new.bias = linear.bias
            owner, _, name = path.rpartition(".")
            setattr(blocks.get_submodule(owner), name, new.to(device))
    model.is_loaded_in_4bit = True


def refusal(precision: str) -> str | None:
    """Return why a precision cannot run on this machine, or None if it can."""
    if precision == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return None


def lora_config(family: str, r: int, dropout: float = 0.0) -> peft.LoraConfig:
    """Return a LoRA configuration for query and value."""
    return peft.LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=_TARGETS[family], task_type=_TASKS[family]
    )


# --- models on one set of weights --------------------------------------------------------------------------


@dataclass
class Models:
    """The models of all methods, which share one set of weights.

    Attributes:
        stock: model with PEFT's LoRA layers.
        eager: model with PEFT's LoRA layers and eager attention.
        lora: model with plain LoRA on this package's layers.
        ours: this package's FLARE models, by the row's name.
        family: family of the base model.
        cache: the source cache of flare-warm.
        frozen: the model without adapters; gradients reach its embeddings.
        liger: Liger's kernels, or None if the rows of liger.py do not run.
        over_liger: the models on Liger's kernels, by the row's name.
    """

    stock: Any
    eager: Any
    lora: Any
    ours: dict[str, Any]
    family: str
    cache: flare.SourceStateCache
    frozen: Any
    liger: liger.Liger | None = None
    over_liger: dict[str, Any] = field(default_factory=dict)

    def with_offset(self, offset: int) -> Any:
        """Return another FLARE model that shares the weights and has the given source_layer_offset."""
        return flare.fast_lora(same_weights(self.stock), fusion=FUSION, source_layer_offset=offset)

    @classmethod
    def of(cls, base: Any, family: str, r: int, dtype: torch.dtype) -> Models:
        """Build all models except those with Liger's kernels.

        All but ``frozen`` have LoRA on query and value, in ``dtype``, with a random B.
        """
        frozen = same_weights(base).requires_grad_(False)
        frozen.enable_input_require_grads()
        stock = peft.get_peft_model(base, lora_config(family, r), autocast_adapter_dtype=False)
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        eager, plain = same_weights(stock), same_weights(stock)
        eager.get_base_model().set_attn_implementation("eager")
        lora = flare.fast_lora(plain, fusion=None)
        copies = {row: same_weights(stock) for row in MEMORY}
        ours = {row: flare.fast_lora(copies[row], fusion=FUSION, source_memory=MEMORY[row]) for row in MEMORY}
        for model in (frozen, stock, eager, lora, *ours.values()):
            model.train()
        cache = flare.SourceStateCache({"device": 1 << 50}, tiers=("device",))
        ours["flare-warm"].set_source_cache(cache)
        return cls(stock, eager, lora, ours, family, cache, frozen)

    def add_liger(self) -> None:
        """Build the models of the rows in liger.py."""
        self.liger = liger.Liger(self.family)
        for row, method in liger.ROWS.items():
            model = same_weights(self.stock)
            self.liger.apply(model.get_base_model())
            if method == "flare":
                model = flare.fast_lora(model, fusion=FUSION, source_memory=MEMORY[method])
            elif method != "peft-lora":
                model = flare.fast_lora(model, fusion=None)
            self.over_liger[row] = model.train()

    @property
    def flare(self) -> Any:
        """Return the model of the row "flare"."""
        return self.ours["flare"]

    @property
    def trained(self) -> list[nn.Parameter]:
        """Return the trained parameters, which all models share."""
        return [p for p in self.stock.parameters() if p.requires_grad]

    def blocks(self, method: str) -> list[nn.Module]:
        """Return the blocks of a method's model; for an encoder-decoder, the blocks of its encoder."""
        return blocks_below(self.transformers_model(method))

    def transformers_model(self, method: str) -> Any:
        """Return the transformers model of a method, without PEFT's wrapper."""
        return self.frozen if method == "frozen" else self.model_of(method).get_base_model()

    def model_of(self, method: str) -> Any:
        """Return the model of a method."""
        named = {"lora": self.lora, "input-fusion": self.lora, "authors": self.eager, "frozen": self.frozen}
        return {**named, **self.ours, **self.over_liger}.get(method, self.stock)

    def refusal(self, method: str) -> str | None:
        """Return why a method is not measured on this model, or None if it is."""
        attention = self.stock.get_base_model().config._attn_implementation
        if method == "eager-sdpa" and attention != "sdpa":
            return f"transformers runs this model with {attention} attention: see the row authors"
        if method == "flare-offload" and self.stock.device.type == "cpu":
            return "on a CPU the states are in host memory already: see the row flare"
        return None

    def loss(self, method: str, batch: Batch) -> Tensor:
        """Run the forward pass of a method, including its source pass; return the loss."""
        model = self.model_of(method)
        if method in liger.ROWS:
            assert self.liger is not None
            with self.liger.functions_replaced():
                return model(**arguments(method, batch)).loss
        if method in ("authors", "eager-sdpa"):
            return self.eager_loss(model, batch, self.all_states(model, batch))
        return model(**arguments(method, batch)).loss

    def all_states(self, model: Any, batch: Batch) -> list[Tensor]:
        """Run the authors' source pass: the whole model with its head (mT5: the encoder). Return all hidden states."""
        with torch.no_grad(), model.disable_adapter():
            return list(self._source_reader(model)(**batch.source, output_hidden_states=True).hidden_states)

    def block_outputs(self, model: Any, batch: Batch) -> list[Tensor]:
        """Return the output of every block on the source text. By default, this package fuses with these outputs."""
        states: list[Tensor] = []

        def note(block: nn.Module, args: Any, output: Any) -> None:
            states.append(output if isinstance(output, Tensor) else output[0])

        handles = [block.register_forward_hook(note) for block in blocks_of(model)]
        try:
            with torch.no_grad(), model.disable_adapter():
                self._source_reader(model)(**batch.source)
        finally:
            for handle in handles:
                handle.remove()
        return states

    def _source_reader(self, model: Any) -> Any:
        base = model.get_base_model()
        return base.get_encoder() if self.family == "mt5" else base

    def eager_loss(self, model: Any, batch: Batch, states: list[Tensor]) -> Tensor:
        """Return the loss of FLARE on PEFT's own layers. Block i fuses with states[i]."""
        with _fusing(model, states, _TARGETS[self.family]):
            return model(**batch.target).loss


def without_liger(method: str) -> str:
    """Return the row of METHODS that computes the same as a row on Liger's kernels; return any other row unchanged."""
    return liger.ROWS.get(method, method)


def arguments(method: str, batch: Batch) -> dict[str, Tensor]:
    """Return the arguments with which a method's model is called."""
    method = without_liger(method)
    return batch.pair if method in MEMORY else batch.joined if method == "input-fusion" else batch.target


def blocks_of(model: Any) -> list[nn.Module]:
    """Return the blocks of a PEFT model; for an encoder-decoder, the blocks of its encoder."""
    return blocks_below(model.get_base_model())


def blocks_below(base: Any) -> list[nn.Module]:
    """Return the blocks of a transformers model; for an encoder-decoder, the blocks of its encoder."""
    stacks = [stack for stack in ModelMap.of(base).stacks if "decoder" not in stack.split(".")]
    return [block for stack in stacks for block in base.get_submodule(stack)]


@contextlib.contextmanager
def _fusing(model: Any, states: list[Tensor], targets: list[str]) -> Iterator[None]:
    """Replace the forward of PEFT's LoRA layers by FLARE's formula in eager PyTorch, within the context."""
    patched = []
    for block, state in zip(blocks_below(model.get_base_model()), states, strict=False):
        for path, layer in block.named_modules():
            if path.rpartition(".")[2] in targets and hasattr(layer, "lora_A"):
                layer.forward = _eager_forward(layer, state)
                patched.append(layer)
    try:
        yield
    finally:
        for layer in patched:
            del layer.forward


def _eager_forward(layer: Any, state: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        A, up, dropout = layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"]
        result = layer.base_layer(x)
        T = A(dropout(layer._cast_input_dtype(x, A.weight.dtype)))
        S = A(dropout(layer._cast_input_dtype(state, A.weight.dtype)))
        return (result + up(reference.fuse(S, T, FUSION)) * layer.scaling["default"]).to(result.dtype)

    return forward


def same_weights(model: nn.Module) -> Any:
    """Return a copy of the modules that shares every parameter and buffer."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def gradients(models: Models, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the adapters by name. All methods share these parameters."""
    named = [(n, p) for n, p in models.stock.named_parameters() if p.requires_grad and "lora_" in n]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: grad for (name, _), grad in zip(named, grads, strict=True) if grad is not None}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, for example warnings of other libraries about deprecated calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
