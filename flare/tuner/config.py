"""Configuration of FLARE adapters: PEFT's LoraConfig, and how the source and the target text are fused."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from peft import LoraConfig

from flare_kernels.fusion import ALL_FUSIONS

from .._compat import FLARE
from .card import fill_card

SOURCE_PADDING = ("keep", "zero")
SOURCE_MEMORY = ("auto", "keep", "offload", "recompute")

# Fields of LoraConfig that cannot be combined with a fusion. Most select a LoRA variant, which computes another update
# than `scaling * phi(S, T) B^T`.
_VARIANTS = (
    "use_dora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "layer_replication",
    "target_parameters",
)

# Initialisations (prefixes of init_lora_weights, such as pissa_niter_4) that subtract the initial B A from the base
# weights.
_CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")

_PLAIN_CARD = """A LoRA adapter of the package `flare-kernels`. It reads only the input text, and can be merged into the
base weights. Run `import flare` before `PeftModel.from_pretrained`. Otherwise PEFT reports `KeyError: 'FLARE'`.
"""
_CARD = """A FLARE adapter: LoRA whose bottleneck fuses the text with the same text in the source language. It needs the
package `flare-kernels`: run `import flare` before `PeftModel.from_pretrained`. Otherwise PEFT reports `KeyError:
'FLARE'`.

**A source is needed at prediction time**: `source_input_ids` and `source_attention_mask` of the same text in the source
language, human or machine-translated, in addition to the usual inputs. Without one the model is plain LoRA, warns, and
predicts worse. The adapter cannot be merged into the base weights, because its output depends on the source text.
"""
_LATENT_CARD = """A FLARE MT adapter: LoRA whose bottleneck fuses the text with its encoding by a translation model. It
needs the package `flare-kernels`: run `import flare` before `PeftModel.from_pretrained`. Otherwise PEFT reports
`KeyError: 'FLARE'`.

**The MT encoder is needed at prediction time**: its last hidden state of the same text (`flare.LatentEncoder`) is
passed as `source_states`. Without it the model is plain LoRA, warns, and predicts worse. The adapter cannot be merged
into the base weights, because its output depends on these states.
"""

_Config = TypeVar("_Config")


def _help_from_docstring(cls: type[_Config]) -> type[_Config]:
    """Copy the fields' descriptions from the class's docstring to ``metadata["help"]``, for transformers' parsers."""
    args = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts = re.findall(r"^    (\w+) \(.*?\): (.*(?:\n     .*)*)", args, re.MULTILINE)
    meanings = {name: " ".join(text.split()) for name, text in texts}
    for each in fields(cls):  # type: ignore[arg-type]
        if each.name in meanings and each.name in inspect.get_annotations(cls):  # other fields belong to a base class
            each.metadata = MappingProxyType({"help": meanings[each.name]})
    return cls


