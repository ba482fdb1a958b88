"""`bench all`: every config that fits this machine, shapes between and beyond them, sampling and
start-up, each beside PyTorch; the worst ratio first. And how the ratios went from commit to commit.
"""

import dataclasses
import datetime
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bench
from gptjax import machine
from gptjax.commands import flags, terminal
from gptjax.errors import RunError, UserError
from gptjax.settings import Config

SMALL = "--n-layer 2 --n-head 2 --n-embd 64"
MIDDLE = "train --config shakespeare_char"
SETTINGS = {
    "quickstart": "train --config quickstart",
    "shakespeare_char_cpu": "train --config shakespeare_char_cpu",
    "shakespeare_char": "train --config shakespeare_char",
    "gpt2, 1 x 1024": "train --config gpt2 --batch-size 1",
    "0.1M, 1 x 32": f"train {SMALL} --block-size 32 --batch-size 1",
    "0.1M, 64 x 32": f"train {SMALL} --block-size 32 --batch-size 64",
    "0.8M, 1 x 64": "train --batch-size 1",
    "0.8M, 64 x 64": "train --batch-size 64",
    "0.8M, 16 x 256": "train --block-size 256 --batch-size 16",
    "0.8M, 1 x 1024": "train --block-size 1024 --batch-size 1",
    "10.7M, 1 x 256": f"{MIDDLE} --batch-size 1",
    "10.7M, 8 x 256": f"{MIDDLE} --batch-size 8",
    "10.7M, 8 x 256, no dropout": f"{MIDDLE} --batch-size 8 --dropout 0",
    "51M, 2 x 512": "train --config gpt2 --n-layer 8 --n-head 8 --n-embd 512 --block-size 512"
    " --batch-size 2",
    "124M, 2 x 256": "train --config gpt2 --batch-size 2 --block-size 256",
    "sampling, batch 1": "generate --block-size 512",
    "sampling, batch 8": "generate --block-size 512 --num-samples 8",
    "sampling, batch 64": "generate --block-size 512 --num-samples 64 --max-new-tokens 100",
    "sampling past the block of 64": "generate",
    "sampling, 124M": "generate --config gpt2 --max-new-tokens 64 --against hf",
    "start-up": "startup",
}
"""name -> the command line of `bench`. gpt2_xl and larger models do not fit 24 GiB."""

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class AllFlags(Config):
    """Measure every config that fits, and shapes between and beyond them, beside PyTorch: half an
    hour on two cores. The worst ratio comes first."""

    only: str | None = None
    """Settings whose names contain this."""
    seconds: float = 10.0
    """Of all rounds of a setting; compilation comes on top."""
    least_rounds: int = 3
    """Rounds of a setting, however long they take."""
    out: str = str(RESULTS)
    """The folder for the JSON report, named by day and commit."""
    plot: str | None = None
    """Measure nothing; draw the ratios of all reports in --out, commit by commit, to this file."""


def main(argv: Sequence[str], prog: str) -> None:
    """Raises UserError: bad flags, or no such setting. RunError: no setting could be measured."""
    _, given = flags.parse(AllFlags(), argv, prog)
    folder = Path(given.out)
    if given.plot:
        plot(folder, given.plot)
        return
    chosen = {name: line for name, line in SETTINGS.items() if (given.only or "") in name}
    if not chosen:
        raise UserError(f"no setting contains {given.only!r}; there are {', '.join(SETTINGS)}")
    reports: dict[str, Any] = {}
    kept = {"machine": machine.describe(), "commit": commit(), "reports": reports}
    path = folder / f"{datetime.datetime.now():%Y-%m-%d-%H%M}-{kept['commit']}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} (--out): {error.strerror}; name a folder") from None
    for name, line in chosen.items():
        more = f"--seconds {given.seconds} --least-rounds {given.least_rounds}".split()
        try:
            options, jobs = bench.settings([*line.split(), *more], prog)
            with tempfile.TemporaryDirectory(prefix="gptjax-bench-") as scratch:
                reports[name] = bench.run(options, jobs, Path(scratch))
        except (RunError, UserError) as error:  # the others are worth knowing
            terminal.status("")
            print(f"{name}: {error}", flush=True)
            continue
        print(f"{name}: {summary(reports[name])['ratio']:.2f}x", flush=True)
        path.write_text(json.dumps(kept, indent=1) + "\n")
    if not reports:
        raise RunError("no setting could be measured")
    print("\n".join([*table(reports), f"wrote {path}"]))


def commit() -> str:
    """Of this checkout, with "-changed" where it differs."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=-changed", "--exclude=*"], cwd=bench.ROOT,
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report in a few numbers; ratios are to the better of the other sides."""
    ours, *others = [row for row in report["rows"] if row["side"] != "gptjax, cold"]
    peaks = [row.get("peak_device_bytes") or row["peak_resident_bytes"] for row in [ours, *others]]
    found = {
        "ratio": min(row["gptjax_is_faster_by"][1] for row in others),
        "memory": peaks[0] / min(peaks[1:]),
        "speed": ours.get("tokens_per_second", ours["seconds"])[1],
        "unit": "tokens/s" if "tokens_per_second" in ours else "s",
    }
    return found | {name: ours[name] for name in ("page_faults_per_unit", "system_time_share")}


def table(reports: Mapping[str, Any]) -> list[str]:
    """A line a setting, the worst ratio first."""
    width = max(map(len, reports))
    lines = [f"{'':{width}}  faster  memory       gptjax         faults  system time"]
    found = {name: summary(report) for name, report in reports.items()}
    for name, row in sorted(found.items(), key=lambda item: item[1]["ratio"]):
        lines.append(
            f"{name:{width}}  {row['ratio']:5.2f}x  {row['memory']:5.2f}x"
            f"  {bench.amount(row['speed']):>6} {row['unit']:8}"
            f"  {bench.amount(row['page_faults_per_unit']):>6}  {row['system_time_share']:11.1%}"
        )
    return lines


def hardware(report: Mapping[str, Any]) -> str:
    """Processor and cores."""
    return ", ".join(report["machine"].split(", ")[:2])


def plot(folder: Path, path: str) -> None:
    """The ratio of every setting over the reports in `folder`, by day, of the newest one's machine.
    Raises UserError: there is none."""
    read = [(file.stem, json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))]
    kept = [(stem, one) for stem, one in read if "reports" in one]
    if not kept:
        raise UserError(f"no report in {folder}; `bench all` writes one")
    newest = hardware(kept[-1][1])
    others = len(kept)
    kept = [(stem, one) for stem, one in kept if hardware(one) == newest]
    if others := others - len(kept):
        print(f"left out: {others} of other machines than {newest}")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name in SETTINGS:
        points = [
            (stem, summary(one["reports"][name])["ratio"])
            for stem, one in kept
            if name in one["reports"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(title=newest, ylabel="times as fast as PyTorch", yscale="log")
    axes.axhline(1, color="black", linewidth=1)
    axes.tick_params(axis="x", rotation=30)
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path)
    print(f"drew {path}")
