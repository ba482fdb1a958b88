"""A trained run in Python: what it says is what its weights say, computed in numpy."""

import dataclasses
import itertools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from helpers import TEXT
from small_models import assert_bitwise, random_params

import gptjax
from gptjax import train_step
from gptjax.config import ModelConfig
from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer
from gptjax.errors import UserError

CHARS = CharTokenizer("".join(sorted(set(TEXT))))
LINE = "RICHARD:\nNow is t"  # block_size characters and one more


@pytest.fixture(scope="module")
def run(tiny) -> gptjax.Run:
    """Random weights that tell positions apart."""
    params = random_params(tiny.run.config, seed=3, scale=0.3)
    return dataclasses.replace(tiny.run, params=params | {"wpe": 4 * params["wpe"]})


def test_training_gives_the_run_that_is_loaded(tiny, tmp_path, cache_dir, monkeypatch):
    config, experiment = tiny.run.config, tiny.run.experiment
    assert (config.vocab_size, config.dtype) == (CHARS.n_vocab, "float32")
    assert experiment.model == config and experiment.optimizer.lr_decay_steps == 12
    best = min((row for row in tiny.recorder.rows if "val_loss" in row and row["step"]),
               key=lambda row: row["val_loss"])  # fmt: skip
    assert tiny.run.step == best["step"]
    assert tiny.run.tokenizer.decode(tiny.run.tokenizer.encode(TEXT)) == TEXT
    run_dir = shutil.copytree(tiny.run_dir, tmp_path / "run")
    monkeypatch.setenv("GPTJAX_CACHE_DIR", str(cache_dir))
    again = gptjax.train(tiny.config, run_dir)  # complete
    assert again.step == tiny.run.step and again.config == config
    assert_bitwise(again.params, tiny.run.params)


def test_a_checkpoint_is_named_by_step_or_latest(tiny):
    with pytest.raises(UserError, match=r"no checkpoint '5' in .*there are: .*12"):
        gptjax.load(tiny.run_dir, "5")
    with pytest.raises(UserError, match="no run in nowhere"):
        gptjax.load("nowhere")
    latest, named = (gptjax.load(tiny.run_dir, name) for name in ("latest", "12"))
    assert latest.step == named.step == 12
    assert_bitwise(latest.params, named.params)


def test_another_compute_precision_keeps_float32_weights(tiny):
    half = gptjax.load(tiny.run_dir, dtype="bfloat16")
    assert half.config == dataclasses.replace(tiny.run.config, dtype="bfloat16")
    assert_bitwise(half.params, tiny.run.params)
    ours, expected = half.logits(LINE[:16]), tiny.run.logits(LINE[:16])
    assert ours.dtype == np.float32 and 0 < np.abs(ours - expected).max() < 0.1


def test_logits_are_numpys(run):
    ids = CHARS.encode(LINE[:16])
    expected = numpy_gpt.logits(run.config, run.params, ids[None])
    for given in (LINE[:16], ids, list(ids), ids[None]):
        found = run.logits(given)
        assert found.dtype == np.float32
        assert found.shape == ((1, 16, 44) if np.ndim(given) == 2 else (16, 44))
        np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_a_loss_is_the_mean_of_numpys_nats(run):
    expected = numpy_gpt.nats(run.config, run.params, CHARS.encode(LINE)[None]).mean()
    assert run.loss(LINE) == pytest.approx(expected, rel=1e-5)
    both = np.stack([CHARS.encode(LINE), CHARS.encode(LINE[::-1])])
    expected = numpy_gpt.nats(run.config, run.params, both).mean()
    assert run.loss(both) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pattern", [("dense",), ("dense", "banded")])
def test_attention_weights_are_numpys(run, pattern):
    config = ModelConfig(2, 2, 16, 16, 44, attention_pattern=pattern, attention_window=3)
    run = gptjax.Run(config, random_params(config), CHARS)
    expected = numpy_gpt.forward(config, run.params, CHARS.encode(LINE[:16]))[1]
    found = run.attention(LINE[:16])
    assert found.shape == (2, 2, 16, 16) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert np.array_equal(run.attention(CHARS.encode(LINE[:16])[None])[0], found)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bias": False, "tied_head": False},
        {"position": "sinusoidal", "activation": "gelu_tanh"},
    ],
)
def test_activations_are_numpys(change):
    config = ModelConfig(3, 2, 16, 16, 44).replace(change)
    run = gptjax.Run(config, random_params(config), CHARS)
    ids = CHARS.encode(LINE[:9])
    expected = numpy_gpt.activations(config, run.params, ids)
    found = run.activations(LINE[:9])
    assert {name: x.shape for name, x in found.items()} == {
        name: x.shape for name, x in expected.items()
    }
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=3e-5, err_msg=name)
    both = run.activations(np.stack([ids, ids[::-1]]))
    assert both["h.1.attn.weights"].shape == (2, 2, 9, 9)
    np.testing.assert_allclose(both["h.2"][0], found["h.2"], atol=1e-6)


