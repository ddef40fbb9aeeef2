"""Test decoding in which one shared pass runs source and target in one batch, so each weight is read once per token.

During generation, the frozen model continues the source text while the adapted model continues the target text
(docs/generation.md). A shared pass needs ``source_layer_offset=0``. Its results are compared with two passes
(``source_pass="separate"``), which tests/test_generation.py compares with a forward pass without a KV cache.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import tiny
import torch
import transformers
from generating import ENDING, TOLERANCE, ends_of, generated, prompts, row_of, source_text
from shared_passes import L, both_ways, zero_offset
from torch.utils._python_dispatch import TorchDispatchMode

import flare
from flare.experiments.measure import count_calls
from flare.source.context import THREAD


def of_family(name: str) -> Any:
    """Return a model that has sliding windows shorter than the text."""
    torch.manual_seed(0)
    values = {**tiny._DECODER, "head_dim": 8, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
    base = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**values))
    base.generation_config.eos_token_id = None
    model = flare.fast_lora(base, r=5, source_layer_offset=0)
    tiny.randomize_lora(model)
    return model.double().eval()


# --- the same numbers as two passes, with half the block executions ---------------------------------------------------


@pytest.mark.parametrize("fusion", ["add_relu", "mul"])
@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.filterwarnings("ignore:source_padding='keep'")
def test_greedy_decoding_matches_two_passes(fusion, padding) -> None:
    model, inputs = zero_offset(fusion=fusion), prompts()
    results = both_ways(model, inputs, source_padding=padding)
    assert results["separate"][2] == 2 * 6 * L
    assert results["shared"][2] == (2 + 5) * L, "two passes for the prompts, then one per token"
    _, plain_logits = generated(model, {n: v for n, v in inputs.items() if not n.startswith("source")})
    assert not torch.allclose(results["shared"][1][:, -1], plain_logits[:, -1], atol=1e-3), (
        "the source made no difference"
    )


@pytest.mark.parametrize("name", ["Mistral", "Qwen3", "Gemma2", "Gemma3", "Qwen2"])
def test_sliding_windows_match_two_passes(name) -> None:
    model = of_family(name) if name != "Gemma3" else zero_offset("gemma3", base={"sliding_window": 4})
    inputs = prompts(pads=name != "Gemma2")  # Gemma 2 has eager attention only, which gives NaN on padding in float64
    if name == "Gemma2":
        assert len(set(model.config.layer_types)) == 2, "some blocks of Gemma 2 must have no window"
    results = both_ways(model, inputs)
    assert results["shared"][2] == (2 + 5) * L


class _WeightReads(TorchDispatchMode):
    """Count the matrix products that read each frozen weight."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights, self.reads = weights, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func._schema.name.rpartition("::")[2] in ("mm", "addmm", "bmm", "addmm_", "linear"):
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.data_ptr() in self.weights:
                    self.reads[self.weights[arg.data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("way", "reads"), [("shared", 1), ("separate", 2)])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_shared_pass_reads_each_frozen_weight_once_per_token(way, reads, targets) -> None:
    model, inputs = zero_offset(target_modules=targets), prompts()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n}
    assert len(linears) == 7 * L + 1, "each block has seven linear layers, and the model one head"
    counted = []
    for new in (3, 7):
        with _WeightReads({m.weight.data_ptr(): n for n, m in linears.items()}) as mode:
            generated(model, inputs, new, source_pass=way)
        counted.append(mode.reads)
    assert {name: counted[1][name] - counted[0][name] for name in linears} == dict.fromkeys(linears, 4 * reads)


def test_samples_of_a_prompt_share_its_source_row() -> None:
    results = both_ways(zero_offset(), prompts(), do_sample=True, top_k=0, num_return_sequences=3)
    assert len({tuple(row) for row in results["shared"][0].tolist()}) > 3, "nothing was sampled"


