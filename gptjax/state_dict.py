"""Our parameters under PyTorch's names, and back. numpy only.

Hugging Face's GPT-2 and nanoGPT name their tensors alike (`transformer.h.0.attn.c_attn.weight`).
They differ in the layout of linear weights: Hugging Face's Conv1D has [in, out], as Flax has;
nanoGPT's nn.Linear has [out, in].
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError

Layout = Literal["in_out", "out_in"]
"""Of linear weights: Hugging Face's, or torch.nn.Linear's and nanoGPT's."""

PREFIX = "transformer."
HEAD = "lm_head.weight"
# Read as they are; every value of them is a float32 too.
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# The causal mask, which older files carry along; torch.compile's and DataParallel's wrappers.
_BUFFER = re.compile(r"transformer\.h\.(\d{1,9})\.attn\.(bias|masked_bias)")
_WRAPPER = re.compile(r"^(_orig_mod\.|module\.)+")
# How many names one error lists.
NAMED = 5


class Place(NamedTuple):
    """Where one PyTorch tensor lives in our tree."""

    path: tuple[str, ...]
    layer: int | None
    """Its index along the leading axis of a stacked block parameter."""
    shape: tuple[int, ...]
    """PyTorch's."""
    transposed: bool


def places(config: ModelConfig, layout: Layout) -> dict[str, Place]:
    """Every trained tensor of the model by its PyTorch name, in nanoGPT's order."""
    c = config.n_embd
    swap = layout == "out_in"

    def norm(name: str, path: tuple[str, ...], layer: int | None) -> Iterator[tuple[str, Place]]:
        yield f"{name}.weight", Place((*path, "scale"), layer, (c,), False)
        if config.bias:
            yield f"{name}.bias", Place((*path, "bias"), layer, (c,), False)

    def linear(
        name: str, path: tuple[str, ...], layer: int, size: tuple[int, int], bias: bool
    ) -> Iterator[tuple[str, Place]]:
        shape = size[::-1] if swap else size
        yield f"{name}.weight", Place((*path, "kernel"), layer, shape, swap)
        if bias:
            yield f"{name}.bias", Place((*path, "bias"), layer, size[1:], False)

    def everything() -> Iterator[tuple[str, Place]]:
        rows = config.padded_vocab_size
        yield f"{PREFIX}wte.weight", Place(("wte",), None, (rows, c), False)
        if config.position == "learned":
            yield f"{PREFIX}wpe.weight", Place(("wpe",), None, (config.block_size, c), False)
        for i in range(config.n_layer):
            h = f"{PREFIX}h.{i}."
            yield from norm(f"{h}ln_1", ("h", "ln_1"), i)
            c_attn, c_proj = ("h", "attn", "c_attn"), ("h", "attn", "c_proj")
            yield from linear(f"{h}attn.c_attn", c_attn, i, (c, 3 * c), config.use_qkv_bias)
            yield from linear(f"{h}attn.c_proj", c_proj, i, (c, c), config.bias)
            yield from norm(f"{h}ln_2", ("h", "ln_2"), i)
            yield from linear(f"{h}mlp.c_fc", ("h", "mlp", "c_fc"), i, (c, 4 * c), config.bias)
            yield from linear(f"{h}mlp.c_proj", ("h", "mlp", "c_proj"), i, (4 * c, c), config.bias)
        if config.n_layer:
            yield from norm(f"{PREFIX}ln_f", ("ln_f",), None)
        if not config.tied_head:
            yield HEAD, Place(("lm_head",), None, (rows, c), False)

    return dict(everything())


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    def names(self) -> Iterable[str]:
        """In the file's own spelling; a name may come twice."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """float32, float16 or bfloat16; each is asked for once."""
        ...


def from_torch(tensors: Tensors, config: ModelConfig, layout: Layout, where: str) -> Any:
    """Our parameters (float32 numpy arrays) out of a state dict; `where` names it in errors.

    Names may come with or without `transformer.`, and with torch.compile's prefix. Holds one copy
    of the parameters and one tensor of the file at a time.

    Raises:
        UserError: keys that are missing, left over, duplicate or wrongly shaped (by name), tensors
            that are not floating-point or not finite, a tied head unlike its embedding.
    """
    names = _resolve(tensors.names(), where)
    for name in [name for name in names if _BUFFER.fullmatch(name)]:
        _check_buffer(tensors, name, names.pop(name), config, where)
    if config.n_layer > len(names):
        raise UserError(f"{where} holds {len(names)} tensors: too few for {config.n_layer} layers")
    wanted = places(config, layout)
    extra_head = config.tied_head and HEAD in names
    problems = [
        _listed("missing", [name for name in wanted if name not in names]),
        _listed(
            "left over",
            [names[n] for n in names if n not in wanted and not (n == HEAD and extra_head)],
        ),
    ]
    misshaped = []
    for name, place in wanted.items():
        if name in names and tensors.shape(names[name]) != place.shape:
            found = list(tensors.shape(names[name]))
            misshaped.append(f"{names[name]} {found} instead of {list(place.shape)}")
    problems.append(_listed("wrongly shaped", misshaped))
    if any(problems):
        raise UserError(
            f"{where} does not hold this model's tensors; " + "; ".join(filter(None, problems))
        )

    params: dict[str, Any] = {}
    for name, place in wanted.items():
        array = _floats(tensors.read(names[name]), names[name], where)
        array = array.T if place.transposed else array
        node = params
        for key in place.path[:-1]:
            node = node.setdefault(key, {})
        if place.layer is None:
            node[place.path[-1]] = np.ascontiguousarray(array, np.float32)
        else:
            stack = node.setdefault(
                place.path[-1], np.empty((config.n_layer, *array.shape), np.float32)
            )
            stack[place.layer] = array
    if extra_head:
        head = _floats(tensors.read(names[HEAD]), names[HEAD], where)
        if not np.array_equal(head, params["wte"]):
            raise UserError(
                f"{where}: {names[HEAD]} differs from the token embedding, but the settings say"
                " that they are one; for two, set tie_word_embeddings to false in config.json"
            )
    return params


def _resolve(found: Iterable[str], where: str) -> dict[str, str]:
    """Our spelling of every name -> the file's."""
    names: dict[str, str] = {}
    for name in found:
        plain = _WRAPPER.sub("", name)
        if plain != HEAD and not plain.startswith(PREFIX):
            plain = PREFIX + plain
        if plain in names:
            other = f" and {names[plain]}" if names[plain] != name else ""
            raise UserError(f"{where} holds {name}{other} twice")
        names[plain] = name
    return names


