"""Tests of FLARE adapters in lm-evaluation-harness, which evaluates a tiny Llama on tasks defined in a folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import small_tasks
import tiny
import torch
import transformers
from peft import PeftModel
from tokenizers import decoders

import flare
from flare.experiments.utils.errors import UserError

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `harness`)")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from flare.experiments.harness import FlareLM, __main__
from flare.experiments.harness.source_prompts import SourcePrompts

LABELS = ("negative", "neutral", "positive")
TARGET = ("Hana mangat", "Cukop get that", "Ibu tom geukereuja bak Grab", "Nyan")
ENGLISH = ("Not tasty", "It is really good", "Mom once worked for Grab", "That one over there")
#: Definition of a task that compares the likelihoods of the labels.
SCORED = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Text: {{{{text}}}}\\nSentiment:"
doc_to_choice: [negative, neutral, positive]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
#: Definition of a task that generates text.
WRITTEN = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "Text: {{{{text}}}}\\nSentiment:"
doc_to_target: label
generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: 12}}
metric_list: [{{metric: bypass}}]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama with a byte tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), small_tasks.byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # no token is dropped in decoding
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = tiny.config("llama", vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, **ids)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, fusion: str | None) -> Path:
    """Save a random adapter with this fusion, and return its folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = flare.fast_lora(model, r=4, lora_alpha=64, fusion=fusion, source_padding="zero")
    tiny.randomize_lora(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fusing(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(base, tmp_path_factory.mktemp("fusing"), "add_relu")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(base, tmp_path_factory.mktemp("plain"), None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three tasks and their data.

    The tasks are tiny_scored and tiny_written, whose rows have a source, and tiny_lonely, whose rows have none.
    english.jsonl holds the sources in reverse order.
    """
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"id": f"n{i}", "text": text, "label": LABELS[i % 3]} for i, text in enumerate(TARGET)]
    small_tasks.write_jsonl(folder / "alone.jsonl", rows)
    both = [{**row, "source_text": text} for row, text in zip(rows, ENGLISH, strict=True)]
    small_tasks.write_jsonl(folder / "both.jsonl", both)
    english = [{**row, "text": text} for row, text in zip(rows, ENGLISH, strict=True)]
    small_tasks.write_jsonl(folder / "english.jsonl", english[::-1])
    for name, form, file in (("scored", SCORED, "both"), ("lonely", SCORED, "alone"), ("written", WRITTEN, "both")):
        text = form.format(name=f"tiny_{name}", file=folder / f"{file}.jsonl", cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def evaluated(tasks: Path, task: str, model: str, **options: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return metrics and samples of the harness; the samples are in the order of the documents."""
    size = options.pop("batch_size", 4)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"device": "cpu", **options},
        tasks=[f"tiny_{task}"],
        task_manager=manager,
        batch_size=size,
        bootstrap_iters=0,
    )
    samples = results["samples"][f"tiny_{task}"]
    return results["results"][f"tiny_{task}"], sorted(samples, key=lambda sample: sample["doc_id"])


def answers(samples: list[dict[str, Any]]) -> list[list[tuple[float, bool]]]:
    return [[tuple(choice) for choice in sample["filtered_resps"]] for sample in samples]


def by_hand(base: Path, fusing: Path, text: str, english: str, label: str) -> tuple[float, bool]:
    """Return the log-likelihood of a label after its prompt, and whether the label is the greedy choice.

    The model reads one row, which is padded here instead of in the package.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), str(fusing)).eval()
    prompts = [tokenizer(f"Text: {one}\nSentiment:")["input_ids"] for one in (text, english)]
    answer = tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
    width = max(map(len, prompts))
    pads = [width - len(one) for one in prompts]
    ids = [[0] * pad + one + answer for pad, one in zip(pads, prompts, strict=True)]
    masks = [[0] * pad + [1] * (width - pad + len(answer)) for pad in pads]
    names = ("input_ids", "source_input_ids"), ("attention_mask", "source_attention_mask")
    batch = {name: torch.tensor([row]) for name, row in zip(names[0], ids, strict=True)}
    batch |= {name: torch.tensor([row]) for name, row in zip(names[1], masks, strict=True)}
    with torch.no_grad():
        logs = model(**batch).logits[0, width - 1 : -1].double().log_softmax(-1)
    total = sum(float(logs[position, token]) for position, token in enumerate(answer))
    return total, logs.argmax(-1).tolist() == answer


def same(left: list[list[tuple[float, bool]]], right: list[list[tuple[float, bool]]]) -> bool:
    """Return whether all log-likelihoods are close and all flags (is the label the greedy choice?) are equal."""
    return all(
        math.isclose(a, b, rel_tol=1e-5) and greedy == other
        for one, two in zip(left, right, strict=True)
        for (a, greedy), (b, other) in zip(one, two, strict=True)
    )


def test_log_likelihoods_equal_those_computed_with_the_model(base, fusing, tasks) -> None:
    metrics, samples = evaluated(tasks, "scored", "flare", pretrained=str(base), peft=str(fusing))
    expected = [
        [by_hand(base, fusing, text, english, label) for label in LABELS]
        for text, english in zip(TARGET, ENGLISH, strict=True)
    ]
    assert same(answers(samples), expected)
    best = [max(range(3), key=lambda k: one[k][0]) for one in expected]
    assert metrics["acc,none"] == sum(choice == i % 3 for i, choice in enumerate(best)) / len(TARGET)
    # sources from a file are matched by id; the source prompts are equal with and without a template for them
    for options in ({}, {"doc_to_source": "Text: {{text}}\nSentiment:", "source_columns": "text"}):
        file = str(tasks / "english.jsonl")
        _, others = evaluated(
            tasks, "lonely", "flare", pretrained=str(base), peft=str(fusing), source_file=file, **options
        )
        assert answers(others) == answers(samples)


def test_without_fusion_the_results_equal_hflm(base, plain, fusing, tasks) -> None:
    names = {"pretrained": str(base), "peft": str(plain)}
    ours, hflm = (answers(evaluated(tasks, "lonely", model, **names)[1]) for model in ("flare", "hf"))
    assert ours == hflm
    with pytest.warns(UserWarning, match="without a source"):
        without = evaluated(tasks, "lonely", "flare", pretrained=str(base), peft=str(fusing), no_source=True)[1]
    assert same(answers(without), ours), "both adapters have equal weights, and without a source both are plain LoRA"
    _, samples = evaluated(tasks, "scored", "flare", pretrained=str(base), peft=str(fusing))
    assert not same(answers(samples), ours)


def test_generation_reads_the_source(base, fusing, tasks) -> None:
    _, samples = evaluated(tasks, "written", "flare", pretrained=str(base), peft=str(fusing), batch_size=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), str(fusing)).eval()
    collate = flare.FlareDataCollator(tokenizer, layout="causal")
    expected, with_target_as_source = [], []
    for text, english in zip(TARGET, ENGLISH, strict=True):
        prompts = [tokenizer(f"Text: {one}\nSentiment:")["input_ids"] for one in (text, english)]
        for outputs, second in ((expected, prompts[1]), (with_target_as_source, prompts[0])):
            batch = collate([{"input_ids": prompts[0], "source_input_ids": second}])
            new = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
            outputs.append(tokenizer.decode(new, skip_special_tokens=True))
    assert [sample["resps"][0][0] for sample in samples] == expected != with_target_as_source


def request(doc: dict[str, Any], prompt: str, answer: Any = " yes") -> Instance:
    return Instance("loglikelihood", doc, (prompt, answer), 0, ("tiny", 0, 1))


def test_texts_of_the_document_are_replaced_by_their_sources_in_the_prompt() -> None:
    doc = {"text": "a {b} c", "source_text": "x", "options": ["ja", "nee"], "source_options": ["yes", "no"], "tag": 3}
    assert SourcePrompts().of(request(doc, "Q: a {b} c\nja, nee?", " nee")) == ("Q: x\nyes, no?", " no")
    assert SourcePrompts().of(request(doc, "Q: a {b} c\nA:", {"until": []})) == ("Q: x\nA:", "")
    for prompt, complaint in (("a {b} c a {b} c", "occurs 2 times"), ("nothing of it", "does not contain the text")):
        with pytest.raises(UserError, match=complaint):
            SourcePrompts(columns=["text"]).of(request(doc, prompt))
    with pytest.raises(UserError, match="no_source=True"):
        SourcePrompts().of(request({"text": "a"}, "a"))
    with pytest.raises(UserError, match="source_columns=text"):
        SourcePrompts(columns=["text"]).of(request({"text": "a", "other": "b", "source_other": "c"}, "a"))


def test_sources_of_a_file_are_matched_by_position_or_id(tmp_path: Path) -> None:
    file = str(small_tasks.write_jsonl(tmp_path / "tiny.jsonl", [{"text": "x", "id": 5}]))
    assert SourcePrompts(str(tmp_path / "{task}.jsonl")).of(request({"text": "a"}, "Q a"))[0] == "Q x"  # by position
    with pytest.raises(UserError, match="no row with id=6"):
        SourcePrompts(file).of(request({"text": "a", "id": 6}, "Q a"))
    late = Instance("loglikelihood", {"text": "a"}, ("Q a", " b"), 0, ("tiny", 1, 1))
    with pytest.raises(UserError, match="has 1 rows, matched by position"):
        SourcePrompts(file).of(late)
    with pytest.raises(UserError, match="share no column with texts"):
        SourcePrompts(file).of(request({"question": "a"}, "Q a"))
    with pytest.raises(UserError, match="no such file"):
        SourcePrompts(str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match="neither a template"):
        SourcePrompts(template="gone.txt")


def test_unsupported_options_are_refused(base, fusing, plain, caplog) -> None:
    options = {"pretrained": str(base), "peft": str(fusing), "device": "cpu"}
    with pytest.raises(UserError, match="exclude each other"):
        FlareLM(**options, no_source=True, doc_to_source="{{text}}")
    with pytest.raises(UserError, match="give a number"):
        FlareLM(**options, batch_size="auto")
    model = FlareLM(**options)
    rolling = Instance("loglikelihood_rolling", {"text": "a"}, ("a",), 0, ("tiny", 0, 1))
    with pytest.raises(UserError, match="task tiny: perplexity"):
        model.loglikelihood_rolling([rolling])
    with pytest.raises(UserError, match="--use_cache"):
        model.set_cache_hook(None)
    FlareLM(**{**options, "peft": str(plain)}, doc_to_source="{{text}}")
    assert "doc_to_source: not read" in caplog.text
    assert FlareLM(**options, no_source=True).loglikelihood_rolling([rolling], disable_tqdm=True) == pytest.approx(
        HFLM(**options).loglikelihood_rolling([rolling], disable_tqdm=True)
    )


@pytest.mark.parametrize(
    ("columns", "refused"),
    [
        ({"text": "a", "label_text": "ja"}, True),  # the source has only the correct answer in the source language
        ({"text": "a", "label_text": "nee"}, False),  # equal in both languages
        ({"text": "a", "options": ["ja", "nee"]}, False),
        ({"text": "a", "first": "ja", "second": "nee"}, False),
    ],
)
def test_a_column_with_the_correct_answer_is_refused_as_a_source(base, fusing, columns, refused) -> None:
    english = {"a": "x", "ja": "yes", "nee": "nee"}
    sources = {
        f"source_{name}": english[value] if isinstance(value, str) else [english[one] for one in value]
        for name, value in columns.items()
    }
    requests = [request({**columns, **sources}, "Q: a\nA:", f" {answer}") for answer in ("ja", "nee")]
    model = FlareLM(str(base), str(fusing), device="cpu")
    if refused:
        with pytest.raises(UserError, match=r"column label_text, .* 'nee' unchanged.*source_columns"):
            model.loglikelihood(requests, disable_tqdm=True)
        model = FlareLM(str(base), str(fusing), device="cpu", source_columns="text")
    assert len(model.loglikelihood(requests, disable_tqdm=True)) == 2


def test_answers_of_one_token_share_a_forward_pass(base, fusing) -> None:
    docs = [{"text": "ja", "source_text": english} for english in ("yes", "no", "yes")]
    requests = [request(doc, "ja?", answer) for doc in docs for answer in "AB"]
    scores = []
    for shares, forwards in ((True, 2), (False, 6)):
        model, calls = FlareLM(str(base), str(fusing), device="cpu", logits_cache=shares), []
        model.model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        scores.append([score for score, _ in model.loglikelihood(requests, disable_tqdm=True)])
        assert len(calls) == forwards
    assert scores[0] == pytest.approx(scores[1]) and len({round(score, 3) for score in scores[0]}) == 4


def test_long_prompts_are_cut_on_the_left_in_both_texts(base, fusing, caplog) -> None:
    model = FlareLM(str(base), str(fusing), device="cpu", max_length=16)
    doc = {"text": "p" * 40, "source_text": "q" * 50}
    assert len(model.loglikelihood([request(doc, "p" * 40)], disable_tqdm=True)) == 1
    assert "1 of 1 prompts or their sources are cut on the left to 16 tokens" in caplog.text


def test_the_command_prints_user_errors(monkeypatch, capsys) -> None:
    """lm_eval's cli_evaluate is replaced, because it reads all tasks of lm_eval, which takes tens of seconds."""

    def refuse() -> None:
        raise UserError("what to do")

    monkeypatch.setattr(__main__, "cli_evaluate", refuse)
    assert __main__.main() == 2 and capsys.readouterr().err == "flare.experiments.harness: what to do\n"
    monkeypatch.setattr(__main__, "cli_evaluate", lambda: None)
    assert __main__.main() == 0
