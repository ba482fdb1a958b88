"""Our parameters under PyTorch's names, and back.

Hugging Face's GPT-2 and nanoGPT name their tensors alike (`transformer.h.0.attn.c_attn.weight`).
They differ in the layout of linear weights: Hugging Face's Conv1D stores [in, out], as Flax does;
nanoGPT's nn.Linear stores [out, in].
"""

import re
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax.config import ModelConfig
from gptjax.errors import UserError

Layout = Literal["in_out", "out_in"]
"""Axes of linear weights: Hugging Face's, or those of nanoGPT and torch.nn.Linear."""

PREFIX = "transformer."
EMBEDDING = f"{PREFIX}wte.weight"
HEAD = "lm_head.weight"
NAMES_LISTED = 5
"""How many tensors one error message names."""

FLOATS = ("float32", "float16", "bfloat16")
"""Every value of these types is a float32 too."""

# Older files carry the causal mask along, and the value that fills it.
_BUFFER = re.compile(r"transformer\.h\.(\d{1,9})\.attn\.(masked_)?bias")
# Prefixes added by torch.compile and DataParallel.
_WRAPPER = re.compile(r"^(_orig_mod\.|module\.)+")


class Parameter(NamedTuple):
    """Where one PyTorch tensor lives in our parameter tree."""

    path: tuple[str, ...]
    layer: int | None
    """Index along the leading axis of a parameter that is stacked over the blocks."""
    shape: tuple[int, ...]
    """In PyTorch."""
    transposed: bool


def torch_parameters(config: ModelConfig, layout: Layout) -> dict[str, Parameter]:
    """Every trained tensor of the model by its PyTorch name, in nanoGPT's order."""
    c, rows = config.n_embd, config.padded_vocab_size
    found: dict[str, Parameter] = {}

    def add(name: str, *shape: int, bias: bool, layer: int | None = None) -> None:
        """A linear layer, or a LayerNorm, whose weight has one axis."""
        path = tuple(part for part in name.split(".") if not part.isdigit())
        linear = len(shape) == 2
        swap = linear and layout == "out_in"
        weight, in_torch = (*path, "kernel" if linear else "scale"), shape[::-1] if swap else shape
        found[f"{PREFIX}{name}.weight"] = Parameter(weight, layer, in_torch, swap)
        if bias:
            found[f"{PREFIX}{name}.bias"] = Parameter((*path, "bias"), layer, shape[-1:], False)

    found[EMBEDDING] = Parameter(("wte",), None, (rows, c), False)
    if config.position == "learned":
        found[f"{PREFIX}wpe.weight"] = Parameter(("wpe",), None, (config.block_size, c), False)
    for i in range(config.n_layer):
        add(f"h.{i}.ln_1", c, bias=config.bias, layer=i)
        add(f"h.{i}.attn.c_attn", c, 3 * c, bias=config.use_qkv_bias, layer=i)
        add(f"h.{i}.attn.c_proj", c, c, bias=config.bias, layer=i)
        add(f"h.{i}.ln_2", c, bias=config.bias, layer=i)
        add(f"h.{i}.mlp.c_fc", c, config.inner_size, bias=config.bias, layer=i)
        add(f"h.{i}.mlp.c_proj", config.inner_size, c, bias=config.bias, layer=i)
    if config.n_layer:
        add("ln_f", c, bias=config.bias)
    if not config.tied_head:
        found[HEAD] = Parameter(("lm_head",), None, (rows, c), False)
    return found


