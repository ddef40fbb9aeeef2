"""FlareTrainer: transformers' Trainer for rows of two texts.

The stock Trainer has four problems with such rows, which are solved here:

- It drops the ``source_*`` columns, because the base model's ``forward`` does not name them. FlareTrainer keeps them.
- It pads with ``tokenizer.pad``, which pads one text. FlareTrainer's default collator, FlareDataCollator, pads both.
- It counts the tokens and FLOPs of the target only. FlareTrainer counts both texts, and logs the number of
  source tokens separately.
- With gradient accumulation it does not scale the loss of models that ignore ``num_items_in_batch`` (BERT, XLM-R, mT5,
  and Llama with a classification head): four accumulated batches give four times the gradient. FlareTrainer computes
  the gradient of one large batch for these models too, also with micro-batches of unequal size.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.training_args import OptimizerNames

from .. import _compat
from ..source.inputs import SOURCE_ARGUMENTS, did_you_mean
from ..source_cache import SourceStateCache
from .collator import SOURCE_POSITIONS, FlareDataCollator, layout_of
from .graphed_step import GraphedStep
from .replicated import exclude_adapters_from_fsdp
from .row_checks import plain_collator, refuse_lost_labels, vocabulary_of, wrong_tokenizer

_log = logging.getLogger(__name__)

_compat.check_trainer(Trainer)


class SourceTokens(TrainerCallback, ExportableState):
    """Callback that holds the count of source tokens and saves it in checkpoints. TrainerState has no such field."""

    def __init__(self) -> None:
        self.seen = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seen": self.seen}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name, {}) if state.global_step else {}
        self.seen = saved.get("attributes", {}).get("seen", 0)
        state.stateful_callbacks[name] = self.state()  # checkpoints of the stock Trainer lack this entry


class SourceCacheCallback(TrainerCallback):
    """Callback that binds the cache to the model, reads and writes its files, and prints a summary at the end."""

    def __init__(self, cache: SourceStateCache) -> None:
        self.cache = cache

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        kw["model"].set_source_cache(self.cache)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.cache.refresh()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.cache.flush()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.cache.flush()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.cache.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.cache.flush()
        if state.is_world_process_zero:
            print(self.cache.summary())  # printed, because the Trainer prints its logs too


class FlareTrainer(Trainer):
    """transformers.Trainer for rows of two texts.

    With rows of one text and a model that does not fuse, the results without gradient accumulation are as with Trainer.

        model = flare.fast_lora(model, r=64, lora_alpha=128)
        rows = [{"input_ids": [...], "source_input_ids": [...], "labels": 1}, ...]
        trainer = flare.FlareTrainer(model, TrainingArguments("out"), train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.predict(rows).predictions  # (rows, classes)

    Differences from Trainer:

    - ``source_*`` columns are kept.
    - If ``processing_class`` is a tokenizer, the default collator is :class:`flare.FlareDataCollator`, in the layout of
      the model.
    - Tokens and FLOPs of target and source are counted.
    - Gradient accumulation gives the gradient of one large batch, also for models that ignore ``num_items_in_batch``.
    - Under ``fsdp_version: 2`` the adapters are replicated (:func:`flare.replicate_adapters`).

    Args:
        *args: positional arguments of transformers.Trainer.
        **kwargs: keyword arguments of transformers.Trainer.
        source_cache: a flare.SourceStateCache. The frozen model reads each source text once; later epochs and
            evaluations take the states of this text from the cache. Hit rate, bytes and seconds saved are logged. With
            source_padding="keep" the states of a row depend on the padded width. A FlareDataCollator then pads every
            batch to the length of the longest row. To find this length, all rows are read once.
        cuda_graphs: True runs forward and backward of a training step as one CUDA graph per padded shape
            (:class:`flare.GraphedStep`). Steps that cannot be captured run eagerly, with one warning per reason. Pad to
            few different lengths (``pad_to_multiple_of``), and set ``logging_nan_inf_filter=False``, because that
            filter waits for the loss of every step.

    Raises:
        ValueError: ``source_cache`` is not a SourceStateCache, or the model has no FLARE adapter to use it; X-Mixup
            with label_smoothing_factor or compute_loss_func. Training and evaluation also raise it if rows cannot be
            collated or a ``source_...`` column is not read.
    """

    def __init__(
        self, *args: Any, source_cache: SourceStateCache | None = None, cuda_graphs: bool = False, **kwargs: Any
    ) -> None:
        if source_cache is not None and not isinstance(source_cache, SourceStateCache):
            raise ValueError(
                f"source_cache={source_cache!r} must be a flare.SourceStateCache, such as "
                "flare.SourceStateCache(8 << 30), or None"
            )
        super().__init__(*args, **kwargs)
        arguments = inspect.signature(Trainer.__init__).bind_partial(self, *args, **kwargs).arguments
        if arguments.get("data_collator") is None and isinstance(self.processing_class, PreTrainedTokenizerBase):
            collator: Any = FlareDataCollator(self.processing_class, require_source=_fuses(self.model))
            self.data_collator = collator
        elif arguments.get("data_collator") is None and self.processing_class is None and _fuses(self.model):
            self.data_collator = plain_collator  # raises an error with advice if rows need padding
        if isinstance(self.data_collator, FlareDataCollator) and self.data_collator.layout == "auto":
            self.data_collator = replace(self.data_collator, layout=layout_of(self.model))
        if isinstance(self.data_collator, FlareDataCollator):
            self._check_tokenizer(self.data_collator)
        if _is_x_mixup(self.model):
            refuse_lost_labels(self)
        self.add_callback(SourceTokens)
        self.source_cache = source_cache
        self._cache_at_start = self._cache_at_log = (0, 0)
        if source_cache is not None:
            self._use_cache(source_cache)
        self.cuda_graphs = cuda_graphs
        self._graphed_step: GraphedStep | None = None
        if cuda_graphs:  # replays of a graph would read an old weight from autocast's cache
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)

    def _check_tokenizer(self, collator: FlareDataCollator) -> None:
        problem = wrong_tokenizer(collator.tokenizer, self.model)
        if problem is not None:
            warnings.warn(problem, UserWarning, stacklevel=3)
        if collator.vocab_size is None:
            self.data_collator = collator = replace(collator, vocab_size=vocabulary_of(self.model))
        if self.label_smoother is not None and collator.model is None:  # the Trainer removes the labels from the inputs
            self.data_collator = replace(collator, model=self.model)

    # --- source states over epochs ------------------------------------------------------------------------------------

    def _use_cache(self, cache: SourceStateCache) -> None:
        if not hasattr(self.model, "set_source_cache"):
            raise ValueError(
                f"source_cache: {type(self.model).__name__} has no FLARE adapter; call flare.fast_lora(model) "
                "first, or leave source_cache out"
            )
        self.model.set_source_cache(cache)
        self.add_callback(SourceCacheCallback(cache))
        configs = [self.model.peft_config[name] for name in self.model.active_adapters]
        collator = self.data_collator
        if not isinstance(collator, FlareDataCollator) or all(c.source_padding == "zero" for c in configs):
            return
        eval_sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        sets = [data for data in (self.train_dataset, *eval_sets) if data is not None]
        if not all(hasattr(data, "__len__") and hasattr(data, "__getitem__") for data in sets):
            return  # a stream can be read only once; the cache warns if a text comes again with another width
        try:
            self.data_collator = collator.fitted(data[index] for data in sets for index in range(len(data)))
        except (ValueError, KeyError, TypeError):
            return  # these rows cannot be collated; training raises an error that says why
        _log.info("source_cache: every batch has %d + %d columns, and %d in the decoder", *self.data_collator.widths)

    def _log_cache(self, logs: dict[str, float]) -> None:
        """Add the cache's hit rate, size and saved seconds to logs of training, but not to logs of an evaluation.

        The rate counts rows since the previous log. In the last log it counts all rows of the run.
        """
        if self.source_cache is None or any(k.endswith("_runtime") and k != "train_runtime" for k in logs):
            return
        stats = self.source_cache.stats()
        rows, hits = self._cache_at_start if "train_runtime" in logs else self._cache_at_log
        self._cache_at_log = (stats.rows, stats.hits)
        logs["source_cache_hit_rate"] = (stats.hits - hits) / max(stats.rows - rows, 1)
        logs["source_cache_bytes"] = sum(stats.nbytes.values())
        if stats.seconds_saved is not None:
            logs["source_cache_seconds_saved"] = round(stats.seconds_saved, 3) + 0.0  # avoids -0.0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does. The logged hit rates count the rows of this run only."""
        self._cache_at_start = self._cache_at_log = self._cache_counts()
        self._parameter_count: int | None = None  # without embeddings; counted in the first step
        if self.is_fsdp_enabled and isinstance(self.model, PeftModel):
            exclude_adapters_from_fsdp(self.model, self.accelerator.state.fsdp_plugin)
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, with the source cache. The logged hit rates do not count the rows read here."""
        if self.source_cache is not None and not self.is_in_train:
            self._check_cast()
        before = self._cache_counts()
        output = super().evaluation_loop(*args, **kwargs)
        after = self._cache_counts()
        rows, hits = after[0] - before[0], after[1] - before[1]
        self._cache_at_start = (self._cache_at_start[0] + rows, self._cache_at_start[1] + hits)
        self._cache_at_log = (self._cache_at_log[0] + rows, self._cache_at_log[1] + hits)
        return output

    def _cache_counts(self) -> tuple[int, int]:
        """Return the rows and hits of the cache so far."""
        return (0, 0) if self.source_cache is None else (self.source_cache.meter.rows, self.source_cache.meter.hits)

    def _check_cast(self) -> None:
        """Remove the cache from the model if bf16_full_eval or fp16_full_eval makes Trainer cast the whole model."""
        name = next((name for name in ("bf16_full_eval", "fp16_full_eval") if getattr(self.args, name)), None)
        if name is not None and self.source_cache is not None:
            self.source_cache.warn_once(
                f"the cache is not used in this evaluation, because {name} casts the base model"
            )
            self.model.set_source_cache(None)

    # --- columns ------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = _compat.signature_columns(self)
        positions = SOURCE_POSITIONS if _is_x_mixup(self.model) else ()
        columns += [name for name in (*SOURCE_ARGUMENTS, *positions) if name not in columns]

    def _check_columns(self, data: Any) -> None:
        """Raise ValueError for a ``source_...`` column that looks like a model input and that the Trainer would drop.

        Such a column holds lists of numbers, or its name is almost the name of a column that is read. Columns of texts
        and row ids may be dropped.
        """
        names = getattr(data, "column_names", None)  # of a datasets.Dataset, streamed or not
        if not self.args.remove_unused_columns or not _fuses(self.model) or isinstance(names, dict):
            return
        listed = isinstance(data, list) or (names is not None and hasattr(data, "__getitem__"))
        row: Any = data[0] if listed and len(data) else {}
        self._set_signature_columns_if_needed()
        read_columns = _compat.signature_columns(self)
        for name in names or (row if isinstance(row, Mapping) else ()):
            value = row.get(name) if isinstance(row, Mapping) else None
            suggestion = did_you_mean(name, [column for column in read_columns if column.startswith("source_")])
            is_sequence = isinstance(value, Sequence) or (isinstance(value, Tensor) and value.ndim > 0)
            per_token = is_sequence and len(value) and not isinstance(value[0], str)  # type: ignore[arg-type,index]
            looks_like_input = suggestion or (per_token and not isinstance(value, str))
            if name.startswith("source_") and name not in read_columns and looks_like_input:
                raise ValueError(
                    f"the data set's column {name!r} is not read, and remove_unused_columns would drop it"
                    f"{suggestion or ';'} rename it, or remove it from the data set"
                )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return Trainer's data loader. Raise ValueError for a ``source_...`` column that is not read."""
        data = self.eval_dataset if eval_dataset is None or isinstance(eval_dataset, str) else eval_dataset
        self._check_columns(data[eval_dataset] if isinstance(eval_dataset, str) else data)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return Trainer's data loader. Raise ValueError for a ``source_...`` column that is not read."""
        self._check_columns(test_dataset)
        return super().get_test_dataloader(test_dataset)

    # --- captured steps -----------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's data loader. With ``cuda_graphs`` its batches stay on the host, where masks can be read."""
        self._check_columns(self.train_dataset)
        loader: DataLoader = super().get_train_dataloader()
        if self.cuda_graphs and hasattr(loader, "device"):
            loader.device = None  # no move by accelerate: training_step copies batches into the graph's tensors
        return loader

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run Trainer's training step. With ``cuda_graphs``, run it as a CUDA graph if it can be captured."""
        if not self.cuda_graphs:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._graphed_step is None or self._graphed_step.model is not model:
            self._graphed_step = GraphedStep(
                model, self._run_step, source_cache=self.source_cache, unsupported=self._unsupported_in_graphs()
            )
        if not model.training:
            model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers swap weights for evaluation; a replay does not swap back
        batch = {**inputs, "num_items_in_batch": num_items_in_batch}
        return self._graphed_step(batch, variant=self.current_gradient_accumulation_steps)

    def _run_step(self, batch: dict[str, Tensor | Any]) -> Tensor:
        assert self._graphed_step is not None
        items = batch.pop("num_items_in_batch", None)
        return super().training_step(self._graphed_step.model, batch, items)

    def _unsupported_in_graphs(self) -> str | None:
        """Return why steps with these training arguments cannot be captured, or None."""
        if self.accelerator.distributed_type != DistributedType.NO or self.args.n_gpu > 1:
            return "training on several devices communicates in every step"
        if getattr(self.accelerator, "parallelism_config", None) is not None:
            return "parallelism_config splits a step over several devices"
        if self.args.torch_empty_cache_steps is not None:
            return "torch_empty_cache_steps frees memory within a step; leave it out"
        if self.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            return f"optim={self.args.optim.value!r} updates parameters in the backward pass"
        return None

    # --- gradient accumulation ----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return the micro-batches of one step, and the number of items over which their loss is averaged.

        The items are the labels (of tokens or rows) that are not -100. For question answering, they are the rows. The
        number is None if Trainer averages the loss over each micro-batch separately.
        """
        if self.cuda_graphs and self.args.world_size == 1:
            device = torch.device("cpu")  # the batches are on the CPU, and moving the count would wait for the GPU
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if items is None and self._normalises() and batches and all("start_positions" in b for b in batches):
            rows = torch.tensor(sum(len(b["start_positions"]) for b in batches), device=device)
            items = self.accelerator.gather(rows).sum() if self.args.average_tokens_across_devices else rows
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the micro-batch's share of the mean loss over the whole accumulated batch.

        A model that uses ``num_items_in_batch`` gets the micro-batch's number of items, so that every model returns the
        mean over the micro-batch. This mean is weighted by (items in the micro-batch) / (items in the batch).
        """
        items = self._items(inputs) if num_items_in_batch is not None and self._normalises() else None
        if items is None or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        result = super().compute_loss(model, inputs, return_outputs, items.clamp(min=1))
        loss = result[0] if return_outputs else result
        # Without a labelled item the mean is 0 / 0. The micro-batch then contributes 0.
        loss = (loss * (items / num_items_in_batch)).masked_fill(items == 0, 0.0)
        return (loss, result[1]) if return_outputs else loss

    def _normalises(self) -> bool:
        """Return whether compute_loss weights the loss of a micro-batch.

        False for a user's loss function, a model that takes no ``num_items_in_batch``, and under DataParallel.
        """
        return self.model_accepts_loss_kwargs and self.compute_loss_func is None and self.args.n_gpu <= 1

    def _items(self, inputs: dict[str, Tensor | Any]) -> Tensor | None:
        """Return the number of items in a micro-batch, as in get_batch_samples; None without labels or answer spans."""
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if isinstance(labels, Tensor):
            shifted = "shift_labels" not in inputs and _compat.loss_shifts_labels(self)
            return (labels[..., 1:] if shifted else labels).ne(-100).sum()
        positions = inputs.get("start_positions")
        # torch.full fills on the device; torch.tensor would copy from the host and wait
        return None if positions is None else torch.full((), len(positions), device=positions.device)

    # --- counts -------------------------------------------------------------------------------------------------------

    @property
    def num_source_input_tokens_seen(self) -> int:
        """Number of source tokens read so far, or 0 if ``include_num_input_tokens_seen`` is "no"."""
        return self._source_tokens().seen

    def _source_tokens(self) -> SourceTokens:
        # Looked up each time: restoring a checkpoint replaces the callbacks.
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, SourceTokens))

    def _track_num_input_tokens(self, inputs: dict[str, Tensor | Any]) -> None:
        super()._track_num_input_tokens(inputs)
        mode, ids = self.args.include_num_input_tokens_seen, inputs.get("source_input_ids")
        if mode == "no" or ids is None:
            return
        mask = inputs.get("source_attention_mask")
        count = mask.sum() if mode == "non_padding" and mask is not None else ids.numel()
        count = torch.as_tensor(count, device=self.args.device, dtype=torch.int64)
        seen = self.accelerator.gather(count).sum().item()
        self._source_tokens().seen += seen
        self.state.num_input_tokens_seen += seen

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """Return 6 FLOPs per target token and parameter, as Trainer, and 2 per source token (without embeddings)."""
        if not self.is_in_train or self._parameter_count is None:  # once per training, because counting is slow
            count = getattr(self.model, "num_parameters", None)
            self._parameter_count = 0 if count is None else count(exclude_embeddings=True)
        target = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        sizes = [0 if ids is None else ids.numel() for ids in (target, inputs.get("source_input_ids"))]
        return (6 * sizes[0] + 2 * sizes[1]) * self._parameter_count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with ``num_source_input_tokens_seen`` and ``source_cache_*`` added.

        ``num_input_tokens_seen`` counts target and source.
        """
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_source_input_tokens_seen"] = self.num_source_input_tokens_seen
        self._log_cache(logs)
        super().log(logs, start_time)


def _fuses(model: Any) -> bool:
    """Return whether an adapter of the model fuses target and source, so that the rows need a source."""
    configs = getattr(model, "peft_config", {}).values()
    return any(getattr(config, "fusion", None) is not None for config in configs)


def _is_x_mixup(model: Any) -> bool:
    """Return whether the model has an X-Mixup adapter, which also trains on the labels of the source."""
    return any(hasattr(config, "x_mixup_layer") for config in getattr(model, "peft_config", {}).values())


class FlareSeq2SeqTrainer(FlareTrainer, Seq2SeqTrainer):
    """transformers.Seq2SeqTrainer for rows of two texts, with the additions and arguments of :class:`FlareTrainer`."""
