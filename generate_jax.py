"""Sample from a trained run: python generate_jax.py [RUN] --prompt "def "; the same as
`gptjax generate`."""

import sys

from gptjax.commands import generate, main

if __name__ == "__main__":
    sys.exit(main.run(generate.main, "python generate_jax.py"))