def test_an_untrained_model_is_where_training_begins(tiny, tmp_path):
    config = tiny.config.replace({"data.source": str(tiny.run_dir.parent / "text.txt")})
    run = gptjax.untrained(config)
    experiment = tiny.run.experiment
    assert_bitwise(run.params, train_step.init_state(experiment).params)
    assert run.tokenizer.state() == tiny.run.tokenizer.state()
    assert run.config == tiny.run.config and run.step == 0
    alone = config.replace({"data.source": None, "data.dir": str(tiny.run_dir.parent / "set")})
    assert gptjax.untrained(alone).tokenizer.state() == tiny.run.tokenizer.state()
    with pytest.raises(UserError, match="begins with the weights of other"):
        gptjax.untrained(config.replace(init_from="other"))


def test_the_likeliest_text_is_numpys(run):
    expected = numpy_gpt.greedy(run.config, run.params, CHARS.encode("RICH"), 30)
    assert len(set(expected)) > 5
    found = run.generate("RICH", max_new_tokens=30, temperature=0)
    assert found == CHARS.decode(expected)
    # Of a prompt longer than the block, the end counts.
    (first,) = numpy_gpt.greedy(run.config, run.params, CHARS.encode(LINE * 3), 1)
    assert run.generate(LINE * 3, max_new_tokens=1, temperature=0) == CHARS.decode([first])
    inside = run.generate("RICH", max_new_tokens=30, temperature=0, overflow="stop")
    assert inside == found[:13]


@pytest.mark.parametrize("length", [1, 2, 16, 17, 40])
def test_scores_are_numpys_with_half_a_block_before(run, length):
    ids, block = CHARS.encode(LINE * 3)[:length], run.config.block_size
    scores = run.score(ids)
    assert scores.shape == (length,) and np.isnan(scores[0])
    for at in range(1, length):
        start = 0 if at <= block else block // 2 * -(-(at - block) // (block // 2))
        expected = -numpy_gpt.nats(run.config, run.params, ids[None, start : at + 1])[0, -1]
        assert scores[at] == pytest.approx(expected, abs=1e-4)


def test_pieces_of_a_stream_are_the_text(run):
    pieces = run.generate("RICH", max_new_tokens=40, stream=True)
    first = next(pieces)
    assert len(first) == 1  # it comes before the rest is there
    whole = run.generate("RICH", max_new_tokens=40)
    assert first + "".join(pieces) == whole
    endless = run.generate("RICH", max_new_tokens=0, stream=True)
    assert "".join(itertools.islice(endless, 40)) == whole


def test_samples_are_drawn_side_by_side_and_by_seed(run):
    one = run.generate("RICH", max_new_tokens=20, seed=1)
    assert run.generate("RICH", max_new_tokens=20, seed=1, num_samples=1) == [one]
    assert run.generate("RICH", max_new_tokens=20, seed=2) != one
    texts = run.generate("RICH", max_new_tokens=1, seed=1, num_samples=8)
    assert texts[0] == one[0] and len(texts) == 8 and len(set(texts)) > 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_text(run, stream):
    whole = run.generate("RICH", max_new_tokens=40)
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    found = run.generate("RICH", max_new_tokens=40, stop=["no such text", stop], stream=stream)
    assert "".join(found) == expected


