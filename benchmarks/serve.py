"""Many streams at once against one: tokens a second, memory, and whether the texts are the same.

    python -m benchmarks.serve RUN [--streams 32] [--seconds 60]

The server and its clients are two processes of this machine. The clients ask for one text after the
other, and leave some of them early. One stream is `run.generate` in one call, without a server, and
one client alone. RUN must be of characters: then tokens can be counted by the text.
"""

import asyncio
import contextlib
import dataclasses
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.commands import flags
from gptjax.errors import RunError
from gptjax.settings import Config

PROMPT = "def "
CANCELLED = 8
"""Every so many-th text is left after its first piece."""

IN_ONE_CALL = """
import json, sys, time
import gptjax
from gptjax import files
from gptjax.devices import setup
setup.select_platform("cpu")
setup.use_compilation_cache(files.cache_dir() / "xla")
run = gptjax.load(sys.argv[1])
count, prompt = int(sys.argv[2]), sys.argv[3]
def seconds():
    began = time.perf_counter()
    run.generate(prompt, max_new_tokens=count, temperature=0.8, top_k=0, seed=1, overflow="half")
    return time.perf_counter() - began
seconds()
print(json.dumps([count / seconds() for _ in range(9)]))
"""


@dataclasses.dataclass(frozen=True)
class ServeFlags(Config):
    """Measure gptjax serve: streams at once against one stream."""

    streams: int = 32
    """Clients at the same time, and rows of the server."""
    seconds: float = 60.0
    """How long they ask for texts."""
    tokens: int = 1000
    """Of each text."""
    compared: int = 64
    """So many of their texts are asked for once more, alone."""

    def problems(self) -> list[str]:
        return self._check_ints(1, "streams", "tokens", "compared")


async def complete(port: int, seed: int, tokens: int, most: int | None = None) -> tuple[str, bool]:
    """(its text, whether it has ended); after `most` pieces the client leaves."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({
        "prompt": PROMPT, "max_tokens": tokens, "seed": seed, "temperature": 0.8, "stream": True,
    })  # fmt: skip
    writer.write(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
    )
    pieces: list[str] = []
    ended = False
    with contextlib.closing(writer):
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            value = json.loads(line[6:])
            if "choices" not in value:
                raise RunError(f"the server answered {value}")
            pieces.append(value["choices"][0]["text"])
            ended = value["choices"][0]["finish_reason"] is not None
            if len(pieces) == most:
                break
    return "".join(pieces), ended


async def load(port: int, given: ServeFlags, texts: dict[int, str]) -> float:
    """Tokens a second of all clients together; the texts by their seeds."""
    began = time.perf_counter()
    characters, seeds = 0, iter(range(10**9))

    async def client() -> None:
        nonlocal characters
        while time.perf_counter() - began < given.seconds:
            seed = next(seeds)
            leaves = seed % CANCELLED == CANCELLED - 1
            text, ended = await complete(port, seed, given.tokens, 1 if leaves else None)
            characters += len(text)
            if ended:
                texts[seed] = text

    await asyncio.gather(*(client() for _ in range(given.streams)))
    return characters / (time.perf_counter() - began)


@contextlib.contextmanager
def server(run_dir: str, rows: int) -> Iterator[tuple[subprocess.Popen, int]]:
    """Its process and port."""
    command = [sys.executable, "-m", "gptjax", "serve", run_dir, "--port", "0", "--rows", str(rows)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        if not (found := re.search(r":(\d+) ", line)):
            raise RunError("the server did not start")
        yield process, int(found[1])
    finally:
        process.terminate()
        process.wait()


def resident(process: subprocess.Popen) -> float:
    """MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found
    return int(found[1]) / 1024


async def health(port: int) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def measure(process: subprocess.Popen, port: int, given: ServeFlags, one_call: float) -> None:
    """Print all numbers. RunError: a text is another one alone, or requests are left."""
    alone = []
    for seed in range(7):
        began = time.perf_counter()
        await complete(port, 10**9 + seed, given.tokens)
        alone.append(given.tokens / (time.perf_counter() - began))
    before, texts = resident(process), dict[int, str]()
    together = await load(port, given, texts)
    await asyncio.sleep(0.5)
    left, after = (await health(port))["requests"], resident(process)
    one = statistics.median(alone)
    print(f"one stream, run.generate in one call  {one_call:10,.0f} tokens/s")
    print(f"one stream, served                    {one:10,.0f} tokens/s")
    print(f"{given.streams} streams, served        {together:18,.0f} tokens/s")
    print(f"ratio to one call {together / one_call:.1f}, to one served stream {together / one:.1f}")
    print(f"resident {before:.0f} MiB before, {after:.0f} MiB after; requests left: {left}")
    compared = sorted(texts)[:: max(1, len(texts) // given.compared)][: given.compared]
    other = [s for s in compared if (await complete(port, s, given.tokens))[0] != texts[s]]
    print(f"{len(texts)} texts; {len(compared)} asked for alone: {len(other)} differ")
    if other or left:
        raise RunError("texts depend on others, or requests are left")


def main() -> None:
    """Raises UserError, RunError."""
    (run_dir,), given = flags.parse(ServeFlags(), sys.argv[1:], "python -m benchmarks.serve", "RUN")
    arguments = [run_dir, str(max(2000, given.tokens)), PROMPT]
    result = subprocess.run(
        [sys.executable, "-c", IN_ONE_CALL, *arguments], check=True, capture_output=True, text=True
    )
    one_call = statistics.median(json.loads(result.stdout))
    print(f"{platform.processor() or platform.machine()}; {run_dir}; {given.streams} streams")
    with server(run_dir, given.streams) as (process, port):
        asyncio.run(measure(process, port, given, one_call))


if __name__ == "__main__":
    main()
