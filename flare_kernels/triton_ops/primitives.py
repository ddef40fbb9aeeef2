"""The primitives of the adapter as Triton kernels, forward and backward.

:mod:`flare_kernels.torch_ops` exports the same functions in plain PyTorch (but ``decode``); the autograd node is
written once over either module.

=====================  ==============================================================================================
``stack``              the A matrices of several adapters below each other, in the compute dtype
``keep_bits``          packed keep bits of dropout
``shrink``             T = drop(x) A^T, S = drop(x_source) A^T
``expand_``            y_i += scaling_i * phi(S_i, T_i) B_i^T, in place, up to three projections in one launch; or
                       y_i = bias_i + that share, without reading y_i
``grad_bottleneck``    dH_i = scaling_i * G_i B_i, dT and dS through phi, dB_i = scaling_i * G_i^T H_i
``grad_weight``        dA = dT^T drop(x) + dS^T drop(x_source)
``grad_input``         dx = undrop(dT A), or added to a dx that is there
``decode``             shrink and expand for a few tokens, two launches for all projections
=====================  ==============================================================================================

All sums are float32; float32 operands are multiplied in IEEE float32 (never TF32); the same call gives the same bits.
A step may have several forms (``FORMS`` in ``config.py``); :mod:`flare_kernels.forms` chooses one for a call. The
functions here always run kernels. Those of :data:`tuned` take the plain PyTorch form too, where the launch table or
the general rule prefers it: what ``backend="auto"`` runs.
"""

from __future__ import annotations

import functools
import types

from .decode import MAX_ROWS as DECODE_ROWS
from .decode import can_decode, decode
from .expand import expand_
from .grad_bottleneck import grad_bottleneck
from .grad_input import grad_input
from .grad_weight import grad_weight
from .keep_bits import keep_bits
from .shrink import shrink
from .stack import stack

__all__ = [
    "DECODE_ROWS",
    "can_decode",
    "decode",
    "expand_",
    "grad_bottleneck",
    "grad_input",
    "grad_weight",
    "keep_bits",
    "shrink",
    "stack",
    "tuned",
]

tuned = types.SimpleNamespace(
    FOLLOWS_TABLE=True,
    DECODE_ROWS=DECODE_ROWS,
    can_decode=can_decode,
    decode=decode,
    keep_bits=keep_bits,
    stack=stack,
    **{
        primitive.__name__: functools.partial(primitive, follow_table=True)
        for primitive in (expand_, grad_bottleneck, grad_input, grad_weight, shrink)
    },
)
