"""gptjax's runs in EleutherAI's lm-evaluation-harness (the package `lm_eval`): its tasks, with the
numbers that it gives for the same model exported to Hugging Face's format.

    lm_eval.simple_evaluate(model=HarnessModel(gptjax.load("runs/mine")), tasks=["hellaswag"])
"""

import contextlib
import functools
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from gptjax import config_io, run
from gptjax.data import readers
from gptjax.decode_layout import unstack
from gptjax.devices import setup
from gptjax.devices.base import Strategy
from gptjax.devices.strategy import get_strategy
from gptjax.errors import RunError, UserError, first_line, is_out_of_memory
from gptjax.evals import continuations
from gptjax.evals.continuations import Continuation
from gptjax.generation import GrowingText, grow
from gptjax.generation_config import GenerationConfig
from gptjax.model import Params
from gptjax.runtime_config import RuntimeConfig

try:  # optional
    import datasets
    import lm_eval
    import tqdm
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError(
        "lm-evaluation-harness is not installed: pip install 'gptjax[harness]'"
    ) from None

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test"},
}
"""What a split's file is called, as a word of its name."""

PART = re.compile("-[0-9]+-of-[0-9]+")
"""What a name has of a split in several files, which belong together."""

FEWSHOT_SEED = 1234
"""As the harness has it. It chooses the solved examples."""

RESAMPLES = 1000
"""Of the examples, for the standard error of a metric that is no mean."""


class HarnessModel(TemplateLM):
    """A run, as the harness asks a model. It uses all devices of this machine."""

    def __init__(
        self,
        of: run.Run,
        *,
        precision: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 8,
        strategy: Strategy | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        """
        Args:
            precision: what to compute in; float32 is at the highest precision of matrix products.
            batch_size: texts at a time, over all devices; rounded up to a multiple of these.
            strategy: how the devices hold the weights. None: each a copy, or, of a run that was
                loaded `sharded`, a share.
            progress: told how many texts of how many are done.
        """
        super().__init__()
        arrays = jax.tree.leaves(of.params)
        shared = any(len(x.sharding.device_set) > 1 for x in arrays if isinstance(x, jax.Array))
        strategy = strategy or get_strategy("fsdp" if shared else "pmap")
        count = len(strategy.devices)
        self._run = of
        self._config = of.config.replace(dtype=precision)
        self._batch_size, self._progress = -(-batch_size // count) * count, progress
        compute, _ = setup.resolve_compute(self._config, RuntimeConfig(), train=False)
        params = strategy.to_devices(of.params)
        self._scores = continuations.scores(strategy, params, self._config, compute)
        self._highest = "highest" if precision == "float32" else "default"

    @property
    def eot_token_id(self) -> int:
        if self._run.tokenizer.eot is None:
            raise UserError(
                f"the {self._run.tokenizer.kind} tokenizer has no token that ends a text, which the"
                " harness puts before a text that nothing precedes"
            )
        return self._run.tokenizer.eot

    @property
    def max_length(self) -> int:
        return self._config.block_size

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self._run.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        return self._score([Continuation(*tokens) for _, *tokens in requests])

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is what greedy sampling gives) of each continuation."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of each text, by windows that do not overlap."""
        texts, of = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                texts.append(Continuation(*make_disjoint_window(window)))
                of.append(number)
        found = [likelihood for likelihood, _ in self._score(texts)]
        return np.bincount(of, found, minlength=len(requests)).tolist()

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """What follows each text, one after the other, up to a stop text."""
        found = []
        for number, request in enumerate(requests):
            text, options = request.args
            found.append(self._continue(text, options))
            self._progress(number + 1, len(requests))
        return found

    def _score(self, texts: Sequence[Continuation]) -> list[tuple[float, bool]]:
        with jax.default_matmul_precision(self._highest):
            nats, greedy = continuations.score(
                self._scores, texts, self._config, batch_size=self._batch_size,
                progress=self._progress,
            )  # fmt: skip
        return [
            (-own, likeliest) for own, likeliest in zip(nats.tolist(), greedy.tolist(), strict=True)
        ]

    @functools.cached_property
    def _decoding_params(self) -> Params:
        return unstack(self._run.params, self._config)

    def _continue(self, text: str, options: Mapping[str, Any]) -> str:
        tokenizer, asked = self._run.tokenizer, normalize_gen_kwargs({**options})
        temperature = asked.get("temperature", 1.0) if asked["do_sample"] else 0.0
        settings = GenerationConfig(
            max_new_tokens=asked["max_gen_toks"],
            temperature=temperature,
            top_k=asked.get("top_k", 50 if temperature else 0),
            top_p=asked.get("top_p", 1.0),
            stop=tuple(filter(None, asked["until"])),
        )
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"the task asks for {settings.max_new_tokens} new tokens, which leave no room for"
                f" its text in the model's block_size {self.max_length}"
            )
        ids = tokenizer.encode(text)[-room:]
        ids = ids if len(ids) else np.array([self.eot_token_id])
        grown = GrowingText(tokenizer, settings.stop, tokenizer.eot)
        with jax.default_matmul_precision(self._highest):
            for _ in grow(
                [grown],
                run.tokens(self._decoding_params, ids, self._config, settings, stream=False),
            ):
                pass
        return grown.text