@pytest.mark.parametrize("sample", [False, True])
def test_beam_search_matches_two_passes(sample) -> None:
    """Beam search reorders only the target's rows. The source has one row per prompt, which is not moved."""
    model, inputs = zero_offset(), prompts()
    out = {}
    for way in ("separate", "shared"):
        torch.manual_seed(0)
        out[way] = model.generate(
            **inputs,
            num_beams=4,
            num_return_sequences=2,
            do_sample=sample,
            top_k=0,
            max_new_tokens=6,
            pad_token_id=1,
            return_dict_in_generate=True,
            output_scores=True,
            source_pass=way,
        )
    assert torch.equal(out["shared"].sequences, out["separate"].sequences)
    torch.testing.assert_close(out["shared"].sequences_scores, out["separate"].sequences_scores, **TOLERANCE)
    assert out["shared"].past_key_values.layers[0].keys.shape[0] == 3 * 4 + 3
    assert torch.equal(out["shared"].beam_indices, out["separate"].beam_indices)
    assert any(len(set(r.tolist())) > 1 for r in out["shared"].beam_indices.view(6, -1)), "no beam was reordered"


@pytest.mark.parametrize("padded", [True, False])
def test_a_source_that_has_ended_keeps_the_state_of_its_end_token(padded) -> None:
    model, inputs = zero_offset(), prompts(seed=ENDING, pads=padded)
    ends = ends_of(model, inputs, 7)
    without_end = generated(model, inputs, 7)[1]
    results = both_ways(model, inputs, 7, eos_token_id=ends, min_new_tokens=7)
    assert not torch.allclose(results["shared"][1][0], without_end[0], atol=1e-4), "the end token made no difference"


