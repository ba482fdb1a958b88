"""Sample from a trained run: python generate_jax.py [RUN] --prompt "def "; the same as
`gptjax generate`."""

from gptjax import program

if __name__ == "__main__":
    program.end_on_interrupt()
    from gptjax.commands import generate, process

    process.start(generate.main, "python generate_jax.py")
