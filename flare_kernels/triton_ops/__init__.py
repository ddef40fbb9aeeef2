"""The Triton kernels and their launchers; :mod:`flare_kernels.triton_ops.primitives` is what others call.

This package is the only part of ``flare_kernels`` that imports Triton: import it where it is used.
"""