class Row(NamedTuple):
    """A number of a task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    few_shot: int
    examples: int


class TaskResult(NamedTuple):
    """What `evaluate` measured."""

    rows: list[Row]
    versions: dict[str, Any]
    """Of the tasks."""

    def report(self) -> str:
        """A table."""
        shown = [("task", "version", "metric", "value", "stderr", "few-shot", "examples")]
        for row in self.rows:
            stderr = "-" if row.stderr is None else f"{row.stderr:.4f}"
            version = str(self.versions.get(row.task, "-"))
            counts = str(row.few_shot), f"{row.examples:,}"
            shown.append((row.task, version, row.metric, f"{row.value:.4f}", stderr, *counts))
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        lines = (
            "  ".join(
                cell.ljust(width) if number < 3 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in shown
        )
        return f"lm-evaluation-harness {lm_eval.__version__}\n" + "\n".join(lines)


def evaluate(
    model: HarnessModel,
    tasks: Sequence[str],
    data: Mapping[str, Path] | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> TaskResult:
    """Tasks of the harness.

    Args:
        tasks: names of tasks, groups of them or tags.
        data: {task: a file with what is to be evaluated, or a folder with a file for each split},
            as JSON lines or tables with the fields of the public data set. The others are
            downloaded.
        limit: so many examples of each task, the first ones.
        num_fewshot: examples with their answers before each question. None: as the task has it.

    UserError: there is no such task, or its data cannot be read or have not the fields it takes.
    """
    data = data or {}
    with _quiet(), _failing(tasks):
        manager = _manager(tasks)
        if unknown := [name for name in tasks if name not in manager.task_index]:
            near = config_io.near_miss(unknown[0], manager.task_index)
            raise UserError(f"no task {unknown[0]!r} in the harness {lm_eval.__version__}{near}")
        single = {*tasks} & {*manager.all_subtasks}
        if spare := sorted({*data} - single):
            raise UserError(
                f"there are data for {spare[0]}, but the single tasks asked for are"
                f" {', '.join(sorted(single)) or 'none'}"
            )
        # In a group a task can be had with other data than its own.
        members = [
            {"task": name, "custom_dataset": functools.partial(_Splits, path)}
            for name, path in data.items()
        ]
        given = manager.load({"group": "from files", "task": members})["tasks"] if data else {}
        # `simple_evaluate` does these two as well, and asks git and PyTorch where they are.
        loaded = manager.load([given.get(name, name) for name in dict.fromkeys(tasks)])
        for name, task in loaded["tasks"].items():
            shots = task.get_config("num_fewshot")
            if num_fewshot is not None and shots != 0:  # 0: its texts have their examples
                shots = num_fewshot
            if shots and name in data and not data[name].is_dir():
                raise UserError(
                    f"{data[name]} is one split, but the {shots} solved examples before a question"
                    f" of {name} may come from another; name a folder with a file for each, such as"
                    " train.jsonl and test.jsonl, or ask for --num-fewshot 0"
                )
            task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        found = lm_eval.evaluate(
            model, loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False
        )
    rows = []
    for task, numbers in found["results"].items():
        for name, value in numbers.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, float):
                continue
            stderr = numbers.get(f"{metric}_stderr,{filtered}")
            rows.append(Row(
                task, metric if filtered == "none" else name, value,
                stderr if isinstance(stderr, float) else None,
                found["n-shot"].get(task, 0), found["n-samples"].get(task, {}).get("effective", 0),
            ))  # fmt: skip
    return TaskResult(rows, found["versions"])


def _manager(tasks: Sequence[str]) -> TaskManager:
    """The harness's index, with these tasks. To index all takes as long as a small evaluation;
    most tasks lie in a folder whose name theirs begins with."""
    found = Path(lm_eval.__file__).parent / "tasks"
    folders = [
        p for p in found.iterdir() if p.is_dir() and any(t.startswith(p.name) for t in tasks)
    ]
    some = TaskManager(include_defaults=False, include_path=[*map(str, folders)])
    return some if {*tasks} <= {*some.all_subtasks} else TaskManager()


class _Splits(dict[str, Any]):
    """The data of a task, from a file, which is every split, or from a folder."""

    def __init__(self, path: Path, **kwargs: Any):
        super().__init__()
        self._path = path

    def __missing__(self, split: str) -> Any:
        paths = [self._path]
        if self._path.is_dir():
            words = SPLITS.get(split, {split})
            inside = sorted(
                p for p in self._path.rglob("*") if readers.ending(p) in readers.OBJECTS
            )
            paths = [p for p in inside if words & {*re.split("[^a-z]+", p.name.lower())}]
            if not paths:
                raise UserError(
                    f"{self._path} has no file of the {split} split, such as {split}.jsonl"
                )
            # A copy of a repository may have other languages or subsets beside the one.
            if len(kinds := {PART.sub("", str(p.relative_to(self._path))) for p in paths}) > 1:
                raise UserError(
                    f"{self._path} has several files of the {split} split:"
                    f" {', '.join(sorted(kinds))}; name one of them, or a folder with one of each"
                    " split"
                )
        rows = [row for path in paths for _, row in readers.rows(path)]
        try:
            self[split] = datasets.Dataset.from_list(rows)
        except Exception as error:  # of pyarrow, for fields that differ
            raise UserError(
                f"the rows of {paths[0]} do not fit together: {first_line(error)}"
            ) from None
        return self[split]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's messages, and without its processes, which would be forks of ours."""
    os.environ["DISABLE_MULTIPROC"] = "1"
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    shown, bars = tqdm.tqdm.__init__, datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tqdm.tqdm.__init__ = functools.partialmethod(shown, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        tqdm.tqdm.__init__ = shown
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _failing(tasks: Sequence[str]) -> Iterator[None]:
    """UserError where the harness cannot load a task, or its data are not what it takes."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        how = "data that are given need the fields of the public data set"
        if isinstance(error, OSError):  # of a network, a disk, or the Hub
            how = "data can be given as files, by --task-data"
        raise UserError(
            f"the harness cannot evaluate {', '.join(tasks)}: {type(error).__name__}:"
            f" {first_line(error)} ({how})"
        ) from None
