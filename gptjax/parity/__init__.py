"""Do we compute what PyTorch computes? Needs PyTorch: without it, importing this is a UserError."""

import importlib.util

from gptjax.errors import UserError

if importlib.util.find_spec("torch") is None:
    raise UserError("the comparison with PyTorch needs it: pip install -r requirements-torch.txt")
