"""Source and target in one pass over the weights: the numbers of two passes, half the reads, and when there are two.

Only ``source_layer_offset=0`` has it. The yardstick is ``source_pass="separate"``, which tests/test_generation.py holds
against one forward without a cache.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import tiny
import torch
import transformers
from test_generation import ENDING, TOLERANCE, ends_of, fused, generated, prompts, row_of, source_text
from torch.utils._python_dispatch import TorchDispatchMode

import flare
from flare.experiments.measure import count_calls
from flare.source.context import KEYWORD, THREAD

L = tiny.LAYERS
REASON = "generate: source and target take a pass each, not one together"


def zero_offset(family: str = "llama", **options: Any) -> Any:
    return fused(family, source_layer_offset=0, **options)


def of_family(name: str) -> Any:
    """Sliding windows shorter than the text, in some of the blocks."""
    torch.manual_seed(0)
    values = {**tiny._DECODER, "head_dim": 8, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
    base = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**values))
    base.generation_config.eos_token_id = None
    model = flare.fast_lora(base, r=5, source_layer_offset=0)
    tiny.randomize_lora(model)
    return model.double().eval()


def both_ways(model: Any, inputs: dict, new: int = 6, seed: int = 0, **options: Any) -> dict[str, tuple]:
    """Sequences, logits and executions of blocks, by source_pass; one message for anything that differs."""
    found = {}
    for way in ("separate", "shared"):
        torch.manual_seed(seed)
        with count_calls(tiny.block_list(model.get_base_model())) as calls:
            sequences, logits = generated(model, inputs, new, source_pass=way, **options)
        found[way] = (sequences, logits, calls.total)
    assert torch.equal(found["shared"][0], found["separate"][0])
    torch.testing.assert_close(found["shared"][1], found["separate"][1], **TOLERANCE)
    return found


# --- the numbers of two passes, in half the executions ----------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["add_relu", "mul"])
@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.filterwarnings("ignore:source_padding='keep'")
def test_greedy(fusion, padding) -> None:
    model, inputs = zero_offset(fusion=fusion), prompts()
    found = both_ways(model, inputs, source_padding=padding)
    assert found["separate"][2] == 2 * 6 * L
    assert found["shared"][2] == (2 + 5) * L, "two for the prompts, then one for each token"
    _, plain_logits = generated(model, {n: v for n, v in inputs.items() if not n.startswith("source")})
    assert not torch.allclose(found["shared"][1][:, -1], plain_logits[:, -1], atol=1e-3), (
        "the source made no difference"
    )


@pytest.mark.parametrize("name", ["Mistral", "Qwen3", "Gemma2", "Gemma3", "Qwen2"])
def test_families_with_sliding_windows(name) -> None:
    model = of_family(name) if name != "Gemma3" else zero_offset("gemma3", base={"sliding_window": 4})
    inputs = prompts(pads=name != "Gemma2")  # it runs eager attention alone, NaN on rows of pads in float64
    if name == "Gemma2":
        assert len(set(model.config.layer_types)) == 2, "windows in every block"
    found = both_ways(model, inputs)
    assert found["shared"][2] == (2 + 5) * L


class _WeightReads(TorchDispatchMode):
    """How often each frozen weight goes into a product."""

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
def test_each_frozen_weight_is_read_once_a_token(way, reads, targets) -> None:
    model, inputs = zero_offset(target_modules=targets), prompts()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n}
    assert len(linears) == 7 * L + 1, "seven in a block, and the head"
    counted = []
    for new in (3, 7):
        with _WeightReads({m.weight.data_ptr(): n for n, m in linears.items()}) as mode:
            generated(model, inputs, new, source_pass=way)
        counted.append(mode.reads)
    assert {name: counted[1][name] - counted[0][name] for name in linears} == dict.fromkeys(linears, 4 * reads)


def test_samples_share_their_prompts_source_row() -> None:
    found = both_ways(zero_offset(), prompts(), do_sample=True, top_k=0, num_return_sequences=3)
    assert len({tuple(row) for row in found["shared"][0].tolist()}) > 3, "nothing was sampled"


@pytest.mark.parametrize("sample", [False, True])
def test_beams(sample) -> None:
    """They change places in the target's rows alone; the source's one row for each prompt stays where it is."""
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
    assert any(len(set(r.tolist())) > 1 for r in out["shared"].beam_indices.view(6, -1)), "no beam changed its place"


@pytest.mark.parametrize("padded", [True, False])
def test_a_source_that_has_ended_is_held(padded) -> None:
    model, inputs = zero_offset(), prompts(seed=ENDING, pads=padded)
    ends = ends_of(model, inputs, 7)
    going_on = generated(model, inputs, 7)[1]
    found = both_ways(model, inputs, 7, eos_token_id=ends, min_new_tokens=7)
    assert not torch.allclose(found["shared"][1][0], going_on[0], atol=1e-4), "holding made no difference"


def test_sources_that_have_all_ended_leave_the_batch() -> None:
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
def test_adapters_that_do_not_fuse_stay_off_the_source(options) -> None:
    model = zero_offset(**options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    both_ways(model, prompts())


def test_several_adapters() -> None:
    model = zero_offset()
    model.add_adapter("second", flare.FlareConfig(r=4, fusion="mul", source_layer_offset=0, task_type="CAUSAL_LM"))
    tiny.randomize_lora(model, seed=4)
    model.double()
    model.base_model.set_adapter(["default", "second"])
    both_ways(model, prompts())


def test_other_ways_in() -> None:
    """Chunks of a prompt, embeddings, and a base whose projections somebody hooks."""
    model, inputs = zero_offset(), prompts()
    for chunk in (1, 3):
        both_ways(model, inputs, prefill_chunk_size=chunk)
    embeds = model.get_base_model().get_input_embeddings()(inputs["input_ids"])
    both_ways(model, {**{n: v for n, v in inputs.items() if n != "input_ids"}, "inputs_embeds": embeds})
    seen = []
    projection = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    projection.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    both_ways(model, inputs)
    assert all(torch.equal(kept, then) for kept, then in seen), "what a hook holds was written to"


def test_a_row_does_not_depend_on_its_batch() -> None:
    model, inputs = zero_offset(), prompts()
    sequences, logits = generated(model, inputs, source_pass="shared")
    for row in range(3):
        alone, own = generated(model, row_of(inputs, row), source_pass="shared")
        assert torch.equal(alone[0, -6:], sequences[row, -6:])
        torch.testing.assert_close(own[0], logits[row], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_autocast(dtype) -> None:
    """Against float64 no worse than two passes are, up to rounding; the same tokens are fed to both."""
    model, inputs = zero_offset(fusion="add"), prompts()
    want = generated(model, inputs, 2)[1]
    model = model.to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, close = generated(model, inputs, 2, source_pass="shared")
        tolerance = 1e-4 if dtype == torch.float32 and not autocast else 0.05
        assert (close - want).abs().max() < tolerance


# --- what a caller gets to see ----------------------------------------------------------------------------------------


def test_hidden_states_and_attentions_are_the_targets() -> None:
    model, inputs = zero_offset(), prompts()
    model.get_base_model().set_attn_implementation("eager")
    inputs = prompts(pads=False)
    options = {"max_new_tokens": 3, "pad_token_id": 1, "output_hidden_states": True, "output_attentions": True}
    out = {
        way: model.generate(**inputs, **options, return_dict_in_generate=True, source_pass=way)
        for way in ("separate", "shared")
    }
    for name in ("hidden_states", "attentions"):
        for got, want in zip(out["shared"][name][-1], out["separate"][name][-1], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_a_cache_goes_on_where_it_ended() -> None:
    """Token by token, and with several at once, for which the two streams part and meet again."""
    model, inputs = zero_offset(), prompts()
    sequences, logits = generated(model, inputs, 7, source_pass="separate")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1, "return_dict_in_generate": True}
    first = model.generate(**inputs, **options)
    cache = copy.deepcopy(first.past_key_values)
    assert cache.layers[0].keys.shape[0] == 6
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long)], dim=1)
    go_on = {"attention_mask": mask[:, :-1], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(input_ids=first.sequences, past_key_values=cache, **go_on), sequences)
    cache = first.past_key_values
    with torch.no_grad(), count_calls(tiny.block_list(model.get_base_model())) as calls:
        positions = (mask.cumsum(1) - 1)[:, 9:]
        out = model(
            input_ids=sequences[:, 9:11], attention_mask=mask, position_ids=positions[:, :2], past_key_values=cache
        )
        assert cache.layers[0].keys.shape[0] == 3 and calls.total == 3 * L, "two tokens of the source, one by one"
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


def test_nothing_is_left_behind_also_by_a_failing_pass() -> None:
    model, inputs = zero_offset(), prompts()
    want = generated(model, inputs, source_pass="shared")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if len(args[0]) == 6 and kwargs["past_key_values"].get_seq_length() > 8:
            raise RuntimeError("out of memory, say")

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        generated(model, inputs, source_pass="shared")
    handle.remove()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert THREAD.slot.rows is None and THREAD.slot.forward is None and THREAD.slot.context is None
    again = generated(copy.deepcopy(model), inputs, source_pass="shared")
    torch.testing.assert_close(again, want, rtol=0, atol=0)


# --- where there are two passes ---------------------------------------------------------------------------------------


def executions(model: Any, inputs: dict, **options: Any) -> int:
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
def test_by_design(make, options, message) -> None:
    """Nothing to be told of, unless one pass was asked for."""
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


def with_long_rope() -> Any:
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
    (with_other_adapters, "embed_tokens is a Embedding of PEFT's"),
    (with_long_rope, "rope_type='dynamic' looks at the longest row"),
    (with_experts, r"mlp\.experts\.0 stands in a list of modules"),
]


@pytest.mark.parametrize(("make", "message"), UNUSUAL, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_unusual_is_said_once(make, message) -> None:
    model, inputs = make(), prompts()
    with pytest.warns(UserWarning, match=f"{REASON}: .*{message}"):
        assert executions(model, inputs) == 2 * 3 * L
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        executions(model, inputs)
        executions(model, inputs, source_pass="separate")
    with pytest.raises(ValueError, match=f"source_pass='shared' is not possible: .*{message}"):
        generated(model, inputs, 3, source_pass="shared")


def test_a_merged_adapter_is_in_the_weights_of_both() -> None:
    model = zero_offset()
    plain_config = flare.FlareConfig(r=4, fusion=None, target_modules=["o_proj"], task_type="CAUSAL_LM")
    model.add_adapter("plain", plain_config)
    tiny.randomize_lora(model, seed=4)
    model.double()
    model.merge_adapter(["plain"])
    with pytest.warns(UserWarning, match=f"{REASON}: an adapter is merged into .*o_proj"):
        assert executions(model, prompts()) == 2 * 3 * L


def test_other_caches(monkeypatch) -> None:
    class Another(transformers.cache_utils.DynamicLayer):
        """A layer of a kind that nobody has looked at."""

    model, inputs = zero_offset(), prompts()
    monkeypatch.setitem(transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Another)
    with pytest.warns(UserWarning, match=rf"{REASON}: the model's KV cache has layers \(Another\)"):
        assert executions(model, inputs) == 2 * 3 * L


def test_what_a_forward_is_given_for_the_target_alone() -> None:
    """A mask of four dimensions, made by hand: this step takes two passes and says so."""
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


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match="source_pass='both' is not accepted; one of: auto, shared, separate"):
        generated(zero_offset(), prompts(), source_pass="both")


@pytest.mark.parametrize("together", [True, False], ids=["one call", "by itself"])
def test_layers_called_with_other_rows_say_so(together) -> None:
    """As one that sees a part of a batch would be."""
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
def test_layers_that_the_source_does_not_reach_are_named(where) -> None:
    """Attention modules that are not given their keyword arguments in a decoding step."""

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
