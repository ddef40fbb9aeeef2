"""Tests of torch.compile on the whole model and on each block.

The graph of a whole model contains the source pass if the pass can be traced.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
import torch._dynamo.testing
import transformers
from torch import nn

import flare
from flare import FlareTrainer


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fused(family: str, checkpointing: bool | None = None, **overrides):
    model = flare.fast_lora(tiny.model(family), **{"r": 5, "lora_alpha": 7, **overrides})
    tiny.randomize_lora(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model


def step(model: nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name.replace("_orig_mod.", ""): grad for name, grad in tiny.gradients(model).items()}


def assert_same_step(actual, expected) -> None:
    torch.testing.assert_close(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(actual[1][name], grad, msg=name, rtol=1e-5, atol=1e-7)


def whole(model: nn.Module, backend: str) -> nn.Module:
    """Return a compiled wrapper around the whole model."""
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: str) -> nn.Module:
    """Compile each block in place."""
    for block in tiny.block_list(model.get_base_model()):
        block.compile(backend=backend)
    return model


def model_in_place(model: nn.Module, backend: str) -> nn.Module:
    """Compile the base model in place. Its hooks then have separate graphs."""
    model.get_base_model().compile(backend=backend)
    return model


def wrapped(model: nn.Module, backend: str) -> nn.Module:
    """Replace each block by a compiled wrapper."""
    blocks = tiny.block_list(model.get_base_model())
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend=backend)
    return model


@pytest.mark.parametrize(
    ("family", "how", "checkpointing"),
    [
        ("bert", in_place, None),
        ("llama", whole, None),
        ("llama", wrapped, False),
        ("llama", in_place, None),
        ("llama", in_place, False),
        ("llama", in_place, True),
        ("llama", model_in_place, None),
    ],
)
def test_compiled_training_steps_match_eager_steps(family, how, checkpointing) -> None:
    """The two batches have different widths. ``checkpointing`` is use_reentrant, or None without checkpointing."""
    backend = "aot_eager" if family == "bert" else "eager"
    model, reference = how(fused(family, checkpointing), backend), fused(family)
    for inputs in (tiny.batch(family), tiny.batch(family, m=11, seed=5)):
        assert_same_step(step(model, inputs), step(reference, inputs))


class Graphs:
    """Backend that stores its graphs and compiles them with another backend."""

    def __init__(self, backend: str = "eager") -> None:
        self.graphs: list[torch.fx.Graph] = []
        self.backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> object:
        self.graphs.append(module.graph)
        return self.backend(module, inputs)

    def adapters(self) -> list[int]:
        """Return the number of outputs of each call of the kernels' operator, in order."""
        nodes = [node for graph in self.graphs for node in graph.nodes]
        return [len(node.args[4]) for node in nodes if node.target is torch.ops.flare_kernels.lora.default]


@pytest.mark.parametrize(("family", "offset", "sites"), [("xlmr", 0, 3), ("llama", 1, 3), ("mt5", 0, 3 + 2)])
def test_source_and_target_are_one_graph_with_one_operator_per_site(family, offset, sites) -> None:
    """A site is a group of projections that read the same input and share one call of the kernels.

    Dropout is off in the source pass. In the target pass it draws the same masks as in eager mode.
    """
    changes = {} if family == "llama" else {"dropout_rate" if family == "mt5" else "hidden_dropout_prob": 0.2}
    base = tiny.model(family, dtype=torch.float64, **changes)
    model = flare.fast_lora(base, r=5, lora_alpha=7, source_layer_offset=offset).to(torch.float64)
    tiny.randomize_lora(model)
    reference, backend = copy.deepcopy(model), Graphs()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    inputs = tiny.batch(family)
    if family == "mt5":  # Dynamo of torch 2.11 cannot trace the creation of the KV cache
        inputs["use_cache"] = False
    torch.manual_seed(3)
    expected = step(reference, inputs)
    torch.manual_seed(3)
    assert_same_step(step(compiled, inputs), expected)
    separate = 2 * 2 if family == "mt5" else 0  # cross-attention's query and value read different inputs
    assert len(backend.graphs) == 1
    assert sorted(backend.adapters()) == [1] * separate + [2] * sites
    assert all(module.training for module in model.modules())


