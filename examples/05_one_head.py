# %% [markdown]
# # 5. One head of attention
#
# **Idea:** each letter says what it looks for (query) and what it has (key); where they fit, it
# takes more of what is there (value).
#
# **In a tutorial:** "Attention", `class AttentionHead`: key, query, value.
#
# Rung 4 weighed all letters alike. Now the weights come from the letters themselves. Three linear
# layers make three vectors of length D (the head size) of each letter's x:
#
# - the **query**: what am I looking for? ("a vowel before me")
# - the **key**: what have I to offer? ("I am a vowel")
# - the **value**: what do I hand over, if you look at me? ("I am an o, at place 17")
#
# The score of letter j for letter i is the product of i's query and j's key. The rest is rung 4:
# mask, softmax, matrix product, but with the values instead of x.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ladder import batch_at, block_size, encode, train, val_ids, vocab_size

np.set_printoptions(precision=4, floatmode="fixed", suppress=True)

# %% [markdown]
# ## By hand
#
# One query, and two letters with keys and values, D = 2. The scores are chosen to be log 3 and 0,
# so the powers are 3 and 1, the weights 3/4 and 1/4, and the result is 3/4 of 10 plus 1/4 of 20 =
# 12.5.

# %%
query = jnp.array([[np.sqrt(2) * np.log(3), 0.0]])  # [1, D]
keys = jnp.array([[1.0, 0.0], [0.0, 1.0]])  # [2, D]
values = jnp.array([[10.0], [20.0]])  # [2, 1]
scores = query @ keys.T / np.sqrt(2)  # [1, 2]
weights = jax.nn.softmax(scores, axis=-1)
print("scores", scores, "weights", weights, "result", weights @ values)

# %% [markdown]
# ## Why divide by the square root of D?
#
# A product of two vectors of D random numbers is a sum of D terms, so its variance is D: with D =
# 256 scores are of size 16 (the root of 256). Softmax of such scores gives nearly everything to one
# letter, at random, before anything has been learned, and its gradient is nearly 0. Divided by
# sqrt(D), scores have variance 1 whatever D is.

# %%
print("  D  variance  (scaled)  largest of 8 weights  (scaled)")
for d in (4, 16, 64, 256):
    q, k = jax.random.normal(jax.random.key(d), (2, 5000, 8, d))
    scores = jnp.einsum("nd,nkd->nk", q[:, 0], k)  # [5000, 8]: a query, 8 keys
    scaled = scores / d**0.5
    largest, after = (jax.nn.softmax(s, axis=-1).max(axis=-1).mean() for s in (scores, scaled))
    print(f"{d:3}  {scores.var():8.1f}  {scaled.var():8.2f}  {largest:20.2f}  {after:8.2f}")

# %% [markdown]
# (Many a tutorial leaves the division out in its first code. It still learns, only worse: the
# model below then ends at 2.50. And take softmax over the *last* axis, the letters that are
# looked at: with a batch axis in front, PyTorch's `dim=1` would be the wrong one.)
#
# ## The head


# %%
def new_head(key, n_embd, head_size):
    kernels = jax.random.normal(key, (3, n_embd, head_size)) / n_embd**0.5
    return dict(zip(("query", "key", "value"), kernels, strict=True))  # [C, D] each, no bias


def attention_weights(params, x):
    """[B, T, C] -> [B, T, T]: how much each letter (row) takes of each letter (column)."""
    q = x @ params["query"]  # [B, T, D]
    k = x @ params["key"]  # [B, T, D]
    scores = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5  # [B, T, T]
    visible = jnp.tril(jnp.ones(scores.shape[1:])) == 1
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def head(params, x):
    """[B, T, C] -> [B, T, D]."""
    v = x @ params["value"]  # [B, T, D]
    return attention_weights(params, x) @ v


x = jax.random.normal(jax.random.key(0), (16, 8, 64))
weights = attention_weights(new_head(jax.random.key(1), 64, 32), x)
print("weights", weights.shape, "rows sum to 1:", jnp.allclose(weights.sum(-1), 1, atol=1e-5))
print("the first rows of one chunk, before any training:")
print(weights[0, :3, :4])

# %% [markdown]
# The triangle is still there. Row 0 can only be 1: the first letter has nobody else to look at.
#
# ## The model


# %%
def new_linear(key, inputs, outputs):
    kernel = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def init(key, n_embd=64, head_size=64):
    keys = jax.random.split(key, 4)
    return {
        "token_embedding": jax.random.normal(keys[0], (vocab_size, n_embd)),
        "position_embedding": jax.random.normal(keys[1], (block_size, n_embd)),
        "head": new_head(keys[2], n_embd, head_size),
        "fc": new_linear(keys[3], head_size, vocab_size),
    }


def embed(params, inputs):
    """[B, T] -> [B, T, C]."""
    t = inputs.shape[1]
    return params["token_embedding"][inputs] + params["position_embedding"][jnp.arange(t)]


def apply(params, inputs):
    """inputs [B, T] -> logits [B, T, V]."""
    x = head(params["head"], embed(params, inputs))  # [B, T, D]
    return linear(params["fc"], x)  # [B, T, V]


print("logits", apply(init(jax.random.key(0)), batch_at(0)[0]).shape)

# %%
params = train(apply, init(jax.random.key(0)))

# %% [markdown]
# For the first time better than the table of letter pairs. What does the head look at? Each row
# of the picture is a letter, each column a letter that it may look at; dark is much.

# %%
line = "The king is dead, long live"
x = embed(params, jnp.array([encode(line)]))
weights = attention_weights(params["head"], x)[0]  # [T, T]
figure, axes = plt.subplots(figsize=(5.5, 5.5))
axes.imshow(weights, cmap="Blues")
axes.set_xticks(range(len(line)), line.replace(" ", "_"))
axes.set_yticks(range(len(line)), line.replace(" ", "_"))
axes.set(xlabel="looked at", ylabel="who looks")
plt.show()

# %% [markdown]
# Near the diagonal: mostly the letter itself and the one before it. That takes positions: "the
# one before me" is a question of place. On average over a hundred chunks:

# %% tags=["numbers-vary"]
chunks = jnp.array(val_ids[: 100 * block_size].reshape(100, block_size))
weights = attention_weights(params["head"], embed(params, chunks)).mean(axis=0)  # [T, T]
for back in range(4):
    print(f"{back} letters back: {weights.diagonal(-back)[8:].mean():.2f} of the weight")
further = jnp.tril(weights, -4)[8:].sum(axis=1).mean()
print(f"4 or more letters back, together: {further:.2f}")

# %% [markdown]
# What is left for the letters further back is shared by up to 60 of them.
#
# **Exercise.** Leave out the positions (return the token embedding alone from `embed`). *What to
# expect:* 2.46, hardly better than rung 1. The query still comes from the letter itself, so that
# one is known. But a head without positions can only prefer certain letters, not near ones: an "o"
# just before counts as much as an "o" fifty letters back.
