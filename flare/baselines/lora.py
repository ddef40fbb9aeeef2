"""Plain LoRA: FLARE's adapters, kernels and heads, without a source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import peft


def plain_lora(model: Any, config: peft.LoraConfig | None = None, **overrides: Any) -> peft.PeftModel:
    """``fast_lora`` with ``fusion=None``: y = x W^T + b + s T B^T.

    Args:
        model: a transformers model (modified in place) or a PEFT LoRA model, as for :func:`flare.fast_lora`.
        config: a FlareConfig, a peft.LoraConfig or None.
        overrides: FlareConfig fields, such as ``r``, ``lora_alpha`` or ``target_modules``.

    Raises:
        ValueError: an override ``fusion`` other than None.
    """
    from ..tuner.convert import fast_lora

    if overrides.pop("fusion", None) is not None:
        raise ValueError("plain_lora does not fuse: leave fusion out, or call flare.fast_lora to fuse two streams")
    return fast_lora(model, config, fusion=None, **overrides)
