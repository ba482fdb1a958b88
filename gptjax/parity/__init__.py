"""Do we compute what PyTorch computes? Needs PyTorch: without it, importing this is a UserError."""

from gptjax.interop.tensor_files import optional

optional("torch", "the comparison with PyTorch")
