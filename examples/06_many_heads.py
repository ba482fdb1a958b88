# %% [markdown]
# # 6. Many heads
#
# **Idea:** several small heads look for several things at once; what they find is put side by
# side.
#
# **In a tutorial:** "Multi-Head Attention".
#
# One head has one set of weights: if it looks at the letter before, it cannot also look at the
# beginning of the word. So take H heads of size D = C / H. Together they cost what one head of
# size C costs. A last linear layer, the projection, mixes what they found.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from ladder import batch_at, block_size, encode, generate, train, val_ids, vocab_size

# %% [markdown]
# ## As a list of heads
#
# The head is that of rung 5.


# %%
def new_head(key, n_embd, head_size):
    kernels = jax.random.normal(key, (3, n_embd, head_size)) / n_embd**0.5
    return dict(zip(("query", "key", "value"), kernels))


def head(params, x):
    """[B, T, C] -> [B, T, D]."""
    q, k, v = (x @ params[name] for name in ("query", "key", "value"))  # [B, T, D] each
    scores = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5  # [B, T, T]
    visible = jnp.tril(jnp.ones(scores.shape[1:])) == 1
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1) @ v


n_embd, n_head = 64, 4
keys = jax.random.split(jax.random.key(0), n_head)
heads = [new_head(key, n_embd, n_embd // n_head) for key in keys]
x = jax.random.normal(jax.random.key(1), (16, block_size, n_embd))
found = [head(params, x) for params in heads]
print(f"{n_head} heads of", found[0].shape, "side by side:", jnp.concatenate(found, axis=-1).shape)

# %% [markdown]
# ## As one product
#
# Four small products can be one large one. Put the four query matrices [C, D] side by side as one
# matrix [C, C]; multiply once; then cut the result into heads: [B, T, C] becomes [B, T, H, D],
# and H moves forward to stand beside B. Nothing is computed that was not before.


# %%
def split(x, n_head):
    """[B, T, C] -> [B, H, T, D]."""
    b, t, c = x.shape
    return x.reshape(b, t, n_head, c // n_head).transpose(0, 2, 1, 3)


def attention_weights(params, x):
    """[B, T, C] -> [B, H, T, T]."""
    q, k = (split(x @ params[name], n_head) for name in ("query", "key"))  # [B, H, T, D]
    scores = q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5  # [B, H, T, T]
    visible = jnp.tril(jnp.ones(scores.shape[2:])) == 1
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def all_heads(params, x):
    """[B, T, C] -> [B, T, C]."""
    y = attention_weights(params, x) @ split(x @ params["value"], n_head)  # [B, H, T, D]
    return y.transpose(0, 2, 1, 3).reshape(x.shape)


names = ("query", "key", "value")
joined = {name: jnp.concatenate([h[name] for h in heads], axis=1) for name in names}  # [C, C]
one_by_one = jax.jit(lambda heads, x: jnp.concatenate([head(h, x) for h in heads], axis=-1))
together = jax.jit(all_heads)
print("the same numbers:", jnp.allclose(one_by_one(heads, x), together(joined, x), atol=1e-5))

# %%
for name, function, params in (("a list", one_by_one, heads), ("one product", together, joined)):
    start = time.perf_counter()
    for _ in range(100):
        y = function(params, x)
    y.block_until_ready()
    print(f"{name:11} {10 * (time.perf_counter() - start):.2f} ms")

# %% [markdown]
# At this size, on two CPU cores, the one product is no faster. What is gained here is that there is
# one matrix each for query, key and value, however many heads.
#
# ## The model


# %%
def new_linear(key, inputs, outputs):
    kernel = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def init(key):
    keys = jax.random.split(key, 5)
    return {
        "token_embedding": jax.random.normal(keys[0], (vocab_size, n_embd)),
        "position_embedding": jax.random.normal(keys[1], (block_size, n_embd)),
        "heads": new_head(keys[2], n_embd, n_embd),
        "projection": new_linear(keys[3], n_embd, n_embd),
        "fc": new_linear(keys[4], n_embd, vocab_size),
    }


def embed(params, inputs):
    """[B, T] -> [B, T, C]."""
    t = inputs.shape[1]
    return params["token_embedding"][inputs] + params["position_embedding"][jnp.arange(t)]


def apply(params, inputs):
    """inputs [B, T] -> logits [B, T, V]."""
    x = embed(params, inputs)  # [B, T, C]
    x = linear(params["projection"], all_heads(params["heads"], x))  # [B, T, C]
    return linear(params["fc"], x)  # [B, T, V]


print("logits", apply(init(jax.random.key(0)), batch_at(0)[0]).shape)

# %%
params = train(apply, init(jax.random.key(0)))

# %% [markdown]
# Better than one head of the same size, for the price of the projection. Do the heads look at
# different things?

# %%
line = "The king is dead, long live"
weights = attention_weights(params["heads"], embed(params, jnp.array([encode(line)])))[0]
figure, axes = plt.subplots(2, 2, figsize=(10, 10), layout="constrained")
for number, (plot, image) in enumerate(zip(axes.flat, weights, strict=True)):
    plot.imshow(image, cmap="Blues")
    plot.set_xticks(range(len(line)), line.replace(" ", "_"))
    plot.set_yticks(range(len(line)), line.replace(" ", "_"))
    plot.set(xlabel="looked at", ylabel="who looks", title=f"head {number}")
plt.show()

# %% [markdown]
# One line may be chance. Over a hundred chunks: the weight on the letter itself and on those just
# before it; and how much of what is not on itself is on vowels, which are a quarter of all letters.

# %% tags=["numbers-vary"]
chunks = jnp.array(val_ids[: 100 * block_size].reshape(100, block_size))
weights = attention_weights(params["heads"], embed(params, chunks))  # [B, H, T, T]
vowels = jnp.isin(chunks, jnp.array(encode("aeiou")))  # [B, T]
print(f"{vowels.mean():.2f} of the letters are vowels")
print("head  itself  1 back  2 back  vowels")
for number in range(n_head):
    mean = weights[:, number].mean(axis=0)  # [T, T]
    near = "  ".join(f"{mean.diagonal(-back)[8:].mean():6.2f}" for back in range(3))
    others = jnp.tril(weights[:, number], -1)[:, 8:].sum(axis=1)  # [B, T]: what each letter gets
    print(f"{number:4}  {near}  {others[vowels].sum() / others.sum():6.2f}")

# %% [markdown]
# They do.
#
# - Head 0 is the one that looks at the letter two back more than at the last one.
# - Head 1 looks at vowels.
# - Head 2 looks at the letter before.
# - Head 3 looks at the letter itself most, and at vowels least.

# %% tags=["text-varies"]
print(generate(apply, params, "ROMEO:", 200))

# %% [markdown]
# **Exercise.** Try 1, 2, 8 and 16 heads. *What to expect:* 2.38 with one head, 2.24 with 2, 2.23
# with 4 or 8, 2.26 with 16: a query has only 4 numbers there to say what it looks for.
