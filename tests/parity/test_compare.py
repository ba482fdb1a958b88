"""The comparison passes where the two agree, and finds the place where they part."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from small_models import random_params

from gptjax.config import ModelConfig, OptimizerConfig, TrainConfig
from gptjax.data.batches import batch_at
from gptjax.data.tokenizers import CharTokenizer
from gptjax.errors import RunError, UserError
from gptjax.interop import convert
from gptjax.interop.weights import Weights
from gptjax.runtime_config import ComputeConfig

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("transformers", reason="needs transformers")
from gptjax.parity import compare, reference, torch_gpt  # noqa: E402

GPT2 = ModelConfig(3, 2, 16, block_size=24, vocab_size=61)
VARIANTS = {
    "gpt2": GPT2,
    "untied, padded": dataclasses.replace(GPT2, tied_head=False, vocab_multiple=64),
    "nanogpt": dataclasses.replace(GPT2, activation="gelu_erf", bias=False),
    "every setting": dataclasses.replace(
        GPT2,
        activation="silu",
        n_inner=40,
        layer_norm_epsilon=1e-3,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "qkv without bias": dataclasses.replace(GPT2, qkv_bias=False),
    "sinusoidal, banded": dataclasses.replace(
        GPT2, position="sinusoidal", attention_pattern=("dense", "banded"), attention_window=5
    ),
    "no layers": dataclasses.replace(GPT2, n_layer=0),
}
INEXPRESSIBLE = {
    "sinusoidal, banded": "sinusoidal positions, banded attention",
    "no layers": "n_layer 0",
}
"""By Hugging Face's GPT-2."""
CHARACTERS = "".join(chr(ord("A") + i) for i in range(61))
ALL = [(name, "hf") for name in VARIANTS if name not in INEXPRESSIBLE]
ALL += [(name, "nanogpt-style") for name in VARIANTS]


def opened(name: str, against: str = "nanogpt-style", precision="float32", change=None):
    """A comparison of a small model; `change` changes PyTorch's."""
    model = VARIANTS[name]
    params = jax.tree.map(jax.numpy.asarray, random_params(model, scale=0.1))
    theirs = reference.Reference(params, model, against, precision)
    if change:
        change(theirs.model)
    tokens = np.random.default_rng(0).integers(0, 61, 1000)
    return compare.Comparison(
        params, TrainConfig(model, optimizer=OptimizerConfig(1e-2, warmup_steps=5), max_steps=3),
        functools.partial(batch_at, tokens, 0, batch_size=2, block_size=24), theirs,
        compare.TOLERANCES[precision], 20, ComputeConfig(scan_unroll=1),  # compiles faster
    )  # fmt: skip


def first_failure(rows) -> str:
    return next(row.name for row in rows if not row.passed)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_part_of_the_network_agrees(name):
    rows = opened(name).activations()
    assert "agree" in compare.verdict(rows), "\n".join(compare.table(rows))
    assert len(rows) == 2 + (5 * 3 + 1 if VARIANTS[name].n_layer else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "against"), ALL)
def test_every_number_agrees(name, against):
    said: list[str] = []
    rows, model = opened(name, against).run(said.append), VARIANTS[name]
    out = "\n".join(compare.table(rows))
    assert "numbers agree within their tolerances" in compare.verdict(rows), out
    expected = ["embedding ", "logits ", "loss ", "gradient wte", "AdamW step wte",
                "greedy tokens, 20 of 20", "5 AdamW steps", "step 3 of training, loss"]  # fmt: skip
    if model.n_layer:
        expected += ["h.2 ", "gradient h.*.attn.c_attn.weight", "AdamW step h.*.mlp.c_proj.weight"]
    for row in expected:
        assert row in out, row
    assert ("lm_head" in out) == (not model.tied_head)
    assert ("ln_1.bias" in out) == (model.bias and model.n_layer > 0)
    every = "\n".join(compare.table(rows, every=True))
    assert "step 2 of training, loss" in every
    assert ("gradient h.1.mlp.c_fc.weight" in every) == (model.n_layer > 0)
    assert said[0] == "activations" and said[-1] == "training step 3 of 3"


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_hugging_face_cannot_express_is_refused(name):
    with pytest.raises(UserError, match=f"{INEXPRESSIBLE[name]}.*use --against nanogpt-style"):
        opened(name, "hf")


@pytest.mark.slow
def test_bfloat16_agrees_within_its_own_tolerances():
    rows = opened("gpt2", precision="bfloat16").run()
    out = "\n".join(compare.table(rows))
    assert compare.verdict(rows) and "3e-02" in out and "not judged" in out
    logits = next(row for row in rows if row.name == "logits")
    assert logits.relative > 1e-4  # and it is really computed in bfloat16


def nudge(name, change=lambda parameter: parameter.add_(1e-3)):
    def break_it(theirs):
        with torch.no_grad():
            change(theirs.transformer.get_parameter(name))

    return break_it


