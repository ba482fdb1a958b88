"""Every key of a state dict is accounted for, and every value comes back bitwise."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from small_models import SMALL, VARIANTS, assert_bitwise, random_params

from gptjax.errors import UserError
from gptjax.interop import parameter_names
from gptjax.interop.parameter_names import without_zeros

FC = "transformer.h.1.mlp.c_fc.weight"
WTE = "transformer.wte.weight"
HEAD = "lm_head.weight"
PADDED = dataclasses.replace(SMALL, vocab_multiple=16, tied_head=False)


def read(arrays, config=SMALL, layout="in_out"):
    tensors = dict(arrays)
    params = parameter_names.from_torch(tensors, config, layout, "here")
    assert not any(name in tensors for name in parameter_names.torch_parameters(config, layout))
    return params


def tensors_of(config=SMALL, layout="in_out"):
    return parameter_names.to_torch(random_params(config), config, layout)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("config", [*VARIANTS.values(), PADDED], ids=[*VARIANTS, "padded, bias"])
def test_parameters_go_to_pytorch_and_come_back_bitwise(config, layout):
    params = random_params(config)
    arrays = parameter_names.to_torch(params, config, layout)
    shapes = {n: p.shape for n, p in parameter_names.torch_parameters(config, layout).items()}
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert_bitwise(read(arrays, config, layout), params)


def test_the_two_layouts_differ_by_the_transposed_linear_weights():
    ours, theirs = tensors_of(layout="in_out"), tensors_of(layout="out_in")
    for name, array in ours.items():
        linear = array.ndim == 2 and ".h." in name
        assert np.array_equal(theirs[name], array.T if linear else array)


def test_padded_rows_are_left_out_on_request():
    params = random_params(PADDED)
    assert params["wte"].shape == params["lm_head"].shape == (32, 16)
    tensors = parameter_names.to_torch(params, PADDED, "in_out", padding=False)
    assert np.array_equal(tensors[WTE], params["wte"][:23])
    assert np.array_equal(tensors[HEAD], params["lm_head"][:23])


@pytest.mark.parametrize("spell", [
    lambda name: name,
    lambda name: name.removeprefix("transformer."),
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module._orig_mod.{name}",
])  # fmt: skip
def test_prefixes_causal_masks_and_a_tied_head_change_nothing(spell):
    tensors = tensors_of()
    more = {HEAD: tensors[WTE]}
    for i in range(2):
        more[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), np.uint8))
        more[f"transformer.h.{i}.attn.masked_bias"] = np.full((), -1e4, np.float32)
    found = read({spell(name): array for name, array in (tensors | more).items()})
    assert_bitwise(found, random_params(SMALL))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_the_float32_of_the_same_value(dtype):
    halves = {name: array.astype(dtype) for name, array in tensors_of().items()}
    expected = {name: array.astype(np.float32) for name, array in halves.items()}
    assert_bitwise(read(halves), read(expected))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(FC), ["missing", FC]),
        (lambda t: t.update({"transformer.h.2.ln_1.weight": t[WTE]}),
         ["left over", "transformer.h.2.ln_1.weight"]),
        (lambda t: t.update({"transformer.h.2.attn.bias": t[WTE]}),
         ["transformer.h.2.attn.bias", "left over"]),
        (lambda t: t.update({"transformer.h.2.attn.masked_bias": t[WTE]}),
         ["h.2.attn.masked_bias", "left over"]),
        (lambda t: t.update({"h.1.attn.bias": np.ones((1, 1, 8, 8), np.uint8)}),
         ["h.1.attn.bias", "left over"]),
        (lambda t: t.update({"h.1.attn.bias": np.tril(np.ones((1, 1, 8, 9), np.uint8))}),
         ["h.1.attn.bias", "left over"]),
        (lambda t: t.update({"score.weight": t[WTE]}), ["left over", "score.weight"]),
        (lambda t: t.update({"wte.weight": t[WTE]}), ["twice", "wte.weight", WTE]),
        (lambda t: t.update({f"_orig_mod.{FC}": t[FC]}), ["twice", f"_orig_mod.{FC}"]),
        (lambda t: t.update({FC: t[FC].T}), ["wrongly shaped", FC, "[64, 16]", "[16, 64]"]),
        (lambda t: t.update({FC: t[FC][None]}), ["wrongly shaped", FC, "[1, 16, 64]"]),
        (lambda t: t.update({HEAD: t[WTE] * 2}), [HEAD, "differs"]),
        (lambda t: t.update({HEAD: t[WTE][:-1]}), [HEAD]),
        (lambda t: t.update({FC: t[FC].astype(np.int64)}), [FC, "int64", "float32"]),
        (lambda t: t.update({FC: t[FC].astype(np.float64)}), [FC, "float64"]),
        (lambda t: t.update({FC: t[FC] * np.nan}), [FC, "not finite"]),
        (lambda t: t[FC].__setitem__((3, 4), np.inf), [FC, "not finite"]),
        (lambda t: t.clear(), ["holds 0 tensors"]),
    ],
)  # fmt: skip
def test_each_key_that_does_not_fit_is_refused_by_name(change, words):
    tensors = {name: array.copy() for name, array in tensors_of().items()}
    change(tensors)
    with pytest.raises(UserError) as error:
        read(tensors)
    message = str(error.value)
    assert message.startswith("here") and "\n" not in message
    for word in words:
        assert word in message


def test_an_error_names_every_kind_of_misfit_but_a_few_of_each():
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
    assert np.array_equal(read(tensors_of() | {HEAD: head}, untied)["lm_head"], head)


def test_very_many_layers_are_refused_at_once():
    with pytest.raises(UserError, match="too few for 100000 layers"):
        read(tensors_of(), dataclasses.replace(SMALL, n_layer=100_000))


def test_biases_are_left_out_only_if_all_of_them_are_zero():
    bare = VARIANTS["no bias"]
    params = random_params(bare)
    names = parameter_names.torch_parameters(SMALL, "in_out")
    arrays = {name: np.zeros(parameter.shape, np.float32) for name, parameter in names.items()}
    arrays |= parameter_names.to_torch(params, bare, "in_out")
    assert_bitwise(without_zeros(read(arrays), bare), params)
    arrays["transformer.h.1.attn.c_attn.bias"][-1] = 1e-30
    assert without_zeros(read(arrays), bare) is None
