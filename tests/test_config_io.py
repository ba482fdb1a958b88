"""Settings from and to JSON and Python files."""

import contextlib
import dataclasses
import json
import shlex

import helpers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import config_io
from gptjax.commands import flags
from gptjax.config import PRESETS, DataConfig, OptimizerConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

CONFIG = TrainConfig(
    model=dataclasses.replace(PRESETS["gpt3-small"], qkv_bias=False, dropout=0.1),
    data=DataConfig(source="x.txt", tokenizer="gpt2"),
    optimizer=OptimizerConfig(lr_decay_steps=7),
)
RUNTIME = RuntimeConfig(run_dir="here", compute=ComputeConfig(remat=True))


def test_json_round_trip_keeps_every_setting(tmp_path):
    config_io.save_run_settings(tmp_path / "config.json", CONFIG, RUNTIME)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert config_io.run_settings(saved, "here") == (CONFIG, RUNTIME)
    assert saved["experiment"]["model"]["attention_pattern"] == ["dense", "banded"]


def test_names_values_and_types_of_settings_agree():
    values, types = config_io.flatten(CONFIG), config_io.setting_types(TrainConfig)
    assert values.keys() == types.keys()
    assert values["model.n_layer"] == 12 and types["model.n_layer"] is int
    assert (
        values["optimizer.lr_decay_steps"] == 7 and types["optimizer.lr_decay_steps"] == int | None
    )


def test_unknown_and_ill_typed_settings_are_all_named():
    experiment = {"model": {"n_layr": 3, "n_head": "four"}, "batch_size": True, "seed": -1}
    saved = {"experiment": experiment, "runtime": {"eval_intervall": 3, "compute": []}}
    with pytest.raises(UserError) as caught:
        config_io.run_settings(saved, "run/config.json")
    message = str(caught.value)
    assert message.startswith("run/config.json: ")
    for words in (
        "unknown setting model.n_layr; did you mean model.n_layer?", "model.n_head is 'four'",
        "batch_size is True; expected a whole number", "seed -1 must be at least 0",
        "unknown setting eval_intervall; did you mean eval_interval?",
        "compute is []; expected an object",
    ):  # fmt: skip
        assert words in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
NAMES = ["model", "data", "parallel", "batch_size", "beta1", "run_dir", "experiment", "runtime",
         "eval_batches", "gradient_accumulation_steps", "optimizer", "distributed"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1))
def test_any_json_is_settings_or_a_user_error(fields):
    parts = {"experiment": fields, "runtime": fields}
    for saved in (*fields.values(), fields, parts):
        try:
            config, runtime = config_io.run_settings(saved, "x")
            assert isinstance(config, TrainConfig) and isinstance(runtime, RuntimeConfig)
        except UserError as error:
            assert str(error).startswith("x")


MAKE = "from gptjax.config import *\nconfig = TrainConfig({})"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config = (", ["SyntaxError"]),
        ("\n1 / 0", ["line 2: ZeroDivisionError: division by zero"]),
        ("import sys\nsys.exit(0)", ["line 2: SystemExit: 0"]),
        ("import gptjax.nope", ["No module named 'gptjax.nope'"]),
        (MAKE.format("batch_sise=1"), ["did you mean batch_size?"]),
        (MAKE.format("model=ModelConfig(n_layr=1)"), ["did you mean n_layer?"]),
        (MAKE.format("batch_size='4', seed=0.5"), ["batch_size is '4'; expected a whole", "0.5"]),
        (MAKE.format("batch_size=-4, seed=-1"), ["batch_size -4 must be at least 1", "seed -1"]),
        ("", ["must set `config = TrainConfig(...)`"]),
        (MAKE.format("") + "\nruntime = 3", ["`runtime` must be a RuntimeConfig"]),
    ],
)
def test_config_files_that_are_wrong_say_how(tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError) as caught:
        config_io.load_config(str(tmp_path / "bad.py"))
    for word in ["bad.py", *words]:
        assert word in str(caught.value)


