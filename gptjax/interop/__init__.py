"""Models of Hugging Face and nanoGPT, into runs of gptjax and back."""
