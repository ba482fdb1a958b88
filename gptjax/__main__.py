"""python -m gptjax: the same as the command gptjax."""

from gptjax.commands.main import main

if __name__ == "__main__":
    main()
