"""Settings: validation that names everything at once, JSON both ways, what a resume may change."""

import contextlib
import dataclasses
import json

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from gptjax import config as config_lib
from gptjax.config import PRESETS, DataConfig, ModelConfig, TrainConfig
from gptjax.errors import UserError


def test_json_round_trip_keeps_every_field():
    config = TrainConfig(
        model=dataclasses.replace(PRESETS["gpt3-small"], qkv_bias=False, dropout=0.1),
        data=DataConfig(source="x.txt", tokenizer="gpt2"),
        lr_decay_steps=7,
    )
    assert config_lib.from_json(config_lib.to_json(config), "here") == config


def test_all_bad_settings_are_reported_at_once():
    config = TrainConfig(
        model=ModelConfig(n_embd=130, n_head=4, dropout=1.0),
        data=DataConfig(val_fraction=2.0),
        batch_size=0,
        learning_rate=float("nan"),
        beta2=1.0,
    )
    problems = "; ".join(config.problems())
    for words in (
        "n_embd 130 is not divisible by model.n_head 4", "n_head may be 1 or 2 or 5",
        "model.dropout 1.0", "val_fraction 2.0", "batch_size 0 must be at least 1",
        "learning_rate nan", "beta2 1.0",
    ):  # fmt: skip
        assert words in problems


def test_unknown_and_ill_typed_json_settings_name_themselves_and_the_near_miss():
    text = '{"model": {"n_layr": 3, "n_head": "four"}, "batch_size": true, "seed": 1.5}'
    with pytest.raises(UserError) as caught:
        config_lib.from_json(text, "run/config.json")
    message = str(caught.value)
    assert message.startswith("run/config.json: ")
    assert "unknown setting model.n_layr; did you mean model.n_layer?" in message
    assert "model.n_head is 'four'; expected int" in message
    assert "batch_size is True; expected int" in message
    assert "seed is 1.5; expected int" in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON, st.sampled_from(["model", "data", "batch_size", "beta1", "run_dir"]))
def test_no_json_value_anywhere_raises_anything_but_a_user_error(value, field):
    for text in (json.dumps(value), json.dumps({field: value})):
        try:
            assert isinstance(config_lib.from_json(text, "x"), TrainConfig)
        except UserError as error:
            assert str(error).startswith("x")


@given(st.text())
def test_no_text_is_read_as_a_config_or_raises_anything_but_a_user_error(text):
    with contextlib.suppress(UserError):
        config_lib.from_json(text, "x")


def test_a_batch_that_does_not_divide_names_the_sizes_that_do():
    config = TrainConfig(batch_size=50, gradient_accumulation_steps=3)
    with pytest.raises(UserError, match="use 48 or 72 or another multiple of 24"):
        config.divide_batch(8)
    assert dataclasses.replace(config, batch_size=48).divide_batch(8) == 2


def test_a_resume_may_move_and_report_otherwise_but_not_train_otherwise():
    saved = TrainConfig(max_steps=100, lr_decay_steps=100)
    harmless = dataclasses.replace(
        saved, run_dir="elsewhere", log_interval=1, keep_checkpoints=9, max_steps=300
    )
    assert config_lib.resume_conflicts(saved, harmless) == []
    other = dataclasses.replace(
        saved, learning_rate=2.0, model=dataclasses.replace(saved.model, n_layer=3)
    )
    assert config_lib.resume_conflicts(saved, other) == [
        "model.n_layer: 12 in the run, 3 now",
        "learning_rate: 0.001 in the run, 2.0 now",
    ]


def test_more_steps_conflict_only_where_they_would_change_the_schedule():
    saved = TrainConfig(max_steps=100)
    longer = dataclasses.replace(saved, max_steps=200)
    assert config_lib.resume_conflicts(saved, longer) == [
        "lr_decay_steps: 100 in the run, 200 now (to train longer, add --lr-decay-steps 100)"
    ]
    assert not config_lib.resume_conflicts(saved, dataclasses.replace(longer, lr_decay_steps=100))


