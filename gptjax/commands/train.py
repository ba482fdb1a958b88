"""gptjax train [CONFIG]: train a model, or resume a run."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from gptjax import config_io, console, files, first_edition, program
from gptjax.commands import flags, process, terminal
from gptjax.config import FINETUNE, TrainConfig
from gptjax.errors import UserError
from gptjax.runtime_config import RuntimeConfig
from gptjax.settings import Config


@dataclasses.dataclass(frozen=True)
class TrainFlags(Config):
    """Train a model, or resume a run.

    CONFIG is a Python file, the name of a config that comes with gptjax, or the folder of a run.
    Without it: the settings of the run that --run-dir names, else those of configs/quickstart.py.
    The last part of a flag's name is enough: --n-layer 4 is --model.n-layer 4.
    """

    print_config: bool = False
    """Print all settings as JSON, and exit."""


DEFAULTS = [TrainFlags(), TrainConfig(), RuntimeConfig()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError; after a stop signal SystemExit, with 128 + its number."""
    config, runtime, tokenizer, print_config = read_settings(argv, prog)
    if print_config:
        print(config_io.run_settings_json(config, runtime))
        return
    trainer = run(config, runtime, tokenizer)
    if trainer and trainer.stopped_by:
        step = trainer.checkpoints.latest_step
        kept = " before the first step" if step is None else f"; saved step {step}"
        resume = program.command("train", "--run-dir", trainer.checkpoints.run_dir)
        with contextlib.suppress(OSError):  # stdout may be closed
            print(f"stopped{kept}. Resume: {resume}", flush=True)
        sys.exit(128 + trainer.stopped_by)


def run(config: TrainConfig, runtime: RuntimeConfig, tokenizer: Any) -> Any:
    """`launch.train`, with all that listens to it."""
    # JAX is imported when the command runs, not to print its help.
    from gptjax import launch
    from gptjax.history import History
    from gptjax.metrics import MetricsLog
    from gptjax.profile import Profile
    from gptjax.progress import ProgressDisplay, Samples
    from gptjax.signals import StopSignal
    from gptjax.trackers.callback import Trackers

    stop, display, trackers = StopSignal(), ProgressDisplay(), Trackers()
    callbacks = [stop, MetricsLog(), History(), display, Samples(display), Profile(), trackers]
    try:
        with contextlib.closing(stop), contextlib.closing(display), contextlib.closing(trackers):
            return launch.train(
                config, runtime, tokenizer=tokenizer, callbacks=callbacks, stop=lambda: stop.number,
                console=console.make(),
            )  # fmt: skip
    finally:
        if trackers.hangs:
            process.skip_farewell()


def read_settings(
    argv: list[str], prog: str, parent: str = "runs"
) -> tuple[TrainConfig, RuntimeConfig, Any, bool]:
    """(the experiment, its circumstances, the tokenizer of the weights that the run resumes or
    starts from, whether only to print the settings).

    The settings are those of the config file, or of the existing run, or for fine-tuning
    (--init-from), or the quickstart's; changed by the flags; with the architecture of the weights.
    A run that has no folder yet gets one in `parent`.

    Raises:
        UserError: something about them is wrong, or there is no text to train on.
    """
    named, given, problems = flags.read(DEFAULTS, argv, prog, "[CONFIG]", first_edition.RENAMED)
    asked = given.pop("help", False)
    if named and terminal.is_run(files.path(named[0])):
        run = named.pop(0)
        if given.setdefault("run_dir", run) != run:
            raise UserError(f"two runs are named: {run} and --run-dir {given['run_dir']}")
    folder, origin, runtime = given.get("run_dir"), given.get("init_from"), RuntimeConfig()
    if named:
        name, (config, runtime) = Path(named[0]).stem, config_io.load_config(named[0])
    elif folder and (saved := saved_settings(files.path(folder))):
        name, (config, runtime) = Path(folder).name, saved
        data = {f"data.{name}": value for name, value in config_io.flatten(config.data).items()}
        del data["data.pack"]  # it changes no token
        if any(given.get(name, value) != value for name, value in data.items()):
            given.setdefault("data.dir", None)  # not the old text's
    elif origin:
        name, config = f"{Path(origin).name}-finetuned", FINETUNE
    else:
        name, (config, runtime) = "quickstart", config_io.load_config("quickstart")
    if "data.dir" in given or given.get("data.mix"):
        given.setdefault("data.source", None)  # the config's text is not that folder's
    if asked:
        flags.show_help([TrainFlags(), config, runtime], prog, "[CONFIG]")
    chosen_for, defaults = config.optimizer.kind, [TrainFlags(), config, runtime]
    own, config, runtime = flags.apply(defaults, given, problems, prog)
    kind = config.optimizer.kind
    rate = "muon_learning_rate" if kind == "muon" else "learning_rate"
    if kind != chosen_for and named and f"optimizer.{rate}" not in given:
        with contextlib.suppress(OSError):  # stderr may be closed
            print(
                f"note: --{rate.replace('_', '-')} is {getattr(config.optimizer, rate)}; the"
                f" config's settings were chosen for {chosen_for}, not {kind}",
                file=sys.stderr,
            )
    data = config.data
    if not (data.source or data.dir or data.mix or runtime.dry_run):
        raise UserError(
            "no text to train on; name one with --data.source (a .txt or .jsonl file, a folder, a"
            " glob, shakespeare or builtin), or a prepared folder with --data.dir"
        )
    from gptjax import resume  # JAX, see `main`

    run_dir = runtime.run_dir or f"{parent}/{name}"
    config, tokenizer = resume.adopt_weights(config, run_dir)
    return config, runtime.replace({"run_dir": run_dir}), tokenizer, own.print_config


def saved_settings(run_dir: Path) -> tuple[TrainConfig, RuntimeConfig] | None:
    """Those of a run that exists, from config.json or else from its newest checkpoint; without the
    folder of its data if that is no longer there and can be made again from the text.

    Raises:
        UserError: config.json cannot be read, or is damaged.
    """
    from gptjax import run_metadata  # JAX, see `main`
    from gptjax.data import prepare

    path = run_dir / "config.json"
    if path.exists():
        text = files.read_text(path)
        try:
            config, runtime = config_io.run_settings(files.parse_json(text, str(path)), str(path))
        except UserError as error:
            raise UserError(
                f"{error}; repair it, or delete {path} to go on with the settings of the run's"
                " newest checkpoint"
            ) from None
    elif metadata := run_metadata.newest_metadata(run_dir):
        config, runtime = metadata.config, metadata.runtime
    else:
        return None
    folder = Path(config.data.dir or "")
    prepared = folder.name.rpartition("-")[0] == prepare.default_name(config.data)
    if config.data.dir and not prepared:  # gptjax 0.1 saved a text that was not that folder's
        config = config.replace({"data.source": None})
    if prepared and not folder.exists():
        config = config.replace({"data.dir": None})
    return config, runtime
