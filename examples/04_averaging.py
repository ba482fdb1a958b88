# %% [markdown]
# # 4. The averaging triangle
#
# **Idea:** let each letter take the average of all letters up to itself, by one matrix product
# with a triangle of weights.
#
# **In a tutorial:** "Attention": `tril`, `masked_fill`, `softmax`, `wei @ x`.
#
# Until now a letter knew itself only. Older networks (RNN, LSTM) carry what they have read from
# letter to letter, one after the other, so a long text takes long. Attention reads all letters at
# once, by matrix products. This rung makes the simplest product that does so; the next one makes
# its weights clever.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from ladder import batch_at, block_size, train, vocab_size

np.set_printoptions(precision=4, floatmode="fixed", suppress=True)  # as PyTorch prints

# %% [markdown]
# ## The average of what came before
#
# In the chunk "Hi Tom" the last exercise is: context "Hi To", target "m". Five letters are known,
# so let each count one fifth. In the exercise before it is a fourth, and so on. A letter must
# never see those after it: they are what it has to predict.
#
# One number a letter is enough to see it. The numbers 1 to 5, and a loop:

# %%
x = jnp.array([[1.0], [2.0], [3.0], [4.0], [5.0]])  # [T, C], C = 1
by_loop = jnp.stack([x[: i + 1].mean(axis=0) for i in range(5)])
print(by_loop.T)

# %% [markdown]
# (1), (1 + 2) / 2 = 1.5, (1 + 2 + 3) / 3 = 2, and so on: right.
#
# The same by a matrix: row i holds the weights that letter i gives to each letter. `tril` keeps
# the lower triangle.

# %%
triangle = jnp.tril(jnp.ones((5, 5)))
weights = triangle / triangle.sum(axis=1, keepdims=True)
print(weights)
by_product = weights @ x  # [T, T] times [T, C] = [T, C]
print("the product is the loop's result:", jnp.allclose(by_product, by_loop))

# %% [markdown]
# The same once more, in the form in which attention has it. Begin with scores that are all zero,
# "every letter is equally important". Set those of later letters to minus infinity. Softmax makes
# weights of them: e^0 = 1 for each known letter, e^-infinity = 0 for the others, divided by the
# sum.

# %%
scores = jnp.zeros((5, 5))
scores = jnp.where(triangle == 0, -jnp.inf, scores)  # masked_fill in PyTorch
print(scores)
weights = jax.nn.softmax(scores, axis=-1)
print(weights)
print("and again the same:", jnp.allclose(weights @ x, by_loop))

# %% [markdown]
# Why the detour? Because scores can be any numbers. Give the letter before twice the weight of
# the others: its score is log 2 = 0.69 instead of 0. In the last row the weights are then 1, 1,
# 1, 2, 1 sixths:

# %%
before = jnp.eye(5, k=-1) * jnp.log(2.0)
print(jax.nn.softmax(jnp.where(triangle == 0, -jnp.inf, before), axis=-1)[-1])

# %% [markdown]
# ## The future stays hidden
#
# Change the last letter: only the last row may change.

# %%
changed = weights @ x.at[4].set(100.0)
print("rows that changed:", [i for i in range(5) if changed[i] != (weights @ x)[i]])

# %% [markdown]
# ## The model
#
# Rung 3 with the average between embedding and linear layer. For a batch, [T, T] times [B, T, C]
# is computed for each of the B chunks.


# %%
def new_linear(key, inputs, outputs):
    kernel = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def init(key, n_embd=64):
    keys = jax.random.split(key, 3)
    return {
        "token_embedding": jax.random.normal(keys[0], (vocab_size, n_embd)),
        "position_embedding": jax.random.normal(keys[1], (block_size, n_embd)),
        "fc": new_linear(keys[2], n_embd, vocab_size),
    }


def average(x):
    """[B, T, C] -> [B, T, C]: each letter becomes the mean of those up to it."""
    t = x.shape[1]
    scores = jnp.where(jnp.tril(jnp.ones((t, t))) == 0, -jnp.inf, jnp.zeros((t, t)))
    return jax.nn.softmax(scores, axis=-1) @ x


def apply(params, inputs):
    """inputs [B, T] -> logits [B, T, V]."""
    t = inputs.shape[1]
    x = params["token_embedding"][inputs] + params["position_embedding"][jnp.arange(t)]
    x = average(x)  # [B, T, C]
    return linear(params["fc"], x)  # [B, T, V]


print("logits", apply(init(jax.random.key(0)), batch_at(0)[0]).shape)

# %%
params = train(apply, init(jax.random.key(0)))

# %% [markdown]
# Worse than rung 1, although each letter sees so much more! An average forgets the order, and
# which letter was the last: of 60 letters, the one that matters most counts one sixtieth.
# Positions do not help, since they are averaged as well. The triangle is right; the weights must
# be chosen.
#
# **Exercise.** Keep the letter itself beside the average: `x = x + average(x)`. *What to expect:*
# 2.50, about that of rung 1 again. The letter itself is back, and the average of the rest has
# hardly anything to add. (Adding instead of replacing will come back on rung 8.)
