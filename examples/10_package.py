# %% [markdown]
# # 10. The package's model
#
# **Idea:** the model of `gptjax` computes what rung 9 computes. Put the same numbers in, get the
# same logits, and the same loss at every step of training.
#
# **In a tutorial:** the end of it; here the package takes over.
#
# The package is made for large models and many devices, so it looks different inside. This rung
# shows by numbers that it is the same model, and then what it has that the ladder has not.

# %%
import contextlib
import json
import re
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ladder import (
    batch_at,
    block_size,
    characters,
    cross_entropy,
    read_text,
    validation_loss,
    vocab_size,
)

import gptjax
from gptjax import optim, train_step

# %% [markdown]
# ## Rung 9 again
#
# The model of rung 9, without dropout, which would be drawn in another way. Nothing else is
# changed.

# %%
STD = 0.07


class Attention(nn.Module):
    n_head: int
    n_layer: int

    @nn.compact
    def __call__(self, x):
        b, t, c = x.shape

        def heads(name):
            y = nn.Dense(c, kernel_init=nn.initializers.normal(STD), name=name)(x)
            return y.reshape(b, t, self.n_head, -1).transpose(0, 2, 1, 3)  # [B, H, T, D]

        q, k, v = heads("query"), heads("key"), heads("value")
        scores = q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5  # [B, H, T, T]
        scores = jnp.where(jnp.tril(jnp.ones((t, t))) == 0, -jnp.inf, scores)
        y = (jax.nn.softmax(scores, axis=-1) @ v).transpose(0, 2, 1, 3).reshape(b, t, c)
        smaller = nn.initializers.normal(STD / (2 * self.n_layer) ** 0.5)
        return nn.Dense(c, kernel_init=smaller, name="projection")(y)


class MLP(nn.Module):
    n_layer: int

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        smaller = nn.initializers.normal(STD / (2 * self.n_layer) ** 0.5)
        x = nn.Dense(4 * c, kernel_init=nn.initializers.normal(STD), name="expand")(x)
        return nn.Dense(c, kernel_init=smaller, name="contract")(jax.nn.gelu(x))


class Block(nn.Module):
    n_head: int
    n_layer: int

    @nn.compact
    def __call__(self, x):
        attention = Attention(self.n_head, self.n_layer, name="attention")
        x = x + attention(nn.LayerNorm(epsilon=1e-5, name="norm_1")(x))
        return x + MLP(self.n_layer, name="mlp")(nn.LayerNorm(epsilon=1e-5, name="norm_2")(x))


class GPT(nn.Module):
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64

    @nn.compact
    def __call__(self, inputs):
        init = nn.initializers.normal(STD)
        tokens = self.param("token_embedding", init, (vocab_size, self.n_embd))
        positions = self.param("position_embedding", init, (block_size, self.n_embd))
        x = tokens[inputs] + positions[: inputs.shape[1]]  # [B, T, C]
        for i in range(self.n_layer):
            x = Block(self.n_head, self.n_layer, name=f"block_{i}")(x)
        return nn.LayerNorm(epsilon=1e-5, name="norm")(x) @ tokens.T  # [B, T, V]


gpt = GPT()
inputs, targets = batch_at(0)
rung_9 = jax.jit(gpt.init)(jax.random.key(0), inputs)["params"]

# %% [markdown]
# ## The same numbers under other names
#
# The package is told what a model is by a `ModelConfig`, and makes its parameters by `gptjax.init`:

# %%
config = gptjax.ModelConfig(
    n_layer=2, n_head=4, n_embd=64, block_size=block_size, vocab_size=vocab_size, dtype="float32"
)
shapes = jax.eval_shape(lambda key: gptjax.init(config, key), jax.random.key(0))
for path, array in jax.tree_util.tree_leaves_with_path(shapes):
    print(f"{jax.tree_util.keystr(path, simple=True, separator='/'):22} {array.shape}")

# %% [markdown]
# Three differences:
#
# - the names are GPT-2's own: `wte` for the token embedding, `wpe` for the positions, `h` for the
#   blocks, `c_fc` for the layer that expands;
# - query, key and value are one matrix `c_attn`, [C, 3 C]: one large product instead of three;
# - the blocks are not side by side but stacked, with an axis for the layer in front. So JAX
#   compiles one block and can run it in a loop: 96 layers compile as fast as two.
#
# To carry our numbers over is to rename, to put side by side, and to stack:


