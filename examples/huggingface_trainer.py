"""An ordinary Hugging Face Trainer script for CSV files in two languages. The one line for FLARE is marked.

    python examples/huggingface_trainer.py --model FacebookAI/xlm-roberta-base --data nusax --target acehnese

DATA has one folder per language, each with train.csv and test.csv. Their columns are id, text and label; rows of
two languages with the same id are translations of each other. Without --model and --data the script uses a tiny random
model and a small made-up language, so that it runs anywhere in seconds (and learns little).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, Trainer, TrainingArguments

import flare


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a (fine-tuned) encoder model")
    parser.add_argument("--data", type=Path, help="folder with one folder per language")
    parser.add_argument("--source", default="english")
    parser.add_argument("--target", default="vemari")
    parser.add_argument("--output", type=Path, default=Path("fine-tuned"))
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def load(data: Path, source: str, target: str, split: str) -> Dataset:
    """Return the target's rows that have a source row with the same id. Columns: id, text, label, source_text."""
    files = {language: str(data / language / f"{split}.csv") for language in (source, target)}
    rows, sources = (load_dataset("csv", data_files=files[language])["train"] for language in (target, source))
    texts = dict(zip(sources["id"], sources["text"], strict=True))
    rows = rows.filter(lambda row: row["id"] in texts)
    return rows.map(lambda row: {"source_text": texts[row["id"]]})


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    data = options.data or make_data(options.output / "data")
    train, test = (load(data, options.source, options.target, split) for split in ("train", "test"))
    labels = sorted(set(train["label"]))
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels))
    else:
        tokenizer, model = tiny_model(len(labels))

    def features(row: dict) -> dict:
        cut = {"truncation": True, "max_length": 128}
        return {
            "input_ids": tokenizer(row["text"], **cut)["input_ids"],
            "source_input_ids": tokenizer(row["source_text"], **cut)["input_ids"],
            "labels": labels.index(row["label"]),
        }

    train, test = (rows.map(features, remove_columns=rows.column_names) for rows in (train, test))

    # <- the one line; it was: model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=64, lora_alpha=128))
    model = flare.fast_lora(model, r=64, lora_alpha=128)

    arguments = TrainingArguments(
        str(options.output / "checkpoints"),
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        per_device_train_batch_size=32,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # <- keeps the source's columns; flare.FlareTrainer keeps them anyway
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=flare.FlareDataCollator(tokenizer),  # pads both texts of a batch to one length
        compute_metrics=lambda out: {"accuracy": float(np.mean(out.predictions.argmax(-1) == out.label_ids))},
    )
    trainer.train()
    print(f"{options.target}, accuracy on {len(test)} rows: {100 * trainer.evaluate()['eval_accuracy']:.1f} %")
    trainer.model.save_pretrained(options.output / "adapter")


def tiny_model(labels: int) -> tuple:
    """Return a tokenizer for the made-up language and a random BERT for it."""
    from flare.experiments.demo.base_model import build_tokenizer

    tokenizer = build_tokenizer()
    size = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=labels, **size)
    return tokenizer, AutoModelForSequenceClassification.from_config(config)


def make_data(folder: Path) -> Path:
    """Write the made-up parallel corpus as CSV files in the layout described above."""
    from flare.experiments.demo.corpus import make_corpus

    corpus = make_corpus(train=96, test=60)
    for language, side in (("english", "source"), ("vemari", "target")):
        (folder / language).mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            with (folder / language / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "text", "label"])
                writer.writerows([i, getattr(p, side), p.label] for i, p in enumerate(getattr(corpus, split)))
    return folder


if __name__ == "__main__":
    main()
