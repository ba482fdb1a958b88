"""What must not grow, and does not wobble: per config page faults a step, temporary bytes and
operations of the compiled step, programs that a run compiles, and those that a second one does.

    python -m benchmarks.growth           compares with growth.json; exit code 1 if something grew
    python -m benchmarks.growth --write   makes it what is true now
"""

import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIGS = {
    "quickstart": {},
    "shakespeare_char_cpu": {},
    "shakespeare_char": {"batch_size": 4},
    "gpt2": {"batch_size": 1, "model.block_size": 256, "model.n_layer": 2},
}
"""name -> what is changed, so that it is quick on two cores."""

STEPS = 12

ALLOWED = {"temporary_bytes": 1.02, "operations": 1.02, "compilations": 1.0}
"""By what factor a number may grow unnoticed."""

FAULTS = 100
"""So many a step are none: a step that gives its memory back has tens of thousands."""

FILE = Path(__file__).with_suffix(".json")


def child(name: str, folder: Path) -> dict[str, Any]:
    """In a process of its own: a short run of a config, as `gptjax train` makes it, on data in
    `folder`."""
    import jax

    from benchmarks import bench
    from gptjax import config_io, launch
    from gptjax.devices import base
    from gptjax.runtime_config import RuntimeConfig
    from gptjax.trainer import Callback

    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    programs: list[Any] = []
    compile_step = base.TrainStep.compile

    def compile_and_keep(self: Any, *arguments: Any) -> Any:
        programs.append(compile_step(self, *arguments))
        return programs[-1]

    setattr(base.TrainStep, "compile", compile_and_keep)  # noqa: B010
    faults: list[int] = []

    class Faults(Callback):
        def on_step(self, trainer: Any, row: Any) -> None:
            jax.block_until_ready(trainer.state)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    config, _ = config_io.load_config(name)
    config = config.replace(CONFIGS[name]).replace(
        {"data.dir": str(folder / "data"), "max_steps": STEPS, "init_from": None,
         "model.vocab_size": bench.vocabulary(config)}
    )  # fmt: skip
    runtime = RuntimeConfig(
        run_dir=tempfile.mkdtemp(dir=folder), device="cpu", num_devices=1, eval_batches=1,
        eval_interval=1000, sample_tokens=20,
    )  # fmt: skip
    launch.train(config, runtime, callbacks=[Faults()])
    (program,) = programs
    operations = len(re.findall(r"^ *(?:ROOT )?%?[\w.-]+ = ", program.as_text(), re.MULTILINE))
    return {
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "operations": operations,
        "compilations": events.count("/jax/compilation_cache/cache_misses"),
        "from_cache": events.count("/jax/compilation_cache/cache_hits"),
        "faults": statistics.median(b - a for a, b in itertools.pairwise(faults[4:])),
    }


def measure(name: str) -> dict[str, float]:
    """The numbers of one config; "again" is what a second process compiles."""
    from benchmarks import bench
    from gptjax import config_io

    config, _ = config_io.load_config(name)
    with tempfile.TemporaryDirectory(prefix="gptjax-growth-") as folder:
        bench.write_data(Path(folder) / "data", bench.vocabulary(config))

        def run() -> dict[str, Any]:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.growth", name, folder], cwd=bench.ROOT,
                env=os.environ | {"GPTJAX_CACHE_DIR": f"{folder}/cache"}, check=True,
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            return json.loads(done.stdout.splitlines()[-1])

        first, second = run(), run()
    if second["from_cache"] < first["compilations"]:
        raise SystemExit(f"{name}: a second process took {second['from_cache']} programs from disk")
    del first["from_cache"]
    faults = max(first["faults"], second["faults"])
    return first | {"faults": faults, "again": second["compilations"]}


def grown(found: dict[str, float], before: dict[str, float]) -> list[str]:
    """What of a config's numbers is worse than it was, in words."""
    out = [
        f"{key} {found[key]:,}, was {before[key]:,}"
        for key, factor in ALLOWED.items()
        if found[key] > before[key] * factor
    ]
    if found["faults"] > FAULTS:
        out.append(f"{found['faults']:,.0f} page faults a step")
    if found["again"]:
        out.append(f"a second process compiled {found['again']} programs")
    return out


def main(argv: list[str]) -> int:
    """The exit code."""
    import importlib.metadata

    version = importlib.metadata.version("jax")
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    found = {name: measure(name) for name in CONFIGS}
    for name, numbers in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:,}" for key, value in numbers.items()))
    if argv == ["--write"]:
        FILE.write_text(json.dumps(kept | {version: found}, indent=1) + "\n")
        return 0
    if version not in kept:
        print(
            f"nothing is known of JAX {version}, only of {', '.join(kept) or 'none'}; add --write"
        )
        return 1
    before = kept[version]
    worse = [f"{name}: {word}" for name in found for word in grown(found[name], before[name])]
    print("\n".join(worse) or "nothing grew")
    return 1 if worse else 0


if __name__ == "__main__":
    if not {*sys.argv[1:]} <= {"--write"} and len(sys.argv) != 3:
        sys.exit(__doc__)
    if len(sys.argv) == 3:
        print(json.dumps(child(sys.argv[1], Path(sys.argv[2]))))
    else:
        sys.exit(main(sys.argv[1:]))
