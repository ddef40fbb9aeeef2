"""Whole models with random weights, and the ways to train them on two texts that are compared.

One set of weights serves all methods: the stock PEFT model is copied, module by module but not weight by weight, and
the copies get this package's layers. So the methods can be timed in turn, and a big model is held once.

===============  =====================================================================================================
frozen           the frozen model alone: forward, and backward to its embeddings
peft-lora        plain LoRA on PEFT's layers; no source
lora             the same on this package's layers
input-fusion     the same layers on one text of source + target, 2m tokens
authors          FLARE as its authors run it: PEFT's layers, eager attention, the source through the whole model with
                 its head and all hidden states, x_S = the input of each block
eager-sdpa       the same with PyTorch's fused attention
flare            this package, source states kept on the device (source_memory="keep")
flare-offload    the same with source_memory="offload": states wait in host memory (CUDA only)
flare-recompute  the same with source_memory="recompute": the source pass runs once more in backward
flare-warm       "keep", every source row in a SourceStateCache (on the device): no source pass is run
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
#: source_memory of this package's rows.
MEMORY = {"flare": "keep", "flare-offload": "offload", "flare-recompute": "recompute", "flare-warm": "keep"}
METHODS = ("frozen", "peft-lora", "lora", "input-fusion", "authors", "eager-sdpa", *MEMORY)
#: A step in units of the frozen model's forward pass over m tokens: forward and backward of the target (no weight
#: gradients) are 2, each source pass is 1. Input-level fusion is 2 over 2m tokens, and more for its attention.
UNITS = {"frozen": 2, "peft-lora": 2, "lora": 2, "input-fusion": 4, "flare-recompute": 4, "flare-warm": 2}
#: How often a step runs each block, where that is not twice.
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
    """The transformers configuration of a model of the given depth, without dropout."""
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
    """A random model on the device; with nf4 the linears of its blocks are bitsandbytes'."""
    with torch.device(device):
        made = _CLASSES[model.family](config_of(model, depth, positions))
    made = made.to(device, dtype)
    if precision == "nf4":
        quantise(made, device, dtype)
    return made


