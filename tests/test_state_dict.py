"""PyTorch's names, shapes and values: against real PyTorch models, and every key accounted for."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from gptjax import state_dict, torch_gpt
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import init_params

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=23)
VARIANTS = {
    "gpt2": SMALL,
    "untied": dataclasses.replace(SMALL, tied_head=False),
    "no bias": dataclasses.replace(SMALL, bias=False),
    "no qkv bias": dataclasses.replace(SMALL, qkv_bias=False),
    "only qkv bias": dataclasses.replace(SMALL, bias=False, qkv_bias=True),
    "erf": dataclasses.replace(SMALL, gelu="erf"),
}
PADDED = dataclasses.replace(SMALL, vocab_multiple=16, tied_head=False)


def random_params(config: ModelConfig, seed: int = 0):
    """No two numbers alike and none zero, so that no mix-up hides."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    return jax.tree.map(lambda x: 0.2 * draw.standard_normal(x.shape, np.float32), shapes)


def assert_bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype == np.float32 and np.array_equal(x, y)


class Pairs:
    """`state_dict.Tensors` of (name, array) pairs, which can hold a name twice."""

    def __init__(self, pairs):
        self.pairs = list(pairs.items() if isinstance(pairs, dict) else pairs)
        self.given = set()

    def names(self):
        return [name for name, _ in self.pairs]

    def shape(self, name):
        return dict(self.pairs)[name].shape

    def read(self, name):
        assert name not in self.given, f"{name} was read twice"
        self.given.add(name)
        return dict(self.pairs)[name]


def read(pairs, config=SMALL, layout="in_out"):
    return state_dict.from_torch(Pairs(pairs), config, layout, "here")


def tensors_of(config=SMALL, layout="in_out"):
    return state_dict.to_torch(random_params(config), config, layout)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_names_order_and_shapes_are_those_of_a_pytorch_gpt(config):
    theirs = torch_gpt.TorchGPT(config).named_parameters()
    expected = [(name, tuple(parameter.shape)) for name, parameter in theirs]
    ours = state_dict.places(config, "out_in")
    assert [(name, place.shape) for name, place in ours.items()] == expected


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_transformers_gpt2(tied):
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=12, vocab_size=23,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).named_parameters()
    expected = {name: tuple(parameter.shape) for name, parameter in theirs}
    ours = state_dict.places(dataclasses.replace(SMALL, tied_head=tied), "in_out")
    assert {name: place.shape for name, place in ours.items()} == expected


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("config", [*VARIANTS.values(), PADDED], ids=[*VARIANTS, "padded"])
def test_parameters_go_to_pytorch_and_come_back_bitwise(config, layout):
    params = random_params(config)
    assert_bitwise(read(state_dict.to_torch(params, config, layout), config, layout), params)


def test_the_two_layouts_differ_by_the_transposed_linear_weights_alone():
    ours, theirs = tensors_of(layout="in_out"), tensors_of(layout="out_in")
    for name, array in ours.items():
        linear = array.ndim == 2 and ".h." in name
        assert np.array_equal(theirs[name], array.T if linear else array)


def test_padded_rows_are_left_out_on_request():
    params = random_params(PADDED)
    assert params["wte"].shape == params["lm_head"].shape == (32, 16)
    tensors = state_dict.to_torch(params, PADDED, "in_out", padding=False)
    assert np.array_equal(tensors["transformer.wte.weight"], params["wte"][:23])
    assert np.array_equal(tensors["lm_head.weight"], params["lm_head"][:23])


@pytest.mark.parametrize("spell", [
    lambda name: name,
    lambda name: name.removeprefix("transformer."),
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module._orig_mod.{name}",
])  # fmt: skip
def test_prefixes_causal_masks_and_a_tied_head_change_nothing(spell):
    tensors = tensors_of()
    more = {"lm_head.weight": tensors["transformer.wte.weight"]}
    for i in range(2):
        more[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), np.uint8))
        more[f"transformer.h.{i}.attn.masked_bias"] = np.float32(-1e4)
    found = read({spell(name): array for name, array in (tensors | more).items()})
    assert_bitwise(found, random_params(SMALL))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_the_float32_of_the_same_value(dtype):
    halves = {name: array.astype(dtype) for name, array in tensors_of().items()}
    expected = {name: array.astype(np.float32) for name, array in halves.items()}
    assert_bitwise(read(halves), read(expected))