def test_a_nanogpt_config_is_answered_with_the_command(tmp_path):
    (tmp_path / "nano.py").write_text(
        "out_dir = 'out-a'\ndataset = 'shakespeare_char'\nbatch_size = 64\nn_layer = 6\n"
        "gradient_accumulation_steps = 2\nmax_iters = 5000\neval_iters = 20\ncompile = False\n"
    )
    with pytest.raises(UserError, match=r"nano\.py is a config file of nanoGPT") as caught:
        config_io.load_config(str(tmp_path / "nano.py"))
    flags_of = dict(word[2:].split("=") for word in str(caught.value).split() if "=" in word)
    expected = {"run-dir": "out-a", "data.source": "shakespeare", "data.tokenizer": "char",
                "batch-size": "128", "model.n-layer": "6", "max-steps": "5000",
                "eval-batches": "10", "model.n-head": "12", "optimizer.learning-rate": "0.0006",
                "model.activation": "gelu_erf", "model.bias": "False"}  # fmt: skip
    assert expected.items() <= flags_of.items() and "compile" not in flags_of


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("device = 'cuda:0'", ["--device=gpu"]), ("device = 'mps'", ["--device=auto"]),
        ("dataset = 'openwebtext'", ["--data.dir=data/openwebtext"]),
        ("init_from = 'gpt2-xl'", ["convert import gpt2-xl runs/gpt2-xl", "--init-from=runs/gpt2"]),
        ("batch_size = 'x'", []), ("gradient_accumulation_steps = 0", []),
    ],
)  # fmt: skip
def test_the_command_for_a_nanogpt_config_can_be_read(tmp_path, settings, words):
    (tmp_path / "nano.py").write_text(f"n_layer = 6\nn_head = 6\nlearning_rate = 1e-3\n{settings}")
    with pytest.raises(UserError) as caught:
        config_io.load_config(str(tmp_path / "nano.py"))
    for word in words:
        assert word in str(caught.value)
    command = shlex.split(str(caught.value).partition("here it is: ")[2].partition(", without")[0])
    argv = [word for word in command if word.startswith("--")]
    defaults = [TrainConfig(), RuntimeConfig()]
    named, given, problems = flags.read(defaults, argv, "gptjax train")
    assert not named and not problems and given["model.n_layer"] == 6


def test_a_config_file_keeps_what_it_gives(tmp_path):
    (tmp_path / "own.py").write_text(MAKE.format("model=ModelConfig(n_layer=12), seed=1337"))
    config, runtime = config_io.load_config(str(tmp_path / "own.py"))
    assert (config, runtime) == (TrainConfig(), RuntimeConfig())
    assert config.given == {"model", "seed"} and config.model.given == {"n_layer"}


SHIPPED = sorted(path.stem for path in (helpers.ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_found_by_name_from_anywhere(tmp_path, name, capsys):
    with contextlib.chdir(tmp_path):
        config, runtime = config_io.load_config(name)
        assert config_io.load_config(f"configs/{name}.py") == (config, runtime)
    assert not capsys.readouterr().err
    runtime.divide_batch(config, 1)


def test_a_missing_config_file_names_the_shipped_ones():
    with pytest.raises(UserError, match=r"no config file nope\.py; expected .*quickstart"):
        config_io.load_config("nope.py")


def test_shipped_configs_are_nanogpts_settings():
    small, runtime = config_io.load_config("shakespeare_char_cpu")
    model, rates = small.model, small.optimizer
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (4, 4, 128, 64)
    assert (model.dropout, small.batch_size, small.max_steps) == (0.0, 12, 2000)
    assert (rates.learning_rate, rates.min_lr, rates.warmup_steps, rates.beta2) == (
        1e-3, 1e-4, 100, 0.99,
    )  # fmt: skip
    assert runtime.eval_full_split
    model = config_io.load_config("shakespeare_char")[0].model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (6, 6, 384, 256)
    sized = dataclasses.replace(model, vocab_size=65)
    position = 256 * 384  # nanoGPT's 10.65M counts no position embeddings
    assert round((sized.num_parameters() - position) / 1e6, 2) == 10.65
