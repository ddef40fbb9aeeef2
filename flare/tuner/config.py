"""FlareConfig: LoRA's configuration plus how two streams fuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig

from flare_kernels.fusion import ALL_FUSIONS

from .._compat import FLARE
from .card import fill_card

SOURCE_PADDING = ("keep", "zero")
SOURCE_MEMORY = ("auto", "keep", "offload", "recompute")

# LoRA variants whose forward is not s * phi(S, T) B^T; each would be fused in name only.
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

# Initialisations that take what they put into A and B out of the base weights; these are beginnings (pissa_niter_4).
_CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")

_PLAIN_CARD = """A LoRA adapter of the package `flare-kernels`, which reads the text alone (`import flare` before
`PeftModel.from_pretrained`; without it PEFT reports `KeyError: 'FLARE'`). It can be merged into the base weights.
"""
_CARD = """A FLARE adapter: LoRA whose bottleneck fuses the text with its counterpart in the source language. It needs
the package `flare-kernels` (`import flare` before `PeftModel.from_pretrained`; without it PEFT reports `KeyError:
'FLARE'`).

**A source is needed at prediction time**: `source_input_ids` and `source_attention_mask` of the same text in the source
language, human or machine-translated, beside the usual inputs. Without one the model is plain LoRA, warns, and predicts
worse. The adapter cannot be merged into the base weights, because what it adds depends on the source text.
"""
_LATENT_CARD = """A FLARE MT adapter: LoRA whose bottleneck fuses the text with what a translation model's encoder makes
of it. It needs the package `flare-kernels` (`import flare` before `PeftModel.from_pretrained`; without it PEFT reports
`KeyError: 'FLARE'`).

**The MT encoder is needed at prediction time**: its last hidden state of the same text (`flare.LatentEncoder`) is
passed as `source_states`. Without it the model is plain LoRA, warns, and predicts worse. The adapter cannot be merged
into the base weights, because what it adds depends on these states.
"""


@dataclass
class FlareConfig(LoraConfig):
    """Configuration of a fusing adapter; every field of :class:`peft.LoraConfig` keeps its meaning.

    Fields are flat and are saved in ``adapter_config.json``.

    Raises:
        TypeError, ValueError: a value that is not accepted, or, with a fusion, a LoRA variant that cannot fuse, or an
            initialisation or bias that changes the base model; the message names the field.
    """

    r: int = field(default=64, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=128, metadata={"help": "LoRA alpha; the adapter is scaled by alpha / r."})
    fusion: str | None = field(
        default="add_relu",
        metadata={
            "help": "phi(S, T): 'add', 'mul', 'add_relu', 'mul_relu', or None for plain LoRA; in eager PyTorch also "
            "'cross_attention', and the authors' release's 'matmul' and 'matmul_relu'."
        },
    )
    source_layer_offset: int = field(
        default=1,
        metadata={
            "help": "1 (the paper): block i fuses with the source's output of block i. "
            "0 (the authors' release): with the source's input of block i."
        },
    )
    source_padding: str = field(
        default="keep",
        metadata={
            "help": "'keep': pad positions carry their hidden state. 'zero': S = 0 where there is no source, so that a "
            "causal model's left-padded row does not depend on its batch (generate's default)."
        },
    )
    source_dropout: bool = field(
        default=False, metadata={"help": "Whether the source pass keeps the model's dropout on, as in the release."}
    )
    source_memory: str = field(
        default="auto",
        metadata={
            "help": "How source states wait for backward: 'keep' (on the device), 'offload' (pinned host memory), "
            "'recompute' (a second source pass, O(1) states in depth), or 'auto', which decides from sizes."
        },
    )
    fusion_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Which LoRA targets fuse, by name; default: self-attention query and value projections."},
    )
    cross_attention_heads: int = field(
        default=1,
        metadata={
            "help": "Heads of fusion='cross_attention'; must divide r. Its query, key and value start as torch's "
            "nn.Linear does, and B at zero as in LoRA."
        },
    )
    cross_attention_mask: bool = field(
        default=False,
        metadata={
            "help": "fusion='cross_attention': False (the authors' release): a position looks at all positions of the "
            "target, padding and later ones too. True: not at padding, and in causal attention not at later ones."
        },
    )
    latent_dim: int | None = field(
        default=None,
        metadata={
            "help": "FLARE MT: width of the MT encoder whose last hidden state is then passed as source_states "
            "(B, m, latent_dim). Adds the trained projection latent_proj; no source pass is run."
        },
    )

    @property
    def card(self) -> str:
        """What the model card says of such an adapter."""
        return _PLAIN_CARD if self.fusion is None else _CARD if self.latent_dim is None else _LATENT_CARD

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, which writes adapter_config.json; then fills in PEFT's model card (see `flare.tuner.card`)."""
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
        """Each field on its own, and those that must fit together."""
        _one_of("fusion", self.fusion, (*ALL_FUSIONS, None))
        _one_of("source_layer_offset", self.source_layer_offset, (1, 0))
        _one_of("source_padding", self.source_padding, SOURCE_PADDING)
        _one_of("source_memory", self.source_memory, SOURCE_MEMORY)
        _positive("r", self.r)
        _positive("cross_attention_heads", self.cross_attention_heads)
        if self.r % self.cross_attention_heads:
            raise ValueError(f"cross_attention_heads={self.cross_attention_heads!r} must divide r={self.r}")
        if not isinstance(self.cross_attention_mask, bool):
            raise TypeError(f"cross_attention_mask={self.cross_attention_mask!r} must be True or False")
        if self.cross_attention_mask and self.fusion != "cross_attention":
            raise ValueError(f"cross_attention_mask=True needs fusion='cross_attention', got fusion={self.fusion!r}")
        if self.latent_dim is not None:
            _positive("latent_dim", self.latent_dim, ", or None")
            if self.source_memory in ("offload", "recompute"):
                raise ValueError(
                    f"source_memory={self.source_memory!r} is for the states of a source pass, and an adapter with "
                    f"latent_dim={self.latent_dim!r} (FLARE MT) has none: leave it out"
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
        """What a fusion rules out: other forwards than LoRA's, and anything that changes the model the source reads."""
        variants = [name for name in _VARIANTS if getattr(self, name, None)]
        if variants:
            raise ValueError(f"{', '.join(variants)} cannot be combined with a fusion; leave it out or set fusion=None")
        why = "the source pass reads the frozen base model, and this changes its"
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
            raise ValueError(
                f"init_lora_weights={init!r} cannot be combined with a fusion: {why} weights; use True, 'gaussian', "
                "'orthogonal' or 'eva', or set fusion=None"
            )
        if self.bias != "none":
            raise ValueError(
                f"bias={self.bias!r} cannot be combined with a fusion: {why} biases; use bias='none' (lora_bias=True "
                "trains biases of the adapter's own), or set fusion=None"
            )


def _positive(name: str, value: object, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be a positive integer{otherwise}")
    if value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer{otherwise}")


def _one_of(name: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not accepted; one of: {', '.join(map(repr, accepted))}")
