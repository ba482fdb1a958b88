"""What is suggested: the published rules, by their own words and numbers; speeds are made up."""

import itertools
import math
import types

import numpy as np
import pytest

from gptjax import config_io, guidance
from gptjax.config import DataConfig, ModelConfig
from gptjax.data import token_files
from gptjax.devices import memory
from gptjax.errors import UserError
from gptjax.guidance import Speed, predicted_loss
from gptjax.runtime_config import RuntimeConfig

DATA = DataConfig("text.txt")
RUNTIME = RuntimeConfig()


def dataset(tokens, vocab_size=65):
    return types.SimpleNamespace(
        train=range(tokens), val=range(tokens // 10),
        tokenizer=types.SimpleNamespace(n_vocab=vocab_size),
    )  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """One that computes so many FLOP/s, whatever the size, and never runs out of memory."""

    def make(flops):
        def measure(config, runtime, data, *, evaluates=False):
            tokens = config.batch_size * config.model.block_size
            step = config.model.flops_per_token() * tokens / flops
            return Speed(config.model, tokens, step, step / 3)

        monkeypatch.setattr(guidance, "measure", measure)
        monkeypatch.setattr(guidance, "_in_memory", lambda config, runtime: (runtime, 2**30))
        monkeypatch.setattr(memory, "available", lambda given: (2.0**40, "a test"))
        model = ModelConfig(4, 4, 128, 128, vocab_size=65)
        return [measure(guidance.train_config(
            model, DATA, batch_size=16, steps=1, dropout=0.0), RUNTIME, None)]  # fmt: skip

    return make


@pytest.mark.parametrize("flops", [1e13, 1e18, 1e21])
def test_with_text_enough_twenty_tokens_per_parameter_are_best(flops):
    sizes = np.geomspace(1e4, 1e12, 4000)
    losses = [predicted_loss(n, flops / (6 * n), unique=1e15) for n in sizes]
    best = sizes[int(np.argmin(losses))]
    assert flops / (6 * best) / best == pytest.approx(20, rel=0.05)  # arXiv:2203.15556


def test_repeated_text_counts_for_less_and_less():
    unique, few = 1e9, 1e7  # parameters that the text can fill

    def loss(epochs, of=unique):
        return predicted_loss(few, epochs * of, of)

    # arXiv:2305.16264: as good as new up to four times, nothing beyond forty.
    new = [predicted_loss(few, epochs * unique, 1e15) for epochs in (1, 4)]
    assert loss(1) == pytest.approx(new[0]) and loss(4) == pytest.approx(new[1], abs=0.02)
    assert 0 < loss(40) - loss(1e9) < 0.1 * (loss(1) - loss(40))
    # After R* = 15.39 repetitions they were worth 1 - 1/e of new tokens on average (section 3.1).
    worth = unique * (1 + 15.39 * (1 - math.exp(-1)))
    assert loss(1 + 15.39) == pytest.approx(predicted_loss(few, worth, 1e15), abs=1e-9)


def test_parameters_that_a_text_cannot_fill_count_for_less():
    unique = 2e6
    gains = [predicted_loss(n, 4e7, unique) - predicted_loss(2 * n, 4e7, unique)
             for n in (1e4, 1e5, 1e6, 1e7)]  # fmt: skip
    assert all(a > b > 0 for a, b in itertools.pairwise(gains)) and gains[-1] < 0.1


def test_speeds_between_measured_ones_lie_between_them():
    small, large = (ModelConfig(n, 2, 32 * n, 64, vocab_size=65) for n in (1, 8))
    between = ModelConfig(4, 2, 128, 64, vocab_size=65)
    found = [Speed(model, 1000, model.flops_per_token() * 1000 / rate)
             for model, rate in ((small, 1e9), (large, 16e9))]  # fmt: skip
    assert guidance.speed_at(small, found) == pytest.approx(1e9 / small.flops_per_token())
    assert 1e9 < guidance.speed_at(between, found) * between.flops_per_token() < 16e9
    larger = large.replace(n_layer=80)
    assert guidance.speed_at(larger, found) == pytest.approx(16e9 / larger.flops_per_token())


@pytest.mark.parametrize("seconds", [120, 7200, 1e6])
def test_the_time_is_kept_and_used(machine, seconds):
    measured = machine(1e11)
    found = guidance.suggest(DATA, dataset(10**12), RUNTIME, seconds, measured)
    assert 0.9 * seconds < found.seconds <= seconds
    config, runtime = found.config, found.runtime
    evaluations = 1 + math.ceil(config.max_steps / runtime.eval_interval)
    step = config.model.flops_per_token() * config.batch_size * config.model.block_size / 1e11
    spent = step * (config.max_steps + 20 / 3 * evaluations) + guidance.OTHER_SECONDS
    assert found.seconds == pytest.approx(spent)
    assert 20 / 3 * (evaluations - 1) < 0.12 * config.max_steps
    ratio = found.tokens / config.model.num_parameters()
    assert 5 < ratio < 80  # sizes are a factor of three apart


def test_more_time_or_a_faster_machine_trains_a_larger_model(machine):
    def size(flops, seconds):
        found = guidance.suggest(DATA, dataset(10**12), RUNTIME, seconds, machine(flops))
        return found.config.model.num_parameters()

    assert size(1e11, 120) < size(1e11, 7200) < size(1e11, 1e6) and size(1e15, 7200) > 100e6


def test_a_short_text_is_read_forty_times_at_most_and_with_dropout(machine):
    found = guidance.suggest(DATA, dataset(10**5), RUNTIME, 36000, machine(1e11))
    assert 35 < found.tokens / 1e5 <= 40 and found.config.model.dropout == 0.2
    assert found.seconds < 18000
    assert [guidance.dropout_for(epochs) for epochs in (3.9, 9, 82)] == [0.0, 0.1, 0.2]


def test_too_little_time_is_refused(machine):
    with pytest.raises(UserError, match=r"20 s are too short.*more --hours"):
        guidance.suggest(DATA, dataset(10**6), RUNTIME, 20, machine(1e8))


def test_blocks_fit_the_text(machine):
    models = guidance.candidates(dataset(100))
    assert {model.block_size for model in models} == {64, 99}
    assert all(model.dtype == "float32" for model in models)


@pytest.mark.parametrize("name", ["quickstart", "shakespeare_char_fast"])
def test_small_models_have_the_rates_of_the_configs(name):
    config = config_io.load_config(name)[0]
    found = guidance.train_config(
        config.model.replace(vocab_size=96), DATA, batch_size=16, steps=config.max_steps,
        dropout=0.0,
    ).optimizer  # fmt: skip
    for field in ("kind", "learning_rate", "muon_learning_rate", "lr_schedule", "beta1", "beta2"):
        assert getattr(found, field) == getattr(config.optimizer, field), field


def test_large_models_have_gpt3s_rates():
    rates = []
    for model in guidance.LARGE:
        config = guidance.train_config(
            model.replace(vocab_size=50257), DATA, batch_size=8, steps=10**6, dropout=0.0
        )
        rates.append(config.optimizer.learning_rate)
        assert config.optimizer.kind == "adamw" and config.optimizer.warmup_steps == 2000
        assert config.optimizer.min_lr == pytest.approx(rates[-1] / 10)
    assert rates == [6e-4, 3e-4, 2.5e-4, 2e-4, 1.6e-4, 1.2e-4]  # table 2.1


def test_the_batch_is_like_that_of_the_configs():
    for name in config_io.shipped():
        config = config_io.load_config(name)[0]
        if config.init_from is None:  # the rule is for training from scratch
            tokens = config.batch_size * config.model.block_size
            suggested = guidance.BATCH * math.sqrt(tokens * config.max_steps)
            assert 1 / 3 < suggested / tokens < 3, name


def test_what_does_not_fit_is_divided(monkeypatch):
    """A step needs 100 bytes, and 8 for each row of a micro-batch."""

    def compile_step(config, runtime):
        return config.batch_size // runtime.gradient_accumulation_steps

    monkeypatch.setattr(memory, "compile_step", compile_step)
    monkeypatch.setattr(
        memory, "of_program", lambda rows: types.SimpleNamespace(peak=100 + 8 * rows)
    )
    config = guidance.train_config(ModelConfig(1, 1, 8, 8, 9), DATA, batch_size=64, steps=9,
                                   dropout=0.0)  # fmt: skip
    for have, steps in ((1000, 1), (400, 2), (300, 4), (50, 8)):
        monkeypatch.setattr(memory, "available", lambda given, have=have: (have, "a test"))
        runtime, need = guidance._in_memory(config, RUNTIME)
        assert (runtime.gradient_accumulation_steps, need) == (steps, 100 + 8 * 64 // steps)


def test_a_speed_is_measured(tiny):
    speed = guidance.measure(
        tiny.run.experiment, RUNTIME, token_files.load(tiny.run_dir.parent / "set"), evaluates=True
    )
    assert speed.tokens == 256 and 0 < speed.evaluation < 10 and 0 < speed.step < 10
    flops = tiny.run.config.flops_per_token() * 256 / speed.step
    assert speed.flops == pytest.approx(flops)
