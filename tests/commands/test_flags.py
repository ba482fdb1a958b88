"""Flags: what they mean, and everything that is wrong with them at once."""

import dataclasses
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import config_io
from gptjax.commands import flags
from gptjax.commands.convert import ExportFlags
from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.runtime_config import RuntimeConfig
from gptjax.settings import Config

DEFAULTS = [TrainConfig(), RuntimeConfig()]


def read(*argv):
    """{setting: value} of what is given, where nothing is wrong."""
    named, given, problems = flags.read(DEFAULTS, argv, "gptjax train")
    assert not named and not problems
    return given


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--model.n-layer 3", {"model.n_layer": 3}),
        ("--model.n_layer=3", {"model.n_layer": 3}),
        ("--n_layer=3 --n-head 2", {"model.n_layer": 3, "model.n_head": 2}),
        ("--learning-rate 3e-4", {"optimizer.learning_rate": 3e-4}),
        ("--seed 1 --seed=2", {"seed": 2}),
        ("--max-steps 600_000", {"max_steps": 600_000}),
        ("--eval-full-split", {"eval_full_split": True}),
        ("--eval-full-split --seed 3", {"eval_full_split": True, "seed": 3}),
        ("--bias false --seed 3", {"model.bias": False, "seed": 3}),
        ("--bias=False", {"model.bias": False}),
        ("--qkv-bias True", {"model.qkv_bias": True}),
        ("--qkv-bias none", {"model.qkv_bias": None}),
        ("--save-interval None", {"save_interval": None}),
        ("--attention-pattern dense banded", {"model.attention_pattern": ("dense", "banded")}),
        (
            "--lora.rank 8 --lora-targets attn c_fc",
            {"model.lora_rank": 8, "model.lora_targets": ("attn", "c_fc")},
        ),
        ("--min-lr -1e-3", {"optimizer.min_lr": -1e-3}),
        ("--data.source -", {"data.source": "-"}),
        ("--data.source=--odd", {"data.source": "--odd"}),
        ("--data.source=a=b", {"data.source": "a=b"}),
        ("--data.source=", {"data.source": ""}),
        ("--data.source -h --seed 1", {"data.source": "-h", "seed": 1}),
        ("-h --seed 1", {"help": True, "seed": 1}),
    ],
)
def test_flags_mean_what_they_say(argv, expected):
    assert read(*argv.split()) == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--max_iters 3", "--max_iters: nanoGPT's is --max-steps here"),
        ("--output-dir x", "--output-dir: Hugging Face's is --run-dir here"),
        ("--lr 1", "--lr: it is --learning-rate here"),
        ("--epochs 3", "--epochs: a run is counted in steps, --max-steps"),
        ("--start x", "unknown flag --start"),  # of another command: no hint
        ("--block_sze 3", "did you mean --block-size?"),
        ("--model.bias maybe", "--model.bias 'maybe': expected True or False"),
        ("--dry-run yes", "--dry-run 'yes': expected True or False"),
        ("--data.source --be", "as --data.source=--be"),
    ],
)
def test_what_people_type_is_answered_with_the_flag(argv, words):
    _, _, problems = flags.read(DEFAULTS, argv.split(), "gptjax train")
    assert words in problems[0]


