"""FlareTrainer: transformers' Trainer for rows of two texts.

What the stock Trainer does with such rows, and what is different here:

- it drops the ``source_*`` columns, because the base model's ``forward`` does not name them: kept;
- it pads by ``tokenizer.pad``, which knows one text: FlareDataCollator is the default;
- it counts the target's tokens and FLOPs: both streams are counted, the source also by itself;
- with gradient accumulation it does not scale the loss of models that ignore ``num_items_in_batch`` (BERT, XLM-R, mT5,
  and Llama with a classification head), so four steps of accumulation give four times the gradient: here it is the
  gradient of one large batch, for every model and for micro-batches of unequal size.
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
from ..source.inputs import did_you_mean
from ..source_cache import SourceStateCache
from .collator import SOURCE_COLUMNS, SOURCE_POSITIONS, FlareDataCollator, layout_of
from .graphed_step import GraphedStep
from .replicated import leave_adapters_whole
from .row_checks import plain_collator, vocabulary_of, wrong_tokenizer

_log = logging.getLogger(__name__)

_compat.check_trainer(Trainer)


class SourceTokens(TrainerCallback, ExportableState):
    """Carries the number of source tokens seen through checkpoints; TrainerState has room for one number only."""

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
        state.stateful_callbacks[name] = self.state()  # a checkpoint of the stock Trainer has no such entry


class KeepsSourceCache(TrainerCallback):
    """Looks after the cache of a training run: checks the base model, publishes rows, says in the end what it did."""

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
            print(self.cache.summary())  # as the Trainer prints its logs


class FlareTrainer(Trainer):
    """transformers.Trainer for rows of two texts: the same arguments and, for rows without a source, the same results.

    Differences: ``source_*`` columns are kept; the default collator is FlareDataCollator where ``processing_class`` is
    a tokenizer (its layout follows the model); tokens and FLOPs of both streams are counted; gradient accumulation
    gives the gradient of the large batch for every model family.

    Args:
        source_cache: a flare.SourceStateCache: each source text is read once by the frozen model and from the cache in
            later epochs, in training and evaluation. Hit rate, bytes and seconds saved are logged. Under
            source_padding="keep", where a row's states depend on the padded width, a FlareDataCollator pads every batch
            to one length, that of the longest row (all rows are looked at for it).
        cuda_graphs: True: forward and backward of a training step run as one CUDA graph per padded shape
            (flare.GraphedStep). What cannot be captured runs eagerly, and each reason is said once. Pad to few lengths
            (``pad_to_multiple_of``), and set ``logging_nan_inf_filter=False``, which otherwise waits for every loss.
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
        given = inspect.signature(Trainer.__init__).bind_partial(self, *args, **kwargs).arguments
        if given.get("data_collator") is None and isinstance(self.processing_class, PreTrainedTokenizerBase):
            made: Any = FlareDataCollator(self.processing_class, require_source=_fuses(self.model))
            self.data_collator = made
        elif given.get("data_collator") is None and self.processing_class is None and _fuses(self.model):
            self.data_collator = plain_collator  # which says what is missing where rows must be padded
        if isinstance(self.data_collator, FlareDataCollator) and self.data_collator.layout == "auto":
            self.data_collator = replace(self.data_collator, layout=layout_of(self.model))
        if isinstance(self.data_collator, FlareDataCollator):
            self._check_tokenizer(self.data_collator)
        self.add_callback(SourceTokens)
        self.source_cache = source_cache
        self._cache_begun = self._cache_logged = (0, 0)
        if source_cache is not None:
            self._use_cache(source_cache)
        self.cuda_graphs = cuda_graphs
        self._graphed_step: GraphedStep | None = None
        if cuda_graphs:  # a weight that autocast has cast outside a graph would be old in its replays
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)

    def _check_tokenizer(self, collator: FlareDataCollator) -> None:
        said = wrong_tokenizer(collator.tokenizer, self.model)
        if said is not None:
            warnings.warn(said, UserWarning, stacklevel=3)
        if collator.vocab_size is None:
            self.data_collator = collator = replace(collator, vocab_size=vocabulary_of(self.model))
        if self.label_smoother is not None and collator.model is None:  # the Trainer takes the labels from the model
            self.data_collator = replace(collator, model=self.model)

    # --- source states over epochs ------------------------------------------------------------------------------------

    def _use_cache(self, cache: SourceStateCache) -> None:
        if not hasattr(self.model, "set_source_cache"):
            raise ValueError(
                f"source_cache: {type(self.model).__name__} has no FLARE adapter; call flare.fast_lora(model) "
                "first, or leave it out"
            )
        self.model.set_source_cache(cache)
        self.add_callback(KeepsSourceCache(cache))
        configs = [self.model.peft_config[name] for name in self.model.active_adapters]
        collator = self.data_collator
        if not isinstance(collator, FlareDataCollator) or all(c.source_padding == "zero" for c in configs):
            return
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        sets = [data for data in (self.train_dataset, *evaluated) if data is not None]
        if not all(hasattr(data, "__len__") and hasattr(data, "__getitem__") for data in sets):
            return  # a stream: rows that come back in another width are reported by the cache
        try:
            self.data_collator = collator.fitted(data[index] for data in sets for index in range(len(data)))
        except (ValueError, KeyError, TypeError):
            return  # rows that cannot be collated: training says so, better than this could
        _log.info(
            "source_cache: every batch is padded to one length, (left, right, decoder) %s", self.data_collator.widths
        )

    def _log_cache(self, logs: dict[str, float]) -> None:
        """Of training: the hit rate since the last log (in the last log: of the run), and what the cache holds."""
        if self.source_cache is None or any(k.endswith("_runtime") and k != "train_runtime" for k in logs):
            return
        now = self.source_cache.stats()
        rows, hits = self._cache_begun if "train_runtime" in logs else self._cache_logged
        self._cache_logged = (now.rows, now.hits)
        logs["source_cache_hit_rate"] = (now.hits - hits) / max(now.rows - rows, 1)
        logs["source_cache_bytes"] = sum(now.nbytes.values())
        if now.seconds_saved is not None:
            logs["source_cache_seconds_saved"] = round(now.seconds_saved, 3) + 0.0  # no -0.0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer; the hit rates that are logged are of this run alone."""
        self._cache_begun = self._cache_logged = self._cache_counts()
        if self.is_fsdp_enabled and isinstance(self.model, PeftModel):
            leave_adapters_whole(self.model, self.accelerator.state.fsdp_plugin)
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer, with the source cache; what is read here does not count in the hit rates of training."""
        if self.source_cache is not None and not self.is_in_train:
            self._check_cast()
        before = self._cache_counts()
        found = super().evaluation_loop(*args, **kwargs)
        after = self._cache_counts()
        rows, hits = after[0] - before[0], after[1] - before[1]
        self._cache_begun = (self._cache_begun[0] + rows, self._cache_begun[1] + hits)
        self._cache_logged = (self._cache_logged[0] + rows, self._cache_logged[1] + hits)
        return found

    def _cache_counts(self) -> tuple[int, int]:
        """Rows and hits of the cache so far."""
        return (0, 0) if self.source_cache is None else (self.source_cache.meter.rows, self.source_cache.meter.hits)

    def _check_cast(self) -> None:
        """Outside a training the Trainer casts the whole model for bf16_full_eval: then it is another base model."""
        name = next((name for name in ("bf16_full_eval", "fp16_full_eval") if getattr(self.args, name)), None)
        if name is not None and self.source_cache is not None:
            self.source_cache.warn_once(
                f"left out of this evaluation: {name} casts the base model, whose states it holds"
            )
            self.model.set_source_cache(None)

    # --- columns ------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = _compat.signature_columns(self)
        wanted = (*SOURCE_COLUMNS, *SOURCE_POSITIONS) if _reads_source_positions(self.model) else SOURCE_COLUMNS
        columns += [name for name in wanted if name not in columns]

    def _check_columns(self, data: Any) -> None:
        """Raise ValueError for a column ``source_...`` that the Trainer would drop and that can only be meant as input:
        it has numbers for every token, or nearly the name of one that is read. Texts and ids of rows are dropped.
        """
        names = getattr(data, "column_names", None)  # of a datasets.Dataset, also of one that streams
        if not self.args.remove_unused_columns or not _fuses(self.model) or isinstance(names, dict):
            return
        listed = isinstance(data, list) or (names is not None and hasattr(data, "__getitem__"))
        row: Any = data[0] if listed and len(data) else {}
        self._set_signature_columns_if_needed()
        kept = _compat.signature_columns(self)
        for name in names or (row if isinstance(row, Mapping) else ()):
            value = row.get(name) if isinstance(row, Mapping) else None
            near = did_you_mean(name, [one for one in kept if one.startswith("source_")])
            many = isinstance(value, Sequence) or (isinstance(value, Tensor) and value.ndim > 0)
            per_token = many and len(value) and not isinstance(value[0], str)  # type: ignore[arg-type,index]
            if name.startswith("source_") and name not in kept and (near or (per_token and not isinstance(value, str))):
                raise ValueError(
                    f"the data set's column {name!r} is not read, and remove_unused_columns would drop it{near or ';'} "
                    "rename it, or take it out of the data set"
                )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As Trainer. Raises ValueError for a column of a source that is not read."""
        data = self.eval_dataset if eval_dataset is None or isinstance(eval_dataset, str) else eval_dataset
        self._check_columns(data[eval_dataset] if isinstance(eval_dataset, str) else data)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As Trainer. Raises ValueError for a column of a source that is not read."""
        self._check_columns(test_dataset)
        return super().get_test_dataloader(test_dataset)

    # --- captured steps -----------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer; with ``cuda_graphs`` batches stay on the host, where reading their masks waits for no device."""
        self._check_columns(self.train_dataset)
        loader: DataLoader = super().get_train_dataloader()
        if self.cuda_graphs and hasattr(loader, "device"):
            loader.device = None  # accelerate moves batches to it; training_step copies them into the graph's tensors
        return loader

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As Trainer; with ``cuda_graphs`` as a CUDA graph, where it can be captured."""
        if not self.cuda_graphs:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._graphed_step is None or self._graphed_step.model is not model:
            self._graphed_step = GraphedStep(
                model, self._step_of, source_cache=self.source_cache, unsupported=self._unsupported_in_graphs()
            )
        if not model.training:
            model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # a replay does not: schedule-free optimizers exchange weights for evaluation
        batch = {**inputs, "num_items_in_batch": num_items_in_batch}
        return self._graphed_step(batch, variant=self.current_gradient_accumulation_steps)

    def _step_of(self, batch: dict[str, Tensor | Any]) -> Tensor:
        assert self._graphed_step is not None
        items = batch.pop("num_items_in_batch", None)
        return super().training_step(self._graphed_step.model, batch, items)

    def _unsupported_in_graphs(self) -> str | None:
        """What of these arguments cannot be captured, or None."""
        if self.accelerator.distributed_type != DistributedType.NO or self.args.n_gpu > 1:
            return "training on several devices talks to the others in every step"
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
        """The micro-batches of one step, and over how many items their loss is a mean (rows for question answering)."""
        if self.cuda_graphs and self.args.world_size == 1:
            device = torch.device("cpu")  # where the batches are; a copy from there would wait for the device
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
        """The micro-batch's share of the mean over the whole accumulated batch.

        A model that uses ``num_items_in_batch`` is given the micro-batch's own number, so that it returns the same as
        one that ignores it: the mean over the micro-batch. That mean counts with items here / items in the batch.
        """
        here = self._items(inputs) if num_items_in_batch is not None and self._normalises() else None
        if here is None or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Without a labelled item the mean is 0 / 0, and its share none.
        found = super().compute_loss(model, inputs, return_outputs, here.clamp(min=1))
        loss = found[0] if return_outputs else found
        loss = (loss * (here / num_items_in_batch)).masked_fill(here == 0, 0.0)
        return (loss, found[1]) if return_outputs else loss

    def _normalises(self) -> bool:
        """Whether the loss is ours to normalise: not a user's own, nor one of a model or mode without counts."""
        return self.model_accepts_loss_kwargs and self.compute_loss_func is None and self.args.n_gpu <= 1

    def _items(self, inputs: dict[str, Tensor | Any]) -> Tensor | None:
        """How many labelled items a micro-batch has, counted as Trainer counts the whole batch."""
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if isinstance(labels, Tensor):
            shifted = "shift_labels" not in inputs and _compat.loss_shifts_labels(self)
            return (labels[..., 1:] if shifted else labels).ne(-100).sum()
        positions = inputs.get("start_positions")
        # full: filled on the device, where torch.tensor would copy from the host and wait
        return None if positions is None else torch.full((), len(positions), device=positions.device)

    # --- counts -------------------------------------------------------------------------------------------------------

    @property
    def num_source_input_tokens_seen(self) -> int:
        """Source tokens read so far, counted as ``include_num_input_tokens_seen`` says ("no" counts none)."""
        return self._source_tokens().seen

    def _source_tokens(self) -> SourceTokens:
        # Looked up, not kept: restoring callbacks from a checkpoint replaces them.
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
        """Trainer's estimate for the target (6 per parameter and token) plus the source's forward pass (2)."""
        operations: int = super().floating_point_ops(inputs)
        ids = inputs.get("source_input_ids")
        if ids is not None and hasattr(self.model, "num_parameters"):
            operations += 2 * ids.numel() * self.model.num_parameters(exclude_embeddings=True)
        return operations

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer; ``num_input_tokens_seen`` counts both streams, ``num_source_input_tokens_seen`` the source;
        ``source_cache_*`` say what the cache did.
        """
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_source_input_tokens_seen"] = self.num_source_input_tokens_seen
        self._log_cache(logs)
        super().log(logs, start_time)


def _fuses(model: Any) -> bool:
    """Whether an adapter of the model fuses two streams, so that rows without a source are a mistake."""
    configs = getattr(model, "peft_config", {}).values()
    return any(getattr(config, "fusion", None) is not None for config in configs)


def _reads_source_positions(model: Any) -> bool:
    """Whether an adapter of the model trains on the source's spans too, as X-Mixup does."""
    return any(hasattr(config, "x_mixup_layer") for config in getattr(model, "peft_config", {}).values())


class FlareSeq2SeqTrainer(FlareTrainer, Seq2SeqTrainer):
    """transformers.Seq2SeqTrainer with what :class:`FlareTrainer` adds."""