@_help_from_docstring
@dataclass
class FlareConfig(LoraConfig):
    """Configuration of a FLARE adapter: every field of :class:`peft.LoraConfig`, and how the two streams are fused.

    ``save_pretrained`` writes all fields to ``adapter_config.json``. Example::

        config = flare.FlareConfig(r=16, lora_alpha=32, fusion="mul", lora_dropout=0.1)
        model = flare.fast_lora(model, config)

    Under Args are the fields that FLARE adds, and the fields whose default differs from PEFT's.

    Args:
        r (int): Rank of the adapter.
        lora_alpha (int): LoRA's alpha. The adapter's output is scaled by lora_alpha / r.
        fusion (str, optional): phi(S, T), which combines the rank-r projections of source (S) and target (T): 'add',
            'mul', 'add_relu' or 'mul_relu'; None for plain LoRA. 'cross_attention', and 'matmul' and 'matmul_relu'
            of the authors' release, run in eager PyTorch.
        source_layer_offset (int): 1 (the paper): block i fuses with the source's output of block i. 0 (the authors'
            release): block i fuses with the source's input of block i.
        source_padding (str): 'keep' (as in the authors' release): padding positions of the source contribute their
            hidden states. 'zero': S = 0 at these positions, so that a row's output does not depend on the padding of
            its batch. generate() has an argument of the same name, which is 'zero' by default for decoder-only models.
        source_dropout (bool): Whether the source pass applies the model's dropout, as in the authors' release.
        source_memory (str): How source states are stored until the backward pass: 'keep' (on the device), 'offload'
            (in pinned host memory), 'recompute' (by a second source pass; memory does not grow with depth), or 'auto':
            'keep' if the states take at most an eighth of the device's memory, otherwise 'recompute' if possible.
        fusion_modules (list[str] | str, optional): LoRA target modules that fuse, by name or full path. None: the query
            and value projections of self-attention.
        cross_attention_heads (int): Number of heads of fusion='cross_attention'; must divide r. Its query, key
            and value layers are initialised as torch.nn.Linear, and B with zeros as in LoRA.
        cross_attention_mask (bool): Only for fusion='cross_attention'. False (the authors' release): every position
            attends to all positions of the target, including padding and later ones. True: padding is masked and, if
            the model's attention is causal, so are later positions.
        latent_dim (int, optional): For FLARE MT: the width of the MT encoder, whose last hidden state (B, m,
            latent_dim) is passed as source_states. Adds the trained projection latent_proj; no source pass runs.

    Raises:
        TypeError: a field has a value of the wrong type; the message names the field.
        ValueError: a value is not accepted. With a fusion, LoRA variants that cannot fuse are not accepted, nor are
            initialisations and biases that change the base model, because the source pass runs the base model.
    """

    r: int = 64
    lora_alpha: int = 128
    fusion: str | None = "add_relu"
    source_layer_offset: int = 1
    source_padding: str = "keep"
    source_dropout: bool = False
    source_memory: str = "auto"
    fusion_modules: list[str] | str | None = None
    cross_attention_heads: int = 1
    cross_attention_mask: bool = False
    latent_dim: int | None = None

    @property
    def card(self) -> str:
        """The model card's description of an adapter with this config."""
        return _PLAIN_CARD if self.fusion is None else _CARD if self.latent_dim is None else _LATENT_CARD

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, as PEFT does, and fill in PEFT's model card (:mod:`flare.tuner.card`)."""
        super().save_pretrained(save_directory, **kwargs)
        fill_card(Path(save_directory), self)

    def __post_init__(self) -> None:
        self._check_values()
        if self.fusion is not None:
            self._check_fuses()
        super().__post_init__()
        self.peft_type = FLARE  # type: ignore[assignment]
        if isinstance(self.fusion_modules, (set, tuple)):
            self.fusion_modules = sorted(self.fusion_modules)
        elif isinstance(self.fusion_modules, str):
            self.fusion_modules = [self.fusion_modules]

    def _check_values(self) -> None:
        """Raise TypeError or ValueError for a value, or a combination of values, that is not accepted."""
        _check_one_of("fusion", self.fusion, (*ALL_FUSIONS, None))
        _check_one_of("source_layer_offset", self.source_layer_offset, (1, 0))
        _check_one_of("source_padding", self.source_padding, SOURCE_PADDING)
        _check_one_of("source_memory", self.source_memory, SOURCE_MEMORY)
        _check_positive("r", self.r)
        _check_positive("cross_attention_heads", self.cross_attention_heads)
        if self.r % self.cross_attention_heads:
            raise ValueError(f"cross_attention_heads={self.cross_attention_heads!r} must divide r={self.r}")
        if not isinstance(self.cross_attention_mask, bool):
            raise TypeError(f"cross_attention_mask={self.cross_attention_mask!r} must be True or False")
        if self.cross_attention_mask and self.fusion != "cross_attention":
            raise ValueError(f"cross_attention_mask=True needs fusion='cross_attention', got fusion={self.fusion!r}")
        if self.latent_dim is not None:
            _check_positive("latent_dim", self.latent_dim, ", or None")
            if self.source_memory in ("offload", "recompute"):
                raise ValueError(
                    f"source_memory={self.source_memory!r} is for the states of a source pass, and an adapter with "
                    f"latent_dim={self.latent_dim!r} (FLARE MT) runs no source pass: leave source_memory out"
                )
            if self.fusion is None:
                raise ValueError(f"latent_dim={self.latent_dim!r} needs a fusion, got fusion=None (plain LoRA)")
        if not isinstance(self.source_dropout, bool):
            raise TypeError(f"source_dropout={self.source_dropout!r} must be True or False")
        if self.source_dropout and self.source_memory == "recompute":
            raise ValueError(
                "source_memory='recompute' with source_dropout=True: the second source pass would draw other dropout "
                "masks; use source_memory='keep' or 'offload', or source_dropout=False"
            )
        if isinstance(self.lora_dropout, bool) or not isinstance(self.lora_dropout, (int, float)):
            raise TypeError(f"lora_dropout={self.lora_dropout!r} must be a number from 0 to 1")
        if not 0 <= self.lora_dropout <= 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} must be a number from 0 to 1")
        names: object = self.fusion_modules
        many = isinstance(names, (list, set, tuple)) and all(isinstance(name, str) for name in names)
        if names is not None and not isinstance(names, str) and not many:
            raise TypeError(f"fusion_modules={names!r} must be a name, a list of names, or None")

    def _check_fuses(self) -> None:
        """Raise ValueError for settings that a fusion excludes: LoRA variants, and changes of the base model."""
        variants = [name for name in _VARIANTS if getattr(self, name, None)]
        if variants:
            raise ValueError(f"{', '.join(variants)} cannot be combined with a fusion; leave it out or set fusion=None")
        why = "the source pass runs the frozen base model, and this setting changes its"
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
            raise ValueError(
                f"init_lora_weights={init!r} cannot be combined with a fusion: {why} weights; use True, 'gaussian', "
                "'orthogonal' or 'eva', or set fusion=None"
            )
        if self.bias != "none":
            raise ValueError(
                f"bias={self.bias!r} cannot be combined with a fusion: {why} biases; use bias='none' (lora_bias=True "
                "trains biases in the adapter), or set fusion=None"
            )


#: The fields that FlareConfig has in addition to LoraConfig's.
FLARE_FIELDS = frozenset({f.name for f in fields(FlareConfig)} - {f.name for f in fields(LoraConfig)})


def _check_positive(name: str, value: object, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be a positive integer{otherwise}")
    if value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer{otherwise}")


def _check_one_of(name: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not accepted; one of: {', '.join(map(repr, accepted))}")
