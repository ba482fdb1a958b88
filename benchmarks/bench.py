"""Measure gptjax's speed and memory beside PyTorch's.

    python benchmarks/bench.py MODE [flags]                   (or: gptjax bench MODE ...)

MODE: train, generate, startup, scaling, all, race.

Each side works in a process of its own (`ours`, `pytorch`), and the sides take turns, so that a
machine that is slow for a while is slow for all of them: what counts is the ratio, round by round.
This process imports neither JAX nor PyTorch: their memory and threads would count.
"""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

# Started from anywhere, this measures the checkout that it is part of.
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import worker
from benchmarks.worker import FIRST_STEP, Job, Mode
from gptjax import config_io, machine
from gptjax.commands import flags, process, terminal
from gptjax.config import TrainConfig
from gptjax.errors import RunError, UserError
from gptjax.runtime_config import RuntimeConfig
from gptjax.settings import Config

ROOT = Path(__file__).parent.parent
PROG = "python benchmarks/bench.py"

CALL_SECONDS = 570
"""One call ends within ten minutes."""

TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}
"""How so many chips of one TPU host lie beside one another, as libtpu wants it."""

Row = dict[str, Any]
"""What was measured of one side, as it stands in the JSON report. Three numbers are quartiles."""

UNITS = {"train": "step", "scaling": "step", "generate": "call", "startup": "process"}
"""What a side does at least once a turn."""


@dataclasses.dataclass(frozen=True)
class BenchFlags(Config):
    """Measure gptjax's speed and memory beside PyTorch's, in turn, in one call.

    train: tokens per second of training, beside a PyTorch model in nanoGPT's style with fused
    attention and AdamW, eager and under torch.compile. generate: of sampling, beside nanoGPT's
    loop, which has no cache, or Hugging Face's generate, which has one. startup: a whole process to
    its first training step. scaling: training over the number of devices (of a CPU: that it is
    split into). all: every config that fits, and many shapes (see `all --help`). race: whole runs
    to a loss (see `race --help`).

    Every flag of train_jax.py changes the config's setting for both sides: --batch-size,
    --block-size, --dtype, --device ... (PyTorch's bfloat16 is its autocast.)
    """

    config: str = "shakespeare_char_cpu"
    """The model and its training: a Python file, or the name of a config that comes with gptjax.
    (Its batch may be meant for many devices. Its gradient_accumulation_steps count as 1.)"""
    against: Literal["torch", "hf", "none"] = "torch"
    """torch: PyTorch in nanoGPT's style; hf: Hugging Face's GPT-2, which has a cache to sample
    with; none: gptjax alone."""
    num_samples: int = 1
    """generate: samples drawn side by side."""
    max_new_tokens: int = 500
    """generate: tokens after a prompt of one."""
    seconds: float = 40.0
    """Time of all rounds together; compilation and start-up come on top."""
    least_rounds: int = 5
    """Rounds, however long they take."""
    turn_seconds: float = 1.0
    """Length of one side's turn, about."""
    json: str | None = None
    """Write all numbers to this file too."""

    def problems(self) -> list[str]:
        out = self._check_ints(1, "num_samples", "max_new_tokens", "least_rounds")
        for name in ("seconds", "turn_seconds"):
            if not 0 <= getattr(self, name) <= 3600:
                out.append(f"{name} {getattr(self, name)} is outside [0, 3600]")
        return out


