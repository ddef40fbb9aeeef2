"""Compute the memory of the paper's recipes on 1, 4 and 8 GPUs from the sizes of the models. Nothing is measured.

    python benchmarks/recipe_memory.py

No GPU is needed: parameters are counted on models that are built on the meta device. The bytes of a process are the sum
of these parts (with DDP, each GPU has one process and a whole model; d is the width and m the tokens of a text):

=================  ===================================================================================================
base               per weight: 4 in float32, 2 in bfloat16, 1/2 + 1/64 + 1/4096 in NF4 (double quantised scales)
trained weights    per weight, in float32: 4 (weight) + 4 (gradient) + 8 (AdamW's state; 2 for the 8-bit AdamW)
source states      2 d per token and fusing block, with source_memory="keep"
block              per token and block, saved by autograd in bfloat16 autocast without checkpointing:
                   2 (6 d) for x, q, k, v, and the input and output of attention; 4 (2 d) for the inputs of two norms;
                   2 d for dropout masks (not in Llama and Gemma 2); 2 f a for the feed-forward layer of width f,
                   where a is 1, or 3 if the layer is gated; in mT5, which has no fused attention, 7 m per head (scores)
checkpointing      2 d per token and block, plus the part "block" for a single block
logits             10 per token and vocabulary entry (Llama and Gemma 2 only): 2 in bfloat16, 4 for a float32 copy, 4
                   for its gradient
=================  ===================================================================================================

Not counted: the CUDA context and the libraries' workspaces (about 1 GiB), fragmentation, DDP's buckets (4 bytes per
trained weight), and mT5's decoder (its texts are short). For plain LoRA on XLM-R Large with B = 16, m = 512, no
dropout, and weights and norms in bfloat16, these formulas give 5.7 GiB. The measured peak on an H200 was 5.8 GiB
(benchmarks/results/nvidia-h200).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from models import base_model
from shapes import GEMMA2, LLAMA, MT5, XLMR, ModelShape

import flare
from flare.experiments.runs.fitting import per_process_batch
from flare.recipes import Recipe

GIB = 2**30
NF4 = 1 / 2 + 1 / 64 + 1 / 4096
GPUS = (1, 4, 8)
LENGTHS = {128: "nusax", 512: "tydiqa"}
RECIPES = {"paper-xlmr": XLMR, "paper-mt5": MT5, "paper-llama": LLAMA, "paper-gemma2": GEMMA2}


@dataclass(frozen=True)
class Need:
    """Memory of one process in bytes.

    Attributes:
        base: the frozen weights.
        trained: trained weights, their gradients and the optimizer's state.
        row: everything that grows with the batch, per row (text pair) of the batch.
    """

    base: float
    trained: float
    row: float

    def total(self, rows: int, shards: int = 1) -> float:
        """Return the bytes for a batch of ``rows``, if the base is sharded across ``shards`` processes.

        The temporary memory for gathering the largest sharded unit is not counted.
        """
        return self.base / shards + self.trained + rows * self.row


def need(name: str, m: int) -> Need:
    """Return the memory of a recipe for texts of m tokens."""
    shape, recipe = RECIPES[name], Recipe.read(f"{name}/{LENGTHS[m]}")
    with torch.device("meta"):
        base = base_model(shape, shape.layers, 512, torch.device("meta"), torch.float32)
    linears = sum(
        module.weight.numel()
        for path, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and "head" not in path and "classifier" not in path
    )
    others = sum(parameter.numel() for parameter in base.parameters()) - linears
    if shape is MT5:  # the published model has a separate head, but models.py ties the head to the embedding
        others += shape.vocabulary * shape.d if base.config.tie_word_embeddings else 0
    wide = 4 if recipe.dtype == "float32" else 2
    frozen = linears * NF4 + others * wide if recipe.quantization else (linears + others) * wide
    overrides = {key: value for key, value in recipe.adapter.items() if key != "source_padding"}
    model = flare.fast_lora(base, **overrides)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    optimizer = 2 if "8bit" in str(recipe.training.get("optim")) else 8
    return Need(frozen, trained * (8 + optimizer), _row(shape, recipe, m))


def _row(shape: ModelShape, recipe: Recipe, m: int) -> float:
    d = shape.d
    block = 12 * d + 8 * d + 2 * shape.inner * (1 if shape is XLMR else 3)
    block += 2 * d if shape in (XLMR, MT5) else 0
    block += 7 * m * shape.heads if shape is MT5 else 0
    blocks = 2 * d * shape.layers + block if recipe.gradient_checkpointing else block * shape.layers
    source = 2 * d * shape.layers
    logits = 10 * shape.vocabulary if shape in (LLAMA, GEMMA2) else 0
    return float(m * (blocks + source + logits))


def table() -> str:
    """Return the table of docs/distributed.md."""
    head = ["recipe", "m", "base", "trained", "a row", *(f"{n} GPU{'s' if n > 1 else ''}: rows, GiB" for n in GPUS)]
    lines = ["| " + " | ".join([*head, "8 GPUs, FSDP2"]) + " |", "|---|" + "---:|" * len(head)]
    for name in RECIPES:
        for m in LENGTHS:
            memory, training = need(name, m), Recipe.read(f"{name}/{LENGTHS[m]}").training
            cells = [name, str(m), *(f"{part / GIB:.2f}" for part in (memory.base, memory.trained, memory.row))]
            for gpus in GPUS:
                rows, steps = per_process_batch(training, gpus)
                batch = f"{rows} x {steps}" if steps > 1 else str(rows)
                cells.append(f"{batch}, {memory.total(rows) / GIB:.0f}")
            rows = per_process_batch(training, 8)[0]
            lines.append("| " + " | ".join([*cells, f"{memory.total(rows, 8) / GIB:.0f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(table())
