# %% [markdown]
# # 1. A table of letters
#
# **Idea:** a language model gives every possible next letter a probability. The smallest one is a
# table with a row for each letter: what usually follows it?
#
# **In a tutorial:** "Output Embedding", encode and decode, sub-words, "Hi Tom", `block_size`.
#
# This is the first of ten rungs. At the top stands the GPT of the package `gptjax`, and each rung
# adds one idea to the one below. A GPT (generatively pretrained transformer) is the right-hand
# half of the well-known picture in "[Attention is all you need](https://arxiv.org/abs/1706.03762)":
# the half that produces text. The left half, which reads a text in another language, is left out,
# and so is the attention to it.
#
# Letters in shapes, here and everywhere: **B** texts side by side, **T** letters of each, **V**
# possible letters, **C** numbers that stand for one letter (from rung 2 on).

# %%
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.data import corpus, tokenizers
from gptjax.errors import UserError

# %% [markdown]
# ## Text
#
# The text is Tiny Shakespeare, a million letters of plays. (It is downloaded once. If that is not
# possible, the ladder takes the source code of Python's own library; the losses are others then.)


# %%
def read_text():
    """Tiny Shakespeare; where it is not and cannot be downloaded, Python's own library."""
    try:
        files = corpus.find_files("shakespeare")
    except UserError:
        files = corpus.find_files("builtin")[:100]
    return "".join(file.read_text() for file in files)


# %%
text = read_text()
print(f"{len(text):,} letters, which begin:\n")
print(text[:148])

# %% [markdown]
# ## Letters become numbers
#
# A network computes with numbers. So each letter of the vocabulary gets an integer, its id. First
# with a vocabulary that has only the letters of "Hello":

# %%
input_string = "Hello"
chars = sorted(set(input_string))
print(chars)
print([chars.index(letter) for letter in input_string])

# %% [markdown]
# "l" is there twice, and has one id. Now with all characters of the text. ("Letter" means any of
# them from here on: spaces, line ends and signs too.)

# %%
characters = sorted(set(text))
vocab_size = len(characters)
str_to_int = {character: i for i, character in enumerate(characters)}
int_to_str = dict(enumerate(characters))


def encode(text):
    return [str_to_int[character] for character in text]


def decode(ids):
    return "".join(int_to_str[int(i)] for i in ids)


print(f"V = {vocab_size}: {''.join(characters)!r}")
print(encode("Hi Tom"))
print(decode(encode("Hi Tom")))

# %% [markdown]
# ### Sub-words
#
# Ids may also stand for pieces of words, "sub-words". Google's SentencePiece learns them from the
# text: it begins with single letters, and again and again joins the two neighbours that are most
# often side by side. The more pieces, the shorter a text becomes in ids, and the larger the
# vocabulary, with all the tables that have a row for each of its entries. We look at this
# trade-off with three sizes of vocabulary. (SentencePiece spells a space as "▁".)

# %%
lines = text[:300_000]
print("vocabulary  ids for the text's first 300,000 letters")
print(f"{vocab_size:10}  {len(encode(lines)):7,}")
for size in (400, 1000, 4000):
    pieces = tokenizers.SentencePieceTokenizer.train([lines], size)
    hello = "".join(f"[{pieces.piece(i)}]" for i in pieces.encode("Hello World.").tolist())
    print(f"{size:10}  {len(pieces.encode(lines)):7,}   Hello World. = {hello}")

# %% [markdown]
# With 4000 pieces a text has less than a third as many ids. GPT-2 has 50,257 pieces. The ladder
# stays with single letters: its tables are small, and everything else about a GPT is the same.

# %% [markdown]
# ## What is learned, and what it is tested on
#
# The last tenth of the text is never trained on. The loss there tells whether the model has
# learned the language and not just the text by heart.

# %%
ids = np.array(encode(text))
split = int(0.9 * len(ids))
train_ids, val_ids = ids[:split], ids[split:]
print(f"{len(train_ids):,} letters to train on, {len(val_ids):,} to validate")

# %% [markdown]
# ## Context and target
#
# The whole text never goes into the network at once, but in chunks. Their length is called
# `block_size`, or T. One chunk holds as many exercises as it has letters: at each place, predict
# the next letter from those so far.

# %%
for i in range(1, len("Hi Tom")):
    print(f"context {'Hi Tom'[:i]!r:9} target {'Hi Tom'[i]!r}")

# %% [markdown]
# So inputs and targets are the same letters, shifted by one. And because chunks do not depend on
# each other, B of them are computed side by side: a batch.

# %%
block_size = 64
batch_size = 16


def batch_at(step):
    """inputs [B, T], targets [B, T]: B chunks from anywhere in the training text."""
    draw = np.random.default_rng(step)
    starts = draw.integers(len(train_ids) - block_size, size=batch_size)
    chunks = np.stack([train_ids[start : start + block_size + 1] for start in starts])
    return chunks[:, :-1], chunks[:, 1:]


