"""Text, tokenizers, prepared token files, and the batches that are drawn from them."""
