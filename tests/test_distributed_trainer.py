"""Test the trainer, saving, and the examples on two processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import two_processes
import two_streams
from accelerate.commands.config.config_args import load_config_from_file
from distributed_training import LR, D, batch, fused, shard
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

import flare
from flare.source.fsdp import prepare_generate

EXAMPLE = Path(__file__).parents[1] / "examples" / "fine_tune.py"


# --- the trainer ------------------------------------------------------------------------------------------------------


def fine_tune(rank: int | None, task: str, folder: Path) -> dict[str, Any]:
    """Train two epochs with FlareTrainer.

    Return the adapter's weights, the logged losses and gradient norms, and the numbers of tokens and source tokens
    seen.
    """
    if rank is not None:
        world = str(two_processes.WORLD)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    model = flare.fast_lora(two_streams.task_model(task), r=4, lora_alpha=8)
    tiny.randomize_lora(model)
    args = TrainingArguments(
        str(folder / f"rank-{rank}"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        num_train_epochs=2,
        per_device_train_batch_size=4 if rank is None else 4 // two_processes.WORLD,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        optim="sgd",
        include_num_input_tokens_seen="non_padding",
        ddp_find_unused_parameters=False,
    )
    rows = two_streams.rows(task, 16)
    trainer = flare.FlareTrainer(model, args, train_dataset=rows, processing_class=two_streams.tokenizer())
    assert trainer.accelerator.num_processes == (1 if rank is None else two_processes.WORLD)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    logs = trainer.state.log_history
    losses = [log["loss"] for log in logs if "loss" in log]
    norms = [log["grad_norm"] for log in logs if "grad_norm" in log]
    seen = (trainer.state.num_input_tokens_seen, trainer.num_source_input_tokens_seen)
    return {"weights": weights, "losses": losses, "norms": norms, "seen": seen}


@pytest.mark.parametrize("task", ["bert", "llama"])
def test_the_trainer_on_two_processes_equals_one_with_the_double_batch(task, tmp_path) -> None:
    """The loss is the mean over all labels of a step on all ranks. Rows of "llama" have different numbers of labels."""
    expected = fine_tune(None, task, tmp_path)
    assert len(expected["losses"]) == 4 and expected["seen"][1] > 0
    for actual in two_processes.run(tmp_path, fine_tune, task, tmp_path):
        assert actual["seen"] == expected["seen"]
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(actual["weights"][name], weight, rtol=1e-5, atol=1e-6, msg=name)


# --- saving -----------------------------------------------------------------------------------------------------------


def generated(model: Any, latent: bool) -> Tensor:
    """Return the prompts of rank 0's batch (B, m), each followed by four greedily generated tokens: (B, m + 4)."""
    inputs = {name: value for name, value in batch("llama", 0, latent).items() if name != "labels"}
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


def save_sharded(rank: int, folder: Path, latent: bool) -> tuple[Tensor, Tensor]:
    """Train one step under FSDP2, save an adapter and a sharded checkpoint, and load the checkpoint into a new model.

    Return the trained model's logits (B, m, vocabulary) and its generated tokens.
    """
    overrides = {"latent_dim": D} if latent else {}
    model = fused("llama", **overrides)
    shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    model(**batch("llama", rank, latent)).loss.backward()
    optimizer.step()
    with torch.no_grad():
        logits = model(**batch("llama", 0, latent)).logits
    sharded = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    assert sharded and all(isinstance(value, DTensor) for value in sharded.values())
    checkpoint.save({"model": sharded}, checkpoint_id=folder / "sharded")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(folder / "adapter", state_dict=state)

    other = fused("llama", **overrides)
    shard(other)
    loaded = {"model": get_model_state_dict(other, options=StateDictOptions(ignore_frozen_params=True))}
    checkpoint.load(loaded, checkpoint_id=folder / "sharded")
    set_model_state_dict(other, loaded["model"], options=StateDictOptions(strict=False))
    with torch.no_grad():
        torch.testing.assert_close(other(**batch("llama", 0, latent)).logits, logits, rtol=0, atol=0)
    for _ in range(2):
        prepare_generate(model)
        tokens = generated(model, latent)
    return logits, tokens


@pytest.mark.parametrize("latent", [False, True])
def test_a_sharded_model_is_saved_and_loaded(latent, tmp_path) -> None:
    """The model is saved as a PEFT adapter, and as a sharded checkpoint that one process converts into an adapter."""
    (tmp_path / "run").mkdir()
    (expected, tokens), other = two_processes.run(tmp_path / "run", save_sharded, tmp_path, latent)
    torch.testing.assert_close((expected, tokens), other, rtol=0, atol=0)
    inputs = batch("llama", 0, latent)
    untrained = fused("llama", **({"latent_dim": D} if latent else {}))
    assert (untrained(**inputs).logits - expected).abs().max() > 1e-4
    state = {"model": get_model_state_dict(untrained, options=StateDictOptions(ignore_frozen_params=True))}
    checkpoint.load(state, checkpoint_id=tmp_path / "sharded")
    set_model_state_dict(untrained, state["model"], options=StateDictOptions(strict=False))
    untrained.save_pretrained(tmp_path / "converted")
    for folder in ("adapter", "converted"):
        base = tiny.model("llama", dtype=torch.float64)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / folder, autocast_adapter_dtype=False)
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(generated(loaded, latent), tokens)


# --- the examples -----------------------------------------------------------------------------------------------------


def test_the_example_runs_on_two_processes(tmp_path) -> None:
    """Run the command in the example's docstring on CPUs. No B of the saved adapter is zero, so each B was trained."""
    assert "accelerate launch --config_file examples/ddp.yaml examples/fine_tune.py" in EXAMPLE.read_text()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLE.with_name("ddp.yaml"))]
    script = [str(EXAMPLE), "--output", str(tmp_path / "out"), "--rows", "32"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [*launch, "--main_process_port", "0", *script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=180)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # end processes that still run
        process.wait()
    assert process.returncode == 0, printed
    assert "adapter of 2 process(es)" in printed
    weights = peft.utils.load_peft_weights(str(tmp_path / "out"), device="cpu")
    assert peft.PeftConfig.from_pretrained(tmp_path / "out").fusion == "add_relu"
    assert any("lora_B" in name for name in weights)
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_the_fsdp_example_uses_fsdp2() -> None:
    plugin = load_config_from_file(str(EXAMPLE.with_name("fsdp2.yaml"))).fsdp_config
    assert plugin["fsdp_version"] == 2 and plugin["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
