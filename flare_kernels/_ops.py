"""The namespace of the operators in ``torch.ops``.

A build for the Hugging Face kernels hub replaces this file by one whose namespace is unique to that build.
"""

NAMESPACE = "flare_kernels"


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the qualified name of an operator, such as ``flare_kernels::lora``."""
    return f"{NAMESPACE}::{op_name}"