class Worker:
    """One side, in a process of its own, which has to answer until the `deadline`."""

    def __init__(self, job: Job, deadline: float):
        """Raises RunError: it failed, or is too slow."""
        self.job, self._deadline = job, deadline
        self.facts: dict[str, Any] = {}
        """Its last answer."""
        self.turns: list[dict[str, float]] = []
        """Of each turn what one unit took, as `worker.used`."""
        # Both sides live on one accelerator: JAX must not take all of its memory at once.
        fraction = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")
        # Compiling is compared too, so nothing is there that was compiled before.
        environment = visible_devices(job) | {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": fraction,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "GPTJAX_CACHE_DIR": f"{job.folder}/cache of {job.side}",
        }
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other_end = spawn.Pipe()
        self._log = Path(job.folder) / f"{job.side} {job.mode}.log"
        arguments = (job, environment, other_end, str(self._log))
        self._process = spawn.Process(target=worker.work, args=arguments, daemon=True)
        self._process.start()
        other_end.close()
        try:
            self._answer()
            if job.mode != "ceilings":
                self.first_seconds = self._run(1)["seconds"]
                """Of the first unit, which compiles."""
        except BaseException:
            self._process.kill()
            raise

    def _answer(self) -> None:
        if not self._pipe.poll(max(0.0, self._deadline - time.monotonic())):
            raise RunError(
                f"the {self.job.side} side did not finish within the {CALL_SECONDS} s of one call;"
                " use a smaller --batch-size or --max-new-tokens, or a smaller model"
            )
        try:
            self.facts = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            reason = f"exit code {self._process.exitcode}: {last_line(self._log.read_text())}"
            self.facts = {"error": reason}
        if "error" in self.facts:
            raise RunError(f"the {self.job.side} side failed: {self.facts['error']}")

    def _run(self, units: int) -> dict[str, float]:
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer says how
            self._pipe.send(units)
        self._answer()
        cost = {name: self.facts[name] / units for name in worker.used()}
        return cost | {"resident": self.facts["resident"]}

    def turn(self, seconds: float) -> None:
        """As many units as took about so many seconds the last time, at least one."""
        last = self.turns[-1] if self.turns else self._run(1)
        self.turns.append(self._run(max(1, round(seconds / last["seconds"]))))

    def close(self) -> None:
        self._pipe.close()  # it ends, and cleans up after itself
        self._process.join(10)
        self._process.kill()

    def row(self, ours: "Worker") -> Row:
        """What was measured; `ours`: gptjax, in the same rounds."""
        job, common = self.job, row(self.job.side, self.turns, ours.turns)
        tokens = job.config.batch_size * job.config.model.block_size
        if job.mode == "generate":
            tokens = job.num_samples * job.new_tokens
        return common | {
            "tokens_per_second": quartiles([tokens / turn["seconds"] for turn in self.turns]),
            "compile_seconds": max(0.0, self.first_seconds - common["seconds"][1]),
            "peak_device_bytes": self.facts["device_memory"],
            "device_count": self.facts["device_count"],
        }


def last_line(output: str) -> str:
    """Where a failed process says why."""
    return (output.strip().splitlines() or ["it printed nothing"])[-1]


def visible_devices(job: Job) -> dict[str, str]:
    """The environment in which a process sees `num_devices` accelerators (`scaling`), or else one
    GPU, the same for all sides: PyTorch's trains on one."""
    if job.mode != "scaling" and not job.compared:
        return {}
    count = job.runtime.num_devices or 1 if job.mode == "scaling" else 1
    out = {}
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        allowed = os.environ[name].split(",") if os.environ.get(name) else range(count)
        out[name] = ",".join(map(str, allowed[:count]))
    if job.mode == "scaling" and count in TPU_BOUNDS:
        out["TPU_VISIBLE_CHIPS"] = ",".join(map(str, range(count)))
        out["TPU_CHIPS_PER_PROCESS_BOUNDS"] = TPU_BOUNDS[count]
        out["TPU_PROCESS_BOUNDS"] = "1,1,1"
    return out


