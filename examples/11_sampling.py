# %% [markdown]
# # 11. Sampling and the key/value cache
#
# **Idea:** probabilities can be sharpened before a letter is drawn; and what was computed for the
# letters so far need not be computed again.
#
# **In a tutorial:** "Softmax", `generate`.
#
# The ladder is climbed; from here on we use the package's model.

# %%
import contextlib
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ladder import read_text

import gptjax
from gptjax.sampling import Sampling, filter_logits

# %% [markdown]
# ## Temperature, top-k, top-p
#
# Four letters with probabilities 0.5, 0.3, 0.15 and 0.05. Logits are their logarithms.
#
# **Temperature** t divides the logits, so probability p becomes p^(1/t), divided by the new sum.
# At 0.5 they are squared: 0.25, 0.09, 0.0225, 0.0025; the sum is 0.365, so the first becomes 0.25
# / 0.365 = 0.685. Below 1 the likely becomes likelier. At 0 always the likeliest is taken.
#
# **Top-k** keeps the k likeliest letters. **Top-p** keeps the fewest that together have at least
# probability p. What is left is divided by its sum: with k = 2 or p = 0.7 the first two are left,
# and the first becomes 0.5 / 0.8 = 0.625.

# %%
logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
for settings in (
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 2},
    {"top_p": 0.7},
):
    probabilities = jax.nn.softmax(filter_logits(logits, Sampling(**settings)))[0]
    print(*(f"{p:.3f}" for p in probabilities), settings)

# %% [markdown]
# ## A trained model
#
# The network of rungs 9 and 10, trained by the package for 500 steps.

# %%
config = gptjax.TrainConfig(
    model=gptjax.ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=64),
    data=gptjax.DataConfig(source="text.txt"),
    optimizer=gptjax.OptimizerConfig(
        kind="muon", learning_rate=8e-3, muon_learning_rate=0.03, min_lr=0.0,
        warmup_steps=20, lr_schedule="linear", beta1=0.8, beta2=0.95,
    ),
    batch_size=16,
    max_steps=500,
)  # fmt: skip
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    Path("text.txt").write_text(read_text())
    runtime = gptjax.RuntimeConfig(eval_interval=500, sample_tokens=0)
    run = gptjax.train(config, "run", runtime=runtime)
print(run)

# %% tags=["text-varies"]
for temperature in (0.1, 0.8, 1.5):
    print(f"--- temperature {temperature}")
    print("ROMEO:" + run.generate("ROMEO:", max_new_tokens=120, temperature=temperature, seed=1))

# %% [markdown]
# Cold texts repeat themselves, hot ones fall apart; 0.8 is a common choice.
#
# ## The cache, with one head
#
# To draw letter 101 a model needs the logits at letter 100 only. In attention that is one row
# of the triangle: the query of letter 100, with the keys and values of all 100. Those of the
# first 99 were computed before, and they cannot have changed: a letter sees none of those after
# it. So they are kept.

# %%
keys = jax.random.split(jax.random.key(0), 4)
w_query, w_key, w_value = (jax.random.normal(key, (8, 4)) / 8**0.5 for key in keys[:3])
x = jax.random.normal(keys[3], (6, 8))  # [T, C]: six letters


def attend(q, k, v):
    """The last query with all keys and values."""
    return jax.nn.softmax(q[-1] @ k.T / 2, axis=-1) @ v  # 2 = sqrt(D)


cached_keys, cached_values = jnp.zeros((0, 4)), jnp.zeros((0, 4))
for t in range(6):
    again = attend(x[: t + 1] @ w_query, x[: t + 1] @ w_key, x[: t + 1] @ w_value)
    new = x[t : t + 1]  # [1, C]: only the new letter
    cached_keys = jnp.concatenate([cached_keys, new @ w_key])
    cached_values = jnp.concatenate([cached_values, new @ w_value])
    once = attend(new @ w_query, cached_keys, cached_values)
    same = jnp.allclose(again, once, atol=1e-5)
    print(f"{t + 1} keys in the cache; all computed anew gives the same: {same}")

# %% [markdown]
# ## The cache of the package
#
# `gptjax.apply` takes a cache and returns the next one; nothing is hidden here either. It has
# room for `slots` letters of each layer and head. We feed one letter at a time, and compare the
# logits with those of the whole text at once.

# %%
model = run.config
ids = jnp.asarray(run.tokenizer.encode("The king is dead, long live the king"))[None]  # [1, T]
whole, _ = gptjax.apply(model, run.params, ids)  # [1, T, V]
step = jax.jit(lambda params, letter, cache: gptjax.apply(model, params, letter, cache))
cache = gptjax.init_cache(model, batch=1, slots=64, dtype=jnp.float32)
print("keys in the cache [L, B H, slots, D]:", cache.keys.shape)
rows = []
for t in range(ids.shape[1]):
    logits, cache = step(run.params, ids[:, t : t + 1], cache)
    rows.append(logits)
by_letter = jnp.concatenate(rows, axis=1)
print(by_letter.shape, "the same logits within 1e-4:", jnp.allclose(by_letter, whole, atol=1e-4))

# %% [markdown]
# ## How much faster
#
# Without a cache each letter costs a pass over the whole block. A larger model shows it better: 4
# layers, 128 wide, a block of 256, with random weights (speed does not ask what was learned).
# Both take always the likeliest letter, so both must write the same text.

# %%
large = gptjax.ModelConfig(
    n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=run.tokenizer.n_vocab
)
params = jax.jit(gptjax.init, static_argnums=0)(large, jax.random.key(0))
random_run = gptjax.Run(large, params, run.tokenizer)
letters = 100


@jax.jit
def next_letter(params, text, length):
    logits, _ = gptjax.apply(large, params, text)
    return logits[0, length - 1].argmax()


def uncached():
    text = np.zeros((1, large.block_size), np.int32)
    text[0, :6] = run.tokenizer.encode("ROMEO:")
    for length in range(6, 6 + letters):
        text[0, length] = next_letter(params, text, length)
    return run.tokenizer.decode(text[0, 6 : 6 + letters])


def cached():
    return random_run.generate("ROMEO:", max_new_tokens=letters, temperature=0.0)


print("the same text:", uncached() == cached())

# %% tags=["numbers-vary"]
seconds = {}
for generate in (uncached, cached):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        generate()
        times.append(time.perf_counter() - start)
    seconds[generate.__name__] = sorted(times)[1]
    print(f"{generate.__name__:8} {1000 * sorted(times)[1] / letters:.2f} ms a letter")
print(f"{seconds['uncached'] / seconds['cached']:.0f} times as fast")

# %% [markdown]
# And the longer the block, the more. Memory is the price: a key and a value for each letter,
# layer and head.
#
# Once the block is full the cache cannot help: with each further letter the window moves on by one,
# every letter in it gets another position, and all keys change. `run.generate` then computes the
# whole window for each letter; with `overflow="half"` it drops the older half of the block instead,
# reads the other half anew, and has room in the cache again.
#
# **Exercise.** How large is the cache of GPT-2 for one text (12 layers, 768 wide, 1024 tokens,
# float32)? *What to expect:* a key and a value, 2 x 12 x 768 x 1024 numbers of 4 bytes, are 75
# MB, beside 498 MB for the 124 million parameters. Check it with
# `gptjax.init_cache(gptjax.PRESETS["gpt2"], batch=1, slots=1024, dtype=jnp.float32)`: the
# `nbytes` of its `keys` and `values`.
