"""Test X-Mixup: model families, generation, checkpointing, saving, training, and invalid arguments."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from datasets import Dataset
from mixup_models import LAYER, batch, mixup_model, randomised, with_source_labels
from transformers import Trainer, TrainingArguments
from two_streams import rows, task_model, tokenizer

from flare import FlareConfig
from flare.baselines import load_x_mixup, plain_lora, x_mixup
from flare.training.trainer import FlareTrainer

# --- families, generation, checkpointing ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["roberta", "distilbert", "mistral", "qwen3", "gemma2", "gemma3", "mt5"])
def test_every_family_mixes_and_copies_are_independent(family: str):
    model = randomised(x_mixup(tiny.model(family, **({"dropout_rate": 0.0} if family == "mt5" else {})), r=4))
    inputs = tiny.batch(family)
    if family in ("mistral", "qwen3", "gemma2", "gemma3"):
        inputs["labels"][:, :6] = -100
        inputs["source_labels"] = torch.full_like(inputs["labels"], -100)
    out = model(**inputs)
    out.loss.backward()
    assert all(g.isfinite().all() and g.abs().max() > 0 for n, g in tiny.gradients(model).items() if "lora_" in n)
    other = {**inputs, "source_input_ids": inputs["source_input_ids"].roll(1, 1)}
    assert not torch.allclose(model(**other).logits, out.logits)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(**inputs).logits, out.logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mt5"])
def test_generation_matches_teacher_forcing(family: str):
    """Every generated token has the largest logit in a teacher-forced forward pass. Rows have unequal padding."""
    model = randomised(x_mixup(tiny.model(family, eos_token_id=None), r=4)).eval()
    inputs = {k: v for k, v in tiny.batch(family, B=3, m=9).items() if k != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    generated = model.generate(**inputs, **options)
    assert not torch.equal(
        generated, model.generate(**{k: v for k, v in inputs.items() if "source" not in k}, **options)
    )
    beams = model.generate(**inputs, num_beams=3, **options)
    assert beams.shape == generated.shape
    if family == "mt5":
        forced = model(**inputs, decoder_input_ids=generated[:, :-1]).logits.argmax(-1)
        assert torch.equal(forced, generated[:, 1:])
        return
    new = generated[:, 9:]
    grown = {k: torch.cat([v, torch.ones_like(new)], 1) for k, v in inputs.items() if k != "input_ids"}
    grown["source_attention_mask"][:, 9:] = 0
    labels = torch.cat([torch.full((3, 9), -100), new], 1)
    out = model(input_ids=generated, labels=labels, **grown)
    assert torch.equal(out.logits[:, 8:-1].argmax(-1), new)
    with pytest.raises(ValueError, match="prefill_chunk_size cannot be combined with a source"):
        model.generate(**inputs, prefill_chunk_size=4, **options)


@pytest.mark.parametrize("family", ["llama", "mt5"])
def test_generate_infers_a_missing_attention_mask_as_transformers_does(family: str):
    """Padding is masked, unless the pad token is an end token too."""
    model = randomised(x_mixup(tiny.model(family, eos_token_id=None), r=4)).eval()
    inputs = {k: v for k, v in tiny.batch(family, B=3, m=9).items() if k != "labels"}
    mask = inputs.pop("attention_mask")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, 1)

    def logits(**options: Any) -> Any:
        options = {"max_new_tokens": 2, "pad_token_id": 1, **options}
        return model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True).logits[0]

    masked, unmasked = logits(attention_mask=mask), logits(attention_mask=torch.ones_like(mask))
    assert not torch.allclose(masked, unmasked, atol=1e-4)
    torch.testing.assert_close(logits(), masked, rtol=0, atol=0)
    torch.testing.assert_close(logits(eos_token_id=[1, 2]), unmasked, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool):
    grads = []
    for checkpointing in (False, True):
        model = mixup_model("bert")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**batch("bert")).loss.backward()
        grads.append(tiny.gradients(model))
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value)
    # the forward pass turns checkpointing off in the mixed block, and then on again
    assert model.get_base_model().bert.encoder.layer[LAYER].gradient_checkpointing


# --- saving and training ----------------------------------------------------------------------------------------------


def test_a_loaded_adapter_equals_the_saved_one(tmp_path: Path):
    model = mixup_model("xlmr", lambda0=0.4, alpha=0.3, layer_norm=False).eval()
    model.save_pretrained(tmp_path)
    inputs = batch("xlmr")
    for load in (load_x_mixup, peft.PeftModel.from_pretrained):
        loaded = load(task_model("xlmr").double(), tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
        config = loaded.peft_config["default"]
        assert (config.x_mixup_layer, config.x_mixup_lambda0, config.x_mixup_alpha) == (LAYER, 0.4, 0.3)
        assert not any(p.requires_grad for p in loaded.parameters())
    assert sum(p.requires_grad for n, p in model.named_parameters() if "x_mixup" in n) == 2
    card = (tmp_path / "README.md").read_text()
    assert "An X-Mixup adapter" in card and "A FLARE adapter" not in card
    plain_lora(task_model("xlmr"), r=4).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="adapter of type FLARE, not FLARE_X_MIXUP"):
        load_x_mixup(task_model("xlmr"), tmp_path / "plain")


@pytest.mark.parametrize("task", ["bert", "bert-spans", "llama"])
def test_a_resumed_run_gives_equal_weights_and_the_best_weights_are_loaded(task: str, tmp_path: Path):
    data = Dataset.from_list(with_source_labels(task, rows(task, 12)))

    def run(folder: str, resume: bool = False) -> Any:
        args = TrainingArguments(
            output_dir=str(tmp_path / folder),
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            per_device_train_batch_size=4,
            learning_rate=0.02,
            max_steps=4,
            save_steps=2,
            eval_steps=2,
            eval_strategy="steps",
            load_best_model_at_end=True,
        )
        model = x_mixup(task_model(task), r=4, layer=LAYER)
        trainer = FlareTrainer(
            model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer()
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-2") if resume else None)
        return trainer

    whole = run("run")
    again = run("run", resume=True)
    state, other = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    ratio = {n: float(v) for n, v in state.items() if "lora_x_mixup" in n}
    assert len(ratio) == 2 and 0.0 not in ratio.values() and 1.0 not in ratio.values()
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert whole.evaluate()["eval_loss"] == pytest.approx(min(losses))
    predicted = whole.predict(data).predictions
    assert len(predicted[0] if isinstance(predicted, tuple) else predicted) == 12


def test_a_model_without_a_source_warns_once_and_is_plain_lora():
    model, inputs = mixup_model("bert").eval(), batch("bert")
    alone = {name: value for name, value in inputs.items() if not name.startswith("source_")}
    with pytest.warns(UserWarning, match="run without a source and is plain LoRA"):
        logits = model(**alone).logits
    lora = plain_lora(task_model("bert").double(), r=4)
    lora.load_state_dict({name: weight for name, weight in model.state_dict().items() if "x_mixup" not in name})
    torch.testing.assert_close(lora.eval()(**alone).logits, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**alone)


@pytest.mark.parametrize("task", ["bert", "mt5"])
def test_an_interrupted_forward_leaves_no_source(task: str):
    """After a KeyboardInterrupt torch runs no hooks, so the next call removes the state."""
    model, inputs = mixup_model(task).eval(), batch(task)
    plain = {name: value for name, value in inputs.items() if not name.startswith("source_")}
    calls = [lambda: model(**plain).loss]
    if task == "mt5":  # generate calls the encoder directly
        del plain["labels"]
        options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
        calls = [lambda: model.generate(**plain, **options).logits[0]]

    def under_the_base_model() -> Any:
        with model.disable_adapter():
            return calls[0]()

    calls.append(under_the_base_model)
    for call in calls:
        expected, runs = call(), []

        def interrupt(module: Any, args: Any, output: Any, runs: list[Any] = runs) -> None:
            runs.append(output)
            if len(runs) == 2:  # the run on the target
                raise KeyboardInterrupt

        base = model.get_base_model()
        last = base.encoder.block[-1] if task == "mt5" else base.bert.encoder.layer[-1]
        handle = last.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        torch.testing.assert_close(call(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "option", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": lambda outputs, labels, **kwargs: outputs.logits}]
)
def test_options_that_take_the_labels_away_are_refused(option: dict[str, Any], tmp_path: Path):
    """Without labels there is no loss to which X-Mixup could add its terms."""
    (name,) = option
    smoothing, kwargs = (option, {}) if name == "label_smoothing_factor" else ({}, option)
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False, **smoothing)
    model, inputs = mixup_model("bert", dtype=torch.float32), batch("bert")
    with pytest.raises(ValueError, match=rf"{name}=.*X-Mixup's losses .* would be lost; leave {name} out"):
        FlareTrainer(model, args, processing_class=tokenizer(), **kwargs)
    FlareTrainer(plain_lora(task_model("bert"), r=4), args, processing_class=tokenizer(), **kwargs)
    stock = Trainer(model, args, **kwargs)
    with pytest.warns(UserWarning, match="is trained without labels, so the output has no loss"):
        stock.compute_loss(model, dict(inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock.compute_loss(model, dict(inputs))


def test_training_with_labels_and_predicting_without_them_do_not_warn():
    for task, names in (("bert", ("labels",)), ("bert-spans", ("start_positions", "end_positions"))):
        model, inputs = mixup_model(task), batch(task)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)
            model.eval()(**{name: value for name, value in inputs.items() if name not in names})


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_invalid_arguments_raise():
    with pytest.raises(
        ValueError, match=r"layer=3 is not a block of BertForSequenceClassification.* has blocks 0 to 2"
    ):
        x_mixup(task_model("bert"), r=4, layer=3)
    with pytest.raises(ValueError, match=r"lambda0=1\.5 must be a number from 0 to 1"):
        x_mixup(task_model("bert"), r=4, lambda0=1.5)
    with pytest.raises(TypeError, match="layer='middle' must be the number of a block"):
        x_mixup(task_model("bert"), r=4, layer="middle")
    with pytest.raises(ValueError, match="x_mixup does not fuse"):
        x_mixup(task_model("bert"), fusion="add")
    with pytest.raises(ValueError, match="starts from a transformers model, got a PeftModel"):
        x_mixup(plain_lora(task_model("bert"), r=4))
    model, inputs = x_mixup(task_model("bert"), FlareConfig(r=4)), batch("bert")
    assert model.peft_config["default"].r == 4
    with pytest.raises(ValueError, match=r"source_input_ids has shape \(3, 4\), the target's input_ids \(3, 10\)"):
        model(**{**inputs, "source_input_ids": inputs["source_input_ids"][:, :4], "source_attention_mask": None})
    with pytest.raises(ValueError, match="output_attentions=True: the attention of the mixup block runs twice"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="a model holds one X-Mixup adapter"):
        model.add_adapter("second", model.peft_config["default"])
    assert model(**inputs).loss.isfinite()  # the refused calls left the model as it was
    base = model.unload()
    names = {name: value for name, value in inputs.items() if not name.startswith("source_")}
    torch.testing.assert_close(base(**names).logits, task_model("bert")(**names).logits)
