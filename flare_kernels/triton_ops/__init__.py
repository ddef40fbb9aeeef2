"""The five primitives of the adapter as Triton kernels, forward and backward.

:mod:`flare_kernels.torch_ops` exports the same five functions in plain PyTorch; the autograd nodes are written once
over either module. This package is the only part of ``flare_kernels`` that imports Triton: import it where it is used.

=====================  ==============================================================================================
``shrink``             T = drop(x) A^T, S = drop(x_source) A^T
``expand_``            y += scaling * phi(S, T) B^T, in place
``grad_bottleneck``    dH = scaling * G B, dT and dS through phi, dB = scaling * G^T phi(S, T)
``grad_weight``        dA = dT^T drop(x) + dS^T drop(x_source)
``grad_input``         dx = undrop(dT A)
=====================  ==============================================================================================

All sums are float32; float32 operands are multiplied in IEEE float32 (never TF32); the same call gives the same bits.
"""

from .expand import expand_
from .grad_bottleneck import grad_bottleneck
from .grad_input import grad_input
from .grad_weight import grad_weight
from .shrink import shrink

__all__ = ["expand_", "grad_bottleneck", "grad_input", "grad_weight", "shrink"]
