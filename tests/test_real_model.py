"""Test FLARE on a real BERT and real parallel sentences: correct logits and gradients, and a loss that falls."""

from __future__ import annotations

import csv

import peft
import tiny
import torch
import transformers

import flare
from flare_kernels import reference


def test_minilm_on_nusax_matches_the_formula_and_learns(minilm, nusax) -> None:
    """Logits and gradients match the FLARE formula on PEFT's layers. 12 training steps lower the loss."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    read = {}
    for language in ("english", "javanese"):
        with open(nusax / language / "train.csv", encoding="utf-8", newline="") as file:
            read[language] = {row["id"]: row for row in csv.DictReader(file)}
    ids = [i for i in read["javanese"] if i in read["english"]][:8]
    labels = {"negative": 0, "neutral": 1, "positive": 2}
    rows = [
        {
            "input_ids": tokenizer(read["javanese"][i]["text"], truncation=True, max_length=32)["input_ids"],
            "source_input_ids": tokenizer(read["english"][i]["text"], truncation=True, max_length=32)["input_ids"],
            "labels": labels[read["javanese"][i]["label"]],
        }
        for i in ids
    ]
    batch = dict(flare.FlareDataCollator(tokenizer)(rows))

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return transformers.AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=3).eval()

    lora = {"r": 8, "lora_alpha": 16}
    stock = peft.get_peft_model(
        base(), peft.LoraConfig(**lora, target_modules=["query", "value"], task_type="SEQ_CLS")
    ).eval()
    model = flare.fast_lora(base(), **lora).eval()
    for each in (stock, model):
        tiny.randomize_lora(each)
    plain = {k: v for k, v in batch.items() if not k.startswith("source_")}
    states = tiny.source_hidden_states(stock, batch, offset=1)
    with tiny.eager_fusion(stock, states, lambda S, T: reference.fuse(S, T, "add_relu"), ("query", "value")):
        expected = stock(**plain)
        expected.loss.backward()
    actual = model(**batch)
    actual.loss.backward()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    expected_grads, grads = tiny.gradients(stock), tiny.gradients(model)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item(), msg=name)

    model = flare.fast_lora(base(), **lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
