"""Files of tensors: every value back, and nothing but a clear error out of a bad one."""

import json
import os
import struct

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import weights
from gptjax.errors import UserError

DRAW = np.random.default_rng(0)
ARRAYS = {
    name: DRAW.standard_normal(shape, np.float32)
    for name, shape in {"a": (3, 4), "b.weight": (5,), "c": (2, 2, 2), "d": (7,)}.items()
}
TENSORS = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
PARTS = [{name: TENSORS[name] for name in names} for names in (["a", "d"], ["b.weight", "c"])]
GARBAGE = settings(max_examples=300)


class Trap:
    """A pickle of it creates a file when it is read, unless reading runs nothing."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_parts(folder, stem, suffix, save):
    """Two shards and their index."""
    weight_map = {}
    for number, part in enumerate(PARTS, 1):
        name = f"{stem}-{number:05}-of-00002.{suffix}"
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map, f"{stem}.{suffix}")


def write_index(folder, weight_map, stem="model.safetensors"):
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))


WRITERS = {
    "safetensors": lambda f: safetensors.torch.save_file(TENSORS, f / "model.safetensors"),
    "sharded safetensors": lambda f: write_parts(
        f, "model", "safetensors", safetensors.torch.save_file
    ),
    "torch": lambda f: torch.save(TENSORS, f / "pytorch_model.bin"),
    "old torch": lambda f: torch.save(
        TENSORS, f / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "sharded torch": lambda f: write_parts(f, "pytorch_model", "bin", torch.save),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_kind_of_file_gives_the_names_shapes_and_values(tmp_path, write):
    write(tmp_path)
    tensors = weights.hugging_face_tensors(tmp_path)
    assert sorted(tensors.names()) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert tensors.shape(name) == array.shape
        found = tensors.read(name)
        assert found.dtype == np.float32 and np.array_equal(found, array)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_to_the_bit(tmp_path, kind, dtype):
    half = {"a": TENSORS["a"].to(dtype)}
    if kind == "torch":
        torch.save(half, tmp_path / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(half, tmp_path / "model.safetensors")
    found = weights.hugging_face_tensors(tmp_path).read("a")
    assert np.array_equal(found.astype(np.float32), half["a"].float().numpy())


def test_safetensors_come_before_pickles(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert sorted(weights.hugging_face_tensors(tmp_path).names()) == sorted(ARRAYS)


# ------------------------------------------------------------------------------ bad files


def refused(folder, *words):
    """Reading everything in the folder ends in one line with these words."""
    with pytest.raises(UserError) as error:
        tensors = weights.hugging_face_tensors(folder)
        for name in tensors.names():
            tensors.shape(name)
            tensors.read(name)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_folder_without_weights_is_refused(tmp_path):
    refused(tmp_path, "holds no weights", "model.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "old torch"])
@pytest.mark.parametrize("keep", [0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, kind, keep):
    WRITERS[kind](tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(tmp_path, str(path))


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, new):
    trap, path = tmp_path / "trap", tmp_path / "pytorch_model.bin"
    torch.save({"a": Trap(trap)}, path, _use_new_zipfile_serialization=new)
    refused(tmp_path, str(path), "mkdir", "not run")
    assert not trap.exists()
    torch.load(path, weights_only=False)  # it is a trap indeed
    assert trap.exists()


@pytest.mark.parametrize("content", [[], {"a": 3}, {"a": {"b": torch.ones(2)}}, torch.ones(2)])
def test_a_pickle_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "named tensors")


@pytest.mark.parametrize("tensor", [
    torch.ones(2).to_sparse(),
    torch.ones(2).to(torch.float8_e4m3fn),
    torch.ones(2, device="meta"),
], ids=["sparse", "float8", "meta"])  # fmt: skip
def test_a_torch_tensor_that_numpy_cannot_hold_is_refused_by_name(tmp_path, tensor):
    torch.save({"odd": tensor}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "odd")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../model.safetensors"}, ["../model.safetensors"]),
        ({"a": ".."}, [".."]),
        ({"a": "/etc/hostname"}, ["/etc/hostname"]),
        ({"a": "missing.safetensors"}, ["missing.safetensors"]),
        ({"a": ""}, ["not a file beside it"]),
        ({"a": "x\0"}, ["not a file beside it"]),
        ({"a": "x" * 300}, ["not a file beside it"]),
        ({"a": 3}, ["weight_map"]),
        ({"a": "part", "z": "part"}, ["different tensors", "z"]),
        ({}, []),
        (["a"], ["weight_map"]),
        (None, ["weight_map"]),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, weight_map, words):
    (tmp_path / "model").mkdir()
    for place in ("model.safetensors", "model/part"):
        safetensors.torch.save_file({"a": TENSORS["a"]}, tmp_path / place)
    write_index(tmp_path / "model", weight_map)
    if weight_map == {}:
        assert list(weights.hugging_face_tensors(tmp_path / "model").names()) == []
    else:
        refused(tmp_path / "model", *words)


def test_a_tensor_in_two_parts_comes_twice_or_is_refused(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        safetensors.torch.save_file({"a": TENSORS["a"], name: TENSORS["d"]}, tmp_path / name)
    write_index(tmp_path, {"a": "1.safetensors"} | {f"{i}.safetensors": f"{i}.safetensors"
                                                    for i in "12"})  # fmt: skip
    assert list(weights.hugging_face_tensors(tmp_path).names()).count("a") == 2
    (tmp_path / "model.safetensors.index.json").unlink()
    for name in ("1.bin", "2.bin"):
        torch.save({"a": TENSORS["a"]}, tmp_path / name)
    write_index(tmp_path, {"a": "1.bin", "b": "2.bin"}, "pytorch_model.bin")
    refused(tmp_path, "distinct named tensors")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", b"\xff", pytest.param("[" * 100_000, id="deep")]
)
def test_a_bad_json_file_is_a_clear_error(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, str(path))


def header_with(**tensor):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | tensor
    return json.dumps({"a": entry}).encode()


@pytest.mark.parametrize("dtype", ["F64", "I32", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "F4"])
def test_other_kinds_of_numbers_are_a_clear_error_or_given_as_they_are(tmp_path, dtype):
    header = header_with(dtype=dtype, shape=[64 // {"F4": 4, "F64": 64, "I32": 32, "C64": 64}.get(
        dtype, 8)])  # fmt: skip
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    try:
        tensors = weights.hugging_face_tensors(tmp_path)
        tensors.shape("a")
        assert tensors.read("a").dtype.name not in ("float32", "float16", "bfloat16")
    except UserError as error:
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "nope"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**63), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 24), min_size=2, max_size=2) | JSON,
    },
)
HEADER = st.binary() | (st.dictionaries(st.sampled_from("ab"), ENTRY) | JSON).map(
    lambda found: json.dumps(found).encode()
)


@GARBAGE
@given(header=HEADER, length=st.none() | st.integers(0, 2**64 - 1), body=st.binary(max_size=24))
def test_no_safetensors_header_raises_anything_but_a_user_error(scratch, header, length, body):
    path = scratch / "model.safetensors"
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + body)
    read_all(lambda: weights.SafetensorsFiles([path]), path)


def read_all(open_, path):
    try:
        tensors = open_()
        for name in tensors.names():
            tensors.shape(name)
            tensors.read(name)
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new", [True, False])
@settings(max_examples=200)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1)), min_size=1, max_size=3))
def test_no_damage_to_a_torch_file_raises_anything_but_a_user_error(scratch, new, changes):
    whole = scratch / f"whole-{new}.pt"
    if not whole.exists():
        torch.save({"a": TENSORS["d"]}, whole, _use_new_zipfile_serialization=new)
    content = bytearray(whole.read_bytes())
    for place, patch in changes:
        start = int(place * (len(content) - 1))
        content[start : start + len(patch)] = patch
    path = scratch / "damaged.pt"
    path.write_bytes(content)
    read_all(lambda: weights.TorchTensors(weights.load_torch_file(path), str(path)), path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for read in (
        weights.load_torch_file,
        weights.read_json,
        lambda p: weights.SafetensorsFiles([p]),
    ):
        with pytest.raises(UserError, match=r"nope\.x"):
            read(tmp_path / "nope.x")
        with pytest.raises(UserError):
            read(tmp_path)
