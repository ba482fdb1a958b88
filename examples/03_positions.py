# %% [markdown]
# # 3. Positions
#
# **Idea:** add a second vector to each letter's embedding, which says where in the chunk it
# stands.
#
# **In a tutorial:** "Positional Encoding" (`position_embedding_table`), "Input Embedding".
#
# What comes next on the ladder, attention, treats the letters before as a heap: at the "t" it could
# not tell "cat" from "act". So the order is written into the vectors themselves.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ladder import batch_at, block_size, train, vocab_size

# %% [markdown]
# ## Learned positions
#
# As for letters there is a table, [T, C], one row for each place in the chunk. The rows are
# added. By hand, with T = 3 and C = 2, for the letters 1, 0, 1:

# %%
tokens = jnp.array([[10.0, 10.0], [20.0, 20.0]])  # [V, C]
positions = jnp.array([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])  # [T, C]
print(tokens[jnp.array([1, 0, 1])] + positions)

# %% [markdown]
# The first and the last row are the same letter at two places: now they differ. With a batch the
# shapes are [B, T, C] + [T, C]; the second is added to each of the B chunks.
#
# In GPT-2's size, with four words instead of letters ("Every effort moves you") and C = 768:

# %%
words = "Every effort moves you".split()
keys = jax.random.split(jax.random.key(0), 2)
token_table = jax.random.normal(keys[0], (len(words), 768))  # [V, C]
position_table = jax.random.normal(keys[1], (4, 768))  # [T, C]: a context of 4
ids = jnp.arange(4)
x = token_table[ids] + position_table[jnp.arange(4)]
print("token embedding", token_table[ids].shape, "+ positions", position_table.shape, "=", x.shape)

# %% [markdown]
# ## Fixed positions: sinusoids
#
# "[Attention is all you need](https://arxiv.org/abs/1706.03762)" did not learn the table but
# computed it: column pair i of position p holds the sine and the cosine of p / 10000^(2i/C). The
# first pair turns quickly, the last hardly: like the hands of a clock. By hand: position 0 is 0, 1,
# 0, 1, ...; position 1 begins with sin 1 = 0.841 and cos 1 = 0.540.


# %%
def sinusoids(length, n_embd):
    """[T, C]: sines in even columns, cosines in odd ones."""
    position = np.arange(length)[:, None]
    angle = position / 10000 ** (np.arange(0, n_embd, 2) / n_embd)  # [T, C/2]
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, n_embd)


table = sinusoids(block_size, 64)
print(np.round(table[:3, :6], 3))

# %%
figure, axes = plt.subplots(figsize=(6, 4))
figure.colorbar(axes.imshow(table, cmap="RdBu", aspect="auto"), label="sine or cosine")
axes.set(xlabel="column (C)", ylabel="position (T)", title="Sinusoids: a clock with 32 hands")
plt.show()

# %% [markdown]
# On the right are hands that have hardly moved: every sine near 0 (white), every cosine near 1
# (blue), so stripes. On the left are hands that have gone round. The arc between them is where a
# hand has turned by 45 degrees: sine and cosine are both 0.71, and the stripes vanish. Each hand is
# slower than the last by the same factor, so it gets there later by that factor, and the arc bends.

# %%
print("position 63, columns 30 and 31:", np.round(table[63, 30:32], 2))

# %% [markdown]
# Why sines? The dot product of the rows of two positions depends only on how far apart they are,
# and is largest for the same place. So "three letters back" looks the same everywhere:

# %%
for first, second in ((0, 0), (20, 20), (0, 3), (20, 23), (0, 20), (40, 60)):
    product = table[first] @ table[second]
    print(f"positions {first:2} and {second:2}, {second - first:2} apart: {product:.2f}")

# %% [markdown]
# ## The model
#
# The same as on rung 2, with one line more. GPT-2 learns its positions, and so do we.


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


def apply(params, inputs):
    """inputs [B, T] -> logits [B, T, V]."""
    t = inputs.shape[1]
    tok_emb = params["token_embedding"][inputs]  # [B, T, C]
    pos_emb = params["position_embedding"][jnp.arange(t)]  # [T, C]
    x = tok_emb + pos_emb  # [B, T, C]
    return linear(params["fc"], x)  # [B, T, V]


print("logits", apply(init(jax.random.key(0)), batch_at(0)[0]).shape)

# %%
params = train(apply, init(jax.random.key(0)))

# %% [markdown]
# No better than rung 2. That is no fault: chunks begin anywhere in the text, so "this is letter
# 17 of the chunk" says nothing about the next letter. Positions begin to matter when letters look
# at each other, from rung 5 on. What you see is the whole cost of having them: T x C = 4,096
# parameters.
#
# **Exercise.** Take the sinusoids instead: `pos_emb = sinusoids(t, 64)` in `apply`, and no
# `position_embedding` in `init`. *What to expect:* the parameters of rung 2, 8,385, and again a
# loss of 2.48: positions do not help yet, whichever kind they are.
