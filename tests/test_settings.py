"""What all settings share: they know what was given, and keep it."""

import dataclasses

import pytest

from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import ConfigError


def test_given_is_what_was_passed_by_position_or_name():
    assert ModelConfig(1, 2, dropout=0.0).given == {"n_layer", "n_head", "dropout"}
    assert ModelConfig().given == set() and TrainConfig().model.given == set()


def test_replace_keeps_what_was_given():
    config = TrainConfig(model=ModelConfig(n_head=4), seed=3)
    changed = config.replace({"model.n_layer": 2, "model.n_head": 12, "batch_size": 5})
    model = dataclasses.replace(config.model, n_layer=2, n_head=12)
    assert changed == dataclasses.replace(config, model=model, batch_size=5)
    assert changed.given == {"model", "seed", "batch_size"}
    assert changed.model.given == {"n_layer", "n_head"}


def test_replace_takes_a_section_and_a_value_of_it():
    model = ModelConfig(n_embd=24, n_head=2)
    changed = TrainConfig().replace({"model.n_layer": 4}, model=model)
    assert changed.model == ModelConfig(4, 2, 24)


@pytest.mark.parametrize("name", ["modle.n_layer", "n_layer", "seed.x", "model.n_layr"])
def test_replace_names_what_it_does_not_know(name):
    with pytest.raises(ConfigError, match=f"unknown setting {name}"):
        TrainConfig().replace({name: 4})


def test_replace_names_all_that_is_out_of_range():
    with pytest.raises(ConfigError) as caught:
        TrainConfig().replace({"model.n_layer": -1, "seed": -2, "data.val_fraction": 2.0})
    assert len(caught.value.problems) == 3
