"""What to train, given a text, a machine and some time: from the machine's measured speed and a few
published rules."""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from gptjax import config_io, evaluation, train_step
from gptjax.config import PRESETS, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.data.batches import batch_at, windows_over
from gptjax.data.token_files import Dataset
from gptjax.devices import hosts, memory, setup
from gptjax.devices.strategy import get_strategy
from gptjax.errors import UserError
from gptjax.runtime_config import RuntimeConfig

SMALL = [
    ModelConfig(n_layer, n_head, n_embd, block_size, bias=False)
    for n_layer, n_head, n_embd, block_size in (
        (2, 2, 64, 64), (3, 3, 96, 64), (4, 4, 128, 128), (4, 4, 192, 256), (6, 4, 256, 256),
        (6, 6, 384, 256), (8, 8, 512, 512),
    )
]  # fmt: skip
"""Those of the configs that come with gptjax, and some between them."""
LARGE = [
    PRESETS[name].replace(
        vocab_size=None, block_size=1024, attention_pattern=("dense",), bias=False
    )
    for name in ("gpt3-small", "gpt3-medium", "gpt3-large", "gpt3-xl", "gpt3-2.7b", "gpt3-6.7b")
]
GPT3_RATES = {
    125e6: 6e-4, 350e6: 3e-4, 760e6: 2.5e-4, 1.3e9: 2e-4, 2.7e9: 1.6e-4, 6.7e9: 1.2e-4,
}  # fmt: skip
"""Parameters: peak learning rate of AdamW (arXiv:2005.14165, table 2.1)."""

MUON_BELOW = 30e6
"""Parameters. The configs that come with gptjax have measured Muon's rates for small models."""

PROBE_SECONDS = 2.0
"""Of steps, for each size that is measured."""
ALL_PROBES = 15.0
"""Seconds after which no larger size is tried; on accelerators, whose compilers take longer and
which small sizes do not fill, four times that."""

NEARLY_NEW, LITTLE_USE, NO_USE = 4, 16, 40
"""Times that a text is read: up to the first it teaches nearly as much as new text, after the last
nothing (arXiv:2305.16264)."""

BATCH = 1.73
"""Tokens of a step over the square root of all tokens: 1.7 in the quickstart, 1.4 in
shakespeare_char_fast, 1.8 in nanoGPT's shakespeare_char, 1.0 (125M) to 5.8 (175B) in GPT-3."""

OTHER_SECONDS = 15.0
"""From the start of the process to its first step, and for a dozen samples and checkpoints."""

LEAST_ROWS = 8
"""Sequences of a step."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured of one configuration."""

    model: ModelConfig
    tokens: int
    """Of a step."""
    step: float
    """Seconds of a training step, the median."""
    evaluation: float = 0.0
    """Seconds of evaluating one batch."""

    @property
    def flops(self) -> float:
        """FLOP/s of training."""
        return self.model.flops_per_token() * self.tokens / self.step


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A configuration, and what it promises."""

    config: TrainConfig
    runtime: RuntimeConfig
    speed: Speed
    seconds: float
    """Of the whole run."""
    peak: float
    """Bytes of a device's memory."""

    @property
    def tokens(self) -> int:
        """Those that are trained on."""
        return self.config.max_steps * self.speed.tokens


