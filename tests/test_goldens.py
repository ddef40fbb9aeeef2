"""Compare flare.fast_lora and FlareTrainer with stored results ("goldens") that follow the authors' release.

tests/goldens/README.md describes the results, which were computed on the versions that the authors pin. The selection
of cases in tests/goldens always runs. The environment variable FLARE_GOLDENS names a folder with the full set, whose
cases run too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import flare

SELECTION = Path(__file__).parent / "goldens"
#: Largest accepted differences.
LOGITS, LOSS, GRAD_ABSOLUTE, GRAD_RELATIVE, STEP_LOSS, WEIGHTS = 5e-5, 1e-5, 1e-5, 1e-4, 5e-5, 5e-5
_CONFIG_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *(
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ),
    *("layer_norm_eps", "rms_norm_eps", "rope_theta", "head_dim", "hidden_act", "attention_bias", "mlp_bias"),
    *("tie_word_embeddings", "id2label"),
)


def _cases() -> list[Any]:
    selected = json.loads((SELECTION / "manifest.json").read_text())["cases"]
    params = [pytest.param(SELECTION, name, id=name) for name in selected]
    full = os.environ.get("FLARE_GOLDENS")
    if full and Path(full, "manifest.json").is_file():
        every = json.loads(Path(full, "manifest.json").read_text())["cases"]
        rest = [name for name in every if name not in selected]
        params += [pytest.param(Path(full), name, id=f"full-{name}") for name in rest]
    return params


CASES = _cases()
TRAINING = [case for case in CASES if "train10" in case.values[1]]
GENERATION = [case for case in CASES if "generate" in case.values[1]]
SINGLE = [case for case in CASES if case not in TRAINING + GENERATION]


def build(folder: Path, name: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """Return a case's model with the stored base and adapter weights, the case's tensors, and its manifest entry."""
    manifest = json.loads((folder / "manifest.json").read_text())
    case = manifest["cases"][name]
    family = manifest["families"][case["family"]]
    values = {k: v for k, v in family["config"].items() if k in _CONFIG_KEYS and v is not None}
    if "id2label" in values:
        values["num_labels"] = len(values.pop("id2label"))
    if "rope_theta" in values:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "classifier_dropout")
    cls = getattr(transformers, family["model_class"])
    config = cls.config_class(**values, **dict.fromkeys(dropouts, 0.0))
    config._attn_implementation = "eager"
    model = cls(config)
    stored = load_file(folder / family["base_file"])
    missing, unexpected = model.load_state_dict({k.removeprefix("base."): v for k, v in stored.items()}, strict=False)
    assert not unexpected and all("position_ids" in key or "inv_freq" in key for key in missing)
    fusion = case["fusion"].replace("-", "_")
    tensors = load_file(folder / case["file"])
    model = flare.fast_lora(
        model,
        fusion=None if fusion == "none" else fusion,
        source_layer_offset=0,
        r=case["r"],
        lora_alpha=case["lora_alpha"],
        target_modules=case["target_modules"],
        cross_attention_heads=case.get("cross_attention_heads") or 1,
        latent_dim=tensors["mt_states"].shape[-1] if "mt_states" in tensors else None,
    )
    parameters = trained_parameters(model)
    loaded = {k for k in tensors if k.startswith(("adapter.", "mt_proj.")) and not k.endswith(".f64")}
    assert loaded == set(parameters)
    with torch.no_grad():
        for key in loaded:
            parameters[key].copy_(tensors[key])
    return model.train(), tensors, case


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters except the head's, by the names that they have in the golden files."""
    parameters = {}
    for name, parameter in model.named_parameters():
        path, _, rest = name.removeprefix("base_model.model.").partition(".default.")
        if path.endswith((".lora_A", ".lora_B")):
            parameters[f"adapter.{path}"] = parameter
        elif path.endswith(".lora_cross_attention"):
            parameters[f"adapter.{path.replace('lora_cross', 'cross')}.{rest}"] = parameter
        elif path.endswith(".latent_proj"):
            parameters[f"mt_proj.{rest}"] = parameter
    return parameters