def _check_buffer(
    tensors: Tensors, name: str, spelled: str, config: ModelConfig, where: str
) -> None:
    """What older files carry along must be what we compute anyway: a causal mask and its fill."""
    found = _BUFFER.fullmatch(name)
    assert found is not None
    shape = tensors.shape(spelled)
    causal = shape[:2] == (1, 1) and len(shape) == 4 and shape[2] == shape[3]
    if found[2] == "bias" and causal:
        mask = np.asarray(tensors.read(spelled), np.float32)[0, 0] != 0
        causal = np.array_equal(mask, np.tri(len(mask), dtype=bool))
    if int(found[1]) >= config.n_layer or (found[2] == "bias" and not causal):
        raise UserError(f"{where}: {spelled} {list(shape)} is not a causal mask of this model")


def _listed(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{kind}: {', '.join(names[:NAMED])}{more}" if names else ""


def _floats(array: np.ndarray, name: str, where: str) -> np.ndarray:
    if array.dtype.name not in FLOATS:
        raise UserError(f"{where}: {name} holds {array.dtype.name}; expected {', '.join(FLOATS)}")
    # The sum is not finite if any value is not; it may also overflow, so look again.
    if not np.isfinite(array.sum(dtype=np.float64)) and not np.isfinite(array).all():
        raise UserError(f"{where}: {name} holds values that are not finite; the file is damaged")
    return array


def without_zeros(params: Any, config: ModelConfig, bare: ModelConfig) -> Any | None:
    """`params` of `config` less those that the model `bare` does not have; None if any of them is
    not zero: then they are not the same function."""
    kept = set(places(bare, "in_out"))
    tensors = to_torch(params, config, "in_out")
    if any(array.any() for name, array in tensors.items() if name not in kept):
        return None
    out: dict[str, Any] = {}
    for place in places(bare, "in_out").values():
        node, source = out, params
        for key in place.path[:-1]:
            node, source = node.setdefault(key, {}), source[key]
        node[place.path[-1]] = source[place.path[-1]]
    return out


def to_torch(
    params: Any, config: ModelConfig, layout: Layout, *, padding: bool = True
) -> dict[str, np.ndarray]:
    """The state dict of our parameters, as float32 arrays that share their memory where the layout
    allows. A tied head is not in it: it is the embedding. Without `padding`, the embedding's
    padded rows are left out: they have no logits with us, but would have in PyTorch."""

    def at(place: Place) -> np.ndarray:
        node = params
        for key in place.path:
            node = node[key]
        array = np.asarray(node)
        array = array if place.layer is None else array[place.layer]
        if place.path in (("wte",), ("lm_head",)) and not padding:
            array = array[: config.vocab_size]
        return np.ascontiguousarray(array.T if place.transposed else array)

    return {name: at(place) for name, place in places(config, layout).items()}
