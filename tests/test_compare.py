"""The comparison with PyTorch: it passes where the two agree, and finds the place where they
part."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conftest import assert_one_clear_line

from gptjax import cli, compare, convert, data, model, reference, torch_gpt
from gptjax.config import DataConfig, ModelConfig, TrainConfig
from gptjax.errors import RunError, UserError
from gptjax.tokenizers import CharTokenizer

# One compiled block serves all layers: it compiles faster.
GPT2 = ModelConfig(3, 2, 16, block_size=24, vocab_size=61, scan_unroll=1)
VARIANTS = {
    "gpt2": GPT2,
    "untied_padded": dataclasses.replace(GPT2, tied_head=False, vocab_multiple=64),
    "nanogpt_with_bias": dataclasses.replace(GPT2, gelu="erf"),
    "nanogpt": dataclasses.replace(GPT2, gelu="erf", bias=False),
    "qkv_without_bias": dataclasses.replace(GPT2, qkv_bias=False),
}
REFUSED = {
    "sinusoidal_banded": "sinusoidal positions, banded attention",
    "no_layers": "n_layer 0",
}
INEXPRESSIBLE = {
    "sinusoidal_banded": dataclasses.replace(
        GPT2, position="sinusoidal", attention_pattern=("dense", "banded"), attention_window=5
    ),
    "no_layers": dataclasses.replace(GPT2, n_layer=0),
}
CHARACTERS = "".join(chr(ord("A") + i) for i in range(61))
FEW = ["--steps", "3", "--greedy-tokens", "20"]


def lively(config: ModelConfig):
    """Weights of every kind far from zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init_params(config, 0))
    return jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype("f4"), shapes)


@pytest.fixture(autouse=True)
def _compile_without_a_cache(monkeypatch):
    monkeypatch.setattr(compare.devices, "use_compilation_cache", lambda folder: None)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """name -> a run directory with a model of that kind."""

    @functools.cache
    def make(name: str) -> Path:
        config = (VARIANTS | INEXPRESSIBLE)[name]
        rows = dataclasses.replace(config, vocab_size=config.padded_vocab_size, vocab_multiple=1)
        settings = TrainConfig(model=rows, data=DataConfig(None))
        run_dir = tmp_path_factory.mktemp("run") / name
        imported = convert.Imported(settings, lively(config), "", Path("."))
        convert.write_run(imported, CharTokenizer(CHARACTERS), run_dir)
        return run_dir

    return make


@pytest.mark.parametrize("against", ["hf", "nanogpt-style"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_number_agrees_with(run_of, capsys, name, against):
    compare.main([str(run_of(name)), *FEW, "--against", against])
    out = capsys.readouterr().out
    assert "numbers agree within their tolerances" in out and "FAIL" not in out
    for row in ("h.2 ", "logits ", "loss ", "gradient h.*.attn.c_attn.weight", "gradient wte",
                "AdamW step h.*.mlp.c_proj.weight", "greedy tokens, 20 of 20",
                "5 AdamW steps", "step 3 of training, loss"):  # fmt: skip
        assert row in out, row
    assert ("lm_head" in out) == (name == "untied_padded")
    assert ("ln_1.bias" in out) == VARIANTS[name].bias


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_hugging_face_cannot_express_is_refused_by_name_and_agrees_with_the_plain_one(
    run_of, capsys, name
):
    named = {
        "sinusoidal_banded": "sinusoidal positions, banded attention",
        "no_layers": "n_layer 0",
    }
    with pytest.raises(UserError, match=f"{named[name]}.*use --against nanogpt-style"):
        compare.main([str(run_of(name)), *FEW])
    compare.main([str(run_of(name)), *FEW, "--against", "nanogpt-style"])
    assert "numbers agree" in capsys.readouterr().out


def test_bfloat16_agrees_within_its_own_tolerances(run_of, capsys):
    compare.main([str(run_of("gpt2")), *FEW, "--precision", "bfloat16"])
    out = capsys.readouterr().out
    assert "numbers agree" in out and "3e-02" in out
    assert "not judged" in out
    logits = next(line for line in out.splitlines() if line.startswith("logits"))
    assert float(logits.split()[2]) > 1e-4  # and it is really computed in bfloat16


# ----------------------------------------------------------------------- where they part


def rows_of(break_it, precision="float32") -> list[compare.Row]:
    """The rows of a comparison with a PyTorch model that `break_it` has changed."""
    params = jax.tree.map(jax.numpy.asarray, lively(GPT2))
    theirs = reference.Reference(params, GPT2, "nanogpt-style", precision)
    break_it(theirs.model)
    tokens = np.random.default_rng(0).integers(0, 61, 1000)
    batch = functools.partial(data.batch_at, tokens, 0, batch_size=2, block_size=24)
    config = TrainConfig(model=GPT2, max_steps=8, warmup_steps=5, learning_rate=1e-2)
    return compare.compare(params, config, batch, theirs, precision, 10)


def test_a_wrong_optimizer_is_found_in_bfloat16_too(monkeypatch):
    plain = torch_gpt.adamw

    def quicker(theirs, **settings):
        return plain(theirs, **settings | {"betas": (0.9, 0.999)})

    monkeypatch.setattr(reference.torch_gpt, "adamw", quicker)
    assert first_failure(rows_of(lambda _: None, "bfloat16")).startswith("5 AdamW steps")


def first_failure(rows: list[compare.Row]) -> str:
    return next(row.name for row in rows if not row.passed)


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("wpe.weight", "embedding"),
        ("h.0.ln_1.bias", "h.0.ln_1"),
        ("h.1.attn.c_proj.weight", "h.1.attn"),
        ("h.2.mlp.c_fc.bias", "h.2.mlp"),
        ("ln_f.weight", "ln_f"),
    ],
)
def test_a_changed_weight_is_found_where_it_acts_first(parameter, place):
    def nudge(theirs):
        with torch.no_grad():
            theirs.transformer.get_parameter(parameter).add_(1e-3)

    assert first_failure(rows_of(nudge)) == place


