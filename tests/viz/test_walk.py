"""The walk through a model: its numbers are the model's, by numpy and by hand."""

import math
import re

import numpy as np
import numpy_gpt
import pytest
from helpers import TEXT
from rich.console import Console
from small_models import random_params

import gptjax
from gptjax.config import ModelConfig
from gptjax.data.tokenizers import CharTokenizer
from gptjax.errors import UserError
from gptjax.viz import explain, walk

CHARS = CharTokenizer("".join(sorted({*TEXT, "<", ">", "/", "&"})))
PROMPT = "</script> & now"
CONFIG = ModelConfig(2, 2, 16, 16, CHARS.n_vocab)


def sections(run, prompt=PROMPT):
    return {section.title: section for section in walk.walk(run, prompt)}


def find(found, title):
    return next(section for name, section in found.items() if title in name)


def row(table, label):
    return next(row for row in table.rows if row[0] == label)


@pytest.fixture(scope="module")
def run():
    return gptjax.Run(CONFIG, random_params(CONFIG, seed=1, scale=0.3), CHARS)


@pytest.fixture(scope="module")
def found(run):
    return sections(run)


@pytest.fixture(scope="module")
def expected(run):
    return numpy_gpt.activations(CONFIG, run.params, CHARS.encode(PROMPT))


def test_averages_are_those_of_arithmetic(found, expected):
    even, real = find(found, "plain average").blocks
    assert [cells[1:] for cells in even.rows] == [
        [pytest.approx(1 / (i + 1))] * (i + 1) + [None] * (4 - i) for i in range(5)
    ]
    head = int(real.caption.removeprefix("layer 0, head "))
    for i, cells in enumerate(real.rows):
        np.testing.assert_allclose(
            cells[1 : i + 2], expected["h.0.attn.weights"][head, i, : i + 1], atol=1e-5
        )


def test_a_head_by_hand_is_numpys(found, expected):
    section = find(found, "One head by hand")
    head = int(section.title[-1])
    vectors, scores = section.blocks
    products, scaled = (np.array([cells[i] for cells in scores.rows]) for i in (1, 2))
    weights = np.array([cells[3].share for cells in scores.rows])
    np.testing.assert_allclose(scaled, products / math.sqrt(8), rtol=1e-5)
    np.testing.assert_allclose(weights, np.exp(scaled) / np.exp(scaled).sum(), atol=1e-5)
    np.testing.assert_allclose(weights, expected["h.0.attn.weights"][head, -1], atol=1e-5)
    passed_on = row(vectors, "sum of weight x value")[1:7]
    own = expected["h.0.attn.joined"][-1, head * 8 : head * 8 + 6]
    np.testing.assert_allclose(passed_on, own, atol=1e-5)


def test_layer_norm_brings_mean_0_and_variance_1(found):
    *rows, cut = find(found, "LayerNorm: each").blocks[0].rows
    assert cut[0] == "..." and len(rows) == 12
    for _, _, _, mean, variance, _ in rows:
        assert abs(mean) < 1e-6 and abs(variance - 1) < 1e-3


def test_dropout_doubles_what_it_keeps(found):
    before, kept, after = find(found, "Dropout").blocks[0].rows
    for x, keep, y in zip(before[1:7], kept[1:7], after[1:7], strict=True):
        assert y == (pytest.approx(2 * x) if keep == "yes" else 0)
    assert {*kept[1:7]} == {"yes", "no"}


def test_embeddings_are_the_tables_rows(found, run):
    rows = find(found, "become a vector").blocks[0].rows
    wte, wpe = np.asarray(run.params["wte"]), np.asarray(run.params["wpe"])
    ids = CHARS.encode(PROMPT)
    for i in range(3):
        token, position, both = (cells[1:7] for cells in rows[3 * i : 3 * i + 3])
        np.testing.assert_allclose(token, wte[ids[i], :6], rtol=1e-6)
        np.testing.assert_allclose(position, wpe[i, :6], rtol=1e-6)
        np.testing.assert_allclose(both, np.add(token, position), rtol=1e-6)


