"""Safetensors: every value comes back, and a bad file gives one clear error."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from fuzz import damaged, read_or_refuse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from gptjax.errors import UserError
from gptjax.interop import tensor_files

DRAW = np.random.default_rng(0)
ARRAYS = {
    "a": DRAW.standard_normal((3, 4), np.float32), "b.weight": np.ones(5, np.float16),
    "c": DRAW.standard_normal((2, 2, 2)).astype(bfloat16), "d": np.array(3, np.float32),
}  # fmt: skip
INDEX = "model.safetensors.index.json"


def read_all(folder):
    return tensor_files.hugging_face_tensors(folder)


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_header(path, header: bytes, body: bytes, length=None):
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + body)


def refused(folder, *words):
    """Reading all of the folder ends in one line with these words."""
    with pytest.raises(UserError) as error:
        read_all(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("files", [1, 2])
def test_names_shapes_and_values_come_back(tmp_path, files):
    if files == 1:
        safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors")
    else:
        for number, names in enumerate((["a", "d"], ["b.weight", "c"])):
            part = {name: ARRAYS[name] for name in names}
            safetensors.numpy.save_file(part, tmp_path / f"{number}.safetensors")
        write_index(tmp_path, {n: f"{int(n not in 'ad')}.safetensors" for n in ARRAYS})
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    found = read_all(tmp_path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_a_folder_without_weights_is_refused(tmp_path):
    refused(tmp_path, "holds no weights", "model.safetensors")


@pytest.mark.parametrize("keep", [0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    whole = safetensors.numpy.save(ARRAYS)
    path.write_bytes(whole[: int(keep * len(whole))])
    refused(tmp_path, str(path))


def test_a_name_that_comes_twice_is_refused(tmp_path):
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    path = tmp_path / "model.safetensors"
    write_header(path, f"{{{entry}, {entry}}}".encode(), bytes(4))
    refused(tmp_path, "names 'a' twice")
    path.unlink()
    for name in "12":
        part = {"a": ARRAYS["a"], name: ARRAYS["d"]}
        safetensors.numpy.save_file(part, tmp_path / f"{name}.safetensors")
    write_index(tmp_path, {"1": "1.safetensors", "2": "2.safetensors", "a": "1.safetensors"})
    refused(tmp_path, INDEX, "different tensors: a")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../model.safetensors"}, ["../model.safetensors", "not a file beside it"]),
        ({"a": ".."}, ["names .."]),
        ({"a": "/etc/hostname"}, ["/etc/hostname"]),
        ({"a": "missing.safetensors"}, ["missing.safetensors"]),
        ({"a": ""}, ["not a file beside it"]),
        ({"a": "x\0"}, ["not a file beside it"]),
        ({"a": "x" * 300}, ["not a file beside it"]),
        ({"a": 3}, ["weight_map"]),
        ({"a": "part", "z": "part"}, ["different tensors", "z"]),
        (["a"], ["weight_map"]),
        (None, ["weight_map"]),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, weight_map, words):
    (tmp_path / "model").mkdir()
    for path in ("model.safetensors", "model/part"):
        safetensors.numpy.save_file({"a": ARRAYS["a"]}, tmp_path / path)
    write_index(tmp_path / "model", weight_map)
    refused(tmp_path / "model", *words)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", b"\xff", pytest.param("[" * 100_000, id="deep")]
)
def test_a_bad_index_is_a_clear_error(tmp_path, text):
    path = tmp_path / INDEX
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, str(path))


@pytest.mark.parametrize("dtype", ["F64", "I32", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "F4"])
def test_other_kinds_of_numbers_are_refused_or_given_as_such(tmp_path, dtype):
    bits = {"F4": 4, "F64": 64, "I32": 32, "C64": 64}.get(dtype, 8)
    entry = {"dtype": dtype, "shape": [64 // bits], "data_offsets": [0, 8]}
    write_header(tmp_path / "model.safetensors", json.dumps({"a": entry}).encode(), bytes(8))
    try:
        assert read_all(tmp_path)["a"].dtype.name not in ("float32", "float16", "bfloat16")
    except UserError as error:
        assert "model.safetensors" in str(error)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
@pytest.mark.parametrize("name", ["model.safetensors", "header", INDEX])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, name, drawn):
    path = tmp_path / "model.safetensors"
    whole = safetensors.numpy.save(ARRAYS)
    if name == path.name:
        path.write_bytes(drawn.draw(damaged(whole)))
    elif name == "header":
        end = 8 + int.from_bytes(whole[:8], "little")
        header = drawn.draw(damaged(whole[8:end]))
        length = drawn.draw(st.none() | st.integers(0, 2**64 - 1))
        write_header(path, header, whole[end:], length)
    else:
        (tmp_path / "part").write_bytes(whole)
        index = json.dumps({"weight_map": dict.fromkeys(ARRAYS, "part")}).encode()
        (tmp_path / INDEX).write_bytes(drawn.draw(damaged(index)))
    read_or_refuse(lambda: read_all(tmp_path), tmp_path)
