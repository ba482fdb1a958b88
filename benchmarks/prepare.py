"""Preparing a text with GPT-2's tokens, beside the usual script: `datasets.map` with tiktoken on
all cores, then one array on disk. In turn, each in processes of its own: time and peak memory.

    python -m benchmarks.prepare [--megabytes 100] [--rounds 3]

The text is Tiny Shakespeare, its lines in another order each time it comes round again.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptjax import machine
from gptjax.data import corpus

OURS = """
from pathlib import Path
from rich.console import Console
from gptjax.config import DataConfig
from gptjax.data.prepare import prepare
config = DataConfig("text.jsonl", "gpt2", val_fraction=0.01)
prepare(config, Path("ours"), Console(quiet=True))
"""

USUAL = """
import os
import datasets
import numpy as np
import tiktoken

encoding = tiktoken.get_encoding("gpt2")

def encode(row):
    ids = encoding.encode_ordinary(row["text"])
    ids.append(encoding.eot_token)
    return {"ids": ids, "len": len(ids)}

if __name__ == "__main__":
    found = datasets.load_dataset("json", data_files="text.jsonl", cache_dir="cache", split="train")
    split = found.train_test_split(test_size=0.01, seed=1, shuffle=True)
    rows = split.map(encode, remove_columns=["text"], num_proc=os.cpu_count())
    for name, part in rows.items():
        total = int(np.sum(part["len"], dtype=np.uint64))
        out = np.memmap(f"{name}.bin", dtype=np.uint16, mode="w+", shape=(total,))
        at = 0
        shards = min(64, len(part))
        for number in range(shards):
            batch = part.shard(shards, number, contiguous=True).with_format("numpy")
            ids = np.concatenate([*batch["ids"], np.zeros(0, np.uint16)])
            out[at : at + len(ids)] = ids
            at += len(ids)
        out.flush()
"""


def write_text(path: Path, size: int) -> None:
    """JSON lines of about a kilobyte each, `size` bytes in all."""
    lines = corpus.find_files("shakespeare")[0].read_text().splitlines(keepends=True)
    order, written = random.Random(0), 0
    with path.open("w") as file:
        while written < size:
            order.shuffle(lines)
            for start in range(0, len(lines), 40):
                row = json.dumps({"text": "".join(lines[start : start + 40])}) + "\n"
                written += file.write(row)


def measure(script: str, folder: Path, *arguments: str) -> tuple[float, float]:
    """(seconds, peak GiB of its largest process) of a Python script in `folder`."""
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"}
    (folder / "script.py").write_text(script)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "script.py", *arguments], cwd=folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(errors)
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(machine.describe(), flush=True)
    found: dict[str, list[tuple[float, float]]] = {"gptjax": [], "datasets.map": []}
    for _ in range(given.rounds):
        for name, script in (("gptjax", OURS), ("datasets.map", USUAL)):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                write_text(folder / "text.jsonl", given.megabytes * 10**6)
                found[name].append(measure(script, folder))
    times = {}
    for name, runs in found.items():
        times[name] = statistics.median(seconds for seconds, _ in runs)
        memory = max(peak for _, peak in runs)
        rate = given.megabytes / times[name]
        print(f"{name:13} {times[name]:6.1f} s {rate:6.1f} MB/s  {memory:.2f} GiB at most")
    print(f"ratio {times['datasets.map'] / times['gptjax']:.2f}x")


if __name__ == "__main__":
    main()
