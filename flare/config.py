"""FlareConfig: LoRA's configuration plus how two streams fuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig

from flare_kernels import FUSIONS
from flare_kernels.fusion import EAGER_FUSIONS

from ._compat import FLARE

SOURCE_PADDING = ("keep", "zero")
SOURCE_MEMORY = ("auto", "keep")

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

_CARD_HEADING = "## Loading this adapter"
_CARD = f"""{_CARD_HEADING}

A FLARE adapter: LoRA whose bottleneck fuses the text with its source-language counterpart. It needs the package
`flare-kernels` (`import flare` before `PeftModel.from_pretrained`; without it PEFT reports `KeyError: 'FLARE'`) and,
beside the usual inputs, `source_input_ids` and `source_attention_mask`, or, where its config has a `latent_dim`,
`source_states`: the MT encoder's last hidden state. It cannot be merged into the base weights, because what it adds
depends on the source text.
"""


@dataclass
class FlareConfig(LoraConfig):
    """Configuration of a fusing adapter; every field of :class:`peft.LoraConfig` keeps its meaning.

    Fields are flat and are saved in ``adapter_config.json``.

    Raises:
        ValueError: a value that is not accepted, or a LoRA variant that cannot fuse; the message names the field.
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
        metadata={"help": "'keep': pad positions carry their hidden state. 'zero': S = 0 where there is no source."},
    )
    source_dropout: bool = field(
        default=False, metadata={"help": "Whether the source pass keeps the model's dropout on, as in the release."}
    )
    source_memory: str = field(
        default="auto", metadata={"help": "How source states wait for backward: 'auto' or 'keep'."}
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
    latent_dim: int | None = field(
        default=None,
        metadata={
            "help": "FLARE MT: width of the MT encoder whose last hidden state is then passed as source_states "
            "(B, m, latent_dim). Adds the trained projection latent_proj; no source pass is run."
        },
    )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, which writes adapter_config.json; then says in the model card what loading this adapter takes."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        for card in (folder / "README.md", folder.parent / "README.md"):  # a named adapter lies one folder down
            if card.is_file():
                text = card.read_text(encoding="utf-8")
                if _CARD_HEADING not in text:
                    card.write_text(text.rstrip() + "\n\n" + _CARD, encoding="utf-8")
                break

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FLARE  # type: ignore[assignment]
        _one_of("fusion", self.fusion, (*FUSIONS, *EAGER_FUSIONS, None))
        _one_of("source_layer_offset", self.source_layer_offset, (1, 0))
        _one_of("source_padding", self.source_padding, SOURCE_PADDING)
        _one_of("source_memory", self.source_memory, SOURCE_MEMORY)
        if self.latent_dim is not None:
            if isinstance(self.latent_dim, bool) or not isinstance(self.latent_dim, int) or self.latent_dim < 1:
                raise ValueError(f"latent_dim={self.latent_dim!r} must be a positive integer, or None")
            if self.fusion is None:
                raise ValueError(f"latent_dim={self.latent_dim!r} needs a fusion, got fusion=None (plain LoRA)")
        if self.r < 1:
            raise ValueError(f"r={self.r!r} must be a positive integer")
        if self.cross_attention_heads < 1 or self.r % self.cross_attention_heads:
            raise ValueError(f"cross_attention_heads={self.cross_attention_heads!r} must divide r={self.r}")
        if isinstance(self.fusion_modules, (set, tuple)):
            self.fusion_modules = sorted(self.fusion_modules)
        elif isinstance(self.fusion_modules, str):
            self.fusion_modules = [self.fusion_modules]
        if self.fusion is not None:
            variants = [name for name in _VARIANTS if getattr(self, name, None)]
            if variants:
                raise ValueError(
                    f"{', '.join(variants)} cannot be combined with a fusion; leave it out or set fusion=None"
                )


def _one_of(name: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not accepted; one of: {', '.join(map(repr, accepted))}")
