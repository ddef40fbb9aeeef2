"""Report of the LoRA modules that fuse, and of the reasons why others do not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportRow:
    """Whether one adapter fuses in one LoRA module, and if not, why.

    Attributes:
        module: dotted path of the module.
        adapter: name of the adapter.
        fused: whether the adapter fuses in this module.
        fusion: the fusion; None if the adapter is plain LoRA here.
        reason: why the adapter does not fuse in this module; "" if it fuses.
        backend_layer: name of the module's class.
    """

    module: str
    adapter: str
    fused: bool
    fusion: str | None
    reason: str
    backend_layer: str


class FastLoraReport(tuple[ReportRow, ...]):
    """Tuple of the :class:`ReportRow` of every LoRA module and adapter; prints as a table."""

    __slots__ = ()

    @property
    def fused(self) -> tuple[ReportRow, ...]:
        """Rows of the modules that fuse."""
        return tuple(row for row in self if row.fused)

    @property
    def declined(self) -> tuple[ReportRow, ...]:
        """Rows of the modules that do not fuse."""
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
