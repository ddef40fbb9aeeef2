"""torch.compile around the whole model or around each block: the source pass stays eager, the numbers the same."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch._dynamo.testing
from torch import nn

import flare


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


def assert_same_step(got, want) -> None:
    torch.testing.assert_close(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, msg=name, rtol=1e-5, atol=1e-7)


def whole(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: str) -> nn.Module:
    for block in tiny.block_list(model.get_base_model()):
        block.compile(backend=backend)
    return model


def wrapped(model: nn.Module, backend: str) -> nn.Module:
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
    ],
)
def test_training_steps(family, how, checkpointing) -> None:
    """Two batches, the second of another width; in both modes of checkpointing."""
    backend = "aot_eager" if family == "bert" else "eager"
    model, reference = how(fused(family, checkpointing), backend), fused(family)
    for inputs in (tiny.batch(family), tiny.batch(family, m=11, seed=5)):
        assert_same_step(step(model, inputs), step(reference, inputs))


def test_with_and_without_a_source() -> None:
    model, reference = in_place(fused("llama"), "eager"), fused("llama")
    for source in (False, True, False):
        inputs = tiny.batch("llama", source=source)
        assert_same_step(step(model, inputs), step(reference, inputs))


def test_checkpointed_blocks_compile_where_side_effects_in_backward_are_skipped() -> None:
    """Dynamo's switch for side effects under checkpointing; without it such a block runs eagerly."""
    counter = torch._dynamo.testing.CompileCounter()
    model, reference = in_place(fused("llama", False), counter), fused("llama")
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        for inputs in (tiny.batch("llama"), tiny.batch("llama", m=11, seed=5)):
            assert_same_step(step(model, inputs), step(reference, inputs))
    assert counter.frame_count >= 1
