"""Measure speed and memory beside PyTorch's: python -m gptjax.bench train|generate|startup|scaling

Every side works in a process of its own (`bench_ours`, `bench_torch`), and the sides take turns, so
that a machine that is slow for a while is slow for all. What counts is the ratio, round by round.
Neither JAX nor PyTorch is imported here: their memory and threads would count.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import platform
import re
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

import numpy as np

from gptjax import cli
from gptjax import config as config_lib
from gptjax.config import LARGEST, DeviceKind, TrainConfig
from gptjax.errors import RunError, UserError
from gptjax.places import replace_file

ROOT = Path(__file__).parent.parent
CALL_SECONDS = 570
"""One call ends within ten minutes."""

TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}
"""How so many chips of one TPU host lie beside one another, as libtpu wants it."""

FIRST_STEP = "compiled and took the first step"
"""What train_jax.py says when it has done so."""

Mode = Literal["train", "generate", "startup", "scaling"]
Work = Mode | Literal["ceilings"]
Against = Literal["torch", "hf", "none"]


@dataclasses.dataclass(frozen=True)
class Job:
    """What one side has to do: the same for all sides but for its name."""

    side: str
    mode: Work
    config: TrainConfig
    devices: int | None = None
    samples: int = 1
    tokens: int = 1
    against: bool = False
    """Whether there are other sides."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        fields = json.loads(text)
        config = config_lib.from_json(json.dumps(fields.pop("config")), "the job")
        return cls(config=config, **fields)


# ------------------------------------------------------------------------ in the worker


def random_tokens(config: TrainConfig) -> np.ndarray:
    """A training split of tokens drawn evenly: what they say makes no difference to the speed."""
    vocabulary = config.model.vocab_size or 0
    random = np.random.default_rng(0)
    return random.integers(vocabulary, size=1_000_000).astype("u2" if vocabulary < 2**16 else "u4")


def serve(
    makers: dict[str, Callable[[Job], Callable[[int], None]]], facts: Callable[[], dict[str, Any]]
) -> None:
    """A worker's main loop: reads how many units to do, does them, answers with the seconds it
    took and its `facts`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    job = Job.from_json(sys.argv[1])
    run = makers[job.mode](job)
    print(json.dumps(facts()), file=answers, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        run(int(line))
        seconds = time.perf_counter() - began
        resident = _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        answer = facts() | {"seconds": seconds, "resident": resident}
        print(json.dumps(answer), file=answers, flush=True)


def _bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024


# ------------------------------------------------------------------------ in the parent


class Worker:
    """One side, in a process of its own, which has to answer until the `deadline`."""

    def __init__(self, job: Job, deadline: float):
        self.side = job.side
        self._deadline = deadline
        module = "bench_ours" if job.side.startswith("gptjax") else "bench_torch"
        # Both sides live on one accelerator: JAX must not take all of its memory at once.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"} | os.environ | visible(job)
        # Compiling is compared too, so nobody has done it before; errors come without advice.
        environment |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "JAX_TRACEBACK_FILTERING": "off"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"gptjax.{module}", job.to_json()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            cwd=ROOT, env=environment,
        )  # fmt: skip
        self.facts: dict[str, Any] = {}
        self.seconds: list[float] = []
        """Per unit, a number a turn."""
        self.first = 0.0
        """Seconds of the first unit, which compiles."""
        try:
            self._answer()
            self.first = self._run(1)
        except BaseException:
            self.close()
            raise

    def _answer(self) -> None:
        assert self._process.stdout
        left = max(0.0, self._deadline - time.monotonic())
        if not select.select([self._process.stdout], [], [], left)[0]:
            raise RunError(
                f"the {self.side} side was not done within the {CALL_SECONDS} s of a call;"
                " take fewer --batch-size or --max-new-tokens, or a smaller model"
            )
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RunError(_ended(self.side, self._process.returncode, self._errors))
        self.facts = json.loads(line)

    def _run(self, units: int) -> float:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer says how
            print(units, file=self._process.stdin, flush=True)
        self._answer()
        return self.facts["seconds"] / units

    def turn(self, seconds: float) -> None:
        """As many units as took about so many seconds the last time, at least one."""
        last = self.seconds[-1] if self.seconds else self._run(1)
        self.seconds.append(self._run(max(1, round(seconds / last))))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            assert file
            with contextlib.suppress(BrokenPipeError):
                file.close()


def visible(job: Job) -> dict[str, str]:
    """The environment that leaves a side so many accelerators, in `scaling`, and else one GPU, the
    same for all sides: PyTorch's trains on one."""
    if job.mode != "scaling" and job.side == "gptjax" and not job.against:
        return {}
    count = job.devices or 1 if job.mode == "scaling" else 1
    out = {}
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        there = os.environ.get(name, "").split(",") if os.environ.get(name) else range(count)
        out[name] = ",".join(map(str, there[:count]))
    if job.mode == "scaling" and count in TPU_BOUNDS:
        out["TPU_VISIBLE_CHIPS"] = ",".join(map(str, range(count)))
        out["TPU_CHIPS_PER_PROCESS_BOUNDS"] = TPU_BOUNDS[count]
        out["TPU_PROCESS_BOUNDS"] = "1,1,1"
    return out


