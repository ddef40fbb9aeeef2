"""Cache of source states, so that the frozen model reads each source text only in the first epoch.

A source state is a hidden state of the frozen model on the source text. A row is one text of a batch. The states of a
row are stored together, as one entry, in one of three tiers: on the device, in host memory or on disk.

arguments    checks the cache's arguments
checksum     computes 64-bit weighted sums of bytes, which are the same on every device
weights      collects the frozen weights of a base model, and where its modules store them
fingerprint  computes a hash of a frozen base model's weights and config
watch        detects changes of a base model
row_keys     computes the keys of a batch's rows, and which positions of each row are stored
entries      converts the states of a row to bytes and back
memory       the device tier and the host tier
shards       the disk tier: safetensors files that are published atomically
meter        counts rows, and measures the time of source passes
trial        measures the time to read a row, for tiers="auto"
store        finds and stores rows in the tiers of a cache
row_writer   writes the rows that a source pass computes into the cache
reader       runs one source pass that reads cached rows, and computes and stores the other rows
request      lists the source states that a model's active adapters read
cache        SourceStateCache
"""

from .cache import SourceStateCache
from .meter import CacheStats
from .reader import CachedReader
from .request import SourceRequest

__all__ = ["CacheStats", "CachedReader", "SourceRequest", "SourceStateCache"]
