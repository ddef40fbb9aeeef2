"""Test recipes. A recipe, given by its name or as a YAML file, loads and quantises a base and adds fusing adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
import yaml
from datasets import Dataset
from two_streams import rows, tokenizer

import flare
from flare.experiments.runs.defaults import kind_of
from flare.experiments.utils.errors import UserError
from flare.recipes import Recipe, names

CLASSES = {
    "CAUSAL_LM": transformers.LlamaForCausalLM,
    "SEQ_CLS": transformers.LlamaForSequenceClassification,
    "QUESTION_ANS": transformers.LlamaForQuestionAnswering,
    "TOKEN_CLS": transformers.LlamaForTokenClassification,
}
KINDS = {"qlora": "FlareLinear4bit", "qlora-int8": "FlareLinear8bitLt"}
needs_bnb = pytest.mark.skipif(
    not transformers.utils.is_bitsandbytes_available(), reason="bitsandbytes is not installed (extra: bnb)"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one folder for each task. It holds a tiny Llama for the task and a tokenizer without a pad token."""
    folders = {}
    for task, model_class in CLASSES.items():
        folders[task] = tmp_path_factory.mktemp(task)
        torch.manual_seed(0)
        config = tiny.config("llama", hidden_size=64, intermediate_size=64, num_labels=3)
        model_class(config).save_pretrained(folders[task])
        word_tokenizer = tokenizer(pad=False)
        word_tokenizer.eos_token = "[SEP]"
        word_tokenizer.save_pretrained(folders[task])
    return folders


def loaded(recipe: Any, base: Path, **changes: Any) -> Any:
    model, _ = flare.from_recipe(recipe, base, r=4, lora_alpha=8, **changes)
    tiny.randomize_lora(model)
    return model


# --- packaged recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_packaged_recipes_can_be_read_and_used(name, tmp_path) -> None:
    recipe = Recipe.read(name)
    config = flare.FlareConfig(**recipe.adapter)
    assert (config.r, config.lora_alpha, config.fusion) == (64, 128, "add_relu")
    args = recipe.training_arguments(tmp_path, use_cpu=True, bf16=False, optim="adamw_torch")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert args.get_warmup_steps(100) == 10
    assert recipe.collator(tokenizer()).layout == {"SEQ_2_SEQ_LM": "seq2seq", "CAUSAL_LM": "causal"}.get(
        recipe.task, "encoder"
    )
    if recipe.quantization is not None:  # the decoders
        assert config.target_modules == "all-linear" and config.source_padding == "zero"
        assert recipe.gradient_checkpointing and recipe.training["optim"] == "adamw_bnb_8bit"
        transformers.BitsAndBytesConfig(**recipe.quantization)


def test_paper_recipes_have_the_papers_settings() -> None:
    epochs = {"xlmr": (10, 10, 20), "mt5": (10, 10, 20), "llama": (3, 3, 5), "gemma2": (3, 3, 5)}
    for model, expected in epochs.items():
        recipes = [Recipe.read(f"paper-{model}/{task}") for task in ("xnli", "tydiqa", "nusax")]
        assert tuple(one.training["num_train_epochs"] for one in recipes) == expected
        assert [one.training["learning_rate"] for one in recipes] == [2e-5, 2e-4, 2e-4]
        assert [one.batches["max_length"] for one in recipes] == [128, 512, 128]
        assert all(one.base for one in recipes), "a recipe of the paper names its model"
        if model in ("llama", "gemma2"):  # as in flare train: the model generates the label or the answer
            assert {one.task for one in recipes} == {"CAUSAL_LM"}
            assert not any("num_labels" in one.model for one in recipes)


# --- QLoRA ------------------------------------------------------------------------------------------------------------