def quantise(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Put nf4 weights in place of those of every linear inside the blocks."""
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
    """Why a precision cannot run here; None where it can."""
    if precision == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return None


def lora_config(family: str, r: int, dropout: float = 0.0) -> peft.LoraConfig:
    """LoRA on query and value."""
    return peft.LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=_TARGETS[family], task_type=_TASKS[family]
    )


# --- one set of weights, three sets of modules ------------------------------------------------------------------------


@dataclass
class Models:
    """PEFT's stock LoRA model, this package's plain LoRA and FLARE, over the same weights."""

    stock: Any
    eager: Any  # PEFT's, with eager attention
    lora: Any
    ours: dict[str, Any]  # this package's FLARE: row -> model
    family: str
    cache: flare.SourceStateCache  # of flare-warm
    frozen: Any  # without adapters; gradients reach its embeddings
    liger: liger.Liger | None = None
    over_liger: dict[str, Any] = field(default_factory=dict)  # row -> model

    def with_offset(self, offset: int) -> Any:
        """One more FLARE over the same weights, with another source_layer_offset."""
        return flare.fast_lora(same_weights(self.stock), fusion=FUSION, source_layer_offset=offset)

    @classmethod
    def of(cls, base: Any, family: str, r: int, dtype: torch.dtype) -> Models:
        """LoRA on query and value, adapters in the model's dtype, B not zero."""
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

    def put_over_liger(self) -> None:
        """Make the models of the rows of liger.py."""
        self.liger = liger.Liger(self.family)
        for row, method in liger.ROWS.items():
            model = same_weights(self.stock)
            self.liger.put_into(model.get_base_model())
            if method == "flare":
                model = flare.fast_lora(model, fusion=FUSION, source_memory=MEMORY[method])
            elif method != "peft-lora":
                model = flare.fast_lora(model, fusion=None)
            self.over_liger[row] = model.train()

    @property
    def flare(self) -> Any:
        """The model of the row of that name."""
        return self.ours["flare"]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.stock.parameters() if p.requires_grad]

    def blocks(self, method: str) -> list[nn.Module]:
        """The blocks of the model that a method runs; an encoder-decoder's encoder's."""
        return blocks_below(self.transformers_model(method))

    def transformers_model(self, method: str) -> Any:
        """The model that a method runs, without PEFT's around it."""
        return self.frozen if method == "frozen" else self.of_method(method).get_base_model()

    def of_method(self, method: str) -> Any:
        """The model that a method runs."""
        own = {"lora": self.lora, "input-fusion": self.lora, "authors": self.eager, "frozen": self.frozen}
        return {**own, **self.ours, **self.over_liger}.get(method, self.stock)

    def refusal(self, method: str) -> str | None:
        """Why a method has no row for this model; None where it has one."""
        attention = self.stock.get_base_model().config._attn_implementation
        if method == "eager-sdpa" and attention != "sdpa":
            return f"transformers runs this model with {attention} attention: see the row authors"
        if method == "flare-offload" and self.stock.device.type == "cpu":
            return "on a CPU the states are in host memory already: see the row flare"
        return None

    def loss(self, method: str, batch: Batch) -> Tensor:
        """The forward pass of a method, its source pass included."""
        model = self.of_method(method)
        if method in liger.ROWS:
            assert self.liger is not None
            with self.liger.in_force():
                return model(**arguments(method, batch)).loss
        if method in ("authors", "eager-sdpa"):
            return self.eager_loss(model, batch, self.all_states(model, batch))
        return model(**arguments(method, batch)).loss

    def all_states(self, model: Any, batch: Batch) -> list[Tensor]:
        """The authors' source pass: the whole model, its head included, and every hidden state of it."""
        with torch.no_grad(), model.disable_adapter():
            return list(self._reader(model)(**batch.source, output_hidden_states=True).hidden_states)

    def block_outputs(self, model: Any, batch: Batch) -> list[Tensor]:
        """What this package's default reads: the output of every block on the source text."""
        states: list[Tensor] = []

        def note(block: nn.Module, args: Any, output: Any) -> None:
            states.append(output if isinstance(output, Tensor) else output[0])

        handles = [block.register_forward_hook(note) for block in blocks_of(model)]
        try:
            with torch.no_grad(), model.disable_adapter():
                self._reader(model)(**batch.source)
        finally:
            for handle in handles:
                handle.remove()
        return states

    def _reader(self, model: Any) -> Any:
        base = model.get_base_model()
        return base.get_encoder() if self.family == "mt5" else base

    def eager_loss(self, model: Any, batch: Batch, states: list[Tensor]) -> Tensor:
        """The method over PEFT's own layers, block i fusing with states[i]."""
        with _fusing(model, states, _TARGETS[self.family]):
            return model(**batch.target).loss


def like(method: str) -> str:
    """The row of METHODS that computes what a row over Liger's kernels does; any other row itself."""
    return liger.ROWS.get(method, method)


def arguments(method: str, batch: Batch) -> dict[str, Tensor]:
    """What a method's model is called with."""
    kind = like(method)
    return batch.pair if kind in MEMORY else batch.joined if kind == "input-fusion" else batch.target


def blocks_of(model: Any) -> list[nn.Module]:
    """The blocks of a PEFT model; an encoder-decoder's encoder's."""
    return blocks_below(model.get_base_model())


def blocks_below(base: Any) -> list[nn.Module]:
    """The blocks of a transformers model; an encoder-decoder's encoder's."""
    stacks = [stack for stack in ModelMap.of(base).stacks if "decoder" not in stack.split(".")]
    return [block for stack in stacks for block in base.get_submodule(stack)]


@contextlib.contextmanager
def _fusing(model: Any, states: list[Tensor], targets: list[str]) -> Iterator[None]:
    """PEFT's layers, their forward replaced by the method's formula, written as PEFT writes LoRA."""
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
    """A copy of the modules that shares every parameter and buffer."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def gradients(models: Models, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the adapters by name, whichever method the loss is of: they share the weights."""
    named = [(n, p) for n, p in models.stock.named_parameters() if p.requires_grad and "lora_" in n]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: grad for (name, _), grad in zip(named, grads, strict=True) if grad is not None}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of other libraries about their own deprecated calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