def test_what_comes_next_and_the_loss_are_numpys(found, run, expected):
    section = find(found, "What comes next")
    ids = CHARS.encode(PROMPT)
    nats = numpy_gpt.nats(CONFIG, run.params, ids[None]).mean()
    assert f"{nats:.3f} nats a token" in section.text[1]
    shares = np.exp(expected["logits"]) / np.exp(expected["logits"]).sum(-1, keepdims=True)
    for i, cells in enumerate(section.blocks[0].rows):
        best = int(shares[i].argmax())
        assert cells[1].token == walk.shown(CHARS, best)
        assert cells[1].share == pytest.approx(shares[i, best], rel=1e-3)
    # After the last layer the lens is the model.
    last = find(found, "layer by layer").blocks[0].rows[-1]
    for guess, cells in zip(last[1:], section.blocks[0].rows[-6:], strict=True):
        assert guess.token == cells[1].token and guess.share == pytest.approx(cells[1].share)


def test_targets_are_what_follows_the_context(run):
    rows = find(sections(run, "now is"), "predicted").blocks[1].rows
    assert [cells[1:3] for cells in rows[:4]] == [
        ["n", "o"], ["no", "w"], ["now", "\u2423"], ["now\u2423", "i"],
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [(1, 1, 2, 16), (1, 2, 4, 16), (2, 1, 16, 16)])
def test_the_smallest_models_are_walked(sizes):
    config = ModelConfig(*sizes, vocab_size=3)
    run = gptjax.Run(config, random_params(config), CharTokenizer("abc"))
    found = walk.walk(run, "abca")
    assert "1 layer" in explain.describe(run) or sizes[0] > 1
    assert "<table" in explain.to_html(run, "small", "abca", found)
    guesses = find({section.title: section for section in found}, "What comes next").blocks[0]
    assert {len(row) for row in guesses.rows} == {8} and guesses.rows[0][4:6] == [None, None]


def test_the_loss_is_right_where_a_probability_is_nothing():
    params = random_params(CONFIG, seed=2, scale=30)
    run = gptjax.Run(CONFIG, params, CHARS)
    text = find(sections(run, "now is the"), "What comes next").text[1]
    assert float(re.search(r"([\d.]+) nats", text)[1]) == pytest.approx(
        run.loss("now is the"), rel=1e-4
    )


@pytest.mark.parametrize(
    "change",
    [{}, {"tied_head": False, "bias": False, "position": "sinusoidal"},
     {"attention_pattern": ("dense", "banded"), "attention_window": 3, "n_layer": 3}],
)  # fmt: skip
def test_every_kind_of_model_is_walked_and_all_parameters_are_counted(change):
    config = CONFIG.replace(change)
    run = gptjax.Run(config, random_params(config), CHARS)
    found = sections(run)
    assert find(found, "Every shape").blocks[0].rows[-1] == ["all", None, config.num_parameters()]
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    explain.show(run, "model", [*found.values()], console)
    text = console.export_text()
    assert all(f"{i}. {title}" in text for i, title in enumerate(found, 1))
    assert max(map(len, text.splitlines())) <= 80


def test_a_page_is_complete_in_itself_and_escapes_the_prompt(run, found):
    page = explain.to_html(run, "a <b> run", PROMPT, [*found.values()])
    assert "a &lt;b&gt; run" in page and "&lt;/script&gt; &amp; now" in page
    assert page.count("</script>") == 2 and "http" not in page
    assert all(title.split(":")[0] in page for title in found)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("n", "at least two tokens"), ("", "at least two"), ("now" * 9, "27 tokens do not fit"),
     ("caf\u00e9", "is not one of the")],
)  # fmt: skip
def test_what_cannot_be_walked_is_refused(run, prompt, words):
    with pytest.raises(UserError, match=words):
        walk.walk(run, prompt)
