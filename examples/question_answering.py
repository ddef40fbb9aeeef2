"""Fine-tune span question answering in one language, with the English question and context as the source.

    python examples/question_answering.py --model FacebookAI/xlm-roberta-base --data tydiqa --target swahili

DATA has one folder per language, each with train.jsonl and test.jsonl. Their keys are id, question, context and SQuAD's
answers {"text": [...], "answer_start": [...]}. Without --model and --data the script uses a tiny random model and
made-up rows, so that it runs anywhere in seconds (and learns little).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, TrainingArguments

import flare


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of an encoder model")
    parser.add_argument("--data", type=Path, help="folder with one folder per language")
    parser.add_argument("--source", default="english")
    parser.add_argument("--target", default="vemari")
    parser.add_argument("--output", type=Path, default=Path("fine-tuned-qa"))
    parser.add_argument("--epochs", type=float, default=5)
    return parser.parse_args()


def read(folder: Path, split: str) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, (folder / f"{split}.jsonl").read_text("utf-8").splitlines())}


def features(row: dict, source: dict, tokenizer) -> dict | None:
    """Return the token ids of both (question, context) pairs, and the token positions of the target's answer.

    Return None if the whole answer was cut off.
    """
    pair = {"truncation": "only_second", "max_length": 512}
    target = tokenizer(row["question"], row["context"], return_offsets_mapping=True, **pair)
    start = row["answers"]["answer_start"][0]
    end = start + len(row["answers"]["text"][0])
    offsets = zip(target.sequence_ids(), target["offset_mapping"], strict=True)
    inside = [i for i, (part, (first, last)) in enumerate(offsets) if part == 1 and first < end and last > start]
    english = tokenizer(source["question"], source["context"], **pair)["input_ids"]
    if not inside:
        return None
    positions = {"start_positions": inside[0], "end_positions": inside[-1]}
    return {"input_ids": target["input_ids"], "source_input_ids": english, **positions}


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    data = options.data or make_data(options.output / "data")
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForQuestionAnswering.from_pretrained(options.model)
    else:
        from flare.experiments.demo.base_model import build_tokenizer

        tokenizer = build_tokenizer()
        size = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = AutoModelForQuestionAnswering.from_config(BertConfig(vocab_size=len(tokenizer), **size))

    rows = {}
    for split in ("train", "test"):
        source, target = read(data / options.source, split), read(data / options.target, split)
        pairs = [features(target[i], source[i], tokenizer) for i in target if i in source]
        rows[split] = [row for row in pairs if row]
        print(f"{split}: {len(rows[split])} rows, {len(pairs) - len(rows[split])} dropped (answer cut off)")
    model = flare.fast_lora(model, r=64, lora_alpha=128)  # the span head trains and is saved with the adapter
    arguments = TrainingArguments(
        str(options.output / "checkpoints"),
        num_train_epochs=options.epochs,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
        label_names=["start_positions", "end_positions"],
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = flare.FlareTrainer(model, arguments, train_dataset=rows["train"], processing_class=tokenizer)
    trainer.train()
    (starts, ends), (first, last) = trainer.predict(rows["test"])[:2]
    right = (starts.argmax(-1) == first) & (ends.argmax(-1) == last)
    print(f"{options.target}, exact spans on {len(right)} rows: {100 * right.mean():.1f} %")
    trainer.model.save_pretrained(options.output / "adapter")


def make_data(folder: Path) -> Path:
    """Write rows in English and in the made-up language. A question asks who did one thing, as in "who praised"."""
    from flare.experiments.demo.corpus import PEOPLE, THINGS, VERBS, vemari_word

    rng = random.Random(0)
    verbs = [verb for group in VERBS.values() for verb in group]
    for split, count in (("train", 96), ("test", 32)):
        lines: dict[str, list[str]] = {"english": [], "vemari": []}
        for number in range(count):
            people, done, asked = rng.sample(PEOPLE, 2), rng.sample(verbs, 2), rng.randrange(2)
            clauses = [(people[i], done[i], rng.choice(THINGS)) for i in range(2)]
            for language, word, order in (("english", str, (0, 1, 2)), ("vemari", vemari_word, (0, 2, 1))):
                context = " ".join(" ".join(word(clause[i]) for i in order) + " ." for clause in clauses)
                answers = {"text": [word(people[asked])], "answer_start": [context.index(word(people[asked]))]}
                row = {"id": str(number), "question": f"who {word(done[asked])}", "context": context}
                lines[language].append(json.dumps({**row, "answers": answers}))
        for language, text in lines.items():
            (folder / language).mkdir(parents=True, exist_ok=True)
            (folder / language / f"{split}.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
