"""Tests of other libraries' symbols that flare uses. If an upgrade removes or changes a symbol, a test fails."""

from __future__ import annotations

import inspect

import peft
import pytest
import tiny
import torch
import transformers
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import flare
from flare import _compat, _versions
from flare.source.source_pass import module_switches


def test_types_are_registered_with_peft() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

    import flare

    assert PEFT_TYPE_TO_CONFIG_MAPPING["FLARE"] is flare.FlareConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["FLARE"] is flare.FlareModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["FLARE"] == "lora_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING["FLARE_X_MIXUP"] is flare.baselines.XMixupConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING["FLARE_X_MIXUP"] == "lora_"
    assert "fusion" in CONFIG_KEYS_TO_CHECK["FLARE"] and "use_rslora" in CONFIG_KEYS_TO_CHECK["FLARE"]


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (BaseTuner, "inject_adapter", ["model", "adapter_name"]),
        (LoraModel, "_prepare_adapter_config", ["peft_config", "model_config"]),
        (BaseTuner, "merge_adapter", ["adapter_names", "safe_merge"]),
        (BaseTuner, "merge_and_unload", ["progressbar", "safe_merge", "adapter_names"]),
        (BaseTuner, "unload", []),
        (BaseTuner, "delete_adapter", ["adapter_name"]),
        (LoraModel, "add_weighted_adapter", ["adapters", "weights", "adapter_name", "combination_type"]),
        (LoraModel, "_enable_peft_forward_hooks", []),
        (BaseTuner, "_remove_adapter_name_from_key", ["adapter_name"]),
        (BaseTuner, "_remap_adapter_state_dict_for_load", ["config", "adapter_name", "state_dict"]),
        (LoraLayer, "_check_forward_args", ["x"]),
        (peft.tuners.lora.Linear, "merge", ["safe_merge", "adapter_names"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_methods_that_flare_overrides_or_calls_have_these_parameters(owner, name, parameters) -> None:
    assert list(inspect.signature(getattr(owner, name)).parameters)[1 : 1 + len(parameters)] == parameters


def test_lora_layer_has_the_attributes_that_flare_reads() -> None:
    model = peft.get_peft_model(tiny.model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    for name in (
        "lora_A",
        "lora_B",
        "lora_dropout",
        "scaling",
        "lora_variant",
        "base_layer",
        "merged",
        "lora_embedding_A",
    ):
        assert hasattr(layer, name), name
    assert layer.disable_adapters is False and layer._disable_adapters is False
    assert _compat.set_adapters_disabled(layer, True) is False and layer.disable_adapters is True
    assert isinstance(LoraLayer.other_param_names, tuple) and "scaling" in LoraLayer.other_param_names
    assert issubclass(LoraLayer, BaseTunerLayer)


def test_modules_to_save_wrapper_can_be_disabled() -> None:
    model = peft.get_peft_model(tiny.model("bert"), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    wrapper = model.get_base_model().classifier
    assert isinstance(wrapper, _compat.AuxiliaryTrainingWrapper)
    assert wrapper._disable_adapters is False and hasattr(wrapper, "original_module")


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gemma2", "mt5"])
def test_models_have_checkpointing_blocks_and_a_backbone(family) -> None:
    model = tiny.model(family)
    assert any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    assert isinstance(model.base_model, transformers.PreTrainedModel)


@pytest.mark.parametrize("cache", [transformers.DynamicCache, transformers.EncoderDecoderCache])
def test_caches_have_methods_for_row_selection(cache) -> None:
    for name in ("reorder_cache", "batch_select_indices", "get_seq_length", "crop"):
        assert callable(getattr(cache, name)), name


def test_every_module_is_returned_once_in_torchs_order() -> None:
    model = flare.fast_lora(tiny.model("mt5"), r=2)  # its stacks share the embedding
    model.shared_again, model.nothing = model.base_model.model.shared, None
    model.register_module("none", None)
    assert [*map(id, _compat.every_module(model))] == [*map(id, model.modules())]


def test_copy_each_copies_into_views() -> None:
    sources = [torch.randn(2, 3), torch.randn(2, 1)]
    buffer = torch.zeros(2, 5)
    _compat.copy_each([buffer[:, :3], buffer[:, 4:]], sources, False)
    assert torch.equal(buffer, torch.cat([sources[0], torch.zeros(2, 1), sources[1]], 1))


def test_attributes_of_a_subclass_are_read_without_its_code() -> None:
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_: object) -> None:
            raise AssertionError("the subclass's code ran")

    loud = torch.zeros(2).as_subclass(Loud)
    with _compat.without_torch_function():
        assert loud._version == 0 and torch.Tensor.data_ptr(loud) and not loud.requires_grad
    with pytest.raises(AssertionError):
        torch.Tensor.data_ptr(loud)


def test_a_module_compiled_in_place_can_be_called_eagerly() -> None:
    class LinearPlusOne(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    module, calls = LinearPlusOne(2, 2), []
    module.compile(backend=lambda graph, inputs: calls.append(1) or graph.forward)
    with module_switches(module).off(dropout=True):
        module(torch.ones(2))
        assert not calls
    module(torch.ones(2))
    assert calls


def test_a_compiled_module_is_recognised() -> None:
    model = tiny.model("llama")
    assert not _compat.is_compiled(model)
    model.model.layers[1].compile(backend="eager")
    assert _compat.is_compiled(model)


@pytest.mark.parametrize("layer", _compat.GROWING_CACHE_LAYERS, ids=lambda layer: layer.__name__)
def test_rows_of_cache_layers_can_be_concatenated(layer) -> None:
    """Only ``keys`` and ``values`` have a dimension of rows, and each step is appended to them."""
    cache = layer(sliding_window=4) if "Sliding" in layer.__name__ else layer()
    first, second = torch.randn(2, 1, 3, 2), torch.randn(2, 1, 1, 2)
    assert not cache.is_initialized
    cache.update(first, first)
    by_row = [name for name, value in vars(cache).items() if isinstance(value, torch.Tensor) and value.dim()]
    assert sorted(by_row) == ["keys", "values"]
    cache.keys, cache.values = torch.cat([cache.keys, -cache.keys]), torch.cat([cache.values, -cache.values])
    keys, _ = cache.update(*[torch.cat([second, -second])] * 2)
    torch.testing.assert_close(keys[2:], -torch.cat([first, second], dim=2))
    assert cache.get_seq_length() == 4


def test_encoder_decoder_has_a_method_that_shifts_labels() -> None:
    method = transformers.MT5ForConditionalGeneration.prepare_decoder_input_ids_from_labels
    assert "labels" in inspect.signature(method).parameters


def test_end_of_backward_and_distributed_wrappers_are_recognised() -> None:
    order: list[str] = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            _compat.after_backward(lambda: order.append("after"))
            return grad

    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: order.append("leaf"))
    Node.apply(x).sum().backward()
    assert order == ["leaf", "after"]
    linear = torch.nn.Linear(2, 2)
    assert _compat.REPLICA_MARK in linear._replicate_for_data_parallel().__dict__
    assert _compat.REPLICA_MARK not in linear.__dict__ and not _compat.inside_ddp()
    assert "_active_ddp_module" in inspect.getsource(torch.nn.parallel.DistributedDataParallel._inside_ddp_forward)


def test_fsdp_unit_classes_are_the_classes_of_the_blocks() -> None:
    assert _compat.unit_classes(tiny.model("bert")) == ["BertLayer"]
    assert _compat.unit_classes(tiny.model("llama")) == ["LlamaDecoderLayer"]


def test_a_module_outside_fsdp_synchronizes_its_gradients() -> None:
    assert _compat.synchronizes_gradients(torch.nn.Linear(2, 2))


def test_bitsandbytes_layers_are_recognised() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: bnb)")
    import bitsandbytes as bnb
    import peft.tuners.lora as lora

    for name in ("Linear4bit", "Linear8bitLt"):
        assert _compat.is_lora_over_linear(getattr(lora, name)) and _compat.find_lora_class(name) is getattr(lora, name)
    int8 = [bnb.nn.Linear8bitLt(4, 4, has_fp16_weights=False, threshold=threshold) for threshold in (0.0, 6.0)]
    mixing = [bool(_compat.row_mixing_reason(linear)) for linear in (*int8, bnb.nn.Linear4bit(4, 4))]
    assert mixing == [False, True, False]
    assert _compat.is_quantized_linear(bnb.nn.Linear4bit(4, 4))
    assert not _compat.is_quantized_linear(tiny.torch.nn.Linear(4, 4))


def test_only_pefts_layers_for_linears_of_other_libraries_are_accepted() -> None:
    from peft.tuners.lora import awq, gptq, layer, te, torchao, tp_layer

    over_linears = (gptq.GPTQLoraLinear, awq.AwqLoraLinear, torchao.TorchaoLoraLinear, te.TeLinear)
    assert all(map(_compat.is_lora_over_linear, over_linears))
    others = (layer.Linear, layer.Embedding, layer.Conv1d, layer.MultiheadAttention, tp_layer.LoraParallelLinear)
    assert not any(map(_compat.is_lora_over_linear, others))
    assert (
        _compat.find_lora_class("GPTQLoraLinear") is gptq.GPTQLoraLinear and _compat.find_lora_class("Nowhere") is None
    )


def test_an_old_version_is_an_error_and_a_new_version_a_warning(monkeypatch) -> None:
    monkeypatch.setitem(_versions.TESTED, "peft", ("99.0", "99.1"))
    with pytest.raises(ImportError, match=r"flare needs peft>=99.0, found .*pip install"):
        _versions.check_versions()
    monkeypatch.setitem(_versions.TESTED, "peft", ("0.1", "0.2"))
    with pytest.warns(UserWarning, match=r"tested with peft>=0.1,<0.2, found 0\.") as seen:
        _versions.check_versions()
    assert len(seen) == 1


def test_reentrant_checkpointing_is_recognised():
    model = tiny.model("bert")
    assert not _compat.uses_reentrant_checkpointing(model)
    for use_reentrant in (True, False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert _compat.uses_reentrant_checkpointing(model) is use_reentrant
    model.gradient_checkpointing_disable()
    assert not _compat.uses_reentrant_checkpointing(model)


def test_attention_module_runs_with_a_registered_function() -> None:
    """transformers looks up _attn_implementation of the config in ALL_ATTENTION_FUNCTIONS."""
    seen = []

    def ours(module, query, key, value, mask, **kwargs):
        seen.append(tuple(key.shape))
        return query.transpose(1, 2), None

    _compat.register_attention("flare_test", ours)
    model = tiny.model("llama")
    attention = model.model.layers[1].self_attn
    assert _compat.looks_up_attention(attention) and not _compat.looks_up_attention(model.lm_head)
    with _compat.attention_function(attention, "flare_test"):
        model(**tiny.batch("llama", source=False))
    model(**tiny.batch("llama", source=False))
    assert seen == [(3, 2, 9, 8)]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_capture_creates_no_mask_if_none_is_given(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers treats a capture like tracing, and some releases then create a mask."""
    from transformers import masking_utils
    from transformers.utils import import_utils

    config = tiny.config(family)
    config._attn_implementation = "sdpa"
    embedded, mask = torch.zeros(2, 5, tiny.HIDDEN), torch.ones(2, 5, dtype=torch.long)
    positions = torch.arange(5).unsqueeze(0)

    def create_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
        if family == "bert":
            return masking_utils.create_bidirectional_mask(config, embedded, mask)
        return masking_utils.create_causal_mask(config, embedded, mask, past_key_values=None, position_ids=positions)

    stock = masking_utils.is_tracing, masking_utils.find_packed_sequence_indices
    assert create_mask(None) is None and create_mask(mask) is None
    with _compat.eager_attention_masks():
        packed = torch.tensor([[0, 1, 0, 1, 2]])
        assert masking_utils.find_packed_sequence_indices(packed).tolist() == [[0, 0, 1, 1, 1]]  # not capturing
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        assert create_mask(None) is None
        assert create_mask(mask).shape == (2, 1, 5, 5)  # a capture cannot read the values, so the mask is expanded
    assert (masking_utils.is_tracing, masking_utils.find_packed_sequence_indices) == stock
    if family == "llama":
        assert create_mask(None) is not None  # if this fails, the context manager may not be needed


def test_hooks_of_modules_and_of_gradients_are_recognised() -> None:
    module, kinds = nn.Linear(2, 2), []
    for register in ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"):
        assert sum(map(len, _compat.module_hooks(module))) == len(kinds)
        kinds.append(getattr(module, f"register_{register}")(lambda *_: None))
    assert sum(map(len, _compat.module_hooks(module))) == 4
    assert not _compat.has_gradient_hooks(module.weight)
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        handle = getattr(module.weight, register)(lambda *_: None)
        assert _compat.has_gradient_hooks(module.weight)
        handle.remove()
        assert not _compat.has_gradient_hooks(module.weight)


def test_a_backward_pass_and_a_checkpoint_are_recognised() -> None:
    seen = []

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append((_compat.in_backward(), _compat.saved_tensors_are_packed()))
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(note, note(x), use_reentrant=False).sum().backward()
    assert seen == [(False, False), (False, True), (True, True)]


def test_slice_of_a_module_list_is_not_a_registration() -> None:
    """transformers' decoders slice their list of blocks in each forward. Replaced and added modules are counted."""
    before, blocks = _compat.registrations.count, nn.ModuleList([nn.ReLU(), nn.ReLU()])
    assert len(blocks[:1]) == 1 and _compat.registrations.count == before
    blocks[0] = nn.GELU()
    assert _compat.registrations.count == before + 1
    nn.ModuleDict({"a": nn.ReLU()})
    assert _compat.registrations.count == before + 2


@pytest.mark.parametrize(("options", "saved"), [({}, True), ({"preserve_rng_state": False}, False)])
def test_checkpointing_that_saves_the_random_state_is_recognised(options: dict, saved: bool) -> None:
    model = tiny.model("bert")
    assert not _compat.checkpoints_save_random_state(model)
    _compat.enable_checkpointing(model, {"use_reentrant": False, **options})
    assert _compat.checkpoints_save_random_state(model) == saved
