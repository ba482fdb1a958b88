"""Commands of gptjax 0.1 under their old names: `python -m gptjax.convert`, and so on."""