# %%
def to_package(params):
    """The parameters of rung 9 as those of `gptjax`."""

    def block(p):
        q, k, v = (p["attention"][name] for name in ("query", "key", "value"))
        joined = {name: jnp.concatenate([q[name], k[name], v[name]], axis=-1) for name in q}
        return {
            "ln_1": p["norm_1"],
            "attn": {"c_attn": joined, "c_proj": p["attention"]["projection"]},
            "ln_2": p["norm_2"],
            "mlp": {"c_fc": p["mlp"]["expand"], "c_proj": p["mlp"]["contract"]},
        }

    blocks = [block(params[f"block_{i}"]) for i in range(config.n_layer)]
    return {
        "wte": params["token_embedding"],
        "wpe": params["position_embedding"],
        "h": jax.tree.map(lambda *layers: jnp.stack(layers), *blocks),
        "ln_f": params["norm"],
    }


package = to_package(rung_9)
print("the same shapes:", jax.tree.map(jnp.shape, package) == jax.tree.map(jnp.shape, shapes))

# %% [markdown]
# ## The same logits


# %%
@jax.jit
def ours(params, inputs):
    return gpt.apply({"params": params}, inputs)


@jax.jit
def packages(params, inputs):
    return gptjax.apply(config, params, inputs)[0]


a, b = ours(rung_9, inputs), packages(package, inputs)
print(a.shape, b.shape, "equal within 1e-5:", jnp.allclose(a, b, atol=1e-5))

# %% tags=["numbers-vary"]
print(f"largest difference {jnp.abs(a - b).max():.1e}, largest logit {jnp.abs(a).max():.2f}")

# %% [markdown]
# Why not equal to the last bit? A float32 number has about 7 digits. A sum rounds after each
# term, so another order of the same terms ends in another last digit, and one matrix instead of
# three sums in another order. The largest difference is less than a millionth of the largest logit:
# rounding, and nothing else.
#
# ## The same training
#
# Both models train from these numbers, on the same batches. Ours by Adam from optax, as on all
# rungs:

# %%
steps = 1000


def rate(step):
    return 1e-2 * jnp.minimum((step + 1) / 101, (steps - step) / (steps - 100))


optimizer = optax.adam(rate)


@jax.jit
def our_step(params, state, inputs, targets):
    def loss(params):
        return cross_entropy(gpt.apply({"params": params}, inputs), targets)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, value


# %% [markdown]
# The package is told what an experiment is by a `TrainConfig`. It holds smaller configs: `model` is
# the `ModelConfig` from above, `optimizer` an `OptimizerConfig`. We ask for the same plain Adam: no
# weight decay, no clipping, a warm-up of 100 steps, then the rate in a straight line to 0.

# %%
experiment = gptjax.TrainConfig(
    model=config,
    optimizer=gptjax.OptimizerConfig(
        learning_rate=1e-2, min_lr=0.0, lr_schedule="linear", warmup_steps=100,
        beta1=0.9, beta2=0.999, weight_decay=0.0, grad_clip=0.0,
    ),
    batch_size=16,
    max_steps=steps,
)  # fmt: skip
print(experiment.model.n_layer, "blocks;", experiment.optimizer.kind, "for", experiment.max_steps)

# %% [markdown]
# Its `train_step` takes a state (the number of steps, the parameters, Adam's averages), a batch and
# the experiment, and returns the next state.

# %%
package_step = jax.jit(lambda state, batch: train_step.train_step(state, batch, experiment))

params, state = rung_9, optimizer.init(rung_9)
theirs = train_step.TrainState(jnp.int32(0), package, optim.optimizer(experiment).init(package))
losses, seconds = np.zeros((steps, 2)), 0.0
for step in range(steps):
    inputs, targets = batch_at(step)
    params, state, value = our_step(params, state, inputs, targets)
    # The package takes inputs and targets as one array of windows, [1, B, T + 1].
    windows = np.concatenate([inputs, targets[:, -1:]], axis=1)[None]
    losses[step, 0] = value  # waits for the step
    start = time.perf_counter()
    theirs, metrics = package_step(theirs, train_step.whole_batch(windows.astype(np.int32)))
    losses[step, 1] = metrics["train_loss"]
    seconds += time.perf_counter() - start

