"""DDP and FSDP2 on two processes: every gradient is one process's over both batches, the source's share included."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import tiny
import torch
import two_processes
import two_streams
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.dataclasses import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import flare
from flare.source import projected
from flare.source.fsdp import full_parameter, prepare_generate
from flare.training.replicated import exclude_adapters_from_fsdp, trained_modules
from flare.tuner import site

D = 7  # of FLARE MT's latent states
LR = 0.05
ENGINES = ("ddp", "fsdp2")
EXAMPLE = Path(__file__).parents[1] / "examples" / "fine_tune.py"


def fused(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A tiny fusing model; r=5 does not divide by two, so that one rank's shard of A is the smaller."""
    changes = {"dropout_rate": 0.0} if family == "mt5" else {}
    nf4 = overrides.pop("nf4", None)
    base = tiny.model(family, dtype=dtype, **changes) if nf4 is None else quantized(*nf4)
    model = flare.fast_lora(base, **{"r": 5, "lora_alpha": 7, **overrides})
    tiny.randomize_lora(model)
    return model


def quantized(folder: Path, storage: torch.dtype) -> Any:
    """A checkpoint's linears in NF4, kept in numbers of a dtype; the other weights are float32."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    ).requires_grad_(False)


def batch(family: str, index: int, latent: bool = False) -> dict[str, Tensor]:
    """The batch of one rank in one micro-step; labels of one count, so that the mean of means is the mean."""
    inputs = tiny.batch(family, seed=index, source=not latent)
    generator = torch.Generator().manual_seed(index)
    if latent:
        shape = (*inputs["input_ids"].shape, D)
        inputs["source_states"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    elif family == "mt5":
        inputs["source_labels"] = torch.randint(2, tiny.VOCAB, inputs["labels"].shape, generator=generator)
    return inputs


def shard(model: Any, layout: str = "blocks", **options: Any) -> None:
    """FSDP2 on every block, then the root; or by accelerate's own rule, which it does not follow on a CPU by itself."""
    if "replicated" in layout:
        ignored = flare.replicate_adapters(model)
        assert flare.replicate_adapters(model) == ignored
        options |= (
            {"ignored_modules": trained_modules(model)} if "accelerate" in layout else {"ignored_params": ignored}
        )
    if "accelerate" in layout:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options)
        state = SimpleNamespace(fsdp_plugin=plugin)
        accelerator = SimpleNamespace(
            state=state, mixed_precision="no", is_main_process=True, torch_device_mesh=None, device=torch.device("cpu")
        )
        fsdp2_prepare_model(accelerator, model)
        return
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, **options)
    fully_shard(model, **options)


def whole(tensor: Tensor) -> Tensor:
    """A tensor or all shards of it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(
    rank: int | None,
    engine: str,
    family: str,
    *,
    accumulate: int = 1,
    steps: int = 1,
    reentrant: bool | None = None,
    between: bool = False,
    latent: bool = False,
    options: dict[str, Any] | None = None,
    **overrides: Any,
) -> list[dict[str, Tensor]]:
    """The gradients of some steps of gradient descent, by name.

    Args:
        rank: whose batches; None: those of all ranks, their losses' mean, in this one process.
        engine: "ddp", "fsdp2" or "none".
        accumulate: micro-batches of a step; the engine synchronises in the last one.
        reentrant: use_reentrant of gradient checkpointing; None is without.
        between: evaluate before each step and run two forwards before one backward.
        options: of the engine.
    """
    model: Any = fused(family, **({"latent_dim": D} if latent else {}), **overrides)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    engined = model
    if engine == "ddp":
        engined = DistributedDataParallel(model, **(options or {}))
    elif engine == "fsdp2":
        shard(model, **(options or {}))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sharded = engine == "fsdp2" and "replicated" not in (options or {}).get("layout", "")
    assert all(isinstance(p, DTensor) == sharded for p in parameters.values())
    assert any(isinstance(p, DTensor) for p in model.parameters()) == (engine == "fsdp2")
    ranks = range(two_processes.WORLD) if rank is None else [rank]
    found = []
    for step in range(steps):
        if between:
            with torch.no_grad():
                engined(**batch(family, 99, latent))
        losses = []
        for micro in range(accumulate):
            last = micro == accumulate - 1
            hold: Any = contextlib.nullcontext()
            if engine == "ddp" and not last:
                hold = engined.no_sync()
            elif engine == "fsdp2":
                model.set_requires_gradient_sync(last)
            with hold:
                for which in ranks:
                    index = (step * accumulate + micro) * two_processes.WORLD + which
                    losses.append(engined(**batch(family, index, latent)).loss / accumulate / len(ranks))
                    if not between:
                        losses.pop().backward()
        if between:
            sum(losses).backward()
        found.append({name: whole(p.grad) for name, p in parameters.items()})
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= LR * parameter.grad
                parameter.grad = None
    return found


def train_all(rank: int, engine: str, family: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every case, and how often projections were computed together in all."""
    calls: list[int] = []
    joint = site.apply_with_products

    def counted(call: Any, *args: Any) -> Any:
        if call.outputs > 1:
            calls.append(1)
        return joint(call, *args)

    site.apply_with_products = counted
    return {name: train(rank, engine, family, **case) for name, case in cases.items()} | {"joint": len(calls)}


