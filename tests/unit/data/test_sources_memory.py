"""Reading holds a record or a small batch, however large the file is. Each case is a process of its own."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MB = 2**20
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")

# The reader's parts are imported and have their buffers before the measuring starts. getrusage's peak would be no less
# than that of the process that started this one.
PROGRAM = """
import sys
from pathlib import Path
from dpo_train.config import SourceConfig
from dpo_train.data.sources import plan, read_block

def read(path):
    return sum(1 for block in plan(SourceConfig(path=path), 0) for _ in read_block(block))

def peak_kb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

read(sys.argv[1])
before = peak_kb()
count = read(sys.argv[2])
print(count, (peak_kb() - before) // 1024)
"""


def growth(small: Path, large: Path) -> tuple[int, int]:
    """Records of the large file, and by how many MB its reading raised the peak that the small one left."""
    command = [sys.executable, "-c", PROGRAM, str(small), str(large)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count, megabytes = output.split()
    return int(count), int(megabytes)


@pytest.mark.parametrize(
    "name", ["a.jsonl", pytest.param("a.json", marks=pytest.mark.slow), pytest.param("a.csv", marks=pytest.mark.slow)]
)
def test_a_very_long_line_is_not_held(tmp_path: Path, name: str) -> None:
    """160 MB in one text: at most the 32 MB of the largest record are held, as bytes and as text."""
    (tmp_path / "small").mkdir()
    small, large = tmp_path / "small" / name, tmp_path / name
    small.write_bytes(b"[]")
    with large.open("wb") as stream:
        stream.write(b'["' if name == "a.json" else b'a,b\n"')
        for _ in range(160):
            stream.write(b"a" * MB)
        stream.write(b'"]' if name == "a.json" else b'",1\n')
    count, megabytes = growth(small, large)
    assert 1 <= count <= 2
    assert megabytes < 120


@pytest.mark.slow
def test_a_large_compressed_file_is_streamed(tmp_path: Path) -> None:
    """1,000,000 records, 200 MB: 8 MB more than ten records take, where all of them would take 1,000 and more."""
    line = json.dumps({"prompt": "a" * 50, "chosen": "b" * 60, "rejected": "c" * 40}).encode() + b"\n"
    small, large = tmp_path / "small.jsonl.gz", tmp_path / "large.jsonl.gz"
    small.write_bytes(gzip.compress(line * 10, mtime=0))
    with gzip.open(large, "wb", compresslevel=1) as stream:
        for _ in range(1000):
            stream.write(line * 1000)
    count, megabytes = growth(small, large)
    assert count == 1_000_000
    assert megabytes < 8


@pytest.mark.slow
def test_a_large_row_group_is_read_in_pieces(tmp_path: Path) -> None:
    """200 MB of text in one row group, which does not shrink."""
    draws = np.random.default_rng(0)
    texts = [bytes(draws.integers(97, 123, 2000, dtype=np.uint8)).decode() for _ in range(100_000)]
    for name, rows in (("small", 1000), ("large", 100_000)):
        table = pa.table({"text": texts[:rows]})
        pq.write_table(
            table, tmp_path / f"{name}.parquet", use_dictionary=False, compression="none", row_group_size=rows
        )
    count, megabytes = growth(tmp_path / "small.parquet", tmp_path / "large.parquet")
    assert count == 100_000
    assert megabytes < 40