FC = "transformer.h.1.mlp.c_fc.weight"
WTE = "transformer.wte.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(FC), ["missing", FC]),
        (lambda t: t.update({"transformer.h.2.ln_1.weight": t[WTE]}),
         ["left over", "transformer.h.2.ln_1.weight"]),
        (lambda t: t.update({"transformer.h.2.attn.bias": t[WTE]}),
         ["transformer.h.2.attn.bias", "not a causal mask of this model"]),
        (lambda t: t.update({"h.1.attn.bias": np.ones((1, 1, 8, 8), np.uint8)}),
         ["h.1.attn.bias", "not a causal mask"]),
        (lambda t: t.update({"score.weight": t[WTE]}), ["left over", "score.weight"]),
        (lambda t: t.update({"wte.weight": t[WTE]}), ["twice", "wte.weight", WTE]),
        (lambda t: t.update({f"_orig_mod.{FC}": t[FC]}), ["twice", f"_orig_mod.{FC}"]),
        (lambda t: t.update({FC: t[FC].T}), ["wrongly shaped", FC, "[64, 16]", "[16, 64]"]),
        (lambda t: t.update({FC: t[FC][None]}), ["wrongly shaped", FC, "[1, 16, 64]"]),
        (lambda t: t.update({"lm_head.weight": t[WTE] * 2}), ["lm_head.weight", "differs"]),
        (lambda t: t.update({"lm_head.weight": t[WTE][:-1]}), ["lm_head.weight"]),
        (lambda t: t.update({FC: t[FC].astype(np.int64)}), [FC, "int64", "float32"]),
        (lambda t: t.update({FC: t[FC].astype(np.float64)}), [FC, "float64"]),
        (lambda t: t.update({FC: t[FC] * np.nan}), [FC, "not finite"]),
        (lambda t: t[FC].__setitem__((3, 4), np.inf), [FC, "not finite"]),
        (lambda t: t.clear(), ["holds 0 tensors"]),
    ],
)  # fmt: skip
def test_each_key_that_does_not_fit_is_one_error_that_names_it(change, words):
    tensors = {name: array.copy() for name, array in tensors_of().items()}
    change(tensors)
    with pytest.raises(UserError) as error:
        read(tensors)
    message = str(error.value)
    assert message.startswith("here") and "\n" not in message
    for word in words:
        assert word in message


def test_a_name_that_comes_twice_is_refused():
    pairs = list(tensors_of().items())
    with pytest.raises(UserError, match=rf"holds {WTE} twice"):
        read([*pairs, (WTE, pairs[0][1])])


def test_an_error_names_every_kind_of_misfit_but_only_a_few_of_each():
    tensors = tensors_of()
    wrong = {f"odd.{i}": tensors[WTE] for i in range(8)}
    kept = {name: array for name, array in tensors.items() if ".h.0." not in name}
    with pytest.raises(UserError) as error:
        read(kept | wrong | {WTE: tensors[WTE][1:]})
    message = str(error.value)
    for words in ("missing: transformer.h.0.ln_1.weight", "and 7 more", "left over: odd.0",
                  "and 3 more", f"wrongly shaped: {WTE} [22, 16] instead of [23, 16]"):  # fmt: skip
        assert words in message
    assert "odd.7" not in message


def test_an_untied_head_is_required_and_is_not_the_embedding():
    untied = VARIANTS["untied"]
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        read(tensors_of(), untied)
    head = 3 * tensors_of()[WTE]
    assert np.array_equal(read(tensors_of() | {"lm_head.weight": head}, untied)["lm_head"], head)


def test_a_billion_layers_are_refused_at_once():
    with pytest.raises(UserError, match="too few for 1000000000 layers"):
        read(tensors_of(), dataclasses.replace(SMALL, n_layer=10**9))


def test_biases_are_left_out_only_if_every_one_of_them_is_zero():
    bare = VARIANTS["no bias"]
    params = random_params(bare)
    full = state_dict.to_torch(params, bare, "in_out")
    zeros = {
        name: full.get(name, np.zeros(place.shape, np.float32))
        for name, place in state_dict.places(SMALL, "in_out").items()
    }
    found = state_dict.without_zeros(read(zeros), SMALL, bare)
    assert_bitwise(found, params)
    zeros["transformer.h.1.attn.c_attn.bias"][-1] = 1e-30
    assert state_dict.without_zeros(read(zeros), SMALL, bare) is None


def test_a_torch_model_gives_and_takes_them_strictly():
    torch.manual_seed(0)
    theirs = torch_gpt.TorchGPT(VARIANTS["untied"])
    arrays = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    params = read(arrays, VARIANTS["untied"], "out_in")
    again = state_dict.to_torch(params, VARIANTS["untied"], "out_in")
    assert list(again) == list(arrays)
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)