def inputs_of(tensors: dict[str, torch.Tensor], fusion: str) -> dict[str, torch.Tensor]:
    """Return the keyword arguments of the model, from the tensors of a case."""
    inputs = {"input_ids": tensors["input_ids_target"], "attention_mask": tensors["attention_mask_target"]}
    if "mt_states" in tensors:
        inputs["source_states"] = tensors["mt_states"]
    elif fusion != "none":
        inputs["source_input_ids"] = tensors["input_ids_source"]
        inputs["source_attention_mask"] = tensors["attention_mask_source"]
    return inputs | {k: tensors[k] for k in ("labels", "start_positions", "end_positions") if k in tensors}


@pytest.mark.parametrize(("folder", "name"), SINGLE)
def test_logits_loss_and_gradients_of_one_step_match_the_release(folder, name) -> None:
    model, tensors, case = build(folder, name)
    out = model(**inputs_of(tensors, case["fusion"]))
    valid = tensors["attention_mask_target"].bool()
    compared = 0
    for key in ("logits", "start_logits", "end_logits"):
        if key in tensors:
            difference = (getattr(out, key) - tensors[key]).abs()
            difference = difference[valid] if difference.shape[:2] == valid.shape else difference
            assert difference.max() <= LOGITS, key
            compared += 1
    assert compared
    assert abs(out.loss.item() - tensors["loss"].item()) <= LOSS
    out.loss.backward()
    for key, parameter in trained_parameters(model).items():
        expected = tensors["grad." + key]
        allowed = GRAD_ABSOLUTE + GRAD_RELATIVE * expected.abs().max()
        assert (parameter.grad - expected).abs().max() <= allowed, key


@pytest.mark.parametrize(("folder", "name"), GENERATION)
def test_generation_with_the_releases_alignment_matches_the_release(folder, name) -> None:
    model, tensors, case = build(folder, name)
    out = model.eval().generate(
        **inputs_of(tensors, case["fusion"]),
        source_alignment="release",
        max_new_tokens=case["max_new_tokens"],
        do_sample=False,
        eos_token_id=case["eos_token_ids"],
        pad_token_id=case["pad_token_id"],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(out.sequences, tensors["target_sequences"])
    assert (torch.stack(out.logits) - tensors["target_step_logits"]).abs().max() <= LOGITS


class _Rows(torch.utils.data.Dataset):
    """Data set of the rows of a training case, in the order of the case's batches."""

    def __init__(self, tensors: dict[str, torch.Tensor], fusion: str) -> None:
        stacked = {k.removeprefix("batches."): v for k, v in tensors.items() if k.startswith("batches.")}
        steps = inputs_of(stacked, fusion)
        self.batch_size = steps["input_ids"].shape[1]
        self.columns = {k: v.flatten(0, 1) for k, v in steps.items()}

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {k: v[index] for k, v in self.columns.items()}


@pytest.mark.parametrize(("folder", "name"), TRAINING)
def test_ten_training_steps_of_flare_trainer_match_the_release(folder, name, tmp_path) -> None:
    model, tensors, case = build(folder, name)
    rows = _Rows(tensors, case["fusion"])
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=rows.batch_size,
        max_steps=10,
        learning_rate=1e-3,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )

    class InOrder(flare.FlareTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(rows)

    trainer = InOrder(model=model, args=arguments, train_dataset=rows)
    losses: list[float] = []
    compute = trainer.compute_loss

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        losses.append((result[0] if isinstance(result, tuple) else result).item())
        return result

    trainer.compute_loss = spy  # type: ignore[method-assign]
    trainer.train()
    expected = tensors["loss_per_step"].tolist()
    assert len(losses) == len(expected) == 10
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= STEP_LOSS
    for key, parameter in trained_parameters(model).items():
        assert (parameter - tensors["final." + key]).abs().max() <= WEIGHTS, key
    heads = {
        k.removeprefix("final.base."): v
        for k, v in tensors.items()
        if k.startswith("final.base.") and not k.endswith("f64")
    }
    parameters = dict(model.named_parameters())
    for key, weight in heads.items():
        head, _, rest = key.partition(".")
        trained = parameters[f"base_model.model.{head}.modules_to_save.default.{rest}"]
        assert (trained - weight).abs().max() <= WEIGHTS, key
