"""python -m gptjax.compare of gptjax 0.1."""

from gptjax.commands.main import moved

if __name__ == "__main__":
    moved("compare")