def quartiles(values: Sequence[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    enough = values if len(values) > 1 else [*values] * 2
    return statistics.quantiles(enough, n=4, method="inclusive")


def row(side: str, costs: Sequence[dict[str, float]], ours: Sequence[dict[str, float]]) -> Row:
    """What was measured of one side; `costs`: per unit of work, a dict (`worker.used`) a round;
    `ours`: gptjax's. Where memory goes back to the kernel and is taken again in each unit, page
    faults and system time show it."""
    system = sum(cost["system"] for cost in costs)
    pairs = zip(costs, ours, strict=True)
    return {
        "side": side,
        "seconds": quartiles([cost["seconds"] for cost in costs]),
        "gptjax_is_faster_by": quartiles([cost["seconds"] / our["seconds"] for cost, our in pairs]),
        "page_faults_per_unit": statistics.median(cost["page_faults"] for cost in costs),
        "system_time_share": system / max(1e-9, system + sum(cost["user"] for cost in costs)),
        "peak_resident_bytes": max(cost["resident"] for cost in costs),
        "turns": len(costs),
    }


def rounds(options: BenchFlags, deadline: float) -> Iterator[int]:
    """1, 2, ... until the time is spent; none that may not be over by `deadline`."""
    ends, longest = time.monotonic() + options.seconds, 0.0
    for number in itertools.count(1):
        began = time.monotonic()
        if number > options.least_rounds and began >= ends:
            return
        if number > 1 and began + 2 * longest > deadline:
            return
        yield number
        longest = max(longest, time.monotonic() - began)


def measure(jobs: list[Job], options: BenchFlags, deadline: float) -> list[Row]:
    """Every job's row of the report. The sides take turns until the time is spent."""
    workers: list[Worker] = []
    try:
        for job in jobs:
            terminal.status(f"starting {job.side} ...")
            workers.append(Worker(job, deadline))
        for number in rounds(options, deadline):
            for side in workers:
                terminal.status(f"round {number}: {side.job.side} ...")
                # Threads of the side before spin for a moment after their work.
                time.sleep(0.2)
                side.turn(options.turn_seconds)
        return [side.row(workers[0]) for side in workers]
    finally:
        terminal.status("")
        for side in workers:
            side.close()


def ceilings(job: Job, deadline: float) -> dict[str, Any]:
    """The facts of a side, among them what its library reaches on one device in one large matmul
    and one large copy: no model can be faster on it."""
    terminal.status(f"measuring the machine with {job.side} ...")
    side = Worker(dataclasses.replace(job, mode="ceilings"), deadline)
    side.close()
    terminal.status("")
    return side.facts


def time_process(side: str, command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a process that prints FIRST_STEP in a line of its output. -> what it used
    (`worker.used`), its seconds until then, and as "whole" its seconds until it ended.

    Raises:
        RunError: it does not, or fails.
    """
    began, first, output = time.perf_counter(), None, ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=os.environ | environment,
    ) as process:  # fmt: skip
        assert process.stdout
        try:
            for line in process.stdout:
                output += line
                if FIRST_STEP in line and first is None:
                    first = time.perf_counter() - began
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    if first is None or process.returncode:
        reason = f"exit code {process.returncode}: {last_line(output)}"
        raise RunError(f"the {side} side failed: {reason}")
    return worker.used(usage) | {"seconds": first, "whole": time.perf_counter() - began}


def startup(jobs: list[Job], options: BenchFlags, deadline: float) -> list[Row]:
    """Whole processes that evaluate 20 batches, take two steps, evaluate again and save: ours with
    a filled and with an empty compilation cache, and nanoGPT's way."""
    job, others = jobs[0], [job.side for job in jobs[1:]]
    config = job.config.replace(max_steps=2)
    runtime = job.runtime.replace(
        eval_batches=20, eval_full_split=False, eval_interval=1000,
        save_interval=None, sample_tokens=0, dry_run=False,
    )  # fmt: skip
    seen: dict[str, list[dict]] = {side: [] for side in ("gptjax", "gptjax, cold", *others)}
    # Round 0 fills the cache, and the system's own of files.
    for number in itertools.chain([0], rounds(options, deadline)):
        for side, processes in seen.items():
            terminal.status(f"round {number}: {side} ...")
            run_dir = Path(job.folder) / f"{number} {side}"
            run_dir.mkdir()
            config_io.save_run_settings(run_dir / "config.json", config, runtime)
            cache = f"{run_dir if 'cold' in side else job.folder}/cache"
            command = ["train_jax.py", "--run-dir", str(run_dir)]
            if side == "torch":
                command = ["-m", "benchmarks.pytorch", str(run_dir)]
            environment = visible_devices(job) | {"GPTJAX_CACHE_DIR": cache}
            process = time_process(side, [sys.executable, *command], environment)
            processes += [process] if number else []
    terminal.status("")
    return [
        row(side, processes, seen["gptjax"])
        | {"process_seconds": quartiles([process["whole"] for process in processes])}
        for side, processes in seen.items()
    ]


def scaling(job: Job, most: int, options: BenchFlags, deadline: float) -> list[Row]:
    """Training with 1, 2, 4, ... `most` devices. On an accelerator each has the config's batch, and
    one count is measured after the other; a CPU's cores are only divided, over one batch for all,
    in turn."""
    on_cpu, jobs = job.runtime.device == "cpu", []
    batch, steps = job.config.batch_size, job.runtime.gradient_accumulation_steps
    for n in [2**i for i in range(most.bit_length())]:
        if not on_cpu or batch % (n * steps) == 0:
            config = job.config.replace(batch_size=batch if on_cpu else batch * n)
            runtime, side = job.runtime.replace(num_devices=n), f"gptjax x {n}"
            jobs.append(dataclasses.replace(job, side=side, config=config, runtime=runtime))
    together = [jobs] if on_cpu else [[one] for one in jobs]
    rows = [row for group in together for row in measure(group, options, deadline)]
    for each in rows:
        del each["gptjax_is_faster_by"]
        each["speedup"] = each["tokens_per_second"][1] / rows[0]["tokens_per_second"][1]
    return rows


def settings(argv: Sequence[str], prog: str) -> tuple[BenchFlags, list[Job]]:
    """What a command line asks for: the config file's settings with what the flags change, a job
    for each side, ours first.

    Raises:
        UserError: something about them is wrong, or they are no model that can be trained.
    """
    modes, defaults = "|".join(get_args(Mode)), [BenchFlags(), TrainConfig(), RuntimeConfig()]
    if {"--help", "-h"} & {*argv}:
        flags.show_help(defaults, prog, modes)
    named, given, problems = flags.read(defaults, argv, prog, modes)
    config, runtime = config_io.load_config(given.get("config", BenchFlags.config))
    runtime = runtime.replace(gradient_accumulation_steps=1)
    options, config, runtime = flags.apply([BenchFlags(), config, runtime], given, problems, prog)
    config = config.replace({"init_from": None, "model.vocab_size": vocabulary(config)})
    runtime.divide_batch(config, 1)
    mode: Any = named[0]
    others = {"none": [], "hf": ["hf with cache"], "torch": ["torch"]}[options.against]
    if mode not in get_args(Mode):
        raise UserError(f"cannot measure {mode!r}; expected {prog} {modes}|all|race")
    if mode == "scaling":
        others = []
    elif mode == "train" and "torch" in others:
        others = ["torch", "torch.compile"]
    if options.against == "hf" and mode != "generate":
        raise UserError(f"--against hf is for generate; {mode} runs against torch or none")
    if options.against == "hf" and options.max_new_tokens > config.model.block_size:
        raise UserError(
            f"Hugging Face's cache ends with the block of {config.model.block_size} tokens;"
            f" --max-new-tokens {options.max_new_tokens} must be at most that"
        )
    job = Job(
        "gptjax", mode, config, runtime, "", options.num_samples, options.max_new_tokens,
        compared=bool(others),
    )  # fmt: skip
    return options, [job, *(dataclasses.replace(job, side=other) for other in others)]


def vocabulary(config: TrainConfig) -> int:
    """How many ids a config's model has; of characters, as many as Tiny Shakespeare."""
    sizes = {"gpt2": 50257, "char": 65, "sentencepiece": config.data.sentencepiece_vocab_size}
    return config.model.vocab_size or sizes[config.data.tokenizer]


def write_data(folder: Path, vocab_size: int) -> None:
    """A prepared data set of random tokens: what they say makes no difference to the speed."""
    import numpy as np  # slow, and not needed to print the help

    folder.mkdir()
    counts, random = {"train": 1_000_000, "val": 100_000}, np.random.default_rng(0)
    for split, count in counts.items():
        random.integers(vocab_size, size=count).astype("<u4").tofile(folder / f"{split}.bin")
    meta = {"dtype": "uint32"} | {f"{split}_tokens": count for split, count in counts.items()}
    (folder / "meta.json").write_text(json.dumps(meta))
    characters = "".join(chr(0x10000 + i) for i in range(vocab_size))
    (folder / "tokenizer.json").write_text(json.dumps({"kind": "char", "characters": characters}))


def describe(job: Job, name: str) -> str:
    """The settings, in a line; `name`: the config's."""
    config, model, steps = job.config, job.config.model, job.runtime.gradient_accumulation_steps
    work = f"{config.batch_size} x {model.block_size} tokens a step"
    work += f" in {steps} micro-batches" if steps > 1 else ""
    work += f", dropout {model.dropout}"
    if job.mode == "generate":
        work = f"{job.num_samples} x {job.new_tokens} tokens after one, block"
        work += f" {model.block_size}, temperature 0.8, top-k 200"
    return (
        f"{name}: {model.num_parameters():,} parameters, {model.n_layer} layers,"
        f" {model.n_embd} wide; {work}; {model.dtype}"
    )


def amount(value: float) -> str:
    """Three digits: 12.3k, 456, 7.89M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def cells(row: Row, unit: str) -> dict[str, str]:
    """A row of the table, by the titles of its columns."""
    out = {"": row["side"]}
    if "process_seconds" in row:
        out["to first step"] = f"{row['seconds'][1]:.2f} s"
        out["whole process"] = f"{row['process_seconds'][1]:.2f} s"
    else:
        low, median, high = map(amount, row["tokens_per_second"])
        out |= {"tokens/s": median, "quartiles": f"{low} to {high}"}
        out |= {"MFU": f"{row['mfu']:.1%}"} if "mfu" in row else {}
        out["compile"] = f"{row['compile_seconds']:.1f} s"
    out["memory"] = amount(row.get("peak_device_bytes") or row["peak_resident_bytes"]) + "B"
    out[f"faults/{unit}"] = amount(row["page_faults_per_unit"])
    out["system time"] = f"{row['system_time_share']:.1%}"
    if "speedup" in row:
        return out | {"speedup": f"{row['speedup']:.2f}x"}
    low, median, high = (f"{ratio:.2f}" for ratio in row["gptjax_is_faster_by"])
    return out | {"gptjax is faster": f"{median}x ({low} to {high})"}


def table(report: dict[str, Any]) -> list[str]:
    """The report, in lines of text."""
    lines = [f"machine  {report['machine']}", f"setting  {report['setting']}"]
    for side, facts in report["sides"].items():
        ceiling = facts["ceilings"]
        lines.append(
            f"{side:7}  {facts['versions']}, {facts['devices']}; at most"
            f" {amount(ceiling['matmul_flops'])}FLOP/s in a matmul,"
            f" {amount(ceiling['copy_bytes_per_second'])}B/s in a copy"
        )
    rows = [cells(row, UNITS[report["mode"]]) for row in report["rows"]]
    widths = {title: max(len(row[title]) for row in [{title: title}, *rows]) for title in rows[0]}
    for row in [{title: title for title in widths}, *rows]:
        fields = [row[title].rjust(width) for title, width in widths.items() if title]
        lines.append("  ".join([row[""].ljust(widths[""]), *fields]))
    return lines


def run(options: BenchFlags, jobs: list[Job], folder: Path) -> dict[str, Any]:
    """The report. Processes write into `folder`.

    Raises:
        UserError: this machine cannot measure it.
        RunError: a side fails, or is too slow for one call.
    """
    deadline, config, runtime = time.monotonic() + CALL_SECONDS, jobs[0].config, jobs[0].runtime
    write_data(folder / "data", config.model.vocab_size or 0)
    config = config.replace({"data.dir": str(folder / "data")})
    job = dataclasses.replace(jobs[0], config=config, folder=str(folder))
    facts = {job.side: ceilings(job, deadline)}
    ours, kind = facts[job.side], facts[job.side]["platform"]
    if kind == "tpu" and job.compared:
        raise UserError("PyTorch's side does not run on TPU; add --against none")
    # The other side must not choose another kind of device, or another precision.
    if config.model.dtype == "auto":
        dtype = "float32" if kind == "cpu" else "bfloat16"
        config = config.replace({"model.dtype": dtype})
    runtime = runtime.replace(device=kind)
    jobs = [dataclasses.replace(job, side=x.side, config=config, runtime=runtime) for x in jobs]
    facts |= {other.side: ceilings(other, deadline) for other in jobs[1:2]}
    if job.mode == "startup":
        rows = startup(jobs, options, deadline)
    elif job.mode == "scaling":
        most = machine.cores() if kind == "cpu" else ours["device_count"]
        rows = scaling(jobs[0], most, options, deadline)
    else:
        rows = measure(jobs, options, deadline)
    if job.mode in ("train", "scaling"):
        # The same measure for all: the vendor's number for bfloat16, or what was measured.
        peak = max(fact["ceilings"]["matmul_flops"] for fact in facts.values())
        if config.model.dtype == "bfloat16" and ours["peak_flops"]:
            peak = ours["peak_flops"] / ours["device_count"]
        for each in rows:
            # A CPU's devices are parts of one machine.
            devices = 1 if kind == "cpu" else each["device_count"]
            flops = each["tokens_per_second"][1] * config.model.flops_per_token()
            each["mfu"] = flops / (peak * devices)
    return {
        "mode": job.mode, "machine": machine.describe(),
        "setting": describe(jobs[0], options.config), "sides": facts, "rows": rows,
        "flags": dataclasses.asdict(options),
    }  # fmt: skip


def main(argv: list[str], prog: str = PROG) -> None:
    """Raises UserError, RunError."""
    if argv[:1] in (["all"], ["race"]):
        from benchmarks import race, sweep  # which use this module

        {"all": sweep, "race": race}[argv[0]].main(argv[1:], f"{prog} {argv[0]}")
        return
    options, jobs = settings(argv, prog)
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or "," in hosts:
        raise UserError(
            "the benchmark measures one machine; unset JAX_COORDINATOR_ADDRESS and"
            " TPU_WORKER_HOSTNAMES"
        )
    if options.json:
        with open(options.json, "a"):
            pass  # a path that cannot be written is refused now
    with tempfile.TemporaryDirectory(prefix="gptjax-bench-") as folder:
        report = run(options, jobs, Path(folder))
    print("\n".join(table(report)))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    process.start(main, PROG)
