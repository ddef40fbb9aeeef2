"""Test the cases in which generation cannot read source and target in one shared pass and needs two passes.

With ``source_pass="auto"``, generation then uses two passes, in some cases with a warning. With
``source_pass="shared"``, generation raises an error with the reason.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
import transformers
from generating import TOLERANCE, fused, generated, prompts
from shared_passes import L, both_ways, zero_offset

import flare
from flare.experiments.measure import count_calls
from flare.source.context import KEYWORD, THREAD

REASON = "generate: source and target do not share a pass"


def executions(model: Any, inputs: dict, **options: Any) -> int:
    """Return how often blocks of the model run while it generates three tokens."""
    with count_calls(tiny.block_list(model.get_base_model())) as calls:
        generated(model, inputs, 3, **options)
    return calls.total


def in_train_mode() -> Any:
    return zero_offset().train()


def compiled() -> Any:
    model = zero_offset()
    model.get_base_model().model.layers[1].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (fused, {}, "source_layer_offset is 1"),
        (in_train_mode, {}, "train mode"),
        (compiled, {}, "compiled"),
        (zero_offset, {"source_alignment": "release"}, "source_alignment='release'"),
    ],
    ids=["offset", "train", "compiled", "release"],
)
def test_expected_reasons_for_two_passes_do_not_warn(make, options, message) -> None:
    """The model or an argument makes two passes necessary. "auto" does not warn about it; "shared" raises."""
    model, inputs = make(), prompts()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert executions(model, inputs, **options) > (2 + 2) * L
    with pytest.raises(ValueError, match=f"source_pass='shared' is not possible: .*{message}"):
        generated(model, inputs, 3, source_pass="shared", **options)


def with_trained_head() -> Any:
    model = zero_offset(modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"]
    torch.nn.init.normal_(head.weight)
    return model


def with_other_adapters() -> Any:
    return zero_offset(target_modules=["q_proj", "v_proj", "embed_tokens"])


def with_dynamic_rope() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return zero_offset(base={"rope_parameters": rope})


def with_experts() -> Any:
    model = zero_offset(target_modules=["q_proj", "v_proj", "gate_proj"])
    for block in model.get_base_model().model.layers:
        block.mlp.experts = torch.nn.ModuleList([block.mlp.gate_proj])
        del block.mlp._modules["gate_proj"]
        block.mlp.__dict__["gate_proj"] = block.mlp.experts[0]
    return model.eval()


UNUSUAL = [
    (with_trained_head, "lm_head is a ModulesToSaveWrapper"),
    (with_other_adapters, "embed_tokens is a Embedding of PEFT"),
    (with_dynamic_rope, "rope_type='dynamic' depends on the longest row"),
    (with_experts, r"mlp\.experts\.0 is in a list of modules"),
]


@pytest.mark.parametrize(("make", "message"), UNUSUAL, ids=lambda value: getattr(value, "__name__", ""))
def test_unexpected_reasons_for_two_passes_warn_once(make, message) -> None:
    model, inputs = make(), prompts()
    with pytest.warns(UserWarning, match=f"{REASON}: .*{message}"):
        assert executions(model, inputs) == 2 * 3 * L
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        executions(model, inputs)
        executions(model, inputs, source_pass="separate")
    with pytest.raises(ValueError, match=f"source_pass='shared' is not possible: .*{message}"):
        generated(model, inputs, 3, source_pass="shared")


def test_merged_adapter_prevents_a_shared_pass() -> None:
    model = zero_offset()
    plain_config = flare.FlareConfig(r=4, fusion=None, target_modules=["o_proj"], task_type="CAUSAL_LM")
    model.add_adapter("plain", plain_config)
    tiny.randomize_lora(model, seed=4)
    model.double()
    model.merge_adapter(["plain"])
    with pytest.warns(UserWarning, match=f"{REASON}: an adapter is merged into .*o_proj"):
        assert executions(model, prompts()) == 2 * 3 * L


def test_unknown_kv_caches_prevent_a_shared_pass(monkeypatch) -> None:
    class Another(transformers.cache_utils.DynamicLayer):
        """A cache layer of an unknown class."""

    model, inputs = zero_offset(), prompts()
    monkeypatch.setitem(transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Another)
    with pytest.warns(UserWarning, match=rf"{REASON}: the model's KV cache has layers \(Another\)"):
        assert executions(model, inputs) == 2 * 3 * L


def test_four_dimensional_mask_needs_two_passes() -> None:
    """A decoding step in which the mask of the target has four dimensions takes two passes and warns."""
    model, inputs = zero_offset(), prompts()
    sequences, logits = generated(model, inputs, 4, source_pass="separate")
    out = model.generate(**inputs, max_new_tokens=3, pad_token_id=1, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
    step = {"input_ids": sequences[:, 9:10], "past_key_values": out.past_key_values}
    step["position_ids"] = (mask.sum(1) - 1)[:, None]
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match=rf"{REASON}: attention_mask of the target is \(3, 1, 1, 10\)"),
    ):
        last = model(**step, attention_mask=mask.bool()[:, None, None]).logits
    torch.testing.assert_close(last.float(), logits[:, 3:], **TOLERANCE)


def test_an_unknown_source_pass_raises() -> None:
    with pytest.raises(ValueError, match="source_pass='both' is not accepted; one of: auto, shared, separate"):
        generated(zero_offset(), prompts(), source_pass="both")


@pytest.mark.parametrize("together", [True, False], ids=["one call for q and v", "a separate call"])
def test_a_layer_that_is_called_with_part_of_the_batch_raises(together) -> None:
    model, inputs = zero_offset(), prompts()
    q_proj = model.get_base_model().model.layers[1].self_attn.q_proj
    if not together:
        q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    forward = type(q_proj).forward
    q_proj.forward = lambda x: forward(q_proj, x[:-1] if len(x) == 6 else x)
    message = (
        "q_proj was called with 5 rows in a pass that source and target share, which has 6 rows: pass source_pass="
    )
    with pytest.raises(ValueError, match=message):
        generated(model, inputs, source_pass="shared")
    assert THREAD.slot.rows is None and THREAD.slot.forward is None


@pytest.mark.parametrize("where", ["one attention", "every attention"])
def test_error_names_layers_that_the_source_does_not_reach(where) -> None:
    """A hook removes the source's keyword argument from calls of attention modules in a shared decoding step."""

    def lose(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["hidden_states"]) == 6:
            del kwargs[KEYWORD]

    model, inputs = zero_offset(), prompts()
    blocks = model.get_base_model().model.layers
    lost = blocks[1:2] if where == "one attention" else blocks
    handles = [block.self_attn.register_forward_pre_hook(lose, with_kwargs=True, prepend=True) for block in lost]
    first = 1 if where == "one attention" else 0
    message = (
        rf"the source did not reach {2 * len(lost)} of {2 * L} fusing layers \(first: model.layers.{first}.self_attn"
    )
    with pytest.raises(ValueError, match=message):
        generated(model, inputs, source_pass="shared")
    assert THREAD.slot.rows is None and THREAD.slot.forward is None
    for handle in handles:
        handle.remove()
    both_ways(model, inputs)