def _ended(side: str, code: int, errors: IO[str]) -> str:
    """Why a process ended, in a line: the last thing it said that names an error."""
    errors.seek(0)
    said = errors.read().strip().splitlines() or ["it said nothing"]
    named = [
        line for line in said if re.match(r"[\w.]+(Error|Exception|Interrupt)\b|error: ", line)
    ]
    reason = (named or said)[-1].removeprefix("gptjax.errors.UserError: ")
    if "No module named 'torch" in reason or "No module named 'transformers" in reason:
        reason += "; pip install -r requirements-torch.txt, or --against none"
    return f"the {side} side ended with exit code {code}: {reason}"


class Spread(NamedTuple):
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)


def rounds(flags: "BenchFlags", deadline: float) -> Iterator[int]:
    """1, 2, ... until the time is spent; none that may not be over by `deadline`."""
    ends, longest = time.monotonic() + flags.seconds, 0.0
    for number in itertools.count(1):
        began = time.monotonic()
        if number > flags.least_rounds and began >= ends:
            return
        if number > 1 and began + 2 * longest > deadline:
            return
        yield number
        longest = max(longest, time.monotonic() - began)


def measure(jobs: list[Job], flags: "BenchFlags", deadline: float) -> list[dict[str, Any]]:
    """Every job's row of the table. The sides take turns until the time is spent."""
    workers: list[Worker] = []
    try:
        for job in jobs:
            cli.status(f"starting {job.side} ...")
            workers.append(Worker(job, deadline))
        for number in rounds(flags, deadline):
            for worker in workers:
                cli.status(f"round {number}: {worker.side} ...")
                # Threads of the side before spin for a moment after their work.
                time.sleep(0.2)
                worker.turn(flags.turn_seconds)
        cli.status("")
        return [_row(worker, workers[0], job) for worker, job in zip(workers, jobs, strict=True)]
    finally:
        for worker in workers:
            worker.close()


def _row(worker: Worker, ours: Worker, job: Job) -> dict[str, Any]:
    config = job.config
    unit = config.batch_size * config.model.block_size
    if job.mode == "generate":
        unit = job.samples * job.tokens
    rates = Spread.of([unit / s for s in worker.seconds])
    pairs = zip(worker.seconds, ours.seconds, strict=True)
    return {
        "side": worker.side,
        "tokens_per_second": rates._asdict(),
        "seconds_per_unit": statistics.median(worker.seconds),
        "first_unit_seconds": worker.first,
        "compile_seconds": max(0.0, worker.first - statistics.median(worker.seconds)),
        "peak_resident_bytes": worker.facts["resident"],
        "peak_device_bytes": worker.facts["device_memory"],
        "gptjax_is_faster_by": Spread.of([theirs / our for theirs, our in pairs])._asdict(),
        "turns": len(worker.seconds),
        "devices": worker.facts["devices"],
        "device_count": worker.facts["device_count"],
    }


