# %% [markdown]
# # 13. Eight devices are one
#
# **Idea:** each device has the whole model and an eighth of the batch; after each step they take
# the mean of their gradients, and stay equal.
#
# **In a tutorial:** seldom; it is what makes large models possible.
#
# You need no eight chips: JAX can make eight devices of one processor. They are slow, but they
# compute what eight chips would. (This must be asked for before JAX starts: restart the kernel to
# change it.)

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
from ladder import batch_at, block_size, vocab_size

import gptjax
from gptjax import train_step
from gptjax.devices.strategy import get_strategy

jax.config.update("jax_platforms", "cpu")  # on a machine with a GPU or TPU too
jax.config.update("jax_num_cpu_devices", 8)
print(f"{jax.device_count()} devices of the kind {jax.devices()[0].platform}")

# %% [markdown]
# ## pmap
#
# `jax.pmap` runs a function on every device at once. Its inputs have one more axis in front, with
# a slice for each device. `pmean` takes the mean over devices; each gets the result. By hand: the
# mean of 1 to 8 is 4.5.

# %%
numbers = jnp.arange(1.0, 9.0)  # [8], one number a device
mean = jax.pmap(lambda x: jax.lax.pmean(x, "devices"), axis_name="devices")
print(mean(numbers))

# %% [markdown]
# ## Why the mean of gradients is right
#
# The loss of a batch of 16 is the mean of the losses of its 8 pairs, and the gradient of a mean
# is the mean of the gradients. So eight devices that take two chunks each and average their
# gradients have the gradient of all sixteen.

# %%
config = gptjax.ModelConfig(
    n_layer=1, n_head=4, n_embd=64, block_size=block_size, vocab_size=vocab_size, dtype="float32"
)
params = jax.jit(gptjax.init, static_argnums=0)(config, jax.random.key(0))


def windows_at(step):
    """int32 [B, T + 1]: inputs and targets as one array, as the package takes them."""
    inputs, targets = batch_at(step)
    return np.concatenate([inputs, targets[:, -1:]], axis=1).astype(np.int32)


def gradients(params, windows):
    return jax.grad(lambda p: train_step.loss(p, windows, config))(params)


def averaged(params, windows):
    return jax.lax.pmean(gradients(params, windows), "devices")


windows = windows_at(0)
one = jax.jit(gradients)(params, windows)
shared = windows.reshape(8, 2, -1)  # [8 devices, 2 chunks, T + 1]
eight = jax.pmap(averaged, axis_name="devices", in_axes=(None, 0))(params, shared)
one, eight = jax.device_get((one, eight))  # as numpy's
print("wte's gradient on one device", one["wte"].shape, "and on eight", eight["wte"].shape)


def equal(a, b):
    """Within a hundred-thousandth of the largest number."""
    return np.abs(a - b).max() < 1e-5 * np.abs(a).max()


print("all devices have the same:", all((x == x[0]).all() for x in jax.tree.leaves(eight)))
found = [equal(a, b[0]) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True)]
print(f"{sum(found)} of {len(found)} gradients are those of one device")

# %% [markdown]
# ## Training on eight, and on one
#
# Since all begin with the same parameters and take the same step, they stay the same: nothing but
# gradients is ever sent. The package wraps this in a strategy. It is given its devices, so we can
# train the same experiment twice, on the first device only and on all eight; with dropout too,
# whose masks follow from the seed, the step and the chunk's number, and not from where it is
# computed.

# %%
experiment = gptjax.TrainConfig(
    model=config.replace(dropout=0.1),
    optimizer=gptjax.OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
    batch_size=16,
    max_steps=100,
)


def train(devices, kind="pmap"):
    """The losses of 20 steps, float [20]."""
    strategy = get_strategy(kind, devices)
    state = strategy.to_devices(strategy.initialise(lambda: train_step.init_state(experiment)))
    step = strategy.map_train_step(functools.partial(train_step.train_step, config=experiment))
    losses = []
    for number in range(20):
        state, metrics = step(state, windows_at(number))
        losses.append(float(np.ravel(metrics["train_loss"])[0]))
    return np.array(losses)


on_one, on_eight = train(jax.devices()[:1]), train(jax.devices())
print("step  1 device  8 devices")
for step in (0, 1, 10, 19):
    print(f"{step:4}  {on_one[step]:.4f}    {on_eight[step]:.4f}")
print("all losses equal within 1e-4:", bool((np.abs(on_one - on_eight) < 1e-4).all()))

# %% [markdown]
# They are not equal to the last bit, because a sum over devices rounds in another order.
#
# ## Other ways to share
#
# `shard_map` does the same by JAX's newer interface. With `fsdp` (fully sharded data parallelism)
# each device keeps only an eighth of the parameters, and collects the rest of a layer when it is
# needed: for models that one device cannot hold. The numbers are the same.

# %%
sharded = train(jax.devices(), "fsdp")
print("fsdp equal within 1e-4:", bool((np.abs(sharded - on_one) < 1e-4).all()))

# %% [markdown]
# From the command line: `gptjax train --num-devices 8` makes eight devices of a processor; on a
# machine with eight chips nothing needs to be said, and `--strategy fsdp` shares the parameters
# out.
#
# **Exercise.** Leave `pmean` out of `averaged`. *What to expect:* `all devices have the same:
# False`, and `0 of 16 gradients`: each device has a gradient of its own two chunks. Trained so, the
# eight copies would drift apart, and nothing would say so. The training below does not change: the
# package's step has a `pmean` of its own.
