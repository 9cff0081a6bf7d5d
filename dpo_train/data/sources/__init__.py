"""Raw records from files, buckets and Hugging Face data sets, in blocks that workers read on their own.

    SourceConfig --find_files--> files --plan--> blocks --BlockReader--> records, each with its line

Planning reads listings, sizes and footers only. Reading holds one record, or one small batch of rows, at a time.
"""

from dpo_train.data.sources.base import BLOCK_BYTES, MAX_RECORD_BYTES, Block, Record
from dpo_train.data.sources.planning import plan, source_digest
from dpo_train.data.sources.reading import BlockReader, read_block, sample

__all__ = [
    "BLOCK_BYTES",
    "MAX_RECORD_BYTES",
    "Block",
    "BlockReader",
    "Record",
    "plan",
    "read_block",
    "sample",
    "source_digest",
]