def ceilings(job: Job, deadline: float) -> dict[str, Any]:
    """The facts of a side, among them what its library reaches on one device in one large matmul
    (FLOP/s) and one large copy (bytes/s, read and written): no model on it can be faster."""
    cli.status(f"measuring the machine with {job.side} ...")
    worker = Worker(dataclasses.replace(job, mode="ceilings"), deadline)
    worker.close()
    cli.status("")
    return worker.facts


# ------------------------------------------------------------------------------- startup


class Start(NamedTuple):
    """One process, from its beginning to its end."""

    first_step: float
    """Seconds until the first step was done."""
    whole: float
    """Seconds until the process ended, with its evaluations and its checkpoint."""
    resident: int
    """Bytes of main memory it held at most."""


def watch(side: str, command: list[str], environment: dict[str, str]) -> Start:
    """Run a process that says FIRST_STEP in a line of its output.

    Raises:
        RunError: it does not, or fails.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
            env=os.environ | environment,
        )  # fmt: skip
        assert process.stdout
        first = None
        try:
            for line in process.stdout:
                if FIRST_STEP in line and first is None:
                    first = time.perf_counter() - began
            _, code, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(code)
        if first is None or process.returncode:
            raise RunError(_ended(side, process.returncode, errors))
    return Start(first, time.perf_counter() - began, _bytes(usage.ru_maxrss))


def startup(
    config: TrainConfig, names: list[str], flags: "BenchFlags", deadline: float
) -> list[dict[str, Any]]:
    """Whole processes that evaluate 20 batches, take one step, evaluate again and save: ours with
    a filled and with an empty compilation cache, and nanoGPT's way."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data_dir = folder / "data"
        data_dir.mkdir()
        tokens = random_tokens(config)
        for split, part in (("train", tokens), ("val", tokens[:100_000])):
            part.tofile(data_dir / f"{split}.bin")
        letters = {i: chr(0x10000 + i) for i in range(config.model.vocab_size or 0)}
        meta = {"itos": letters, "stoi": {letter: i for i, letter in letters.items()}}
        (data_dir / "meta.pkl").write_bytes(pickle.dumps(meta | {"vocab_size": len(letters)}))
        config = dataclasses.replace(
            config, max_steps=1, eval_batches=20, eval_full_split=False, sample_tokens=0,
            data=dataclasses.replace(config.data, dir=str(data_dir)),
        )  # fmt: skip
        starts: dict[str, list[Start]] = {
            side: [] for side in ("gptjax", "gptjax, cold", *names[1:])
        }
        # Round 0 fills the cache, and the system's own of files.
        for number in itertools.chain([0], rounds(flags, deadline)):
            for side, seen in starts.items():
                cli.status(f"round {number}: {side} ...")
                run_dir = folder / f"{number}-{side}"
                run_dir.mkdir()
                job = dataclasses.replace(config, run_dir=str(run_dir))
                replace_file(run_dir / "config.json", config_lib.to_json(job) + "\n")
                cache = run_dir / "cache" if "cold" in side else folder / "cache"
                command = [sys.executable, "train_jax.py", "--run-dir", str(run_dir)]
                if side == "torch":
                    text = Job(side, "startup", job).to_json()
                    command = [sys.executable, "-m", "gptjax.bench_torch", text]
                environment = visible(Job(side, "startup", job, against=bool(names[1:])))
                start = watch(side, command, environment | {"GPTJAX_CACHE_DIR": str(cache)})
                if number:
                    seen.append(start)
        cli.status("")
    ours = starts["gptjax"]
    return [
        {
            "side": side,
            "first_step_seconds": Spread.of([s.first_step for s in seen])._asdict(),
            "process_seconds": Spread.of([s.whole for s in seen])._asdict(),
            "peak_resident_bytes": max(s.resident for s in seen),
            "gptjax_is_faster_by": Spread.of(
                [theirs.first_step / our.first_step for theirs, our in zip(seen, ours, strict=True)]
            )._asdict(),
            "turns": len(seen),
        }
        for side, seen in starts.items()
    ]