def from_torch(
    tensors: dict[str, np.ndarray], config: ModelConfig, layout: Layout, where: str
) -> Any:
    """Our parameters, float32 numpy arrays, from a state dict; `where` names its source in errors.

    Names may come with or without `transformer.`, and with the prefixes of torch.compile and
    DataParallel. `tensors` is emptied on the way, so that memory holds about one copy of all.

    Raises:
        UserError: tensors are missing, left over, there twice, of the wrong shape, not
            floating-point or not finite (the message names them); or a tied head differs from the
            embedding.
    """
    spelled: dict[str, str] = {}  # by name without wrappers and with the prefix
    for name, array in tensors.items():
        plain = _WRAPPER.sub("", name)
        plain = plain if plain == HEAD or plain.startswith(PREFIX) else PREFIX + plain
        if plain in spelled:
            raise UserError(f"{where} holds {name} and {spelled[plain]}: one tensor twice")
        buffer = _BUFFER.fullmatch(plain)
        # What we compute anyway is left out; another mask is left over below.
        if not buffer or int(buffer[1]) >= config.n_layer or not (buffer[2] or _is_causal(array)):
            spelled[plain] = name
    if config.n_layer > len(spelled):  # listing them would take long
        layers = config.n_layer
        raise UserError(f"{where} holds {len(tensors)} tensors: too few for {layers} layers")
    wanted = torch_parameters(config, layout)
    head = spelled.pop(HEAD, None) if config.tied_head else None
    problems = {
        "missing": [name for name in wanted if name not in spelled],
        "left over": [spelled[name] for name in spelled if name not in wanted],
        "wrongly shaped": [
            f"{spelled[name]} {list(shape)} instead of {list(parameter.shape)}"
            for name, parameter in wanted.items()
            if name in spelled and (shape := tensors[spelled[name]].shape) != parameter.shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{where} does not hold this model's tensors; {listed}")

    params: dict[tuple[str, ...], np.ndarray] = {}
    for name, (path, layer, _, transposed) in wanted.items():
        array = _floats(tensors.pop(spelled[name]), spelled[name], where)
        array = array.T if transposed else array
        if layer is None:
            params[path] = np.ascontiguousarray(array, np.float32)
        else:
            if path not in params:
                params[path] = np.empty((config.n_layer, *array.shape), np.float32)
            params[path][layer] = array
    if head and not np.array_equal(_floats(tensors.pop(head), head, where), params[("wte",)]):
        raise UserError(
            f"{where}: {head} differs from the token embedding, but the settings say that they are"
            " one; for two, set tie_word_embeddings to false in config.json"
        )
    return unflatten_dict(params)


def _is_causal(mask: np.ndarray) -> bool:
    size = mask.shape[-1] if mask.ndim else 0
    same = mask.shape == (1, 1, size, size)
    return same and np.array_equal(mask[0, 0] != 0, np.tri(size, dtype=bool))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
    return f"{', '.join(names[:NAMES_LISTED])}{more}"


def _floats(array: np.ndarray, name: str, where: str) -> np.ndarray:
    if array.dtype.name not in FLOATS:
        raise UserError(f"{where}: {name} holds {array.dtype.name}; expected {', '.join(FLOATS)}")
    if not np.isfinite(array).all():
        raise UserError(f"{where}: {name} holds values that are not finite; the file is damaged")
    return array


def without_zeros(params: Any, smaller: ModelConfig) -> Any | None:
    """`params` without those that the model `smaller` does not have; None if one of these is not
    zero, so that the two are not the same function."""
    flat = flatten_dict(params)
    for path in flat.keys() - {p.path for p in torch_parameters(smaller, "in_out").values()}:
        if flat.pop(path).any():
            return None
    return unflatten_dict(flat)


def to_torch(
    params: Any, config: ModelConfig, layout: Layout, *, padding: bool = True
) -> dict[str, np.ndarray]:
    """The state dict of our parameters: float32 arrays, which share their memory where the layout
    allows it. A tied head is not in it: it is the embedding. `padding` False leaves out the
    embedding's padded rows: they have no logits here, but would have in PyTorch."""
    flat, out = {path: np.asarray(x) for path, x in flatten_dict(params).items()}, {}
    for name, parameter in torch_parameters(config, layout).items():
        array = flat[parameter.path]
        array = array if parameter.layer is None else array[parameter.layer]
        if name in (EMBEDDING, HEAD) and not padding:
            array = array[: config.vocab_size]
        out[name] = np.ascontiguousarray(array.T if parameter.transposed else array)
    return out
