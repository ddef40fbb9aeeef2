"""Plain LoRA: FLARE's adapters and kernels without a source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import peft


def plain_lora(model: Any, config: peft.LoraConfig | None = None, **overrides: Any) -> peft.PeftModel:
    """Return a model with plain LoRA adapters: :func:`flare.fast_lora` with ``fusion=None``.

    The adapters compute y = x W^T + b + s T B^T with T = x A^T and s = lora_alpha / r, on this package's kernels.

        model = flare.baselines.plain_lora(model, r=64, lora_alpha=128)

    Args:
        model: a transformers model (modified in place) or a PEFT LoRA model.
        config: a FlareConfig, a peft.LoraConfig or None.
        **overrides: fields of FlareConfig, such as ``r``, ``lora_alpha`` or ``target_modules``.

    Raises:
        ValueError: ``fusion`` is not None, or an error of :func:`flare.fast_lora`.
    """
    from ..tuner.convert import fast_lora

    if overrides.pop("fusion", None) is not None:
        raise ValueError("plain_lora does not fuse: leave fusion out, or call flare.fast_lora to fuse two streams")
    return fast_lora(model, config, fusion=None, **overrides)
