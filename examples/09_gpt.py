# %% [markdown]
# # 9. GPT-2
#
# **Idea:** the whole model, with Flax keeping the parameters; and the last things that GPT-2 has:
# dropout, its initialisation, and an output head that shares the embedding's table.
#
# **In a tutorial:** "Transformer Block", "Dropout", "Output head", "Softmax", `forward`.
#
# The blocks are those of rung 8, but for dropout and a bias that GPT-2 gives to query, key and
# value too. What is new is said one by one, then the whole model stands in one cell.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ladder import (
    batch_at,
    block_size,
    count,
    cross_entropy,
    generate,
    train,
    train_ids,
    validation_loss,
    vocab_size,
)

# %% [markdown]
# ## Flax linen: the same functions, less bookkeeping
#
# From rung 8 on most lines of `init` only repeat the shapes that `apply` knows anyway. In Flax
# linen a module says once what it computes; `module.init` makes the parameters, a nested
# dictionary as before, and `module.apply(params, x)` is a pure function as before. (`@nn.compact`
# lets a module name its layers at the place where it uses them.) `nn.Dense` is our `linear`:

# %%
dense = nn.Dense(3)
x = jnp.ones((1, 2))
params = dense.init(jax.random.key(0), x)["params"]
print(jax.tree.map(jnp.shape, params))
by_hand = x @ params["kernel"] + params["bias"]
print("the same as by hand:", jnp.allclose(dense.apply({"params": params}, x), by_hand))

# %% [markdown]
# ## Dropout
#
# In training, [dropout](https://jmlr.org/papers/v15/srivastava14a.html) sets each number to 0 with
# probability 50 %, at random, and doubles the others so that the mean stays. (GPT-2's rate is 10 %:
# one in ten becomes 0, the others are divided by 0.9.) No number can rely on a certain other one
# being there; so the network learns things in more than one way, and learns less by heart. When the
# model is used, nothing is dropped.

# %%
dropout = nn.Dropout(0.5, deterministic=False)
row = jnp.arange(1.0, 13.0)
print("a row      ", row.astype(int))
for seed in range(2):
    print("in training", dropout.apply({}, row, rngs={"dropout": jax.random.key(seed)}).astype(int))
print("in use     ", nn.Dropout(0.5, deterministic=True).apply({}, row).astype(int))
long_row = jnp.ones(768)  # an embedding of GPT-2
dropped = dropout.apply({}, long_row, rngs={"dropout": jax.random.key(0)})
print(f"of 768 numbers {int((dropped == 0).sum())} are 0, about half; mean {dropped.mean():.2f}")

# %% [markdown]
# ## Initialisation
#
# GPT-2's tables and matrices begin as random numbers with standard deviation 0.02. With C = 768
# that is 0.55 / sqrt(C): about half of what our matrices had so far, and much less than the 1 of
# our tables. At our C = 64 the same share is 0.55 / 8 = 0.07. (Biases begin as 0 and LayerNorm's
# scales as 1, as before.) So all logits begin small, all letters about equally likely: the loss
# begins 0.1 above log 65 = 4.17, where rung 8 began 0.6 above it, and few steps are spent on
# unlearning chance.
#
# The matrices whose result is added to the stream (the projections of attention and MLP) get that
# divided by sqrt(2 L): with L blocks 2 L results are added, and a sum of 2 L random numbers is
# sqrt(2 L) times as large as one. So a deep stream begins no larger than a shallow one.
#
# ## A tied head
#
# The last layer asks of each letter: how well does x fit you? The embedding already says what
# each letter is like. So GPT-2 takes the same table: logits = x times the embedding's transpose,
# [B, T, C] times [C, V]. In GPT-2 this saves 768 x 50,257 = 38.6 million parameters of 163
# million.
#
# ## The model

# %%
STD = 0.07


class Attention(nn.Module):
    n_head: int
    n_layer: int
    rate: float

    @nn.compact
    def __call__(self, x, train):
        """[B, T, C] -> [B, T, C]."""
        b, t, c = x.shape

        def heads(name):
            y = nn.Dense(c, kernel_init=nn.initializers.normal(STD), name=name)(x)
            return y.reshape(b, t, self.n_head, -1).transpose(0, 2, 1, 3)  # [B, H, T, D]

        q, k, v = heads("query"), heads("key"), heads("value")
        scores = q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5  # [B, H, T, T]
        scores = jnp.where(jnp.tril(jnp.ones((t, t))) == 0, -jnp.inf, scores)
        weights = nn.Dropout(self.rate, deterministic=not train)(jax.nn.softmax(scores, axis=-1))
        y = (weights @ v).transpose(0, 2, 1, 3).reshape(b, t, c)
        smaller = nn.initializers.normal(STD / (2 * self.n_layer) ** 0.5)
        y = nn.Dense(c, kernel_init=smaller, name="projection")(y)
        return nn.Dropout(self.rate, deterministic=not train)(y)