# ------------------------------------------------------------------------------- command


@dataclasses.dataclass(frozen=True)
class BenchFlags:
    """Measure gptjax's speed and memory beside PyTorch's, in turn, in one call.

    train: tokens per second of training, beside a nanoGPT-style PyTorch model with fused attention
    and AdamW, eager and under torch.compile. generate: of sampling, beside nanoGPT's loop without
    a cache, or Hugging Face's generate with one. startup: a whole process to its first training
    step. scaling: training over the number of devices (of a CPU: that it is split into).
    """

    config: str = "configs/shakespeare_char_cpu.py"
    """The model and its training: a config file as for train_jax.py."""
    batch_size: int | None = None
    """Sequences per step instead of the config's (which counts a whole cluster's, perhaps)."""
    gradient_accumulation_steps: int = 1
    """Micro-batches a step."""
    block_size: int | None = None
    """Tokens per sequence instead of the config's."""
    dropout: float | None = None
    """Dropout instead of the config's."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision of both sides; PyTorch's bfloat16 is its autocast."""
    against: Against = "torch"
    """torch: nanoGPT-style PyTorch; hf: Hugging Face's GPT-2, which has a cache to sample with;
    none: ours alone."""
    num_samples: int = 1
    """generate: samples drawn side by side."""
    max_new_tokens: int = 500
    """generate: tokens after a prompt of one."""
    device: DeviceKind = "auto"
    """Kind of device for both sides."""
    num_devices: int | None = None
    """CPU devices to split the cores into, as train_jax.py's."""
    seconds: float = 40.0
    """Time of the rounds together, compilation and start-up besides."""
    least_rounds: int = 5
    """Rounds, however long they take."""
    turn_seconds: float = 1.0
    """Length of one side's turn, about."""
    json: str | None = None
    """Write all numbers to this file too."""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        out = []
        names = ("batch_size", "block_size", "num_samples", "max_new_tokens", "least_rounds")
        for name in (*names, "gradient_accumulation_steps", "num_devices"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < LARGEST:
                out.append(f"--{name.replace('_', '-')} {value} must be at least 1")
        for name in ("seconds", "turn_seconds"):
            if not 0 <= getattr(self, name) <= 3600:
                out.append(f"--{name.replace('_', '-')} must lie between 0 and 3600")
        return out


def settings(flags: BenchFlags) -> TrainConfig:
    """The config file with what the flags change.

    Raises:
        UserError: the result is no model that can be trained.
    """
    config = config_lib.load(Path(flags.config))
    model = config.model
    vocabulary = model.vocab_size or {"gpt2": 50257, "char": 65}.get(
        config.data.tokenizer, config.data.sentencepiece_vocab_size
    )
    model = dataclasses.replace(
        model, vocab_size=vocabulary, block_size=flags.block_size or model.block_size,
        dropout=model.dropout if flags.dropout is None else flags.dropout,
        dtype=model.dtype if flags.dtype == "auto" else flags.dtype,
    )  # fmt: skip
    config = dataclasses.replace(
        config, model=model, device=flags.device, num_devices=flags.num_devices,
        batch_size=flags.batch_size or config.batch_size,
        gradient_accumulation_steps=flags.gradient_accumulation_steps, init_from=None,
    )  # fmt: skip
    if problems := config.problems():
        raise UserError("; ".join(problems))
    config.divide_batch(1)
    return config


def sides(mode: Mode, flags: BenchFlags) -> list[str]:
    """Who takes part; ours first.

    Raises:
        UserError: Hugging Face's cache is for sampling only.
    """
    if flags.against == "none" or mode == "scaling":
        return ["gptjax"]
    if flags.against == "hf":
        if mode != "generate":
            raise UserError(f"--against hf is for generate; {mode} runs against torch or none")
        return ["gptjax", "hf with cache"]
    return ["gptjax", "torch", *(["torch.compile"] if mode == "train" else [])]


def machine() -> str:
    """Processor, cores and memory."""
    name, memory = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
        memory = f", {total / 2**20:.0f} GiB"
    except (OSError, StopIteration, IndexError, ValueError):
        pass  # not Linux
    return f"{name}, {_cores()} cores{memory}; Python {platform.python_version()}"


def describe(config: TrainConfig, mode: Mode, flags: BenchFlags) -> str:
    """The setting, in a line."""
    model = config.model
    work = f"{config.batch_size} x {model.block_size} tokens a step"
    if config.gradient_accumulation_steps > 1:
        work += f" in {config.gradient_accumulation_steps} micro-batches"
    work += f", dropout {model.dropout}"
    if mode == "generate":
        work = f"{flags.num_samples} x {flags.max_new_tokens} tokens after one, block"
        work += f" {model.block_size}, temperature 0.8, top-k 200"
    return (
        f"{flags.config}: {model.num_parameters():,} parameters, {model.n_layer} layers,"
        f" {model.n_embd} wide; {work}"
    )


def _amount(value: float) -> str:
    """Three digits: 12.3k, 456, 7.89M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _times(spread: dict[str, float]) -> str:
    return "{median:.2f}x ({low:.2f} to {high:.2f})".format(**spread)


def table(report: dict[str, Any]) -> list[str]:
    """The report, in lines of text."""
    lines = [f"machine  {report['machine']}", f"setting  {report['setting']}"]
    rows = report["rows"]
    for side, facts in report["sides"].items():
        ceiling = facts["ceilings"]
        lines.append(
            f"{side:18}{facts['versions']}, {facts['devices']}; at most"
            f" {_amount(ceiling['matmul_flops'])}FLOP/s in a matmul,"
            f" {_amount(ceiling['copy_bytes_per_second'])}B/s in a copy"
        )
    if report["mode"] == "startup":
        lines.append(
            f"{'':18}{'to first step':>15}{'whole process':>15}{'peak memory':>13}"
            "   gptjax is faster"
        )
        for row in rows:
            first, whole = row["first_step_seconds"]["median"], row["process_seconds"]["median"]
            memory = _amount(row["peak_resident_bytes"]) + "B"
            lines.append(
                f"{row['side']:18}{first:13.2f} s{whole:13.2f} s{memory:>13}"
                f"   {_times(row['gptjax_is_faster_by'])}"
            )
        return lines
    lines.append(
        f"{'':18}{'tokens/s':>10}{'quartiles':>18}{'MFU':>7}{'compile':>9}{'memory':>9}"
        + ("   speedup" if report["mode"] == "scaling" else "   gptjax is faster")
    )
    for row in rows:
        rate = row["tokens_per_second"]
        middle = f"{_amount(rate['low'])} to {_amount(rate['high'])}"
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
        memory = _amount(row["peak_device_bytes"] or row["peak_resident_bytes"] or 0) + "B"
        ratio = f"{row['speedup']:.2f}x" if "speedup" in row else _times(row["gptjax_is_faster_by"])
        lines.append(
            f"{row['side']:18}{_amount(rate['median']):>10}{middle:>18}{mfu:>7}"
            f"{row['compile_seconds']:7.1f} s{memory:>9}   {ratio}"
        )
    return lines


def main(argv: list[str]) -> None:
    """`python -m gptjax.bench train|generate|startup|scaling [--flags]`."""
    named, flags = cli.parse(
        BenchFlags(), argv, "python -m gptjax.bench", "train|generate|startup|scaling"
    )
    if len(named) != 1 or named[0] not in get_args(Mode):
        raise UserError(f"measure what? python -m gptjax.bench {'|'.join(get_args(Mode))}")
    mode: Mode = named[0]  # type: ignore[assignment]
    names = sides(mode, flags)
    config = settings(flags)
    if flags.against == "hf" and flags.max_new_tokens > config.model.block_size:
        raise UserError(
            f"Hugging Face's cache ends with the block of {config.model.block_size} tokens;"
            f" --max-new-tokens {flags.max_new_tokens} must be at most that"
        )
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or "," in workers:
        raise UserError(
            "the benchmark measures one machine; unset JAX_COORDINATOR_ADDRESS and"
            " TPU_WORKER_HOSTNAMES"
        )
    if flags.json:
        with open(flags.json, "a"):
            pass  # a path that cannot be written is refused now
    deadline = time.monotonic() + CALL_SECONDS
    job = Job(
        "gptjax", mode, config, flags.num_devices, flags.num_samples, flags.max_new_tokens,
        against=len(names) > 1,
    )  # fmt: skip
    ours = ceilings(job, deadline)
    if ours["platform"] == "tpu" and len(names) > 1:
        raise UserError("PyTorch's side does not run on TPU; add --against none")
    # The other side must not choose another kind of device.
    config = dataclasses.replace(config, device=ours["platform"])
    job = dataclasses.replace(job, config=config)
    facts = {"gptjax": ours} | {
        name: ceilings(dataclasses.replace(job, side=name), deadline) for name in names[1:2]
    }
    precision = config.model.dtype
    if precision == "auto":
        precision = "float32" if ours["platform"] == "cpu" else "bfloat16"
    report: dict[str, Any] = {
        "mode": mode, "machine": machine(), "sides": facts,
        "setting": f"{describe(config, mode, flags)}; {precision}",
    }  # fmt: skip
    if mode == "startup":
        report["rows"] = startup(config, names, flags, deadline)
    elif mode == "scaling":
        report["rows"] = scaling(job, ours, flags, deadline)
    else:
        jobs = [dataclasses.replace(job, side=name) for name in names]
        report["rows"] = measure(jobs, flags, deadline)
    if mode in ("train", "scaling"):
        matmul = max(fact["ceilings"]["matmul_flops"] for fact in facts.values())
        for row in report["rows"]:
            # The same measure for all: the vendor's number for bfloat16, or what was measured.
            known = ours["peak_flops"] / ours["device_count"] if ours["peak_flops"] else matmul
            # A CPU's devices are parts of one machine.
            devices = 1 if ours["platform"] == "cpu" else row["device_count"]
            peak = devices * (known if precision == "bfloat16" else matmul)
            rate = row["tokens_per_second"]["median"]
            row["mfu"] = rate * config.model.flops_per_token() / peak
    print("\n".join(table(report)))
    if flags.json:
        Path(flags.json).write_text(json.dumps(report | {"flags": vars(flags)}, indent=2) + "\n")


def scaling(
    job: Job, ours: dict[str, Any], flags: BenchFlags, deadline: float
) -> list[dict[str, Any]]:
    """Training with 1, 2, 4, ... devices. On an accelerator each has the config's batch, by itself
    and one count after the other; a CPU's cores are only divided, over one batch for all, in
    turn."""
    on_cpu = ours["platform"] == "cpu"
    most = _cores() if on_cpu else ours["device_count"]
    batch, unit = job.config.batch_size, job.config.gradient_accumulation_steps
    counts = [n for n in (2**i for i in range(20)) if n <= most]
    jobs = [
        dataclasses.replace(
            job, side=f"gptjax x {n}", devices=n,
            config=dataclasses.replace(job.config, batch_size=batch if on_cpu else batch * n),
        )
        for n in counts if not (on_cpu and batch % (n * unit))
    ]  # fmt: skip
    if on_cpu:
        rows = measure(jobs, flags, deadline)
    else:
        rows = [measure([one], flags, deadline)[0] for one in jobs]
    for row in rows:
        del row["gptjax_is_faster_by"]
        row["speedup"] = row["tokens_per_second"]["median"] / rows[0]["tokens_per_second"]["median"]
    return rows


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