@pytest.mark.slow
def test_inductor_matches_eager_mode() -> None:
    model = fused("xlmr")
    compiled = torch.compile(copy.deepcopy(model), backend="inductor", fullgraph=True)
    assert_same_step(step(compiled, tiny.batch("xlmr")), step(model, tiny.batch("xlmr")))


def test_switched_adapter_and_new_hook_recompile() -> None:
    """A graph has guards on the adapters' state. A projection with a hook gets its own call of the operator."""
    backend = Graphs()
    model = fused("xlmr")
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    inputs = tiny.batch("xlmr")
    assert_same_step(step(compiled, inputs), step(reference, inputs))
    assert backend.adapters() == [2, 2, 2]
    backend.graphs.clear()
    for one in (model, reference):
        layer = tiny.block_list(one.get_base_model())[1].attention.self.query
        layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert_same_step(step(compiled, inputs), step(reference, inputs))
    assert sorted(backend.adapters()) == [1, 1, 2, 2]
    with model.disable_adapter(), reference.disable_adapter(), torch.no_grad():
        plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
        torch.testing.assert_close(compiled(**plain).logits, reference(**plain).logits)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, reference(**inputs).logits)


@pytest.mark.parametrize("why", ["recompute", "cache", pytest.param("a break", marks=pytest.mark.slow)])
def test_graph_breaks_do_not_change_the_step(why) -> None:
    """A source pass that cannot be traced runs eagerly, after a graph break."""
    model = fused("xlmr", source_memory="recompute" if why == "recompute" else "keep")
    reference, backend = copy.deepcopy(model), Graphs()
    if why == "cache":
        model.set_source_cache(flare.SourceStateCache(1 << 24, tiers=("host",)))
    elif why != "recompute":
        block = tiny.block_list(model.get_base_model())[1]
        block.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        assert_same_step(step(compiled, tiny.batch("xlmr")), step(reference, tiny.batch("xlmr")))
    assert backend.adapters()


def train(folder: Path, model: nn.Module, **options) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return losses and trained weights of two steps of FlareTrainer."""
    rows = tiny.batch("xlmr", B=4)
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=2, logging_steps=1, report_to=[], seed=1,
        learning_rate=1e-2, **options,
    )  # fmt: skip
    data = [{name: value[row] for name, value in rows.items()} for row in range(4)]
    trainer = FlareTrainer(model, args, data_collator=transformers.default_data_collator, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_training(actual, expected) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=1e-4)
    for name, weight in expected[1].items():
        torch.testing.assert_close(actual[1][name], weight, msg=name, rtol=1e-3, atol=1e-4)


def test_compiled_flare_trainer_matches_eager_training(tmp_path: Path) -> None:
    model = fused("xlmr")
    reference, options = copy.deepcopy(model), {"use_cpu": True}
    expected = train(tmp_path / "eager", reference, **options)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "torch_compile_mode": "default"}
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same_training(train(tmp_path / "compiled", model, **compiled, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flare_trainer_with_cuda_graphs_matches_eager_training(tmp_path: Path) -> None:
    model = fused("xlmr")
    expected = train(tmp_path / "eager", copy.deepcopy(model))
    compiled = {"torch_compile": True, "torch_compile_mode": "reduce-overhead"}
    assert_same_training(train(tmp_path / "compiled", model, **compiled), expected)


def test_compiled_steps_with_and_without_a_source_match_eager_steps() -> None:
    model, reference = in_place(fused("llama"), "eager"), fused("llama")
    for source in (False, True, False):
        inputs = tiny.batch("llama", source=source)
        assert_same_step(step(model, inputs), step(reference, inputs))


def test_checkpointed_blocks_compile_if_side_effects_in_backward_are_skipped() -> None:
    """Without Dynamo's setting for side effects under checkpointing, a checkpointed block runs eagerly."""
    counter = torch._dynamo.testing.CompileCounter()
    model, reference = in_place(fused("llama", False), counter), fused("llama")
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        for inputs in (tiny.batch("llama"), tiny.batch("llama", m=11, seed=5)):
            assert_same_step(step(model, inputs), step(reference, inputs))
    assert counter.frame_count >= 1
