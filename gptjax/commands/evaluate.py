"""gptjax evaluate RUN: how well a run predicts a text, or finishes sentences."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

from gptjax import files
from gptjax.commands import flags, terminal
from gptjax.errors import UserError
from gptjax.runtime_config import DeviceKind, RuntimeConfig, StrategyKind
from gptjax.settings import Config


@dataclasses.dataclass(frozen=True)
class EvaluateFlags(Config):
    """Evaluate a run on a text, on its own data, or on HellaSwag, over all devices. Losses are in
    nats per token; bits per character and per byte compare models with different tokenizers."""

    text: str | None = None
    """A .txt or .jsonl file, a folder or a glob."""
    split: Literal["train", "val"] | None = None
    """A split of the data that the run was trained on."""
    data_dir: str | None = None
    """With --split: where the data lie now. None: where they lay in training."""
    hellaswag: str | None = None
    """A file in HellaSwag's jsonl format."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, such as hellaswag lambada_openai wikitext. (Takes
    pip install 'gptjax[harness]'; the texts come from the Hugging Face Hub, or see --task-data.)"""
    task_data: tuple[str, ...] = ()
    """TASK=PATH: a task's own data, in place of a download: a .jsonl or .parquet file with the
    questions, or a folder with a file for each split. The fields are those of the public data."""
    num_fewshot: int | None = None
    """With --tasks: solved examples before each question. None: as the task has it."""
    limit: int | None = None
    """With --tasks: only so many questions of each."""
    stride: int | None = None
    """Tokens from one window to the next. None: block_size, so that windows do not overlap; fewer
    take longer and give tokens more context."""
    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    batch_size: int | None = None
    """Windows at a time, over all devices. None: 8, or more where there are more devices."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What to compute in; float32 is at the highest precision of matrix products."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""
    num_devices: int | None = None
    """CPU devices to split this machine's cores into. None: one, which uses all of them."""
    strategy: StrategyKind | None = None
    """How the devices hold the model, as in training. None: as the run was trained."""

    def problems(self) -> list[str]:
        out = self._check_ints(1, "stride", "batch_size", "num_devices", "limit")
        out += self._check_ints(0, "num_fewshot")
        if len(self.asked()) > 1:
            out.append(f"on what? {_listed(self.asked())} exclude each other")
        out += [f"--{n} is empty" for n in ("text", "hellaswag") if getattr(self, n) == ""]
        for flag, of in OF.items():
            if getattr(self, flag) not in (None, ()) and not {*of} & {*self.asked()}:
                name = flag.replace("_", "-")
                out.append(f"--{name} goes with {' or '.join(f'--{each}' for each in of)}")
        for each in self.task_data:
            task, _, path = each.partition("=")
            if not (task and path):
                out.append(f"--task-data {each!r} is no task with its data: hellaswag=FILE")
        return out

    def asked(self) -> list[str]:
        """What to evaluate on."""
        return [name for name in WHAT if getattr(self, name) not in (None, ())]


WHAT = "text", "split", "hellaswag", "tasks"
OF = {
    "data_dir": ("split",),
    "stride": ("text", "split"),
    "task_data": ("tasks",),
    "num_fewshot": ("tasks",),
    "limit": ("tasks",),
}
"""The flags that go with some of these only."""


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(f'--{name}' for name in names[:-1])} and --{names[-1]}"


DEFAULTS = [EvaluateFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError."""
    named, given = flags.parse(EvaluateFlags(), argv, prog, "RUN")
    if not given.asked():
        raise UserError(f"on what? give one of {_listed(WHAT)}")
    run_dir = terminal.need_run(named[0])
    # JAX is imported when the command runs, not to print its help.
    import jax

    from gptjax import run_metadata, train_step
    from gptjax.data import tokenizers
    from gptjax.devices import setup
    from gptjax.devices.strategy import get_strategy
    from gptjax.evals import hellaswag, perplexity
    from gptjax.run import Run

    if given.tasks:
        from gptjax.evals import harness  # optional, and slow to import

    newest = run_metadata.newest_metadata(run_dir)
    if newest is None:
        raise UserError(f"no checkpoint in {run_dir}: training stopped before it saved one")
    setup.start(RuntimeConfig(device=given.device, num_devices=given.num_devices))
    setup.use_compilation_cache(files.cache_dir() / "xla")
    count = setup.device_count()
    batch_size = given.batch_size or -(-8 // count) * count
    if batch_size % count:
        raise UserError(f"--batch-size {batch_size} does not divide over {count} devices")
    laid_out = RuntimeConfig(strategy=given.strategy or newest.runtime.strategy)
    strategy = get_strategy(laid_out.strategy)
    loaded = run_metadata.load_checkpoint(run_dir, given.checkpoint, strategy.targets)
    metadata = loaded.metadata
    config = metadata.config.model.replace(dtype=given.precision)
    if given.stride and given.stride > config.block_size:
        raise UserError(f"--stride {given.stride} exceeds the block_size {config.block_size}")
    tokenizer = tokenizers.from_json(metadata.tokenizer, str(run_dir))
    # HellaSwag's texts are single documents.
    packed = metadata.config.data.packed and not given.hellaswag
    compute, _ = setup.resolve_compute(config, laid_out, train=False, packed=packed)
    eval_step = functools.partial(
        train_step.eval_step,
        config=config,
        compute=compute,
        eot=tokenizer.eot if packed else None,
    )
    params = strategy.to_devices(loaded.params)
    losses = functools.partial(strategy.map_eval_step(eval_step), params)

    def progress(done: int, total: int) -> None:
        if setup.is_main_host():
            terminal.status(f"{done:,} of {total:,}" if done < total else "")

    highest = "highest" if given.precision == "float32" else "default"
    with jax.default_matmul_precision(highest):
        if given.tasks:
            if jax.process_count() > 1:
                raise UserError("--tasks runs on one host; start it on one alone")
            model = Run(config, loaded.params, tokenizer, loaded.step, metadata.config)
            report = harness.evaluate(
                harness.HarnessModel(
                    model,
                    precision=given.precision,
                    batch_size=batch_size,
                    strategy=strategy,
                    progress=progress,
                ),
                given.tasks,
                {
                    task: files.path(path)
                    for task, _, path in (x.partition("=") for x in given.task_data)
                },
                limit=given.limit,
                num_fewshot=given.num_fewshot,
            ).report()
        elif given.hellaswag:
            questions = hellaswag.read_questions(files.path(given.hellaswag), tokenizer)
            report = hellaswag.evaluate_questions(
                losses,
                questions,
                config,
                name=given.hellaswag,
                batch_size=batch_size,
                progress=progress,
            ).report()
        else:
            if given.text:
                text = perplexity.read_text(given.text, tokenizer, metadata.config.data.end_of_text)
            elif not (folder := given.data_dir or metadata.config.data.dir):
                raise UserError("these weights have no data of their own; name a text with --text")
            else:
                split, fingerprint = given.split or "val", metadata.data_fingerprint
                text = perplexity.read_split(files.path(folder), split, tokenizer, fingerprint)
            report = perplexity.evaluate_text(
                losses, text, config, batch_size=batch_size, stride=given.stride, progress=progress
            ).report()
    if setup.is_main_host():
        print(f"{run_dir}, step {loaded.step}, in {given.precision}, on {report}")
