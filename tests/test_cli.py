"""Flags out of dataclasses, and user errors as one line."""

import dataclasses

import pytest

from gptjax import cli
from gptjax.config import TrainConfig
from gptjax.errors import RunError, UserError


def parse(*argv: str) -> TrainConfig:
    return cli.parse(TrainConfig(), argv, "train_jax.py", "CONFIG.py")[1]


def test_flags_override_nested_defaults_with_hyphens_or_underscores():
    config = parse("--model.n-layer", "3", "--batch_size=7", "--learning-rate", "3e-4")
    assert (config.model.n_layer, config.batch_size, config.learning_rate) == (3, 7, 3e-4)
    assert config == dataclasses.replace(
        TrainConfig(model=dataclasses.replace(TrainConfig().model, n_layer=3)),
        batch_size=7, learning_rate=3e-4,
    )  # fmt: skip


def test_boolean_flags_stand_alone_or_take_true_and_false():
    assert parse("--eval-full-split").eval_full_split
    assert parse("--eval-full-split", "True", "--seed", "3").seed == 3
    for no in (["--model.bias", "False"], ["--model.bias=false"], ["--model.bias", "false"]):
        assert not parse(*no, "--seed", "3").model.bias


def test_the_leading_argument_is_the_positional_one():
    first, config = cli.parse(TrainConfig(), ["c.py", "--seed", "3"], "t", "[CONFIG.py]")
    assert (first, config.seed) == (["c.py"], 3)
    assert cli.parse(TrainConfig(), ["--seed", "3"], "t", "[CONFIG.py]")[0] == []


def test_every_mistake_is_reported_at_once_with_its_near_miss():
    with pytest.raises(UserError) as caught:
        parse("--model.n-layr", "4", "--batch-size", "many", "--seed", "x", "--model.gelu", "relu",
              "--max-steps", "-5")  # fmt: skip
    message = str(caught.value)
    assert "\n" not in message
    for words in ("--model.n-layr", "perhaps --model.n-layer INT", "--batch-size", "'many'",
                  "--seed", "'x'", "'relu'", "'tanh'", "max_steps -5", "--help"):  # fmt: skip
        assert words in message


def test_help_teaches_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--model.n-layer" in shown and "Transformer blocks" in shown


@pytest.mark.parametrize(("error", "code"), [(UserError("bad"), 2), (RunError("broke"), 1)])
def test_user_errors_become_one_line_and_an_exit_code(capsys, error, code):
    def main(argv):
        raise error

    assert cli.run(main) == code
    assert capsys.readouterr().err == f"error: {error}\n"
