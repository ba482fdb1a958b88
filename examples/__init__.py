"""The ladder: notebooks that build the GPT of gptjax, rung by rung."""
