"""Our parameters under PyTorch's names, and back.

Hugging Face's GPT-2 and nanoGPT name their tensors alike (`transformer.h.0.attn.c_attn.weight`).
They differ in the layout of linear weights: Hugging Face's Conv1D stores [in, out], as Flax does;
nanoGPT's nn.Linear stores [out, in].
"""

import re
from collections.abc import Callable, Mapping
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

# Older files carry the causal mask along.
_BUFFER = re.compile(r"transformer\.h\.(\d{1,9})\.attn\.(bias|masked_bias)")
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

    def norm(name: str, layer: int | None) -> None:
        path = tuple(part for part in name.split(".") if not part.isdigit())
        found[f"{PREFIX}{name}.weight"] = Parameter((*path, "scale"), layer, (c,), False)
        if config.bias:
            found[f"{PREFIX}{name}.bias"] = Parameter((*path, "bias"), layer, (c,), False)

    def linear(name: str, layer: int, shape: tuple[int, int], bias: bool) -> None:
        path, full, swap = ("h", *name.split(".")), f"{PREFIX}h.{layer}.{name}", layout == "out_in"
        torch_shape = shape[::-1] if swap else shape
        found[f"{full}.weight"] = Parameter((*path, "kernel"), layer, torch_shape, swap)
        if bias:
            found[f"{full}.bias"] = Parameter((*path, "bias"), layer, shape[1:], False)

    found[EMBEDDING] = Parameter(("wte",), None, (rows, c), False)
    if config.position == "learned":
        found[f"{PREFIX}wpe.weight"] = Parameter(("wpe",), None, (config.block_size, c), False)
    for i in range(config.n_layer):
        norm(f"h.{i}.ln_1", i)
        linear("attn.c_attn", i, (c, 3 * c), config.use_qkv_bias)
        linear("attn.c_proj", i, (c, c), config.bias)
        norm(f"h.{i}.ln_2", i)
        linear("mlp.c_fc", i, (c, 4 * c), config.bias)
        linear("mlp.c_proj", i, (4 * c, c), config.bias)
    if config.n_layer:
        norm("ln_f", None)
    if not config.tied_head:
        found[HEAD] = Parameter(("lm_head",), None, (rows, c), False)
    return found


class Stored(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Is called once at most."""


def from_torch(
    tensors: Mapping[str, Stored], config: ModelConfig, layout: Layout, where: str
) -> Any:
    """Our parameters, float32 numpy arrays, from a state dict; `where` names its source in errors.

    Names may come with or without `transformer.`, and with the prefixes of torch.compile and
    DataParallel. Memory holds one copy of the parameters and one tensor of the file at a time.

    Raises:
        UserError: tensors are missing, left over, there twice, of the wrong shape, not
            floating-point or not finite (the message names them); or a tied head differs from the
            embedding.
    """
    spelled: dict[str, str] = {}  # by name without wrappers and with the prefix
    for name in tensors:
        plain = _WRAPPER.sub("", name)
        plain = plain if plain == HEAD or plain.startswith(PREFIX) else PREFIX + plain
        if plain in spelled:
            raise UserError(f"{where} holds {name} and {spelled[plain]}: one tensor twice")
        spelled[plain] = name
    for name in [name for name in spelled if _BUFFER.fullmatch(name)]:
        file_name = spelled.pop(name)
        if not _is_computed_anyway(name, tensors[file_name], config):
            size = list(tensors[file_name].shape)
            raise UserError(f"{where}: {file_name} {size} is not a causal mask of this model")
    if config.n_layer > len(spelled):
        raise UserError(
            f"{where} holds {len(tensors)} tensors: too few for {config.n_layer} layers"
        )
    wanted = torch_parameters(config, layout)
    head = spelled.pop(HEAD, None) if config.tied_head else None
    problems = [
        _listed("missing", [name for name in wanted if name not in spelled]),
        _listed("left over", [spelled[name] for name in spelled if name not in wanted]),
        _listed("wrongly shaped", [
            f"{spelled[name]} {list(shape)} instead of {list(parameter.shape)}"
            for name, parameter in wanted.items()
            if name in spelled and (shape := tensors[spelled[name]].shape) != parameter.shape
        ]),
    ]  # fmt: skip
    if any(problems):
        problems = list(filter(None, problems))
        raise UserError(f"{where} does not hold this model's tensors; {'; '.join(problems)}")

    params: dict[tuple[str, ...], np.ndarray] = {}
    for name, parameter in wanted.items():
        array = _floats(tensors[spelled[name]], spelled[name], where)
        array = array.T if parameter.transposed else array
        path, layer = parameter.path, parameter.layer
        if layer is None:
            params[path] = np.ascontiguousarray(array, np.float32)
        else:
            if path not in params:
                params[path] = np.empty((config.n_layer, *array.shape), np.float32)
            params[path][layer] = array
    if head and not np.array_equal(_floats(tensors[head], head, where), params[("wte",)]):
        raise UserError(
            f"{where}: {head} differs from the token embedding, but the settings say that they are"
            " one; for two, set tie_word_embeddings to false in config.json"
        )
    return unflatten_dict(params)


def _is_computed_anyway(name: str, tensor: Stored, config: ModelConfig) -> bool:
    """Whether a buffer of an older file is a layer's causal mask, or the value that fills it."""
    _, _, layer, _, kind = name.split(".")
    if int(layer) >= config.n_layer or kind == "masked_bias":
        return int(layer) < config.n_layer
    if len(tensor.shape) != 4 or tensor.shape != (1, 1, tensor.shape[-1], tensor.shape[-1]):
        return False
    return np.array_equal(tensor.read()[0, 0] != 0, np.tri(tensor.shape[-1], dtype=bool))


def _listed(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
    return f"{kind}: {', '.join(names[:NAMES_LISTED])}{more}" if names else ""


def _floats(tensor: Stored, name: str, where: str) -> np.ndarray:
    array = tensor.read()
    if array.dtype.name not in FLOATS:
        raise UserError(f"{where}: {name} holds {array.dtype.name}; expected {', '.join(FLOATS)}")
    # The sum is not finite if any value is not; it may also overflow, so look again.
    if not np.isfinite(array.sum(dtype=np.float64)) and not np.isfinite(array).all():
        raise UserError(f"{where}: {name} holds values that are not finite; the file is damaged")
    return array


def without_zeros(params: Any, smaller: ModelConfig) -> Any | None:
    """`params` without those that the model `smaller` does not have; None if one of these is not
    zero, so that the two are not the same function."""
    flat = flatten_dict(params)
    kept = {parameter.path for parameter in torch_parameters(smaller, "in_out").values()}
    if any(array.any() for path, array in flat.items() if path not in kept):
        return None
    return unflatten_dict({path: array for path, array in flat.items() if path in kept})


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