def test_another_epsilon_of_a_layer_norm_is_found():
    def change(theirs):
        theirs.transformer.h[1].ln_2.eps = 1e-4

    assert first_failure(rows_of(change)) == "h.1.ln_2"


def test_a_wrong_gradient_is_found_in_the_layer_it_comes_from():
    def scale(theirs):
        theirs.transformer.h[1].mlp.register_full_backward_hook(
            lambda module, into, out: (into[0] * 1.001,)
        )

    rows = rows_of(scale)
    failed = [row.name for row in rows if not row.passed]
    assert failed[0] == "gradient h.1.ln_2.bias"
    assert not any(name.startswith("gradient h.2.") for name in failed)


def test_another_weight_decay_is_found_in_the_first_step(monkeypatch):
    plain = torch_gpt.adamw

    def heavier(theirs, **settings):
        return plain(theirs, **settings | {"weight_decay": 0.3})

    monkeypatch.setattr(reference.torch_gpt, "adamw", heavier)
    failed = [row.name for row in rows_of(lambda _: None) if not row.passed]
    decayed = [name for name in failed if name.startswith("AdamW step")]
    assert failed[0] == decayed[0] == "AdamW step wte.weight"
    assert failed[len(decayed)].startswith("5 AdamW steps")
    assert len(decayed) == 2 + 4 * GPT2.n_layer  # both embeddings and four kernels a block


def test_another_momentum_is_found_within_a_few_steps(monkeypatch):
    plain = torch_gpt.adamw

    def quicker(theirs, **settings):
        return plain(theirs, **settings | {"betas": (0.5, 0.99)})

    monkeypatch.setattr(reference.torch_gpt, "adamw", quicker)
    assert first_failure(rows_of(lambda _: None)).startswith("5 AdamW steps")


def test_another_schedule_is_found_in_the_first_step(monkeypatch):
    rate = reference.learning_rate
    monkeypatch.setattr(reference, "learning_rate", lambda config, step: rate(config, step + 1))
    assert first_failure(rows_of(lambda _: None)).startswith("AdamW step wte")


def test_a_number_that_is_not_a_number_fails():
    row = compare.difference("x", np.array([1.0, np.nan]), np.ones(2), 1.0)
    assert not row.passed
    assert not compare.difference("x", np.ones(2), np.zeros(2), 1.0).passed
    assert compare.difference("x", np.zeros(2), np.zeros(2), 0.0).passed


def test_a_failure_is_one_line_that_names_the_place_and_exit_code_1(run_of, monkeypatch, capsys):
    strict = compare.TOLERANCES["float32"]._replace(logits=0.0)
    monkeypatch.setitem(compare.TOLERANCES, "float32", strict)
    monkeypatch.setattr("sys.argv", ["compare", str(run_of("gpt2")), *FEW])
    assert cli.run(compare.main) == 1
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines() if "FAIL" in line] == ["logits"]
    assert re.fullmatch(
        r"error: 1 of \d+ numbers differ by more than their tolerance; the first difference"
        r" arises at: logits\n",
        err,
    )
    with pytest.raises(RunError):
        compare.main([str(run_of("gpt2")), *FEW])


# ------------------------------------------------------------------------------ command


def test_the_runs_own_text_or_a_given_one_makes_the_batches(run_of, capsys, tmp_path):
    (tmp_path / "text.txt").write_text(CHARACTERS * 20)
    compare.main([str(run_of("gpt2")), *FEW, "--text", str(tmp_path / "text.txt"), "--verbose"])
    out = capsys.readouterr().out
    assert f"tokens of {tmp_path / 'text.txt'}" in out
    assert "gradient h.0.mlp.c_fc.weight" in out and "gradient h.2.mlp.c_fc.weight" in out
    with pytest.raises(UserError, match=r"has 9 tokens; expected more than 24"):
        (tmp_path / "short.txt").write_text("ABCABCABC")
        compare.main([str(run_of("gpt2")), *FEW, "--text", str(tmp_path / "short.txt")])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0", "--batch-size", "0"], ["--steps 0", "--batch-size 0 must be at least 1"]),
        (["--against", "keras"], ["keras"]),
        (["--sequence-length", "25"], ["--sequence-length 25 exceeds the block_size 24"]),
    ],
)
def test_bad_input_is_one_clear_line(run_of, command, flags, words):
    assert_one_clear_line(command("-m", "gptjax.compare", run_of("gpt2"), *flags), *words)


def test_a_missing_run_is_one_clear_line(command):
    assert_one_clear_line(command("-m", "gptjax.compare", "nope"), "no run in nope")
