"""Source states kept over epochs: rows of hidden states on the device, in host memory and on disk.

arguments    checks of the cache's arguments
checksum     64-bit weighted sums of bytes, the same on every device
weights      the frozen weights of a base model, and where each of them hangs
fingerprint  what a frozen base model computes: its weights and its config
watch        whether a base model has changed since
rows         names of a batch's rows, and which of their positions are stored
entries      one row's states as bytes
memory       the device and the host tier
shards       the disk tier: safetensors files, published whole or not at all
meter        counts and seconds
trial        tiers="auto": reading measured against recomputing
store        the rows of a cache: tiers, what is found and kept in them
keeping      rows that a source pass computes, on their way into the cache
reader       one source pass through the cache
request      what a model's active adapters read
cache        SourceStateCache
"""

from .cache import SourceStateCache
from .meter import CacheStats
from .reader import CachedReader
from .request import SourceRequest

__all__ = ["CacheStats", "CachedReader", "SourceRequest", "SourceStateCache"]
