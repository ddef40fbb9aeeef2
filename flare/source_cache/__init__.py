"""Source states kept over epochs: rows of hidden states on the device, in host memory and on disk.

checksum     64-bit weighted sums of bytes, the same on every device
fingerprint  what a frozen base model computes: its weights and its config
rows         what one row of a batch is called, and which of its positions are stored
entries      one row's states as bytes
memory       the device and the host tier
shards       the disk tier: safetensors files, published whole or not at all
meter        counts and seconds
trial        tiers="auto": reading measured against recomputing
cache        SourceStateCache
"""

from .cache import SourceStateCache
from .meter import CacheStats

__all__ = ["CacheStats", "SourceStateCache"]