@needs_bnb
@pytest.mark.parametrize("name", KINDS)
def test_qlora_trains_saves_and_reloads(name, bases, tmp_path) -> None:
    recipe = Recipe.read(name)
    model, saved_tokenizer = recipe.load(bases["CAUSAL_LM"], r=4, lora_alpha=8)
    base = model.get_base_model()
    assert saved_tokenizer.pad_token == "[SEP]" and saved_tokenizer.padding_side == "left"
    report = model.fast_lora_report()
    assert {row.backend_layer for row in report} == {KINDS[name]}
    assert {row.module.rpartition(".")[2] for row in report.fused} == {"q_proj", "v_proj"}
    assert len(report) == 7 * tiny.LAYERS
    assert base.model.norm.weight.dtype == torch.float32 and base.is_gradient_checkpointing
    if name == "qlora":
        quantized = base.model.layers[0].mlp.up_proj.base_layer.weight.quant_state
        assert quantized.nested and quantized.quant_type == "nf4"
    arguments = recipe.training_arguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=1, use_cpu=True,
        optim="adamw_torch", report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = flare.FlareTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows("llama", 12)),
        data_collator=recipe.collator(saved_tokenizer),
    )
    trainer.train()
    moved = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert len(moved) == len(before), "every A and B is trained"
    model.save_pretrained(tmp_path / "adapter")
    inputs = recipe.collator(saved_tokenizer)(rows("llama", 3, seed=4))
    again, _ = recipe.load(bases["CAUSAL_LM"], trained=tmp_path / "adapter")
    assert {n for n, p in again.named_parameters() if p.requires_grad} == before.keys()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # under autocast, as the trainer ran the first model
        torch.testing.assert_close(again.train()(**inputs).logits.float(), model(**inputs).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^r: fixed by the trained adapter"):
        recipe.load(bases["CAUSAL_LM"], trained=tmp_path / "adapter", r=4)


@needs_bnb
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant", "peft's default"])
@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_a_quantised_base_keeps_the_fusion(name, mode, bases) -> None:
    """Logits and gradients equal a step without checkpointing, and differ from a step of plain LoRA.

    The authors' release trains plain LoRA if a quantised base is combined with checkpointing.
    """
    inputs = tiny.batch("llama")
    plain = {key: value for key, value in inputs.items() if not key.startswith("source_")}
    base = bases["CAUSAL_LM"]
    expected = loaded(name, base, gradient_checkpointing=False)
    if mode == "peft's default":
        bare = loaded(name, base, gradient_checkpointing=False, fusion=None).unload()
        model = flare.fast_lora(
            peft.prepare_model_for_kbit_training(bare), r=4, lora_alpha=8, target_modules="all-linear",
            source_padding="zero",
        )  # fmt: skip
        tiny.randomize_lora(model)
    else:
        model = loaded(name, base, gradient_checkpointing=mode)
    runs: list[int] = []
    attention = tiny.block_list(model.get_base_model())[0].self_attn
    attention.register_forward_pre_hook(lambda *_: runs.append(1))
    results = {}
    for key, one, batch in (("expected", expected, inputs), ("actual", model, inputs), ("plain", model, plain)):
        one.train().zero_grad()
        out = one(**batch)
        if key == "actual":
            before = len(runs)
        out.loss.backward()
        results[key] = (out.logits.detach(), tiny.gradients(one))
        if key == "actual":
            assert len(runs) > before, "the block was computed again: checkpointing is on"
    (logits, grads), (lora_logits, lora_grads) = results["actual"], results["plain"]
    torch.testing.assert_close(logits, results["expected"][0], rtol=1e-5, atol=1e-5)
    assert (logits - lora_logits).abs().max() > 0.05 * logits.abs().max()
    assert grads.keys() == results["expected"][1].keys()
    for key, grad in results["expected"][1].items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item(), msg=key)
    assert any((grads[key] - lora_grads[key]).norm() > 0.05 * grads[key].norm() for key in grads)


@needs_bnb
@pytest.mark.parametrize("task", ["SEQ_CLS", "QUESTION_ANS", "TOKEN_CLS"])
def test_heads_are_not_quantised_and_are_trained(task, bases) -> None:
    changes = {} if task == "QUESTION_ANS" else {"num_labels": 3}
    model = loaded("qlora", bases[task], task=task, **changes)
    heads = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert heads and all("modules_to_save" in name for name in heads)
    kind = {"SEQ_CLS": "llama-classes", "QUESTION_ANS": "bert-spans", "TOKEN_CLS": "bert-tokens"}[task]
    batch = Recipe.read("qlora").collator(tokenizer(), layout="encoder")(rows(kind, 3))
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if p.requires_grad)


def test_all_linear_excludes_a_trained_head(bases) -> None:
    """PEFT's "all-linear" excludes only the head of sequence classification, and fails on the two heads tested here."""
    for task in ("QUESTION_ANS", "TOKEN_CLS"):
        model = flare.fast_lora(CLASSES[task].from_pretrained(bases[task]), r=4, target_modules="all-linear")
        assert len(model.fast_lora_report()) == 7 * tiny.LAYERS


# --- user files, and refused recipes ----------------------------------------------------------------------------------