def check(got: list[dict[str, Tensor]], want: list[dict[str, Tensor]], name: str, rtol: float = 1e-9) -> None:
    """Every gradient of every step; by default to float64's rounding."""
    for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours.keys() == theirs.keys()
        for parameter, grad in theirs.items():
            error, size = (ours[parameter] - grad).abs().max(), grad.abs().max()
            assert error <= rtol * size + 1e-14, f"{name}, step {step}, {parameter}: {error:.1e} off, of {size:.1e}"


CASES: dict[str, dict[str, Any]] = {
    "plain": {"steps": 2},
    "checkpointing and accumulation": {"reentrant": False, "accumulate": 2},
    "reentrant": {"reentrant": True},
    "FLARE MT, checkpointing and accumulation": {"latent": True, "reentrant": False, "accumulate": 2},
}
MORE_CASES: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate": 2},
    "checkpointing": {"reentrant": False},
    "mul, all linear": {"fusion": "mul", "target_modules": "all-linear"},
    "cross-attention": {"fusion": "cross_attention"},
    "FLARE MT": {"latent": True},
}
ENGINE_CASES: dict[str, dict[str, dict[str, Any]]] = {
    "ddp": {
        "unused parameters looked for": {"options": {"find_unused_parameters": True}},
        "static graph": {"options": {"static_graph": True}},
        "recompute": {"source_memory": "recompute", "steps": 2},
        "recompute, checkpointing and accumulation": {
            "source_memory": "recompute",
            "reentrant": False,
            "accumulate": 2,
        },
    },
    "fsdp2": {
        "accelerate's layout": {"options": {"layout": "accelerate"}, "reentrant": False, "accumulate": 2},
        "accelerate's layout, FLARE MT": {"options": {"layout": "accelerate"}, "latent": True},
        "replicated": {"options": {"layout": "replicated"}, "reentrant": False, "accumulate": 2, "steps": 2},
        "replicated, reentrant": {"options": {"layout": "replicated"}, "reentrant": True, "steps": 2},
        "replicated, by accelerate, FLARE MT": {"options": {"layout": "accelerate, replicated"}, "latent": True},
        "kept whole": {"options": {"reshard_after_forward": False}},
        "kept whole, forwards between": {"options": {"reshard_after_forward": False}, "between": True, "steps": 2},
        "forwards between": {"between": True},
        "FLARE MT, kept whole, forwards between": {
            "options": {"reshard_after_forward": False},
            "between": True,
            "latent": True,
        },
    },
}


@pytest.mark.parametrize("family", ["llama", "bert", "mt5"])
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_one_processs(engine, family, tmp_path) -> None:
    cases = {**CASES, **(MORE_CASES | ENGINE_CASES[engine] if family == "llama" else {})}
    found = two_processes.run(tmp_path, train_all, engine, family, cases)
    wanted: dict[str, list[dict[str, Tensor]]] = {}
    beside = ("options", "reentrant", "between", "source_memory")  # what changes no number
    for name, case in cases.items():
        mathematics = {key: value for key, value in case.items() if key not in beside}
        if str(mathematics) not in wanted:
            wanted[str(mathematics)] = train(None, "none", family, **mathematics)
        for rank in found:
            check(rank[name], wanted[str(mathematics)], name)
    assert all(rank["joint"] > 0 for rank in found)