inputs, targets = batch_at(0)
print("inputs", inputs.shape, "targets", targets.shape)
print("the first inputs ", repr(decode(inputs[0, :20])))
print("the first targets", repr(decode(targets[0, :20])))

# %% [markdown]
# ## The model
#
# A table with V rows and V columns. Row a, column b holds a score for "b follows a": the higher,
# the likelier. Such scores are called logits. In JAX a model is a function of its parameters and
# its inputs; nothing is hidden in an object. To look a row up is to index the table.


# %%
def apply(params, inputs):
    """inputs [B, T] -> logits [B, T, V]."""
    return params["table"][inputs]


params = {"table": jnp.zeros((vocab_size, vocab_size))}
logits = apply(params, inputs)
print("logits", logits.shape)

# %% [markdown]
# `softmax` makes probabilities of logits: take e to the power of each, and divide by the sum. To
# check by hand: logits 0, log 2 and 0 have the powers 1, 2 and 1, whose sum is 4.

# %%
print(jax.nn.softmax(jnp.array([0.0, np.log(2), 0.0])))

# %% [markdown]
# ## The loss
#
# How good are the probabilities? The loss is minus the logarithm of the probability that the
# model gave to the letter that really came (cross-entropy, in nats). Certain and right is 0; a
# probability of 1/2 is log 2 = 0.69. With a table of zeros every letter has probability 1/65, so
# the loss must be log 65.


# %%
def cross_entropy(logits, targets):
    """logits [B, T, V], targets [B, T] -> one number, the mean of -log(probability of target)."""
    log_probabilities = jax.nn.log_softmax(logits)
    of_targets = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)
    return -of_targets.mean()


print(f"loss {cross_entropy(logits, targets):.4f}, log {vocab_size} = {np.log(vocab_size):.4f}")

# %% [markdown]
# ## Learning
#
# JAX derives the gradient of the loss: for each parameter, how much the loss grows if it grows.
# For one pair of letters, "H" then "i", the gradient of row "H" is the model's probabilities,
# minus 1 at "i". So a step against the gradient raises "i" and lowers all others a little.

# %%
pair, following = jnp.array([encode("H")]), jnp.array([encode("i")])
gradient = jax.grad(lambda params: cross_entropy(apply(params, pair), following))(params)
row = gradient["table"][str_to_int["H"]]
print(f"at 'i' {row[str_to_int['i']]:.4f} = 1/65 - 1, at 'a' {row[str_to_int['a']]:.4f} = 1/65")

# %% [markdown]
# Training repeats that with one batch after the other. Adam, an optimizer from the library optax,
# chooses the length of the step for each parameter, from how large its gradients have been. Its
# learning rate rises during the first tenth of the steps (the warm-up: the first gradients say
# little), then falls in a straight line to 0, so that the parameters come to rest.
#
# `validation_loss` then measures on the part of the text that was not trained on. Three things of
# JAX are new here: `jax.jit` compiles a function when it is first called, for the shapes it is
# called with; `jax.value_and_grad` makes of a loss a function that returns the loss and its
# gradients; and `jax.tree` walks through nested dictionaries of arrays ("pytrees"), which is what
# parameters are.


# %%
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


params = train(apply, params, learning_rate=0.1)

# %% [markdown]
# From 4.17 to less than 2.5 nats. Is that as good as a table can be? A table can also be filled
# by counting: how often does b follow a in the training text? (Plus a little, so that no pair is
# impossible.) Its logarithms are logits.

# %%
pairs = np.full((vocab_size, vocab_size), 0.1)
np.add.at(pairs, (train_ids[:-1], train_ids[1:]), 1)
counted = {"table": jnp.log(pairs)}
print(f"by counting: validation loss {validation_loss(apply, counted):.3f}")
probabilities = jax.nn.softmax(params["table"][str_to_int["q"]])
print(f"after 'q' comes 'u': learned {probabilities[str_to_int['u']]:.3f}", end=", ")
print(f"counted {(pairs / pairs.sum(1, keepdims=True))[str_to_int['q'], str_to_int['u']]:.3f}")

# %% [markdown]
# Training found nearly what counting finds, from the loss alone. Counting goes no further: a table
# for contexts of 64 letters would have 65 to the power of 64 rows. Training does: the next rungs
# put other models in place of the table, and train them by the same function.
#
# ## Generating
#
# Draw a letter by the probabilities, append it, ask for the next. (The window always has T places,
# so that JAX compiles once. Those after the last letter are filled with zeros, which do no harm: in
# no model of the ladder do a letter's logits depend on later letters.)


# %% tags=["text-varies"]
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


print(generate(apply, params, "ROMEO:", 200))

# %% [markdown]
# Words have about the right length and hardly anything else: each letter was drawn from the one
# before it alone. All rungs above this one are about letting it know more.
#
# **Exercise.** Train a new table of zeros with `learning_rate=3e-3`. *What to expect:* after 1000
# steps the loss is still near 3, because Adam moves a parameter by at most about the learning
# rate a step, and logits must come from 0 to about 5.
#
# All functions of this rung are collected, in the same words, in `ladder.py`; the next rungs
# import them from there.
