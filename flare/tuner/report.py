"""What was done with every LoRA module of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportRow:
    """One adapter on one LoRA module: whether it fuses, how, and the reason where it does not."""

    module: str
    adapter: str
    fused: bool
    fusion: str | None
    reason: str
    backend_layer: str


class FastLoraReport(tuple[ReportRow, ...]):
    """Every LoRA module of a model; prints as a table."""

    __slots__ = ()

    @property
    def fused(self) -> tuple[ReportRow, ...]:
        """The rows that fuse two streams."""
        return tuple(row for row in self if row.fused)

    @property
    def declined(self) -> tuple[ReportRow, ...]:
        """The rows that do not, each with its reason."""
        return tuple(row for row in self if not row.fused)

    def __str__(self) -> str:
        if not self:
            return "no LoRA modules"
        head = f"{len(self.fused)} of {len(self)} LoRA modules fuse two streams"
        width = max(len(row.module) for row in self)
        lines = [
            f"  {row.module:<{width}}  {row.adapter}  {row.fusion if row.fused else 'plain LoRA: ' + row.reason}"
            for row in self
        ]
        return "\n".join([head, *lines])