def another_epsilon(theirs):
    theirs.transformer.h[1].ln_2.eps = 1e-4


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (nudge("wpe.weight"), "embedding"),
        (nudge("h.0.ln_1.bias"), "h.0.ln_1"),
        (nudge("h.1.attn.c_proj.weight"), "h.1.attn"),
        (another_epsilon, "h.1.ln_2"),
        (nudge("h.2.mlp.c_fc.bias"), "h.2.mlp"),
        (nudge("ln_f.weight"), "ln_f"),
    ],
)
def test_a_difference_is_found_where_it_acts_first(change, where):
    assert first_failure(opened("gpt2", change=change).activations()) == where


def test_a_wrong_gradient_is_found_in_the_layer_it_comes_from():
    def scale(theirs):
        theirs.transformer.h[1].mlp.register_full_backward_hook(
            lambda module, into, out: (into[0] * 1.001,)
        )

    failed = [row.name for row in opened("gpt2", change=scale).gradients() if not row.passed]
    assert failed[0] == "gradient h.1.ln_2.bias"
    assert not any(name.startswith("gradient h.2.") for name in failed)


@pytest.mark.parametrize(
    ("precision", "settings", "where"),
    [
        ("float32", {"weight_decay": 0.3}, "AdamW step wte.weight"),
        ("float32", {"betas": (0.5, 0.99)}, "5 AdamW steps"),
        ("bfloat16", {"betas": (0.9, 0.999)}, "5 AdamW steps"),
    ],
)
def test_another_optimizer_is_found(monkeypatch, precision, settings, where):
    plain = torch_gpt.adamw
    monkeypatch.setattr(torch_gpt, "adamw", lambda p, **given: plain(p, **given | settings))
    rows = opened("gpt2", precision=precision).optimizer()
    failed = [row.name for row in rows if not row.passed]
    assert failed[0].startswith(where)
    decayed = [name for name in failed if name.startswith("AdamW step ")]
    # Both embeddings and four kernels a block.
    assert len(decayed) == (2 + 4 * GPT2.n_layer if "weight_decay" in settings else 0)


@pytest.mark.parametrize("against", ["nanogpt-style", "hf"])
def test_muons_steps_agree(against):
    comparison = opened("gpt2", against)
    config = comparison.config.replace({"optimizer.kind": "muon", "optimizer.muon_iterations": 4})
    rates = config.optimizer.replace(muon_learning_rate=2e-3)  # as the command has it
    config = dataclasses.replace(config, optimizer=rates)
    rows = dataclasses.replace(comparison, config=config).optimizer()
    out = "\n".join(compare.table(rows))
    assert "agree" in compare.verdict(rows), out
    assert "Muon step h.*.attn.c_attn.weight" in out and "5 Muon steps" in out


def test_another_schedule_is_found_in_the_first_step(monkeypatch):
    rate = torch_gpt.learning_rate
    monkeypatch.setattr(torch_gpt, "learning_rate", lambda config, step: rate(config, step + 1))
    assert first_failure(opened("gpt2").optimizer()).startswith("AdamW step wte")


def test_a_number_that_is_not_a_number_fails():
    row = compare.difference("x", np.array([1.0, np.nan]), np.ones(2), 1.0)
    assert not row.passed
    assert not compare.difference("x", np.ones(2), np.zeros(2), 1.0).passed
    assert compare.difference("x", np.zeros(2), np.zeros(2), 0.0).passed
    with pytest.raises(RunError, match=r"1 of 1 numbers differ .* arises at: x"):
        compare.verdict([row])
    assert re.search(r"x .*nan .*FAIL", "\n".join(compare.table([row])))


def test_a_run_is_compared_on_a_text_or_on_its_own_data(tmp_path):
    weights = Weights(TrainConfig(GPT2), random_params(GPT2, scale=0.1))
    convert.write_run(weights, CharTokenizer(CHARACTERS), tmp_path / "run")
    (tmp_path / "text.txt").write_text(CHARACTERS * 20)
    text = str(tmp_path / "text.txt")
    found = compare.open_comparison(tmp_path / "run", text=text, steps=3, sequence_length=12)
    assert f"2 x 12 tokens of {text}" in found.title and "step 0" in found.title
    assert "agree" in compare.verdict(found.activations())
    assert found.config.max_steps == 3 and found.batch(0).shape == (2, 13)
    assert "random tokens" in compare.open_comparison(tmp_path / "run").title
    with pytest.raises(UserError, match="--sequence-length 25 exceeds the block_size 24"):
        compare.open_comparison(tmp_path / "run", sequence_length=25)
    (tmp_path / "text.txt").write_text("ABCABCABC")
    with pytest.raises(UserError, match="has 9 tokens; expected more than 24"):
        compare.open_comparison(tmp_path / "run", text=text)
    with pytest.raises(UserError, match=r"no run in .*nope"):
        compare.open_comparison(tmp_path / "nope")
