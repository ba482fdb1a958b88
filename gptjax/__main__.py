"""python -m gptjax, and the command gptjax."""

from gptjax import program


def main() -> None:
    """Run the command that the arguments name; does not return."""
    program.end_on_interrupt()
    from gptjax.commands.main import main

    main()


if __name__ == "__main__":
    main()
