"""FlareModel: PEFT's LoRA tuner, its layers on flare_kernels, its query and value adapters fusing two streams."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from .._compat import LoraLayer, register_tuner, warn_of_shards
from ..generation.generate import ALIGNMENTS, generate
from ..source.arguments import SOURCE_ARGUMENTS
from ..source.hooks import attach, detach, take_source, warn_without_source
from ..source.inputs import check_cacheable, encode
from ..source.packed_rows import refuse_packed_rows
from ..source.runtime import Runtime, runtime_of
from ..source.states import SourceStates
from ..source_cache import SourceRequest, SourceStateCache
from .config import FlareConfig
from .grouping import make_sites
from .layer import MERGE_REFUSED, FlareLayer, adopt
from .report import FastLoraReport, ReportRow
from .routing import ModelMap


class FlareModel(LoraModel):
    """The tuner that PEFT makes for ``peft_type: FLARE``. Users meet it through :func:`flare.fast_lora`."""

    # --- adapters come and go -----------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: FlareConfig, model_config: dict[str, Any]) -> FlareConfig:
        if peft_config.target_modules is None and not peft_config.target_parameters:
            try:
                peft_config.target_modules = ModelMap.of(self.model).default_targets()
            except ValueError:
                if peft_config.fusion is not None:
                    raise
        _spare_the_head(self.model, peft_config)
        return cast(FlareConfig, super()._prepare_adapter_config(peft_config, model_config))

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """PEFT's, which refuses modules of Mamba that LoRA does not fit where the type is LORA."""
        super()._check_target_module_compatiblity(_AS_LORA, model, target_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, then our classes, fusions and hooks on what it made."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.wire(adapter_name)

    def wire(self, adapter: str) -> None:
        """Adopt the adapter's layers, decide which of them fuse, and install the hooks."""
        config = cast(FlareConfig, self.peft_config[adapter])
        runtime = runtime_of(self.model)
        if runtime is None:
            runtime = Runtime(ModelMap.of(self.model) if config.fusion is not None else ModelMap({}, {}, ()), {})
        elif config.fusion is not None and not runtime.map.places:
            runtime.map = ModelMap.of(self.model)
        runtime.clear()
        runtime.configs[adapter] = config
        projected = False
        for path, module in self.model.named_modules():
            if not isinstance(module, LoraLayer) or adapter not in _adapters_of(module):
                continue
            reason = adopt(module, path)
            if not reason:
                assert isinstance(module, FlareLayer)
                reason = self._why_not(runtime, config, path, module, adapter)
                module.flare_rows = runtime.map.fused.get(path)
                module.flare_fusion[adapter] = None if reason else config.fusion
                if config.fusion is not None:
                    module.flare_unmergeable[adapter] = config.fusion
                if not reason and module not in runtime.layers:
                    runtime.layers.append(module)
                if not reason and config.fusion == "cross_attention":
                    module.add_cross_attention(adapter, config.cross_attention_heads, config.cross_attention_mask)
                if not reason and config.latent_dim is not None and not projected:
                    module.add_latent_projection(adapter, config.latent_dim)
                    projected = True
            runtime.reasons[path, adapter] = reason
        attach(self.model, runtime)

    def _why_not(self, runtime: Runtime, config: FlareConfig, path: str, layer: FlareLayer, adapter: str) -> str:
        """Why this LoRA module does not fuse; empty where it does."""
        if config.fusion is None:
            return "fusion=None"
        place = runtime.map.places.get(path)
        if place is None:
            return "it is not a projection of a block's attention"
        if place.is_cross_attention:
            return "cross-attention does not fuse"
        if config.latent_dim is not None and place.stack in runtime.map.decoders:
            return "with latent_dim only the encoder of an encoder-decoder fuses: the states are of the encoder's text"
        name = path.rpartition(".")[2]
        if config.fusion_modules is None:
            if path not in runtime.map.query_and_value:
                return "only self-attention query and value projections fuse (fusion_modules)"
        elif name not in config.fusion_modules and path not in config.fusion_modules:
            return f"it is not in fusion_modules={list(config.fusion_modules)}"
        hidden = _hidden_size(self.model)
        if hidden is not None and layer.in_features != hidden:
            return f"its input is {layer.in_features} wide, the source's hidden state {hidden}"
        rank, heads = layer.r[adapter], config.cross_attention_heads
        if config.fusion == "cross_attention" and rank % heads:
            return f"cross_attention_heads={heads} does not divide its rank {rank}"
        return ""

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's delete_adapter; the adapter's fusions go with it, and the hooks that no other adapter needs."""
        super().delete_adapter(adapter_name)
        runtime = runtime_of(self.model)
        if runtime is not None:
            runtime.clear()
            runtime.configs.pop(adapter_name, None)
            runtime.reasons = {key: why for key, why in runtime.reasons.items() if key[1] != adapter_name}
            runtime.layers = [layer for layer in runtime.layers if any(f for f in layer.flare_fusion.values())]
            detach(self.model)
            if runtime.configs:
                attach(self.model, runtime)
            else:
                make_sites(self.model)  # PEFT leaves its layers in place, and so their forward

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """PEFT's add_weighted_adapter, for fusing adapters as far as a combination of A and B means something there.

        Raises:
            ValueError: adapters that fuse differently (weights trained for one phi mean nothing under another) or that
                train more than A and B; a fusion, combination_type or weight under which an adapter combined with an
                empty one would not be itself.
        """
        known = [name for name in adapters if name in self.peft_config]
        for name in known:
            config = self.peft_config[name]
            if config.fusion == "cross_attention" or config.latent_dim is not None:
                what = "latent_proj" if config.latent_dim is not None else "cross_attention's query, key and value"
                raise ValueError(f"adapters: {name!r} trains {what}, which cannot be combined: only A and B can")
        for key in ("fusion", "source_layer_offset", "source_padding"):
            values = {name: getattr(self.peft_config[name], key) for name in known}
            if len(set(values.values())) > 1:
                raise ValueError(f"adapters: cannot combine adapters whose {key} differs: {values}")
        fusion = self.peft_config[known[0]].fusion if known else None
        if fusion is not None:
            _check_combination(fusion, combination_type, weights)
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, *args, **kwargs)

    # --- saving and loading -------------------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A weight's name in a saved adapter: PEFT's, which looks for the adapter one component before the last only.

        FLARE MT's projection is saved under one name, whichever layer holds it.
        """
        name = re.escape(adapter_name)
        attention = re.fullmatch(rf"(.*\.lora_cross_attention)\.{name}(\.(query|key|value)\.(weight|bias))", key)
        if attention:
            return attention[1] + attention[2]
        projection = re.fullmatch(rf"(base_model\.model\.)?.*\.latent_proj\.{name}\.(weight|bias)", key)
        if projection:
            return f"{projection[1] or ''}latent_proj.{projection[2]}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: FlareConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """PEFT's, and its warning of shards that were not gathered, which PEFT gives for the type LORA alone."""
        found: dict[str, Tensor] = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        warn_of_shards(found, adapter_name=adapter_name)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: FlareConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's. Raises ValueError where the weights lack FLARE MT's projection, which PEFT would not miss."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if config.latent_dim is not None:
            missing = [
                end for end in ("weight", "bias") if not any(_is_projection(k, adapter_name, end) for k in remapped)
            ]
            if missing:
                names = ", ".join(f"latent_proj.{end}" for end in missing)
                raise ValueError(
                    f"the weights for adapter {adapter_name!r} (latent_dim={config.latent_dim}) lack {names}"
                )
        return remapped

    # --- merging ------------------------------------------------------------------------------------------------------

    def check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Raises ValueError, before anything is merged, where one of the adapters fuses two streams."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            config = self.peft_config.get(name)
            if config is not None and config.fusion is not None:
                raise ValueError(MERGE_REFUSED.format(name=name, fusion=config.fusion))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's merge_adapter; ValueError for a fusing adapter."""
        self.check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """PEFT's merge_and_unload; ValueError for a fusing adapter."""
        self.check_mergeable(adapter_names)
        model = super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
        detach(model)
        return model

    def unload(self) -> nn.Module:
        """The base model without adapters and without our hooks."""
        model = super().unload()
        detach(model)
        return model

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: FlareConfig, path: str, state_dict: dict[str, Tensor], kwargs: Any
    ) -> dict[str, Tensor]:
        """PEFT's, which takes an adapter of PiSSA, CorDA or OLoRA to one of the unchanged base (fusion=None).

        PEFT marks the initial adapter as an ordinary one only where the type is LORA.
        """
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path)
        return cast(
            dict[str, Tensor],
            super()._convert_state_dict_for_initial_model(peft_model, peft_config, path, state_dict, kwargs),
        )

    # --- the source ---------------------------------------------------------------------------------------------------

    def _runtime(self) -> Runtime:
        runtime = runtime_of(self.model)
        if runtime is None:
            raise ValueError("the model has no adapter left to read a source with: add or load one first")
        return runtime

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's. Raises ValueError for ``adapter_names`` with a source: here, because hooks that PEFT has installed
        outlive an error in the forward.
        """
        given = [name for name in SOURCE_ARGUMENTS if kwargs.get(name) is not None]
        if given and kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names (several adapters in one batch) cannot be combined with {', '.join(given)}: run one "
                "adapter per batch, or leave the source out"
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def encode_source(self, source_input_ids: Tensor, source_attention_mask: Tensor | None = None) -> SourceStates:
        """Hidden states of the frozen model on the source text, for the places where active adapters fuse; of an
        encoder-decoder the encoder's alone (its decoder fuses where a forward is given the source's decoder input).

        Args:
            source_input_ids: (B, m) token ids, padded to the length of the target text they will meet.
            source_attention_mask: (B, m); left out means all ones.

        Returns:
            SourceStates, for ``model(..., source_states=...)``.

        Raises:
            TypeError, ValueError: ids that are no integer tensor (B, m), a mask of another shape, or no active adapter
                that fuses.
        """
        runtime = self._runtime()
        source = {"source_input_ids": source_input_ids, "source_attention_mask": source_attention_mask}
        with torch.no_grad():
            return encode(self.model, runtime, source)

    def set_source_cache(self, cache: SourceStateCache | None) -> None:
        """Read source states from a cache, and keep there what has to be computed, in every forward with source ids.

        ``generate`` and ``encode_source`` do without it. FlareTrainer calls this for its ``source_cache``.

        Args:
            cache: a flare.SourceStateCache, or None for none.

        Raises:
            TypeError, ValueError: no cache; a cache bound to another base model; base weights that are trained; active
                adapters whose source pass is not deterministic (source_dropout=True) or that have none.
        """
        runtime = self._runtime()
        if cache is not None:
            if not isinstance(cache, SourceStateCache):
                raise TypeError(f"cache must be a flare.SourceStateCache or None, got {type(cache).__name__}")
            check_cacheable(runtime, runtime.reading().of_both.adapters)
            cache.bind(self.model)
        runtime.source_cache = cache

    def source_request(self) -> SourceRequest:
        """Return what the active adapters read of a source, as a :class:`flare.SourceStateCache` needs to know it."""
        runtime = self._runtime()
        reading = runtime.reading()
        adapters = reading.of_both.adapters
        if not adapters:
            return SourceRequest(self.model, frozenset(), frozenset(), 0, False)
        check_cacheable(runtime, adapters)
        return SourceRequest(
            self.model,
            frozenset(reading.of_text.keys),
            frozenset(reading.of_decoder.keys),
            runtime.setting("source_layer_offset", adapters),
            runtime.setting("source_padding", adapters) == "zero",
        )

    def generate(
        self,
        *args: Any,
        source_alignment: str = "training",
        source_padding: str | None = None,
        source_pass: str = "auto",
        **kwargs: Any,
    ) -> Any:
        """transformers' generate, fusing where a source is given; without one it is the base model's, with plain LoRA.

        The frozen model writes its own greedy continuation of the source, a token for each of the target's; greedy
        search, sampling, beams, several sequences per prompt and chunked prefill are transformers'.

        Args:
            *args: as the base model's generate.
            **kwargs: as the base model's generate, and the source arguments of forward. Both prompts are padded on the
                left, to one width. FLARE MT: ``source_states`` of the prompt. The decoder of an encoder-decoder fuses
                if ``source_labels`` (only their presence counts) or ``source_decoder_input_ids`` (the beginning of the
                source's output) are given, as in forward.
            source_alignment: "training": prompt position j meets the source's prompt position j, new token t the
                source's token t, and a source that has ended is held at its end token. "release": the whole prompt and
                every new token meet one late position of the source, as in the authors' release (decoder-only).
            source_padding: "zero": S = 0 at the source's padding, so that a row's output does not depend on its batch;
                "keep": the padding's states. Default: "zero" for a decoder-only model, whatever the adapter's config
                says; the adapter's own for an encoder-decoder; the release's rule knows "keep" alone.
            source_pass: "shared": the new tokens of both texts go through the model as one batch, so that a step reads
                each frozen weight once and not twice; for decoder-only adapters with source_layer_offset=0, in eval
                mode and not compiled. The prompts are read one after the other. "separate": two passes. "auto"
                (default): shared where that is possible; it says so once where something unusual keeps it from that.
                Both give the same logits up to rounding.

        Raises:
            TypeError, ValueError: source arguments that do not fit, or an option that cannot be combined with a source
                (use_cache=False, a cache of one's own, assisted and contrastive decoding, ...); the message names it.
        """
        if source_alignment not in ALIGNMENTS:
            raise ValueError(
                f"source_alignment={source_alignment!r} is not accepted; one of: {', '.join(map(repr, ALIGNMENTS))}"
            )
        source = take_source(self.model, kwargs, SOURCE_ARGUMENTS)
        runtime = self._runtime() if source else runtime_of(self.model)
        if runtime is None:
            return cast(Any, self.model).generate(*args, **kwargs)
        # generate calls the encoder first, not the model
        if not source and runtime.state_uses() and runtime.map.decoders:
            warn_without_source(runtime, training=False)
        if not source or not runtime.state_uses():
            return cast(Any, self.model).generate(*args, **kwargs)
        refuse_packed_rows(self.model, source, (), kwargs)
        return generate(self.model, runtime, source, source_alignment, source_padding, source_pass, args, kwargs)

    # --- what was done ------------------------------------------------------------------------------------------------

    def fast_lora_report(self) -> FastLoraReport:
        """Every LoRA module and adapter: fused, or declined and why."""
        runtime = runtime_of(self.model)
        reasons = {} if runtime is None else runtime.reasons
        rows: list[ReportRow] = []
        for path, module in self.model.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            for adapter in _adapters_of(module):
                fusion = module.flare_fusion.get(adapter) if isinstance(module, FlareLayer) else None
                reason = reasons.get((path, adapter), "")
                rows.append(ReportRow(path, adapter, fusion is not None, fusion, reason, type(module).__name__))
        return FastLoraReport(rows)


_AS_LORA = LoraConfig()

#: Names of the heads that PEFT trains in full (modules_to_save) for these tasks.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def _spare_the_head(model: nn.Module, config: FlareConfig) -> None:
    """Keep "all-linear" off a head that is trained in full, which PEFT does for sequence classification alone."""
    targets, heads = config.target_modules, _HEADS.get(config.task_type or "", ())
    if not isinstance(targets, str) or targets.lower() != "all-linear" or isinstance(config.exclude_modules, str):
        return
    own = [name for name in heads if isinstance(getattr(model, name, None), nn.Linear)]
    if own:
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *own})


def _adapters_of(layer: LoraLayer) -> Iterable[str]:
    return [*layer.lora_A.keys(), *layer.lora_embedding_A.keys()]


def _is_projection(key: str, adapter: str, end: str) -> bool:
    return key.endswith(f".latent_proj.{adapter}.{end}")


def _check_combination(fusion: str, combination_type: str, weights: Iterable[float]) -> None:
    """Raises ValueError where PEFT's combination of A and B matrices is not one of what fusing adapters add.

    Other combination types mix the ranks or make B A anew, which phi, taken per rank, does not survive; with mul a
    weight on A counts twice; and relu does not pass a negative weight on.
    """
    accepted = "accepted: fusion 'add' or 'add_relu', combination_type 'linear' or 'cat', weights above 0"
    weights = list(weights)
    if fusion not in ("add", "add_relu"):
        raise ValueError(f"adapters: those with fusion={fusion!r} cannot be combined; {accepted}")
    if combination_type not in ("linear", "cat"):
        raise ValueError(f"combination_type={combination_type!r} cannot combine adapters that fuse; {accepted}")
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"weights={weights!r} cannot combine adapters that fuse; {accepted}")


def _hidden_size(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None)


_OWN_FIELDS = sorted({f.name for f in fields(FlareConfig)} - {f.name for f in fields(FlareConfig.__mro__[1])})
register_tuner(FlareConfig, FlareModel, [name for name in _OWN_FIELDS if name != "source_memory"])
