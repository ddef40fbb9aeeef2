"""Fine-tune a classifier on pairs of texts, on one or many GPUs: an ordinary script with one line for FLARE.

One process:                    python examples/fine_tune.py
Two GPUs:                       accelerate launch --config_file examples/ddp.yaml examples/fine_tune.py
Two GPUs, the model sharded:    accelerate launch --config_file examples/fsdp2.yaml examples/fine_tune.py

For eight GPUs, add --num_processes 8 before the script. On a machine without a GPU, the last two commands start two
processes on the CPU, and both use DDP, because accelerate does not shard models on a CPU. With several machines, run
the command on each, and add --num_machines, --machine_rank and --main_process_ip.

The script makes a small corpus and a random base model, so that it runs anywhere in seconds. Replace both by your own.
"""

from __future__ import annotations

import argparse

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

import flare
from flare.experiments.demo.base_model import build_tokenizer
from flare.experiments.demo.corpus import LABELS, make_corpus


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="fine-tuned", help="folder for the adapter")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8, help="rows per process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    return parser.parse_args()


def main() -> None:
    options = parse()
    set_seed(0)

    tokenizer = build_tokenizer()
    rows = [
        {
            "input_ids": tokenizer(pair.target)["input_ids"],
            "source_input_ids": tokenizer(pair.source)["input_ids"],
            "labels": LABELS.index(pair.label),
        }
        for pair in make_corpus(train=options.rows).train
    ]
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_labels=len(LABELS),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    model = BertForSequenceClassification(config)

    # <- the one line; it was: model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32))
    model = flare.fast_lora(model, r=16, lora_alpha=32)

    args = TrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=1e-3,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,  # every adapter is used in every step
    )
    trainer = flare.FlareTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()

    # All processes gather the adapter, and one writes it. Without sharding there is nothing to gather.
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(trainer.model, options=whole)
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(options.output, state_dict=state)
        print(f"adapter of {trainer.accelerator.num_processes} process(es) in {options.output}")


if __name__ == "__main__":
    main()
