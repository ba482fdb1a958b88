"""PyTorch's side of the benchmark is the model that it is said to be."""

import dataclasses

import numpy as np
import pytest

from gptjax.config import ModelConfig, TrainConfig
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
