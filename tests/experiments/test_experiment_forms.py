"""Tests of flare finetune, train, evaluate and predict with each model family, on classification and questions.

The form of a task (`--form`) is how the model answers: with a head ("encoder"), or with generated text ("causal" for
decoders, "seq2seq" for encoder-decoders).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from experiment_data import write_bert, write_data, write_llama, write_t5
from predicting import predicts_as_evaluated

from flare.cli import main
from flare.experiments.runs.defaults import adapt_to_machine, kind_of, paper_recipe
from flare.experiments.runs.records import find_runs, read_record

QUICK = ("--batch-size", "8", "--lr", "1e-2", "--no-progress", "--epochs", "1", "--r", "4")
#: A prompt and a verbalizer of the user, which evaluate and predict read from run.json.
ASKED = ("--prompt", "{text} so the label is", "--verbalizer", "negative=the", "neutral=and", "positive=is")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with texts in data/, questions in qa/, and tiny models in bert/, llama/ and t5/."""
    root = tmp_path_factory.mktemp("forms")
    write_data(root / "data", rows={"train": (0, 16), "valid": (16, 24), "test": (24, 32)})
    questions = {"train": 16, "valid": 8, "test": 8}
    for language, word in (("english", "river"), ("vemari", "goats")):
        (root / "qa" / language).mkdir(parents=True)
        for split, count in questions.items():
            lines = []
            for row in range(count):
                context = f"the {word} {'old ' * (row % 3)}was near the house"
                at = context.index("near")
                answers = {"text": ["near the house"], "answer_start": [at]}
                lines.append({"id": str(row), "question": "where", "context": context, "answers": answers})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (root / "qa" / language / f"{split}.jsonl").write_text(text)
    write_bert(root / "bert")
    write_llama(root / "llama")
    write_t5(root / "t5")
    return root


def flare(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    ("model", "task", "methods", "length"),
    [
        ("bert", "classification", ("x-mixup",), 24),
        ("bert", "qa", ("lora", "input-fusion", "x-mixup", "flare"), 28),
        ("llama", "classification", ("lora", "input-fusion", "flare"), 40),
        ("llama", "qa", ("flare",), 64),
        ("t5", "classification", ("lora", "input-fusion", "flare"), 40),
        ("t5", "qa", ("flare",), 64),
    ],
)
@pytest.mark.filterwarnings("error:The source has no labels")
def test_every_model_family_and_task_is_trained_and_scored(place, tmp_path, model, task, methods, length):
    data = place / ("qa" if task == "qa" else "data")
    words = ("--task", task, "--data", data, "--output", tmp_path / "runs", "--max-length", length, *QUICK)
    if model == "llama" and task == "classification":
        words = (*words, *ASKED)
    assert flare("finetune", "--model", place / model, *words) == 0
    assert flare("train", "--target", "vemari", "--method", *methods, *words) == 0
    first = {}
    for run in find_runs(tmp_path / "runs"):
        if run.record.kind == "train":
            assert run.record.done and set(run.metrics.test["translate-train"]) == set(run.metrics.valid)
            assert (run.metrics.bottleneck is not None) == (run.record.method == "flare")
            first[run.folder] = (run.folder / "predictions-test.jsonl").read_text()
            lines = [json.loads(line) for line in first[run.folder].splitlines()]
            assert [line["id"] for line in lines] and len(lines) == 8
    assert len(first) == len(methods)
    # an adapter that is loaded again makes the predictions that it made after training
    assert flare("evaluate", "--output", tmp_path / "runs", "--no-resume", "--no-progress") == 0
    assert {folder: (folder / "predictions-test.jsonl").read_text() for folder in first} == first
    # flare predict also makes these predictions, from texts without labels
    for run in find_runs(tmp_path / "runs"):
        if run.record.kind == "train":
            names = predicts_as_evaluated(run, data, tmp_path)[0].keys()
            assert ("generated" in names) == (model != "bert")
            assert ("start" in names) == (model == "bert" and task == "qa")
            assert ("probabilities" in names) == (model == "bert" and task != "qa")


def test_the_base_determines_the_form_of_its_adapters(place, tmp_path):
    words = ("--task", "classification", "--data", place / "data", "--output", tmp_path / "runs", *QUICK)
    assert flare("finetune", "--model", place / "llama", "--form", "encoder", "--max-length", 40, *words) == 0
    assert flare("train", "--target", "vemari", "--method", "lora", "--max-length", 40, *words) == 0
    run = next(run for run in find_runs(tmp_path / "runs") if run.record.kind == "train")
    assert run.record.settings["family"] == "encoder" and run.metrics.test["translate-train"]["accuracy"] > 0