def without_the_source(rank: int) -> list[dict[str, Tensor]]:
    projected.SourcePass.backward = staticmethod(lambda ctx, *grads: (None,) * len(ctx.needs_input_grad))
    return train(rank, "ddp", "bert", source_memory="recompute")


def test_a_missing_share_of_the_source_would_be_seen(tmp_path) -> None:
    found = two_processes.run(tmp_path, without_the_source)
    with pytest.raises(AssertionError, match=r"lora_A.* off, of"):
        check(found[0], train(None, "none", "bert"), "cut")


@pytest.mark.parametrize("latent", [False, True])
def test_fsdp2_with_mixed_precision(latent, tmp_path) -> None:
    """float32 shards computed in float64: exact where the source arrives in every block, in FSDP2's dtype."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)
    case = {"engine": "fsdp2", "family": "llama", "latent": latent}
    case |= {"dtype": torch.float32, "options": {"mp_policy": policy}}
    want = train(None, "none", "llama", latent=latent)
    for got in two_processes.run(tmp_path, train_case, case):
        check(got, want, "mixed precision", rtol=1e-6)


def train_case(rank: int, case: dict[str, Any]) -> list[dict[str, Tensor]]:
    return train(rank, **case)


def test_qlora_under_fsdp2(tmp_path) -> None:
    folder = tmp_path / "llama"
    tiny.model("llama", dtype=torch.float32).save_pretrained(folder)
    cases: dict[str, dict[str, Any]] = {
        f"{layout}, {storage}": {"options": {"layout": layout}, "nf4": (folder, storage), "reentrant": False}
        for layout in ("accelerate", "accelerate, replicated")
        for storage in (torch.uint8, torch.float32)
    }
    want = train(None, "none", "llama", nf4=(folder, torch.uint8))
    (tmp_path / "run").mkdir()
    for found in two_processes.run(tmp_path / "run", train_all, "fsdp2", "llama", cases):
        for name in cases:
            check(found[name], want, name, rtol=1e-5)


# --- the trainer ------------------------------------------------------------------------------------------------------


def fine_tune(rank: int | None, task: str, folder: Path) -> dict[str, Any]:
    """Two epochs with FlareTrainer; the adapter's weights, the logged losses and the tokens seen."""
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
def test_the_trainer_on_two_processes_is_one_with_the_double_batch(task, tmp_path) -> None:
    """For llama with rows of unequal numbers of labels: the mean is over all of the step's labels, on all ranks."""
    want = fine_tune(None, task, tmp_path)
    assert len(want["losses"]) == 4 and want["seen"][1] > 0
    for got in two_processes.run(tmp_path, fine_tune, task, tmp_path):
        assert got["seen"] == want["seen"]
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert got["norms"] == pytest.approx(want["norms"], rel=1e-4)
        for name, weight in want["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, rtol=1e-5, atol=1e-6, msg=name)


# --- saving -----------------------------------------------------------------------------------------------------------


def generated(model: Any, latent: bool) -> Tensor:
    """Greedy tokens (B, n) behind the first batch."""
    inputs = {name: value for name, value in batch("llama", 0, latent).items() if name != "labels"}
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


def save_sharded(rank: int, folder: Path, latent: bool) -> tuple[Tensor, Tensor]:
    """Train one step under FSDP2, save both ways, go on from the checkpoint; logits (B, m, vocabulary) and tokens."""
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
def test_a_sharded_model_is_saved(latent, tmp_path) -> None:
    """As a PEFT adapter, and as a sharded checkpoint that one process can make an adapter of."""
    (tmp_path / "run").mkdir()
    (want, tokens), other = two_processes.run(tmp_path / "run", save_sharded, tmp_path, latent)
    torch.testing.assert_close((want, tokens), other, rtol=0, atol=0)
    inputs = batch("llama", 0, latent)
    untrained = fused("llama", **({"latent_dim": D} if latent else {}))
    assert (untrained(**inputs).logits - want).abs().max() > 1e-4
    state = {"model": get_model_state_dict(untrained, options=StateDictOptions(ignore_frozen_params=True))}
    checkpoint.load(state, checkpoint_id=tmp_path / "sharded")
    set_model_state_dict(untrained, state["model"], options=StateDictOptions(strict=False))
    untrained.save_pretrained(tmp_path / "converted")
    for folder in ("adapter", "converted"):
        base = tiny.model("llama", dtype=torch.float64)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / folder, autocast_adapter_dtype=False)
        torch.testing.assert_close(loaded(**inputs).logits, want, rtol=1e-12, atol=1e-12)
        assert torch.equal(generated(loaded, latent), tokens)