def measure(
    config: TrainConfig, runtime: RuntimeConfig, dataset: Dataset, *, evaluates: bool = False
) -> Speed:
    """Take some steps, as training does, and time them."""
    strategy = get_strategy(runtime.strategy)
    compute = setup.resolve_compute(config.model, runtime, train=True)[0]
    step = strategy.map_train_step(
        functools.partial(train_step.train_step, config=config, compute=compute),
        runtime.gradient_accumulation_steps,
    )
    state = strategy.to_devices(strategy.initialise(lambda: train_step.init_state(config)))
    batch = functools.partial(
        batch_at, dataset.train, config.seed,
        batch_size=config.batch_size, block_size=config.model.block_size,
    )  # fmt: skip
    times, running = list[float](), None
    began = time.perf_counter()
    for number in itertools.count():
        state, metrics = step(state, batch(number))
        if running:  # the step before, as in training
            hosts.fetch(running)
        running = metrics
        times.append(time.perf_counter())
        if number == 2:  # the first ones compile, and fill the pipeline
            began = times[-1]
        if number >= 5 and times[-1] - began > PROBE_SECONDS:
            break
    seconds = statistics.median(np.diff(times[2:]).tolist())
    tokens = config.batch_size * config.model.block_size
    if not evaluates or not len(dataset.val):
        return Speed(config.model, tokens, seconds)
    compute = setup.resolve_compute(config.model, runtime, train=False)[0]
    losses = strategy.map_eval_step(
        functools.partial(train_step.eval_step, config=config.model, compute=compute)
    )
    rows = config.batch_size // runtime.gradient_accumulation_steps
    windows = windows_over(len(dataset.val), config.model.block_size, at_most=4 * rows)
    for _ in range(2):  # the first time it is compiled
        began = time.perf_counter()
        evaluation.window_loss(
            functools.partial(losses, state.params), dataset.val, windows, config.model, rows
        )
    each = (time.perf_counter() - began) / len(windows) * config.batch_size
    return Speed(config.model, tokens, seconds, each)


def predicted_loss(parameters: float, tokens: float, unique: float) -> float:
    """Nats per token after training on so many tokens, of which `unique` are different ones: the
    law of arXiv:2305.16264 (section 3.2 and appendix A), in which repeated tokens and parameters
    beyond what the text can fill are worth less and less. Its constants are of English text in
    BPE tokens; only which of two is smaller is used here."""
    a, b, e, exponent = 521.0, 1488.0, 1.87, 0.353
    worth_tokens, worth_parameters = 15.39, 5.31

    def effective(count: float, full: float, worth: float) -> float:
        repeated = max(0.0, count / full - 1)
        return min(count, full) + full * worth * (1 - math.exp(-repeated / worth))

    # With equal exponents the best ratio of tokens to parameters is the same at every size: 20, as
    # arXiv:2203.15556 found.
    best = unique / (b / a) ** (1 / exponent)
    n, d = effective(parameters, best, worth_parameters), effective(tokens, unique, worth_tokens)
    return a / n**exponent + b / d**exponent + e


def speed_at(model: ModelConfig, measured: Sequence[Speed]) -> float:
    """Tokens per second that a model can be expected to train at: FLOP/s between those of measured
    sizes, or the nearest one's."""
    work = [math.log(speed.model.flops_per_token()) for speed in measured]
    rates = [math.log(speed.flops) for speed in measured]
    flops = math.exp(np.interp(math.log(model.flops_per_token()), work, rates))
    return flops / model.flops_per_token()


def candidates(dataset: Dataset) -> list[ModelConfig]:
    """Sizes that could be trained on this text, from small to large."""
    vocab_size = dataset.tokenizer.n_vocab
    room = len(dataset.train) - 1
    return [
        setup.resolve_dtype(
            model.replace(vocab_size=vocab_size, block_size=min(model.block_size, room))
        )
        for model in (*SMALL, *LARGE)
    ]


def measure_sizes(
    data: DataConfig, dataset: Dataset, runtime: RuntimeConfig, told: Callable[[Speed], None]
) -> list[Speed]:
    """The speed of every second size, up to where a step takes a second; `told` of each."""
    found, began = list[Speed](), time.perf_counter()
    most = ALL_PROBES * (4 if setup.peak_flops() else 1)
    for model in candidates(dataset)[::2]:
        config = train_config(model, data, batch_size=_rows(16), steps=1000, dropout=0.0)
        if not _fits(model):
            break
        found.append(measure(config, runtime, dataset))
        told(found[-1])
        if found[-1].step > 1 or time.perf_counter() - began > most:
            break
    return found


def _rows(wanted: float) -> int:
    """A number of sequences that all devices can share: a power of two times their number."""
    count = setup.device_count()
    return count * 2 ** max(0, round(math.log2(max(wanted, LEAST_ROWS) / count)))


def _fits(model: ModelConfig) -> bool:
    """Whether the state does, with a copy for a checkpoint. (Whether a step does takes long to
    find out.)"""
    state = 3 * 4 * model.num_parameters()
    return 2 * state < memory.available(None)[0]