def test_a_text_ends_with_the_end_of_text_token():
    tokens = Gpt2Tokenizer({bytes([byte]): byte for byte in range(256)})
    config = ModelConfig(1, 1, 4, 16, tokens.n_vocab)
    params = random_params(config)
    params["wte"] = np.zeros_like(
        params["wte"]
    )  # all tokens are equally likely: the first is taken
    params["ln_f"]["bias"] += 1
    params["wte"][tokens.eot] = 1  # the likeliest token by far, whatever came before
    run = gptjax.Run(config, params, tokens)
    assert run.generate("ab", max_new_tokens=1, temperature=0) == ""
    assert run.generate("", max_new_tokens=1, temperature=0) == ""  # begins at that token
    ignored = run.generate("ab", max_new_tokens=1, temperature=0, ignore_end_of_text=True)
    assert ignored == tokens.decode([tokens.eot]) != ""


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: run.generate(""), "prompt is empty"),
        (lambda run: run.generate("é"), "é"),
        (lambda run: run.generate("é", max_new_tokens=0), "max_new_tokens 0"),
        (lambda run: run.generate("R", max_new_tokens=0, num_samples=2), "one sample only"),
        (lambda run: run.generate("é", skip_unknown=True), "prompt is empty"),
        (lambda run: run.generate("R", stream=True, num_samples=2), "leave out num_samples"),
        (lambda run: run.generate("R", stop="E"), "stop is 'E'; expected"),
        (lambda run: run.generate("R", top_k=None), "top_k is None; expected"),
        (lambda run: run.generate("R", num_samples=0), "num_samples 0 must be at least 1"),
        (lambda run: run.generate("R", overflow="wrap"), "overflow is 'wrap'; expected"),
        (lambda run: run.logits([0.5, 1.0]), "whole numbers"),
        (lambda run: run.logits([[1, 2], [3]]), "whole numbers"),
        (lambda run: run.logits(LINE), "17 tokens do not fit the model's block_size 16"),
        (lambda run: run.logits(""), "the text is empty"),
        (lambda run: run.attention([3, 44]), "44"),
        (lambda run: run.loss([3, 44]), "44"),
        (lambda run: run.loss([-1, 4]), "-1"),
        (lambda run: run.loss("R"), "at least two tokens"),
        (lambda run: run.loss(LINE + "h"), "17 tokens do not fit"),
    ],
    ids=itertools.count(),
)
def test_what_a_run_cannot_take_is_named(run, call, words):
    with pytest.raises(UserError, match=words):
        call(run)


@pytest.mark.parametrize(
    "environment",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.numpy_rank_promotion("raise"),
        lambda: jax.threefry_partitionable(False),
        lambda: jax.transfer_guard("disallow"),
    ],
)
def test_settings_of_jax_change_no_number(run, environment):
    def numbers():
        text = run.generate("RICH", max_new_tokens=20, seed=1)
        streamed = "".join(run.generate("RICH", max_new_tokens=20, seed=1, stream=True))
        return text, streamed, run.loss(LINE), run.attention("RICH").tobytes()

    expected = numbers()
    with environment():
        assert numbers() == expected


def test_a_run_is_shown_in_one_line(run):
    assert re.fullmatch(r"<Run: [\d,]+ parameters, char tokenizer, step \d+>", repr(run))


def test_pretrained_files_give_the_same_run(run, tmp_path):
    untied = dataclasses.replace(run.config, tied_head=False, bias=False)
    for name, config in {"plain": run.config, "untied": untied}.items():
        wanted = gptjax.Run(config, random_params(config), CHARS)
        wanted.save_pretrained(tmp_path / name)
        again = gptjax.from_pretrained(str(tmp_path / name))
        assert_bitwise(again.params, jax.tree.map(jnp.asarray, wanted.params))
        assert dataclasses.replace(again.config, dropout=0.1, dtype="float32", bias=config.bias,
                                   qkv_bias=None) == config  # fmt: skip
        assert again.tokenizer.decode(again.tokenizer.encode(TEXT)) == TEXT
        with pytest.raises(UserError, match="exists already"):
            wanted.save_pretrained(tmp_path / name)


def test_what_hugging_face_cannot_express_is_refused(run, tmp_path):
    banded = dataclasses.replace(run.config, attention_pattern=("banded",))
    with pytest.raises(UserError, match="banded"):
        dataclasses.replace(run, config=banded).save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no model at"):
        gptjax.from_pretrained(str(tmp_path / "nowhere" / "model"))


def test_weights_shared_out_over_devices_give_the_same_text(tiny):
    sharded = gptjax.load(tiny.run_dir, sharded=True)
    kernel = sharded.params["h"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    settings = {"max_new_tokens": 20, "num_samples": 3, "seed": 5}
    assert sharded.generate("a", **settings) == tiny.run.generate("a", **settings)