# --- the examples -----------------------------------------------------------------------------------------------------


def test_the_example_runs_on_two_processes(tmp_path) -> None:
    """By the command in its docstring, on CPUs; the adapter it writes has learnt, and PEFT reads it."""
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
            os.killpg(process.pid, signal.SIGKILL)  # whatever is left of it
        process.wait()
    assert process.returncode == 0, printed
    assert "adapter of 2 process(es)" in printed
    weights = peft.utils.load_peft_weights(str(tmp_path / "out"), device="cpu")
    assert peft.PeftConfig.from_pretrained(tmp_path / "out").fusion == "add_relu"
    assert any("lora_B" in name for name in weights)
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_the_fsdp_example_asks_for_fsdp2() -> None:
    plugin = load_config_from_file(str(EXAMPLE.with_name("fsdp2.yaml"))).fsdp_config
    assert plugin["fsdp_version"] == 2 and plugin["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"


# --- what cannot be trained is refused, before a step is lost ---------------------------------------------------------


def errors(rank: int) -> dict[str, str]:
    """Name -> the error that a training step raises."""

    def fsdp1() -> None:
        sharded = FullyShardedDataParallel(
            fused("llama"),
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        sharded(**batch("llama", rank))

    def tensor_parallel() -> None:
        mesh = init_device_mesh("cpu", (two_processes.WORLD,), mesh_dim_names=("tp",))
        full_parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))

    steps = {
        "tp": tensor_parallel,
        "ddp": lambda: train(rank, "ddp", "bert", latent=True, reentrant=True),
        "fsdp2": lambda: train(rank, "fsdp2", "bert", latent=True, reentrant=True),
        "fsdp1": fsdp1,
    }
    found = {}
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_what_an_engine_cannot_take_is_refused(tmp_path) -> None:
    for found in two_processes.run(tmp_path, errors):
        assert "tensor parallelism" in found["tp"]
        assert "DistributedDataParallel" in found["ddp"] and "'use_reentrant': False" in found["ddp"]
        assert "FSDP2" in found["fsdp2"] and "'use_reentrant': False" in found["fsdp2"]
        assert "FSDP1" in found["fsdp1"] and "fsdp_version: 2" in found["fsdp1"]


def test_a_base_in_8_bits_is_not_sharded() -> None:
    class Int8Params(torch.nn.Parameter):
        """As bitsandbytes names them."""

    model = fused("bert")
    model.get_base_model().classifier.weight8 = Int8Params(torch.zeros(2), requires_grad=False)
    plugin = SimpleNamespace(fsdp_version=2, ignored_modules=None)
    with pytest.raises(ValueError, match=r"8 bits.*load_in_4bit.*DDP"):
        exclude_adapters_from_fsdp(model, plugin)
    plugin.fsdp_version = 1  # refused where a source comes
    exclude_adapters_from_fsdp(model, plugin)
    assert plugin.ignored_modules is None
    with pytest.raises(ValueError, match=r"group of processes.*accelerate launch"):
        flare.replicate_adapters(model)


def test_data_parallel_threads_are_refused() -> None:
    model, inputs = fused("bert"), batch("bert", 0)
    model.get_base_model()._is_replica = True
    with pytest.raises(ValueError, match=r"source_input_ids in a model under torch.nn.DataParallel.*accelerate launch"):
        model(**inputs)
    model(**{name: value for name, value in inputs.items() if not name.startswith("source")})