@pytest.mark.parametrize("word", ["runs/x", "quickstart", "file", "my.py"])
def test_a_file_or_a_config_may_follow_a_boolean_flag(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    found = flags.read(DEFAULTS, ["--dry-run", word], "gptjax train", "[CONFIG]")
    assert found == ([word], {"dry_run": True}, [])


def test_an_argument_may_follow_a_boolean_flag():
    argv = ["run", "--keep-padding", "out"]
    found = flags.read([ExportFlags()], argv, "gptjax convert export", "RUN FOLDER")
    assert found == (["run", "out"], {"keep_padding": True}, [])


VALUES = {int: st.integers(-(2**40), 2**40), float: st.floats(allow_nan=False), str: st.text()}
NUMBERS_AND_TEXTS = {
    name: kind
    for default in DEFAULTS
    for name, kind in config_io.setting_types(type(default)).items()
    if kind in VALUES
}


@given(st.data(), st.sampled_from(sorted(NUMBERS_AND_TEXTS)))
def test_every_number_and_text_is_read_as_python_writes_it(data, name):
    value = data.draw(VALUES[NUMBERS_AND_TEXTS[name]])
    assert read(f"--{name}={value}") == {name: value}


def test_what_is_given_is_known_though_it_equals_the_default():
    (config, _) = flags.apply(DEFAULTS, read("--n-layer", "12"), [], "gptjax train")
    assert config == TrainConfig() and config.model.given == {"n_layer"}


def test_a_section_keeps_what_was_given_before():
    config = TrainConfig(model=ModelConfig(n_head=2, n_embd=8))
    (config,) = flags.apply([config], {"model.n_layer": 1}, [], "gptjax train")
    assert config.model == ModelConfig(1, 2, 8) and config.model.given == {
        "n_layer", "n_head", "n_embd",
    }  # fmt: skip


def test_all_mistakes_are_reported_at_once(capfd):
    argv = (
        "c.py d.py --model.n-layr 4 --n_heads=2 --batch-size many --seed --activation erf --zzz 3"
        " --max-steps -5 --n-embd 130 --n-head 4 --bias maybe"
    ).split()
    with pytest.raises(UserError) as caught:
        _, given, problems = flags.read(DEFAULTS, argv, "gptjax train", "[CONFIG]")
        flags.apply(DEFAULTS, given, problems, "gptjax train")
    message = str(caught.value)
    for words in (
        "unknown flag --model.n-layr; did you mean --model.n-layer?",
        "unknown flag --n_heads; did you mean --n-head?", "--batch-size 'many': expected a whole",
        "--seed without a value", "--activation 'erf': expected 'gelu_tanh' or 'gelu_erf' or",
        "unknown flag --zzz;",
        "unexpected argument 'd.py'; expected [CONFIG]", "max_steps -5 must be at least 1",
        "--bias 'maybe': expected True or False",
        "n_embd 130 is not divisible by model.n_head 4", "(all flags: gptjax train --help)",
    ):  # fmt: skip
        assert words in message
    assert capfd.readouterr() == ("", "")


@dataclasses.dataclass(frozen=True)
class Sampler(Config):
    """A small set of flags."""

    count: int = 1
    """How many."""
    mode: Literal["a", "b"] = "a"
    stop: tuple[str, ...] = ()

    def problems(self):
        return self._check_ints(1, "count")


@pytest.mark.parametrize(
    ("positional", "argv", "named"),
    [
        ("[RUN]", "", []),
        ("[RUN]", "runs/x --count 2", ["runs/x"]),
        ("[RUN]", "--count 2 runs/x", ["runs/x"]),
        ("[RUN]", "--run-dir runs/x", ["runs/x"]),
        ("RUN ...", "a b --run_dir=c", ["c", "a", "b"]),
        ("SOURCE RUN", "--run-dir c a", ["a", "c"]),
        ("RUN FOLDER", "--run-dir c a", ["c", "a"]),
    ],
)
def test_a_run_is_named_by_position_or_by_its_flag(positional, argv, named):
    assert flags.parse(Sampler(), argv.split(), "gptjax x", positional)[0] == named


@pytest.mark.parametrize(
    ("positional", "argv", "words"),
    [
        ("RUN", "--count 2", "RUN missing: gptjax x RUN"),
        ("RUN ...", "", "RUN missing: gptjax x RUN ..."),
        ("SOURCE RUN", "a", "RUN missing: gptjax x SOURCE RUN"),
        ("RUN", "a --run-dir b", "unexpected argument 'a'"),
        ("", "a", "unexpected argument 'a'"),
        ("RUN", "a --count 0 --mode c", "--mode 'c': expected 'a' or 'b'; count 0 must be"),
    ],
)
def test_missing_and_superfluous_arguments_are_named(positional, argv, words):
    with pytest.raises(UserError) as caught:
        flags.parse(Sampler(), argv.split(), "gptjax x", positional)
    assert words in str(caught.value)


def test_a_tuple_takes_values_up_to_the_next_flag():
    argv = ["run", "--stop", "-", "--- x", "\n", "--count", "2"]
    assert flags.parse(Sampler(), argv, "x", "RUN") == (
        ["run"],
        Sampler(2, "a", ("-", "--- x", "\n")),
    )


def test_a_flag_of_the_first_edition_works_with_a_notice(capsys):
    _, given, _ = flags.read(DEFAULTS, ["--old.one=True"], "x", renamed={"old.one": "dry_run"})
    assert given == {"dry_run": True}
    assert capsys.readouterr().err == "note: --old.one is called --dry-run now\n"


def test_help_explains_flags_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.parse(Sampler(count=7), ["run", "--help"], "gptjax x", "RUN")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("gptjax x RUN", "A small set of flags.", "--count INT", "How many", "7"):
        assert words in shown