def test_a_classifier_can_be_fine_tuned_on_questions(place, tmp_path):
    config = transformers.AutoConfig.from_pretrained(place / "bert", num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    transformers.AutoTokenizer.from_pretrained(place / "bert").save_pretrained(tmp_path / "classifier")
    words = ("--task", "qa", "--data", place / "qa", "--output", tmp_path / "runs", "--max-length", 28, *QUICK)
    assert flare("finetune", "--model", tmp_path / "classifier", *words) == 0


def test_missing_backbone_weights_are_initialised_once(place, tmp_path):
    """A masked language model has no pooler. The saved base must have the random pooler that was used in training."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "bert")
    config = transformers.AutoConfig.from_pretrained(place / "bert")
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    words = ("--task", "classification", "--data", place / "data", "--output", tmp_path / "runs", "--max-length", 24)
    assert flare("finetune", *words, *QUICK, "--model", tmp_path / "mlm", "--seeds", 3) == 0
    transformers.set_seed(3)
    trained = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "mlm").bert.pooler.dense.weight
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "runs" / "base" / "seed-3")
    assert trained.equal(merged.bert.pooler.dense.weight)
    notes = read_record(tmp_path / "runs" / "base" / "seed-3").data["notes"]
    assert [note for note in notes if "no weights for bert.pooler.dense: they are initialised from the seed" in note]


def test_full_fine_tuning_uses_no_adapter(place, tmp_path):
    words = (
        "--task",
        "classification",
        "--data",
        place / "data",
        "--output",
        tmp_path,
        "--max-length",
        24,
        *QUICK[:-2],
    )
    assert flare("finetune", "--model", place / "bert", "--full", *words) == 0
    run = find_runs(tmp_path)[0]
    assert run.record.r is None and run.record.trainable_parameters > 10_000 and run.metrics.test["source-language"]


def test_the_papers_settings_depend_on_the_model_family(place):
    kinds = {name: kind_of(str(place / name)).family for name in ("bert", "llama", "t5")}
    assert kinds == {"bert": "encoder", "llama": "causal", "t5": "seq2seq"}
    llama = kind_of(str(place / "llama"))
    recipe = paper_recipe(llama, "xnli")
    assert recipe.training["learning_rate"] == 2e-5 and recipe.training["num_train_epochs"] == 3
    assert recipe.adapter["target_modules"] == "all-linear" and recipe.quantization["load_in_4bit"]
    assert paper_recipe(kind_of(str(place / "bert")), "qa").batches["max_length"] == 512
    assert paper_recipe(kind_of(str(place / "t5")), "nusax").training["num_train_epochs"] == 20


def test_settings_that_need_a_gpu_are_turned_off_without_one(place, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = paper_recipe(kind_of(str(place / "llama")), "nusax")
    adapted, notes = adapt_to_machine(recipe, None, {})
    assert adapted.quantization is None and adapted.dtype == "float32"
    assert adapted.training["bf16"] is False and adapted.training["optim"] == "adamw_torch"
    assert len(notes) == 3 and all("GPU" in note or "CUDA" in note for note in notes)
    adapted_to_user, _ = adapt_to_machine(recipe, None, {"bf16": True, "optim": "adafactor"})
    assert adapted_to_user.training["bf16"] is True  # a value given by the user is kept
    for has_bf16 in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        on_cpu, notes = adapt_to_machine(recipe, None, {"use_cpu": True})
        assert on_cpu == adapted and "--use_cpu is given" in notes[0]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert not any("GPUs" in note for note in notes)
    assert "one of 2 GPUs is used" in adapt_to_machine(recipe, None, {})[1][0]


def test_decoders_can_be_padded_to_the_full_length(place, tmp_path):
    """The paper pads every text to the full length. --padding max_length does this, and --paper sets this option."""
    words = ("--task", "classification", "--data", place / "data", "--output", tmp_path, "--max-length", 40, *QUICK)
    words += ("--padding", "max_length")
    assert flare("finetune", "--model", place / "llama", *words) == 0
    assert flare("train", "--target", "vemari", "--method", "input-fusion", "flare", *words) == 0
    runs = [run for run in find_runs(tmp_path) if run.record.kind == "train"]
    assert {run.record.settings["padding"] for run in runs} == {"max_length"}
    first = {run.folder: (run.folder / "predictions-test.jsonl").read_text() for run in runs}
    assert flare("evaluate", "--output", tmp_path, "--setting", "translate-train", "--no-resume", "--no-progress") == 0
    assert {folder: (folder / "predictions-test.jsonl").read_text() for folder in first} == first
