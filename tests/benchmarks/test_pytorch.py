"""PyTorch's side of the benchmark is the model that it is said to be."""

import dataclasses

import numpy as np
import pytest

from gptjax import config_io
from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import RuntimeConfig

torch = pytest.importorskip("torch", reason="needs PyTorch")
from benchmarks import pytorch  # noqa: E402
from gptjax.parity import torch_gpt  # noqa: E402

MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=11)


def test_fused_attention_is_the_formula():
    torch.manual_seed(0)
    plain, fused = (torch_gpt.TorchGPT(MODEL, fused=f) for f in (False, True))
    torch_gpt.initialise(plain)
    fused.load_state_dict(plain.state_dict())
    tokens = torch.randint(11, (2, 16))
    expected = plain(tokens)
    torch.testing.assert_close(fused(tokens), expected)
    torch.testing.assert_close(fused(tokens, last_only=True), expected[:, -1:])


@pytest.mark.parametrize("fused", [False, True])
def test_dropout_acts_in_training_only(fused):
    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 16))
    model = torch_gpt.TorchGPT(dataclasses.replace(MODEL, dropout=0.5), fused=fused)
    torch_gpt.initialise(model)
    expected = model.eval()(tokens)
    assert torch.equal(expected, model(tokens))
    assert not torch.equal(expected, model.train()(tokens))


def test_weights_start_as_gpt2s():
    model = torch_gpt.TorchGPT(dataclasses.replace(MODEL, n_embd=256, vocab_size=500))
    torch_gpt.initialise(model)
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    expected = {n: 0.02 / np.sqrt(4) if "c_proj" in n else 0.02 for n in stds}
    assert stds == pytest.approx(expected, rel=0.05)


def test_a_step_is_the_mean_of_its_micro_batches():
    # Every window of a constant text is the same, so that any division gives the same step.
    tokens, after = np.zeros(100, "u4"), []
    for steps in (1, 4):
        training = pytorch.Training(
            TrainConfig(MODEL, batch_size=4), RuntimeConfig(gradient_accumulation_steps=steps)
        )
        losses = [training.step(tokens).item() for _ in range(3)]
        assert losses[0] > losses[1] > losses[2]
        after.append(training.model.state_dict())
    for name, x in after[0].items():
        torch.testing.assert_close(x, after[1][name], rtol=1e-4, atol=1e-6)


def test_this_side_does_not_load_jax(command):
    check = "import sys, benchmarks.pytorch; sys.exit('jax' in sys.modules)"
    assert command("-c", check).returncode == 0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_exact_loss_counts_every_token_but_the_first_once(tmp_path, kind):
    """By windows of one block that were trained to be known by heart."""
    rates = OptimizerConfig(1e-2, min_lr=0.0, warmup_steps=2, kind=kind, muon_learning_rate=0.02)
    config = TrainConfig(
        MODEL, DataConfig(dir=str(tmp_path)), rates, batch_size=4, max_steps=60
    )  # fmt: skip
    tokens = np.tile(np.arange(11), 4)[:37].astype("u2")
    for split in "train", "val":
        tokens.tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.json").write_text('{"dtype": "uint16"}')
    runtime = RuntimeConfig(eval_batches=1, eval_interval=30)
    config_io.save_run_settings(tmp_path / "config.json", config, runtime)
    pytorch.whole_run(tmp_path)
    model = torch_gpt.TorchGPT(MODEL, fused=True)
    model.load_state_dict(torch.load(tmp_path / "ckpt.pt")["model"])
    log_probabilities = []
    for first in 0, 16, 32:
        window = torch.from_numpy(tokens[first : first + 17].astype("i8"))[None]
        with torch.no_grad():
            found = model(window[:, :-1]).log_softmax(-1)[0]
        log_probabilities += [found[i, window[0, i + 1]].item() for i in range(len(found))]
    assert len(log_probabilities) == 36
    loss = pytorch.exact_loss(tmp_path)
    assert loss == pytest.approx(-np.mean(log_probabilities), rel=1e-5)
    assert loss < 0.7  # of 2.4: whoever knows the token before knows this one


def test_rates_follow_the_schedule():
    rates = OptimizerConfig(
        1e-2, min_lr=0.0, warmup_steps=1, kind="muon", muon_learning_rate=0.5, lr_schedule="linear"
    )
    training = pytorch.Training(TrainConfig(MODEL, optimizer=rates, max_steps=11), RuntimeConfig())
    for step, share in {0: 0.5, 1: 1.0, 6: 0.5, 11: 0.0}.items():
        torch_gpt.set_rates(training.optimizer, training.config, step)
        found = [
            group["lr"]
            for each in (training.optimizer.adamw, training.optimizer.muon)
            for group in each.param_groups
        ]
        assert found == pytest.approx([1e-2 * share, 1e-2 * share, 0.5 * share])
