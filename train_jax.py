"""Train a GPT: python train_jax.py [CONFIG] [--flags]; the same as `gptjax train`.

Without CONFIG: configs/quickstart.py, or the run's own settings where --run-dir names a run that
exists. A run that exists is resumed.
"""

from gptjax import program

if __name__ == "__main__":
    program.end_on_interrupt()
    from gptjax.commands import process, train

    process.start(train.main, "python train_jax.py")