def test_sources_leave_the_batch_when_all_of_them_have_ended() -> None:
    model, inputs = zero_offset(), prompts(seed=ENDING)
    ends = source_text(model, inputs, 2, [])[:, -1].tolist()  # every row ends with its second token
    options = {"eos_token_id": ends, "min_new_tokens": 6}
    assert both_ways(model, inputs, 6, **options)["shared"][2] == (2 + 5) * L
    out = model.generate(**inputs, **options, max_new_tokens=6, pad_token_id=1, return_dict_in_generate=True)
    assert out.past_key_values.layers[0].keys.shape[0] == 3, "the source's rows are still in the cache"


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "lora_bias": True},
        {"fusion_modules": ["v_proj"]},
    ],
    ids=str,
)
def test_adapters_that_do_not_fuse_are_not_applied_to_the_source(options) -> None:
    model = zero_offset(**options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    both_ways(model, prompts())


def test_several_active_adapters_match_two_passes() -> None:
    model = zero_offset()
    model.add_adapter("second", flare.FlareConfig(r=4, fusion="mul", source_layer_offset=0, task_type="CAUSAL_LM"))
    tiny.randomize_lora(model, seed=4)
    model.double()
    model.base_model.set_adapter(["default", "second"])
    both_ways(model, prompts())


def test_chunks_embeddings_and_hooked_projections_match_two_passes() -> None:
    """The cases are: prompts read in chunks, embeddings as inputs, and a hook that stores a frozen layer's output."""
    model, inputs = zero_offset(), prompts()
    for chunk in (1, 3):
        both_ways(model, inputs, prefill_chunk_size=chunk)
    embeds = model.get_base_model().get_input_embeddings()(inputs["input_ids"])
    both_ways(model, {**{n: v for n, v in inputs.items() if n != "input_ids"}, "inputs_embeds": embeds})
    seen = []
    projection = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    projection.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    both_ways(model, inputs)
    assert all(torch.equal(stored, then) for stored, then in seen), "an output stored by a hook was overwritten"


def test_a_row_does_not_depend_on_its_batch() -> None:
    model, inputs = zero_offset(), prompts()
    sequences, logits = generated(model, inputs, source_pass="shared")
    for row in range(3):
        alone, row_logits = generated(model, row_of(inputs, row), source_pass="shared")
        assert torch.equal(alone[0, -6:], sequences[row, -6:])
        torch.testing.assert_close(row_logits[0], logits[row], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_autocast_are_close_to_float64(dtype) -> None:
    """A shared pass in float32 or bf16, with and without autocast, gives logits close to the float64 logits."""
    model, inputs = zero_offset(fusion="add"), prompts()
    expected = generated(model, inputs, 2)[1]
    model = model.to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, close = generated(model, inputs, 2, source_pass="shared")
        tolerance = 1e-4 if dtype == torch.float32 and not autocast else 0.05
        assert (close - expected).abs().max() < tolerance


# --- outputs, KV caches and hooks that a caller sees ------------------------------------------------------------------


def test_hidden_states_and_attentions_have_the_targets_rows() -> None:
    model, inputs = zero_offset(), prompts()
    model.get_base_model().set_attn_implementation("eager")
    inputs = prompts(pads=False)
    options = {"max_new_tokens": 3, "pad_token_id": 1, "output_hidden_states": True, "output_attentions": True}
    out = {
        way: model.generate(**inputs, **options, return_dict_in_generate=True, source_pass=way)
        for way in ("separate", "shared")
    }
    for name in ("hidden_states", "attentions"):
        for actual, expected in zip(out["shared"][name][-1], out["separate"][name][-1], strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


def test_generation_continues_from_a_cache() -> None:
    """Continue token by token, and with two tokens in one call.

    The KV cache holds the target's three rows and the source's three rows. A call with several tokens moves the
    source's rows out of it, and the next call with one token moves them back.
    """
    model, inputs = zero_offset(), prompts()
    sequences, logits = generated(model, inputs, 7, source_pass="separate")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1, "return_dict_in_generate": True}
    first = model.generate(**inputs, **options)
    cache = copy.deepcopy(first.past_key_values)
    assert cache.layers[0].keys.shape[0] == 6
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long)], dim=1)
    options = {"attention_mask": mask[:, :-1], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(input_ids=first.sequences, past_key_values=cache, **options), sequences)
    cache = first.past_key_values
    with torch.no_grad(), count_calls(tiny.block_list(model.get_base_model())) as calls:
        positions = (mask.cumsum(1) - 1)[:, 9:]
        out = model(
            input_ids=sequences[:, 9:11], attention_mask=mask, position_ids=positions[:, :2], past_key_values=cache
        )
        assert cache.layers[0].keys.shape[0] == 3 and calls.total == 3 * L, (
            "the source reads its two tokens in two passes"
        )
        torch.testing.assert_close(out.logits.float(), logits[:, 3:5], **TOLERANCE)
        longer = torch.cat([mask, mask[:, -1:]], dim=1)
        out = model(
            input_ids=sequences[:, 11:12],
            attention_mask=longer,
            position_ids=positions[:, 1:2] + 1,
            past_key_values=cache,
            return_dict=False,
        )
        assert cache.layers[0].keys.shape[0] == 6 and calls.total == 4 * L
        torch.testing.assert_close(out[0].float(), logits[:, 5:6], **TOLERANCE)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_generation_leaves_no_hooks_or_state_even_if_it_fails(error) -> None:
    """After a KeyboardInterrupt torch runs no hooks, so the next forward removes the state."""
    model, inputs = zero_offset(), prompts()
    expected = generated(model, inputs, source_pass="shared")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if len(args[0]) == 6 and kwargs["past_key_values"].get_seq_length() > 8:
            raise error("simulated failure")

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(error, match="simulated failure"):
        generated(model, inputs, source_pass="shared")
    handle.remove()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    if error is KeyboardInterrupt:
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert THREAD.slot.rows is None and THREAD.slot.forward is None and THREAD.slot.context is None
    again = generated(copy.deepcopy(model), inputs, source_pass="shared")
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