def train_config(
    model: ModelConfig, data: DataConfig, *, batch_size: int, steps: int, dropout: float
) -> TrainConfig:
    """The experiment, with its optimizer's settings by rule."""
    size = model.num_parameters()
    warmup = min(2000, max(20, steps // 50))
    quickstart = config_io.load_config("quickstart")[0].optimizer
    if size < MUON_BELOW:
        long = steps > 1000  # as shakespeare_char_fast; else as the quickstart
        optimizer = quickstart.replace(
            learning_rate=4e-3 if long else 8e-3, muon_learning_rate=0.02 if long else 0.03,
            warmup_steps=warmup,
        )  # fmt: skip
    else:
        rate = GPT3_RATES[min(GPT3_RATES, key=lambda each: abs(math.log(each / size)))]
        optimizer = OptimizerConfig(rate, rate / 10, warmup, beta2=0.95)
    return TrainConfig(
        model.replace(dropout=dropout), data, optimizer, batch_size=batch_size, max_steps=steps
    )


def dropout_for(epochs: float) -> float:
    """None where the text is as good as new, 0.1 as in shakespeare_char_fast, which reads its text
    9 times, 0.2 as in nanoGPT's shakespeare_char, which reads it 82 times."""
    return 0.0 if epochs <= NEARLY_NEW else 0.1 if epochs <= LITTLE_USE else 0.2


def suggest(
    data: DataConfig,
    dataset: Dataset,
    runtime: RuntimeConfig,
    seconds: float,
    measured: Sequence[Speed],
) -> Suggestion:
    """The size with the least predicted loss among those that this machine can train in the time;
    its own speed is measured then. Raises UserError: the time is too short."""
    unique = len(dataset.train)
    models = [model for model in candidates(dataset) if _fits(model)]

    def tokens(model: ModelConfig) -> float:
        return min(NO_USE * unique, 0.85 * seconds * speed_at(model, measured))

    model = min(
        models, key=lambda each: predicted_loss(each.num_parameters(), tokens(each), unique)
    )
    budget = tokens(model)
    rows = _rows(BATCH * math.sqrt(budget) / model.block_size)
    steps = max(1, int(budget / rows / model.block_size))
    dropout = dropout_for(budget / unique)
    config = train_config(model, data, batch_size=rows, steps=steps, dropout=dropout)
    runtime, peak = _in_memory(config, runtime)
    speed = measure(config, runtime, dataset, evaluates=True)
    # An evaluation takes as long as several steps: there are ten of them, or less.
    batches = runtime.eval_batches
    interval = max(int(10 * batches * speed.evaluation / speed.step), steps // 10, 1)
    each = speed.step + batches * speed.evaluation / interval
    # Besides, the untrained model is evaluated, and the last one.
    steps = int((seconds - OTHER_SECONDS - 2 * batches * speed.evaluation) / each)
    steps = min(steps, int(NO_USE * unique / speed.tokens))
    if steps < 1:
        raise UserError(
            f"{seconds:.0f} s are too short: a step takes {speed.step:.2f} s and the start about"
            f" {OTHER_SECONDS:.0f} s; give more --hours"
        )
    config = train_config(model, data, batch_size=rows, steps=steps, dropout=dropout)
    runtime = runtime.replace(eval_interval=min(interval, steps), log_interval=20)
    total = OTHER_SECONDS + steps * speed.step
    total += (1 + -(-steps // interval)) * batches * speed.evaluation
    return Suggestion(config, runtime, speed, total, peak)


def _in_memory(config: TrainConfig, runtime: RuntimeConfig) -> tuple[RuntimeConfig, float]:
    """(with as many accumulation steps as let a step fit, bytes that it needs of a device)."""
    have = memory.available(None)[0]
    while True:
        need = memory.of_program(memory.compile_step(config, runtime)).peak
        steps = 2 * runtime.gradient_accumulation_steps
        if need <= have or config.batch_size % (steps * setup.device_count()):
            return runtime, need
        runtime = runtime.replace(gradient_accumulation_steps=steps)
