"""The PEFT tuner. It computes LoRA with flare_kernels, and fuses source and target in query and value projections."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from .._compat import LoraLayer, register_tuner, warn_of_shards
from ..generation.generate import ALIGNMENTS, generate
from ..source.arguments import SOURCE_ARGUMENTS
from ..source.context import THREAD
from ..source.hooks import attach, detach, take_source, warn_user, warn_without_source
from ..source.inputs import check_cacheable, encode
from ..source.packed_rows import refuse_packed_rows
from ..source.runtime import Runtime, runtime_of
from ..source.states import SourceStates
from ..source_cache import SourceRequest, SourceStateCache
from .checks import check_combination, unfused_reason
from .config import FLARE_FIELDS, FlareConfig
from .grouping import make_sites
from .layer import MERGE_REFUSED, FlareLayer, convert_layer
from .report import FastLoraReport, ReportRow
from .routing import ModelMap


class FlareModel(LoraModel):
    """PEFT's tuner for ``peft_type: FLARE``, the ``base_model`` of the PeftModel that :func:`flare.fast_lora` returns.

    The PeftModel forwards attribute access to this class, so its methods are called on the PeftModel::

        model = flare.fast_lora(model, r=64, lora_alpha=128)
        output = model(
            input_ids=...,  # the target text, (B, m)
            attention_mask=...,
            labels=...,
            source_input_ids=...,  # the source text, padded to the same length m
            source_attention_mask=...,  # default: all ones
        )
        print(model.fast_lora_report())

    Source arguments of forward, in addition to the base model's arguments:

    * ``source_input_ids``, ``source_attention_mask``, ``source_token_type_ids``: (B, m).
    * ``source_labels`` or ``source_decoder_input_ids``: (B, u), the source's decoder text of length u, only for
      encoder-decoders. With one of them, the decoder fuses too.
    * ``source_states`` instead of ``source_input_ids``: the SourceStates of :meth:`encode_source`, or a tensor
      (B, m, latent_dim) if the adapter has ``latent_dim``.

    Without a source, the model is plain LoRA and warns once.
    """

    # --- adding and deleting adapters ---------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: FlareConfig, model_config: dict[str, Any]) -> FlareConfig:
        if peft_config.target_modules is None and not peft_config.target_parameters:
            try:
                peft_config.target_modules = ModelMap.of(self.model).default_targets()
            except ValueError:
                if peft_config.fusion is not None:
                    raise
        _exclude_trained_head(self.model, peft_config)
        return cast(FlareConfig, super()._prepare_adapter_config(peft_config, model_config))

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Check target modules as PEFT does for the type LORA: some modules of Mamba are rejected."""
        super()._check_target_module_compatiblity(_AS_LORA, model, target_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter as PEFT does, then convert its layers to FLARE's."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.convert_adapter(adapter_name)

    def convert_adapter(self, adapter: str) -> None:
        """Convert an adapter's LoRA layers to FLARE's, set which of them fuse, and install the hooks."""
        config = cast(FlareConfig, self.peft_config[adapter])
        runtime = runtime_of(self.model)
        if runtime is None:
            runtime = Runtime(ModelMap.of(self.model) if config.fusion is not None else ModelMap({}, {}, ()), {})
        elif config.fusion is not None and not runtime.map.places:
            runtime.map = ModelMap.of(self.model)
        runtime.clear()
        runtime.configs[adapter] = config
        has_latent_projection = False
        for path, module in self.model.named_modules():
            if not isinstance(module, LoraLayer) or adapter not in _adapters_of(module):
                continue
            reason = convert_layer(module, path)
            if not reason:
                assert isinstance(module, FlareLayer)
                reason = unfused_reason(self.model, runtime, config, path, module, adapter)
                module.flare_rows = runtime.map.fused.get(path)
                module.flare_fusion[adapter] = None if reason else config.fusion
                if config.fusion is not None:
                    module.flare_unmergeable[adapter] = config.fusion
                if not reason and module not in runtime.layers:
                    runtime.layers.append(module)
                if not reason and config.fusion == "cross_attention":
                    module.add_cross_attention(adapter, config.cross_attention_heads, config.cross_attention_mask)
                if not reason and config.latent_dim is not None and not has_latent_projection:
                    module.add_latent_projection(adapter, config.latent_dim)
                    has_latent_projection = True
            runtime.reasons[path, adapter] = reason
        reasons = {reason for (_, name), reason in runtime.reasons.items() if name == adapter}
        if config.fusion is not None and "" not in reasons:
            warn_user(
                f"adapter {adapter!r} has fusion={config.fusion!r} but fuses in no module, so it ignores the source "
                f"({'; '.join(sorted(reasons))}). Choose target_modules that can fuse, such as the query and value "
                "projections, or set fusion=None"
            )
        attach(self.model, runtime)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does, and remove its fusions and the hooks that no other adapter needs."""
        super().delete_adapter(adapter_name)
        runtime = runtime_of(self.model)
        if runtime is not None:
            runtime.clear()
            runtime.configs.pop(adapter_name, None)
            runtime.reasons = {key: reason for key, reason in runtime.reasons.items() if key[1] != adapter_name}
            runtime.layers = [layer for layer in runtime.layers if any(f for f in layer.flare_fusion.values())]
            detach(self.model)
            if runtime.configs:
                attach(self.model, runtime)
            else:
                make_sites(self.model)  # the layers stay in the model, and their forward needs a site

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Combine adapters as PEFT does.

        Fusing adapters support only fusion 'add' or 'add_relu', combination_type 'linear' or 'cat', and positive
        weights.

        Raises:
            ValueError: the adapters differ in fusion, source_layer_offset or source_padding, they have trainable
                parameters other than lora_A and lora_B, or the combination is not accepted.
        """
        check_combination(self.peft_config, adapters, weights, combination_type)
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, *args, **kwargs)

    # --- saving and loading -------------------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return a weight's name in a saved adapter, which does not contain the adapter's name.

        PEFT expects the adapter's name as the last but one component of a key. In keys of cross-attention it comes one
        component earlier. FLARE MT's projection is saved under one name, independent of the layer that holds it.
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
        """Return an adapter's weights. Warn if they are shards that were not gathered.

        PEFT gives this warning only for the type LORA.
        """
        weights: dict[str, Tensor] = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        warn_of_shards(weights, adapter_name=adapter_name)
        return weights

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: FlareConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a saved adapter's weights to the model's names. Raise ValueError if FLARE MT's projection is missing.

        PEFT does not check for it.
        """
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
        """Raise ValueError if one of the adapters fuses, before any adapter is merged."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            config = self.peft_config.get(name)
            if config is not None and config.fusion is not None:
                raise ValueError(MERGE_REFUSED.format(name=name, fusion=config.fusion))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters as PEFT does. Raise ValueError for an adapter that fuses."""
        self.check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge adapters and return the base model as PEFT does. Raise ValueError for an adapter that fuses."""
        self.check_mergeable(adapter_names)
        model = super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
        detach(model)
        return model

    def unload(self) -> nn.Module:
        """Return the base model without adapters and without FLARE's hooks."""
        model = super().unload()
        detach(model)
        return model

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: FlareConfig, path: str, state_dict: dict[str, Tensor], kwargs: Any
    ) -> dict[str, Tensor]:
        """Convert an adapter whose initialisation changed the base weights into an adapter of the original base.

        Such an adapter (PiSSA, CorDA, OLoRA) has fusion=None. PEFT resets ``init_lora_weights`` in the saved config of
        the initial adapter only if the type is LORA, so this method resets it.
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
            raise ValueError("the model has no adapter that could read a source: add or load one first")
        return runtime

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Install PEFT's hooks. Raise ValueError for ``adapter_names`` together with a source.

        This is checked before the forward, because PEFT does not remove its hooks if the forward raises.
        """
        source = [name for name in SOURCE_ARGUMENTS if kwargs.get(name) is not None]
        if source and kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names (several adapters in one batch) cannot be combined with {', '.join(source)}: run one "
                "adapter per batch, or leave the source out"
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def encode_source(self, source_input_ids: Tensor, source_attention_mask: Tensor | None = None) -> SourceStates:
        """Run the frozen model on a source text and return the hidden states that the active adapters fuse.

        Of an encoder-decoder, only the encoder's states are computed.

        Args:
            source_input_ids: (B, m) token ids, padded to the length of the target text.
            source_attention_mask: (B, m). Default: all ones.

        Returns:
            SourceStates for ``model(..., source_states=...)``: x_S (B, m, d) per block.

        Raises:
            TypeError: an argument is not a tensor of the accepted dtype.
            ValueError: a shape is wrong, the active adapters do not fuse or fuse in the decoder only, or an active
                adapter has latent_dim.
        """
        runtime = self._runtime()
        source = {"source_input_ids": source_input_ids, "source_attention_mask": source_attention_mask}
        with torch.no_grad():
            return encode(self.model, runtime, source)

    def set_source_cache(self, cache: SourceStateCache | None) -> None:
        """Set the cache in which every forward with ``source_input_ids`` looks up and stores source states.

        ``generate`` and ``encode_source`` do not use it. FlareTrainer calls this method with its ``source_cache``.

        Args:
            cache: the cache, or None to stop using one.

        Raises:
            TypeError: ``cache`` is not a SourceStateCache.
            ValueError: the cache is bound to another base model, base weights are trained, the active adapters need no
                source pass, or the source pass is random (source_dropout=True).
        """
        runtime = self._runtime()
        if cache is not None:
            if not isinstance(cache, SourceStateCache):
                raise TypeError(f"cache must be a flare.SourceStateCache or None, got {type(cache).__name__}")
            check_cacheable(runtime, runtime.active_uses().of_both.adapters)
            cache.bind(self.model)
        runtime.source_cache = cache

    def source_request(self) -> SourceRequest:
        """Return a description of the source states that the active adapters read, for a SourceStateCache."""
        runtime = self._runtime()
        active = runtime.active_uses()
        adapters = active.of_both.adapters
        if not adapters:
            return SourceRequest(self.model, frozenset(), frozenset(), 0, False)
        check_cacheable(runtime, adapters)
        return SourceRequest(
            self.model,
            frozenset(active.of_text.keys),
            frozenset(active.of_decoder.keys),
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
        """Generate with transformers' ``generate``, fused with a source if one is given and with plain LoRA otherwise.

        The frozen model decodes a continuation of the source, greedily, with one token for each new token of the
        target. For the target, transformers' greedy search, sampling, beam search, several sequences per prompt and
        chunked prefill can be used::

            output = model.generate(
                input_ids=..., attention_mask=..., source_input_ids=..., source_attention_mask=..., max_new_tokens=64
            )

        Args:
            *args: as for the base model's ``generate``.
            source_alignment: "training": position j of the target's prompt is fused with position j of the source's
                prompt, and new token t with the source's new token t. After the source has ended, its end token is
                used. "release", for decoder-only models: as in the authors' release, all positions of a forward (the
                prompt, or one new token) are fused with a single position of the source, which is decoded first. If
                the target is n tokens long after the forward (padding included), it is the source's n-1st new token,
                or its last one if it has fewer.
            source_padding: "zero": S = 0 at the source's padding, so that a row's output does not depend on its batch.
                "keep": S is computed from the padding's hidden states. Default: "zero" for decoder-only models,
                independent of the adapter's config; the config's value for encoder-decoders. "release" supports only
                "keep".
            source_pass: "shared": each decoding step runs the model once, on the new tokens of both texts, and so reads
                each frozen weight once. Only for decoder-only models in eval mode that are not compiled, and adapters
                with source_layer_offset=0. The two prompts are still processed separately. "separate": two passes per
                step. "auto": "shared" if possible, otherwise "separate", with one warning if an unexpected property of
                the model is the reason. "shared" and "separate" give the same logits up to rounding.
            **kwargs: as for the base model's ``generate``, and forward's source arguments. Both prompts must be padded
                on the left to one width. FLARE MT: ``source_states`` of the prompt. The decoder of an encoder-decoder
                fuses if ``source_labels`` or ``source_decoder_input_ids`` are given. ``source_decoder_input_ids`` are
                the beginning of the source's output. The values of ``source_labels`` are not used, except with
                ``forced_bos_token_id`` (the target's language in NLLB and mBART): then the first label of each row,
                unless it is an end token, is the first token of the source's output.

        Returns:
            What the base model's ``generate`` returns.

        Raises:
            TypeError: an unknown source argument, or one of the wrong type.
            ValueError: source arguments that do not match the target, or an option that cannot be combined with a
                source (for example use_cache=False, past_key_values, an assistant model); the message names it.
        """
        if source_alignment not in ALIGNMENTS:
            raise ValueError(
                f"source_alignment={source_alignment!r} is not accepted; one of: {', '.join(map(repr, ALIGNMENTS))}"
            )
        source = take_source(self.model, kwargs, SOURCE_ARGUMENTS)
        THREAD.slot.reset()  # generate may call the encoder directly, without the hook that resets the slot
        runtime = self._runtime() if source else runtime_of(self.model)
        if runtime is None:
            return cast(Any, self.model).generate(*args, **kwargs)
        # transformers' generate calls the encoder of an encoder-decoder directly, which bypasses the hook that warns
        if not source and runtime.state_uses() and runtime.map.decoders:
            warn_without_source(runtime, training=False)
        if not source or not runtime.state_uses():
            return cast(Any, self.model).generate(*args, **kwargs)
        refuse_packed_rows(self.model, source, (), kwargs)
        return generate(self.model, runtime, source, source_alignment, source_padding, source_pass, args, kwargs)

    # --- report -------------------------------------------------------------------------------------------------------

    def fast_lora_report(self) -> FastLoraReport:
        """Return a report of which LoRA modules fuse and why others do not; it prints as a table."""
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

#: task type -> names of the heads that PEFT trains in full (modules_to_save)
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def _exclude_trained_head(model: nn.Module, config: FlareConfig) -> None:
    """Exclude a head that is trained in full from "all-linear". PEFT does this only for sequence classification."""
    targets, heads = config.target_modules, _HEADS.get(config.task_type or "", ())
    if not isinstance(targets, str) or targets.lower() != "all-linear" or isinstance(config.exclude_modules, str):
        return
    linear_heads = [name for name in heads if isinstance(getattr(model, name, None), nn.Linear)]
    if linear_heads:
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *linear_heads})


def _adapters_of(layer: LoraLayer) -> Iterable[str]:
    return [*layer.lora_A.keys(), *layer.lora_embedding_A.keys()]


def _is_projection(key: str, adapter: str, end: str) -> bool:
    return key.endswith(f".latent_proj.{adapter}.{end}")


register_tuner(FlareConfig, FlareModel, sorted(FLARE_FIELDS - {"source_memory"}))
