"""gptjax: train, sample and compare GPT-2/GPT-3 style models in JAX and Flax."""
