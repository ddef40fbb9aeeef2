"""Cache of source states over epochs: rows of hidden states on the device, in host memory and on disk.

arguments    checks of the cache's arguments
checksum     64-bit weighted sums of bytes, the same on every device
weights      the frozen weights of a base model and their places in its modules
fingerprint  hash of a frozen base model: its weights and its config
watch        detects changes of a base model
row_keys     keys of a batch's rows, and which of their positions are stored
entries      one row's states as bytes
memory       the device tier and the host tier
shards       the disk tier: safetensors files that are published atomically
meter        counts and seconds
trial        tiers="auto": measures the time to read a row
store        the tiers of a cache: finding and storing rows
row_writer   writes the rows that a source pass computes into the cache
reader       one source pass through the cache
request      the source states that a model's active adapters read
cache        SourceStateCache
"""

from .cache import SourceStateCache
from .meter import CacheStats
from .reader import CachedReader
from .request import SourceRequest

__all__ = ["CacheStats", "CachedReader", "SourceRequest", "SourceStateCache"]
