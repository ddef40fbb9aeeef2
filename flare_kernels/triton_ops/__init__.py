"""The Triton kernels and their launchers. Call them through :mod:`flare_kernels.triton_ops.primitives`.

This is the only package of ``flare_kernels`` that imports Triton. Import it inside the functions that use it.
"""
