"""Text to batches: corpora, tokenizers, the token cache, the memory-mapped data set and its loader.

``prepare`` does everything that happens before the first step; ``BatchLoader`` what happens in it.
"""

from slope.data.config import DataConfig, HubSource
from slope.data.dataset import TokenDataset
from slope.data.loader import BatchLoader
from slope.data.prepare import TokenData, pairs, prepare, ready_tokenizer

__all__ = [
    "BatchLoader",
    "DataConfig",
    "HubSource",
    "TokenData",
    "TokenDataset",
    "pairs",
    "prepare",
    "ready_tokenizer",
]