def test_flops_per_token_follow_palms_appendix_b():
    # 6 (N + V C) + 12 L C T with N = 12 C^2 per layer, by hand for a bias-free, norm-light shape.
    config = ModelConfig(2, 2, 64, 32, vocab_size=100, bias=False)
    layer = 12 * 64 * 64 + 2 * 64
    assert config.flops_per_token() == 6 * (2 * layer + 64 + 100 * 64) + 12 * 2 * 64 * 32


def test_of_an_imported_run_only_the_weights_are_fixed():
    saved = TrainConfig(model=ModelConfig(vocab_size=50257), learning_rate=3e-5)
    free = dataclasses.replace(
        saved, learning_rate=1e-3, batch_size=3, data=DataConfig(tokenizer="gpt2"),
        model=dataclasses.replace(saved.model, dropout=0.1, dtype="bfloat16", remat=True),
    )  # fmt: skip
    assert not config_lib.resume_conflicts(saved, free, imported=True)
    other = dataclasses.replace(saved, model=dataclasses.replace(saved.model, gelu="erf"))
    assert config_lib.resume_conflicts(saved, other, imported=True) == [
        "model.gelu: 'tanh' in the run, 'erf' now"
    ]


def test_weights_bring_their_architecture_and_leave_the_rest():
    weights = ModelConfig(48, 25, 1600, vocab_size=50257, gelu="erf", dropout=0.1)
    wanted = ModelConfig(block_size=256, dropout=0.2, remat=True)
    assert config_lib.adopt(wanted, weights) == dataclasses.replace(
        weights, block_size=256, dropout=0.2, remat=True
    )
    # 1024 is the default, so it is nobody's wish.
    small = dataclasses.replace(weights, block_size=64)
    assert config_lib.adopt(ModelConfig(), small).block_size == 64
    with pytest.raises(UserError, match=r"n_layer 6 is not the weights' 48.*block_size 2048 exc"):
        config_lib.adopt(ModelConfig(n_layer=6, block_size=2048), weights)


MAKE = "from gptjax.config import TrainConfig\nconfig = TrainConfig({})"


def test_config_files_that_are_wrong_say_how(tmp_path):
    cases = {
        "syntax.py": ("config = (", "SyntaxError"),
        "key.py": (MAKE.format("batch_sise=1"), "did you mean batch_size?"),
        "type.py": (MAKE.format("batch_size='4'"), "batch_size is '4'; expected int"),
        "range.py": (MAKE.format("batch_size=-4"), "batch_size -4 must be at least 1"),
        "empty.py": ("", "must set `config = TrainConfig(...)`"),
    }
    for name, (text, words) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as caught:
            config_lib.load(tmp_path / name)
        assert name in str(caught.value) and words in str(caught.value)
    with pytest.raises(UserError, match=r"there are: .*configs/quickstart\.py"):
        config_lib.load(tmp_path / "nope.py")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_is_valid(path):
    assert not config_lib.load(path).problems()


def test_nanogpts_settings_are_what_the_config_files_say():
    small = config_lib.load(ROOT / "configs" / "shakespeare_char_cpu.py")
    model = small.model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (4, 4, 128, 64)
    assert (model.dropout, small.batch_size, small.max_steps) == (0.0, 12, 2000)
    assert (small.learning_rate, small.min_lr) == (1e-3, 1e-4)
    assert (small.warmup_steps, small.beta2, small.eval_full_split) == (100, 0.99, True)
    model = config_lib.load(ROOT / "configs" / "shakespeare_char.py").model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (6, 6, 384, 256)
    sized = dataclasses.replace(model, vocab_size=65)
    position = 256 * 384  # nanoGPT's 10.65M counts no position embeddings
    assert round((sized.num_parameters() - position) / 1e6, 2) == 10.65
