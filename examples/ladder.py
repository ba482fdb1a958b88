"""What every rung takes from the first one: the text, the batches, the loss, training, sampling.

01_bigram.py writes and explains each line of this file, in the same words; a test checks that
nothing stands here that a reader of the first rung has not seen.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.data import corpus
from gptjax.errors import UserError


def read_text():
    """Tiny Shakespeare; where it is not and cannot be downloaded, Python's own library."""
    try:
        files = corpus.find_files("shakespeare")
    except UserError:
        files = corpus.find_files("builtin")[:100]
    return "".join(file.read_text() for file in files)


text = read_text()

characters = sorted(set(text))
vocab_size = len(characters)
str_to_int = {character: i for i, character in enumerate(characters)}
int_to_str = dict(enumerate(characters))


def encode(text):
    return [str_to_int[character] for character in text]


def decode(ids):
    return "".join(int_to_str[int(i)] for i in ids)


ids = np.array(encode(text))
split = int(0.9 * len(ids))
train_ids, val_ids = ids[:split], ids[split:]

block_size = 64
batch_size = 16


def batch_at(step):
    """inputs [B, T], targets [B, T]: B chunks from anywhere in the training text."""
    draw = np.random.default_rng(step)
    starts = draw.integers(len(train_ids) - block_size, size=batch_size)
    chunks = np.stack([train_ids[start : start + block_size + 1] for start in starts])
    return chunks[:, :-1], chunks[:, 1:]


def cross_entropy(logits, targets):
    """logits [B, T, V], targets [B, T] -> one number, the mean of -log(probability of target)."""
    log_probabilities = jax.nn.log_softmax(logits)
    of_targets = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)
    return -of_targets.mean()


def validation_loss(apply, params):
    """The mean over 100,000 letters that were not trained on (1,600 chunks)."""
    windows = val_ids[: 1600 * block_size + 1]
    inputs = windows[:-1].reshape(16, 100, block_size)
    targets = windows[1:].reshape(16, 100, block_size)
    loss = jax.jit(lambda params, x, y: cross_entropy(apply(params, x), y))
    return float(np.mean([loss(params, x, y) for x, y in zip(inputs, targets, strict=True)]))


def count(params):
    """How many numbers are trained."""
    return sum(x.size for x in jax.tree.leaves(params))


def train(apply, params, steps=1000, learning_rate=1e-2):
    """The parameters after `steps` batches; prints the loss on the way and at the end."""
    warmup = steps // 10

    def rate(step):
        rising, falling = (step + 1) / (warmup + 1), (steps - step) / (steps - warmup)
        return learning_rate * jnp.minimum(rising, falling)

    optimizer = optax.adam(rate)

    @jax.jit
    def update(params, state, inputs, targets):
        def loss(params):
            return cross_entropy(apply(params, inputs), targets)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    start, state = time.perf_counter(), optimizer.init(params)
    for step in range(steps):
        params, state, value = update(params, state, *batch_at(step))
        if step % (steps // 4) == 0:
            print(f"step {step:4}: loss of the batch {value:.2f}")
    seconds = time.perf_counter() - start
    loss = validation_loss(apply, params)
    print(
        f"step {steps:4}: {count(params):,} parameters,"
        f" validation loss {loss:.3f} nats per letter, after {seconds:.1f} s"
    )
    return params


def generate(apply, params, prompt, letters, seed=0):
    """`prompt` and so many more letters, each drawn by the model's probabilities."""

    @jax.jit
    def draw(params, window, last, step):
        logits = apply(params, window[None])[0, last]
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.categorical(key, logits)

    found = encode(prompt)
    for step in range(letters):
        window = found[-block_size:]
        padded = np.zeros(block_size, int)
        padded[: len(window)] = window
        found.append(int(draw(params, padded, len(window) - 1, step)))
    return decode(found)
