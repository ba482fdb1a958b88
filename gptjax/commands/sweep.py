"""gptjax sweep [CONFIG] --learning-rate 1e-4..1e-2: a run for each of several values."""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptjax import files, program, run_logs, sweep
from gptjax.commands import flags, terminal, train
from gptjax.config import TrainConfig
from gptjax.errors import Diverged, UserError
from gptjax.runtime_config import RuntimeConfig
from gptjax.settings import Config
from gptjax.sweep import Result


@dataclasses.dataclass(frozen=True)
class SweepFlags(Config):
    """Train once for each of several values of one number, and compare: --learning-rate 1e-4..1e-2
    tries --points values at equal ratios, --dropout 0,0.1,0.2 those of the list.

    All else is as for `train`. The runs lie in runs/sweeps/NAME, or in the folder that --run-dir
    names; the same command goes on where it was stopped. A run that diverges is a result too.
    """

    points: int = 5
    """Values of a range, its ends included."""

    def problems(self) -> list[str]:
        return self._check_ints(2, "points")


DEFAULTS = [SweepFlags(), TrainConfig(), RuntimeConfig()]

Point = tuple[str, TrainConfig, Path]
"""A value as it was written, the settings with it, the folder of the run."""


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError; after a stop signal SystemExit, with 128 + its number."""
    if {"-h", "--help"} & {*argv}:
        flags.show_help(DEFAULTS, prog, "[CONFIG]")
    rest, own = take(argv, lambda name, _: name in ("points", "run_dir"))
    count = flags.parse(SweepFlags(), [f"--points={own.get('points', 5)}"], prog)[1].points
    rest, swept = take(rest, lambda _, value: bool(sweep.VALUES.fullmatch(value)))
    if len(swept) != 1:
        raise UserError(
            f"a sweep is over one setting, not {len(swept)}; give it a range, such as"
            " --learning-rate 1e-4..1e-2, or a list, such as --dropout 0,0.1,0.2"
        )
    ((name, text),) = swept.items()
    flag = f"--{name.replace('_', '-')}"
    (number,) = setting(flag, re.split(r"\.\.|,", text)[0], prog).values()
    values = sweep.values(text, count, whole=type(number) is int)
    settings = {value: setting(flag, value, prog) for value in values}
    named = [f"--run-dir={own['run_dir']}"] if "run_dir" in own else []
    first = f"{flag}={next(iter(settings))}"
    config, runtime, tokenizer, prints = train.read_settings(
        [*rest, *named, first], prog, "runs/sweeps"
    )
    if runtime.dry_run or prints:
        raise UserError("--dry-run and --print-config are about one run; use train")
    from gptjax.data import token_files  # slow, and not needed to print the help

    folder = config.data.dir and files.path(config.data.dir)
    validates = config.data.val_fraction or config.data.val_source
    if not (len(token_files.load(folder).val) if folder else validates):
        raise UserError(
            f"a sweep compares validation losses, and {folder or 'this text'} has no validation"
            " split; give a val_fraction or a val_source"
        )
    folder = files.path(runtime.run_dir or "")
    if terminal.is_run(folder):
        raise UserError(f"{folder} is a run; name another folder for the sweep with --run-dir")
    # All of them are checked before the first one begins.
    points = [
        (value, config.replace(change), folder / f"{name.rpartition('.')[2]}={value}")
        for value, change in settings.items()
    ]
    print(f"{len(points)} runs in {folder}; stopped by Ctrl-C, the same command goes on")
    results = [train_or_read(point, runtime, tokenizer, name) for point in points]
    print("\n" + "\n".join(sweep.table(name, results)))
    if name != "seed" and (warning := sweep.at_an_end(results)):
        print(f"note: {warning}")
    print(draw(name, results, folder / "sweep.png"))
    if winner := sweep.best(results):
        best = [*rest, f"{flag}={winner.value}", "--run-dir", winner.run_dir]
        print("best: " + program.command("train", *best))


def take(
    argv: Sequence[str], wanted: Callable[[str, str], bool]
) -> tuple[list[str], dict[str, str]]:
    """(the command line without the flags that are `wanted`, by name and value; those)."""
    rest, taken = list(argv), dict[str, str]()
    for at in reversed(range(len(rest))):
        flag, equals, value = rest[at].partition("=")
        if not equals and at + 1 < len(rest):
            value = rest[at + 1]
        name = flag[2:].replace("-", "_")
        if flags.FLAG.match(flag) and wanted(name, value):
            taken.setdefault(name, value)  # of a flag that is given twice the last one counts
            del rest[at : at + (1 if equals else 2)]
    return rest, taken


def setting(flag: str, value: str, prog: str) -> dict[str, Any]:
    """{setting of a run's experiment: value} for a flag. Raises UserError: there is none, or it is
    no number."""
    _, given, problems = flags.read([TrainConfig()], [f"{flag}={value}"], prog)
    if problems:
        raise UserError("; ".join(problems))
    if not all(type(number) in (int, float) for number in given.values()):
        raise UserError(f"{flag} is not a number; a sweep is over numbers")
    return given


def train_or_read(point: Point, runtime: RuntimeConfig, tokenizer: Any, name: str) -> Result:
    """What came of a run: it is made, or finished, unless it is over already. SystemExit: a signal
    has stopped it."""
    value, config, run_dir = point
    if found := sweep.recorded(value, run_dir, config):
        return found
    print(f"\n{name} {value}", flush=True)
    diverged = None
    try:
        trainer = train.run(config, runtime.replace(run_dir=str(run_dir)), tokenizer)
        if trainer.stopped_by:
            print("stopped; the same command goes on here", flush=True)
            sys.exit(128 + trainer.stopped_by)
    except Diverged as error:
        diverged = str(error)
        print(f"diverged: {error}", flush=True)
    rows = run_logs.read_metrics(run_dir / "metrics.jsonl")
    losses = [row["val_loss"] for row in rows if row["step"] and row.get("val_loss") is not None]
    return sweep.record(value, run_dir, config, losses, diverged)


def draw(name: str, results: Sequence[Result], out: Path) -> str:
    """What to say of the picture. (That matplotlib is missing is no reason to fail.)"""
    from gptjax.viz import sweep as picture

    try:
        picture.draw(name, results, out)
    except UserError as error:
        return f"note: no picture: {error}"
    return f"drew {out}"