print("step  rung 9   package")
for step in (0, 1, 2, 10, 100, 999):
    print(f"{step:4}  {losses[step, 0]:.4f}  {losses[step, 1]:.4f}")
apart = np.abs(losses[:, 0] - losses[:, 1])
print("equal within 1e-5 for the first 50 steps:", bool((apart[:50] < 1e-5).all()))

# %% tags=["numbers-vary"]
for first, last in ((0, 10), (10, 50), (50, 200), (200, 1000)):
    print(f"steps {first} to {last}: largest difference {apart[first:last].max():.1e}")

# %% [markdown]
# The curves are one curve. The differences grow slowly, since each step begins where the last one
# ended, a rounding apart. At the end:

# %%
loss = validation_loss(packages, theirs.params)
size = config.num_parameters()
print(f"rung 9's model: validation loss {validation_loss(ours, params):.2f}")
print(f"the package's:  validation loss {loss:.2f}")

# %% [markdown]
# ## The ladder
#
# Here are all rungs. The losses of the first nine are read from the outputs of the notebooks
# beside this one.

# %%
RESULT = r"([\d,]+) parameters, validation loss ([\d.]+) nats per letter, after ([\d.]+ s)"
print("rung                parameters   loss  trained for")
for path in sorted(Path().glob("0[1-9]_*.ipynb")):
    cells = json.loads(path.read_text())["cells"]
    printed = [o["text"] for c in cells for o in c.get("outputs", []) if "text" in o]
    *_, (parameters, found, trained) = re.findall(RESULT, "".join("".join(p) for p in printed))
    print(f"{path.stem:19} {parameters:>10}  {found}  {trained:>7}")
print(f"{'10_package':19} {size:>10,}  {loss:.3f}  {seconds:5.1f} s")

# %% [markdown]
# ## What the package adds
#
# - **A better recipe**: decay of the weights, clipping, or
#   [Muon](https://kellerjordan.github.io/posts/muon/). Adam scales each number of a matrix by
#   itself; Muon takes the matrix as a whole, and makes its step about equally large in all
#   directions.
# - **Runs**: checkpoints, resuming bit for bit after a kill, `metrics.jsonl`, samples as it
#   trains.
# - **Speed and size**: attention that skips what is masked, and a loss that never holds all logits.
#   bfloat16, a number in 2 bytes instead of 4: the range of float32 with 2 to 3 digits instead of
#   7. Recomputation: what the backward pass needs is computed again there instead of kept, which
#   costs time and saves memory.
# - **Devices**: `pmap`, `shard_map` or fully sharded, on many hosts (`13_devices.py`).
# - **Sampling** with a key/value cache (`11_sampling.py`), **PyTorch** beside it
#   (`12_pytorch.py`), and **GPT-2's weights** (`14_gpt2.py`).
#
# All of it is behind one call. The same network, as many steps of as many letters, with Muon:

# %%
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    Path("text.txt").write_text(read_text())
    experiment = experiment.replace(
        data=gptjax.DataConfig(source="text.txt"),
        optimizer=gptjax.OptimizerConfig(
            kind="muon", learning_rate=8e-3, muon_learning_rate=0.03, min_lr=0.0,
            warmup_steps=20, lr_schedule="linear", beta1=0.8, beta2=0.95,
        ),
    )  # fmt: skip
    runtime = gptjax.RuntimeConfig(eval_interval=steps, sample_tokens=0)
    run = gptjax.train(experiment, "run", runtime=runtime)
    assert run.tokenizer.characters == "".join(characters)
    print(run)
    print(f"validation loss {validation_loss(packages, run.params):.2f}")

# %% [markdown]
# From the command line that is `gptjax train`, and `gptjax train --help` explains each setting.
#
# **Exercise.** Set `vocab_multiple=64` in `ModelConfig`: the package's table then has 128 rows for
# 65 letters. The matrix units of GPUs and TPUs work on tiles, of 64 or 128 rows say, and a tile
# that is nearly empty takes as long as a full one. So `to_package` must add 63 rows of zeros to
# ours: `"wte": jnp.pad(params["token_embedding"], ((0, 63), (0, 0)))`. *What to expect:* another
# shape, the same logits and losses up to rounding, because the rows that are not used get no
# probability.