class MLP(nn.Module):
    n_layer: int
    rate: float

    @nn.compact
    def __call__(self, x, train):
        """[B, T, C] -> [B, T, C]."""
        c = x.shape[-1]
        smaller = nn.initializers.normal(STD / (2 * self.n_layer) ** 0.5)
        x = nn.Dense(4 * c, kernel_init=nn.initializers.normal(STD), name="expand")(x)
        x = nn.Dense(c, kernel_init=smaller, name="contract")(jax.nn.gelu(x))
        return nn.Dropout(self.rate, deterministic=not train)(x)


class Block(nn.Module):
    n_head: int
    n_layer: int
    rate: float

    @nn.compact
    def __call__(self, x, train):
        """[B, T, C] -> [B, T, C]."""
        attention = Attention(self.n_head, self.n_layer, self.rate, name="attention")
        x = x + attention(nn.LayerNorm(epsilon=1e-5, name="norm_1")(x), train)
        mlp = MLP(self.n_layer, self.rate, name="mlp")
        return x + mlp(nn.LayerNorm(epsilon=1e-5, name="norm_2")(x), train)


class GPT(nn.Module):
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    rate: float = 0.0

    @nn.compact
    def __call__(self, inputs, train=False):
        """inputs [B, T] -> logits [B, T, V]."""
        init = nn.initializers.normal(STD)
        tokens = self.param("token_embedding", init, (vocab_size, self.n_embd))
        positions = self.param("position_embedding", init, (block_size, self.n_embd))
        x = tokens[inputs] + positions[: inputs.shape[1]]  # [B, T, C]
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        for i in range(self.n_layer):
            x = Block(self.n_head, self.n_layer, self.rate, name=f"block_{i}")(x, train)
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        return x @ tokens.T  # [B, T, V]: the tied head


gpt = GPT()


def apply(params, inputs):
    return gpt.apply({"params": params}, inputs)


inputs, targets = batch_at(0)
params = jax.jit(gpt.init)(jax.random.key(0), inputs)["params"]
print("inputs", inputs.shape, "-> logits", apply(params, inputs).shape)
print(f"loss before training {cross_entropy(apply(params, inputs), targets):.3f}")

# %% [markdown]
# Its parameters, by name. Nearly all are in the blocks' matrices, 12 C^2 = 49,152 a block; biases
# (9 C) and LayerNorms (4 C) add 832.

# %%
for name, part in params.items():
    print(f"{name:19} {count(part):7,}")
print(f"{'together':19} {count(params):7,}")

# %%
params = train(apply, params)

# %% tags=["text-varies"]
print(generate(apply, params, "ROMEO:", 300))

# %% [markdown]
# Better than rung 8, with fewer parameters. Names, lines, and words that are almost English, from
# 0.1 million parameters.
#
# Softmax, by the way, is not a layer of the model. `cross_entropy` takes the logits in training,
# and `generate` draws from them; both apply it themselves.
#
# ## What dropout is for
#
# Above the rate was 0: 1000 batches are hardly one pass over the text, so nothing can be learned
# by heart. With only 5,000 letters to train on, that changes:

# %%
few = train_ids[:5_000]


def small_batch(step):
    starts = np.random.default_rng(step).integers(len(few) - block_size, size=16)
    chunks = np.stack([few[start : start + block_size + 1] for start in starts])
    return chunks[:, :-1], chunks[:, 1:]


def train_on_few(rate, steps=300):
    model, optimizer = GPT(rate=rate), optax.adam(3e-3)
    params = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, inputs, targets, key):
        def loss(params):
            rngs = {"dropout": key}
            logits = model.apply({"params": params}, inputs, train=True, rngs=rngs)
            return cross_entropy(logits, targets)

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(1), step)
        params, state = update(params, state, *small_batch(step), key)
    return params


for rate in (0.0, 0.2):
    found = train_on_few(rate)
    known = np.mean([cross_entropy(apply(found, x), y) for x, y in map(small_batch, range(20))])
    new = validation_loss(apply, found)
    print(f"dropout {rate}: loss {known:.2f} of what it was trained on, {new:.2f} of new text")

# %% [markdown]
# Without dropout the model knows its small text far better than new text. With dropout it is
# worse on the one and better on the other, which is what counts.
#
# **Exercise.** Draw with 0.02, as if C were 768. *What to expect:* the loss begins at 4.16, and
# ends at 2.1: all layers are so small that hundreds of steps go into making them larger.