def test_a_users_recipe_file_is_read_and_used(bases, tmp_path) -> None:
    content = {
        "base": str(bases["SEQ_CLS"]),
        "task": "SEQ_CLS",
        "model": {"num_labels": 3},
        "adapter": {"r": 4, "fusion": "mul", "target_modules": ["q_proj", "v_proj"]},
        "tasks": {"one": {"adapter": {"fusion": "add"}, "training": {"learning_rate": 1e-3}}, "two": {}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content).replace("0.001", "1e-3"))
    model, saved_tokenizer = flare.from_recipe(
        f"{tmp_path / 'mine.yaml'}/one", source_padding="zero", attn_implementation="eager"
    )
    config = model.peft_config["default"]
    assert (config.fusion, config.r, config.source_padding) == ("add", 4, "zero")
    assert model.get_base_model().config._attn_implementation == "eager"
    assert model.get_base_model().config.pad_token_id == 1 and saved_tokenizer.pad_token_id is not None
    assert Recipe.read(f"{tmp_path / 'mine.yaml'}/one").training["learning_rate"] == 1e-3
    del content["tasks"]
    checked, _ = flare.from_recipe(content, gradient_checkpointing="reentrant", r=2)
    assert checked.get_base_model().is_gradient_checkpointing and checked.peft_config["default"].r == 2


def test_a_multimodal_base_gets_its_pad_token_in_the_config_of_its_text_model(tmp_path) -> None:
    """The config of Gemma3ForConditionalGeneration has no pad_token_id."""
    tiny.multimodal(pad_token_id=None).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, saved_tokenizer = flare.from_recipe({"task": "CAUSAL_LM", "adapter": {"r": 4}}, tmp_path)
    config = model.get_base_model().config
    assert not hasattr(config, "pad_token_id")
    assert config.text_config.pad_token_id == saved_tokenizer.pad_token_id is not None


REFUSED = [
    ("qlra", {}, ValueError, "recipe 'qlra' is neither a file nor one of: .*qlora"),
    ("paper-llama", {}, ValueError, "one recipe for each task: paper-llama/xnli"),
    ("paper-llama/mnli", {}, ValueError, "no task 'mnli'; it has: xnli, tydiqa, nusax"),
    ("qlora", {}, ValueError, "has no base model: pass its name or folder as base"),
    ({"base": "x"}, {}, ValueError, "task is missing; one of: SEQ_CLS"),
    ({"task": "SEQ_CLS", "lr": 1}, {}, ValueError, "lr: not a key of a recipe; keys: about, adapter"),
    ({"task": "CLS"}, {}, ValueError, "task='CLS' is not accepted"),
    (
        {"task": "SEQ_CLS", "adapter": {"rank": 4}},
        {},
        ValueError,
        "adapter has rank; it takes the fields of FlareConfig",
    ),
    ({"task": "SEQ_CLS", "training": 3}, {}, TypeError, "training must be a mapping, got 3"),
    ("qlora", {"gradient_checkpointing": "on"}, ValueError, "gradient_checkpointing='on' is not accepted"),
]


@pytest.mark.parametrize(("recipe", "changes", "error", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_invalid_recipes_raise(recipe, changes, error, message) -> None:
    with pytest.raises(error, match=message):
        flare.from_recipe(recipe, **changes)


def test_an_unknown_argument_is_named_in_the_error(bases) -> None:
    recipe = {"task": "SEQ_CLS", "base": str(bases["SEQ_CLS"])}
    with pytest.raises(TypeError, match=r"fusoin: not a key of a recipe, not a field of FlareConfig, and not accepted"):
        flare.from_recipe(recipe, fusoin="mul")


def test_missing_bitsandbytes_raises(bases, monkeypatch) -> None:
    monkeypatch.setattr("flare.recipes.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes, or pass quantization=None"):
        flare.from_recipe("qlora", bases["CAUSAL_LM"])


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"trust_remote_code": True}},
        {"tokenizer": {"trust_remote_code": True}},
        {"model": {"use_kernels": True}},
        {"model": {"weights_only": False}},
        {"model": {"attn_implementation": "owner/kernel"}},
        {"adapter": {"megatron_core": "evil"}},
    ],
    ids=str,
)
def test_recipes_that_allow_foreign_code_are_refused(content, tmp_path) -> None:
    (tmp_path / "evil.yaml").write_text(yaml.safe_dump({"task": "SEQ_CLS", "tasks": {"x": content}}))
    with pytest.raises(ValueError, match="a recipe never runs"):
        Recipe.read(f"{tmp_path / 'evil.yaml'}/x")


def test_code_of_a_model_folder_does_not_run_by_default(bases, tmp_path, monkeypatch) -> None:
    """Recipes and commands do not ask at the terminal. The folder's module writes the file `ran` if it is imported."""
    folder = tmp_path / "model"
    shutil.copytree(bases["SEQ_CLS"], folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForSequenceClassification\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked at the terminal"))
    recipe = {"task": "SEQ_CLS", "base": str(folder)}
    with pytest.raises(ValueError, match="trust_remote_code"):
        flare.from_recipe(recipe)
    with pytest.raises(UserError, match="its own code, which the commands of flare do not run"):
        kind_of(str(folder))
    assert not (tmp_path / "ran").exists()
