"""The primitives of the adapter as Triton kernels, forward and backward.

:mod:`flare_kernels.torch_ops` exports the same functions, except ``decode``, in plain PyTorch. The autograd node works
with either module.

=====================  ==============================================================================================
``stack``              concatenate the A (or B) matrices of several adapters, in the compute dtype
``dropout_mask``       packed dropout masks
``shrink``             T = drop(x) A^T, S = drop(x_source) A^T
``expand_``            y_i += scaling_i * phi(S_i, T_i) B_i^T, in place, up to three projections in one launch; or
                       y_i = bias_i + scaling_i * phi(S_i, T_i) B_i^T, without reading y_i
``grad_bottleneck``    dH_i = scaling_i * G_i B_i, dT and dS through phi, dB_i = scaling_i * G_i^T H_i
``grad_weight``        dA = dT^T drop(x) + dS^T drop(x_source)
``grad_input``         dx = dT A, masked and scaled under dropout; written, or added to an existing dx
``decode``             shrink and expand for a few tokens, two launches for all projections
=====================  ==============================================================================================

G_i = dL/dy_i, H_i = phi(S_i, T_i), and drop is dropout. All sums are float32. Float32 operands are multiplied in IEEE
float32, never TF32. The same call gives the same bits. A primitive may have several implementations, called forms
(``FORMS`` in ``config.py``). :mod:`flare_kernels.forms` chooses the form of a call. The functions of this module never
take the form "torch" (plain PyTorch). ``backend="auto"`` uses the functions in :data:`tuned`, which take this form if
the launch table or the general rule prefers it.
"""

from __future__ import annotations

import functools
import types

from .decode import MAX_ROWS as DECODE_ROWS
from .decode import can_decode, decode
from .dropout_mask import dropout_mask
from .expand import expand_
from .grad_bottleneck import grad_bottleneck
from .grad_input import grad_input
from .grad_weight import grad_weight
from .shrink import shrink
from .stack import stack

__all__ = [
    "DECODE_ROWS",
    "can_decode",
    "decode",
    "dropout_mask",
    "expand_",
    "grad_bottleneck",
    "grad_input",
    "grad_weight",
    "shrink",
    "stack",
    "tuned",
]

tuned = types.SimpleNamespace(
    FOLLOWS_TABLE=True,
    DECODE_ROWS=DECODE_ROWS,
    can_decode=can_decode,
    decode=decode,
    dropout_mask=dropout_mask,
    stack=stack,
    **{
        primitive.__name__: functools.partial(primitive, follow_table=True)
        for primitive in (expand_, grad_bottleneck, grad_input, grad_weight, shrink)
    },
)
