"""PyTorch's own files: every value comes back, and no code in them is run."""

import io
import json
import os
import warnings
import zipfile

import numpy as np
import pytest
from fuzz import damaged, read_or_refuse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.errors import UserError
from gptjax.interop import tensor_files

torch = pytest.importorskip("torch", reason="needs PyTorch")

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5, dtype=torch.float16),
    "c": torch.full((2, 2), 1.25, dtype=torch.bfloat16), "d": torch.tensor(3.0),
}  # fmt: skip
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they are a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])


class Trap:
    """A pickle of it makes a folder when it is read, unless reading runs nothing."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def content(saved, new=True) -> bytes:
    file = io.BytesIO()
    torch.save(saved, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def read_all(folder):
    return tensor_files.hugging_face_tensors(folder)


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        read_all(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", ["zip", "old", "sharded"])
def test_names_and_values_come_back(tmp_path, kind):
    if kind == "sharded":
        weight_map = {name: f"{number % 2}.bin" for number, name in enumerate(TENSORS)}
        for file in ("0.bin", "1.bin"):
            torch.save({n: TENSORS[n] for n in TENSORS if weight_map[n] == file}, tmp_path / file)
        index = json.dumps({"weight_map": weight_map})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(content(TENSORS, kind == "zip"))
    found = read_all(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        assert np.array_equal(found[name], tensor.float().numpy())


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for file in ("0.bin", "1.bin"):
        torch.save({"a": TENSORS["a"]}, tmp_path / file)
    index = json.dumps({"weight_map": {"a": "0.bin", "b": "1.bin"}})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    refused(tmp_path, "model.bin.index.json", "different tensors: a, b")


@FORMATS
def test_code_in_a_pickle_is_not_run(tmp_path, new):
    trap, path = tmp_path / "trap", tmp_path / "pytorch_model.bin"
    path.write_bytes(content({"a": Trap(trap)}, new))
    refused(tmp_path, str(path), "mkdir", "not run")
    assert not trap.exists()
    torch.load(path, weights_only=False)  # it is a trap indeed
    assert trap.exists()


@pytest.mark.parametrize("saved", [[], {"a": 3}, {"a": {"b": TENSORS["a"]}}, {1: TENSORS["a"]},
                                   TENSORS["a"]], ids=range(5))  # fmt: skip
def test_a_file_without_named_tensors_is_refused(tmp_path, saved):
    torch.save(saved, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "named tensors")


@pytest.mark.parametrize("tensor", [
    torch.ones(2).to_sparse(), torch.ones(2).to(torch.float8_e4m3fn),
    torch.ones(2, device="meta"), NESTED,
    torch.ones(1).expand(2**40),
], ids=["sparse", "float8", "meta", "nested", "stride 0"])  # fmt: skip
def test_a_tensor_that_is_not_a_plain_array_is_refused(tmp_path, tensor):
    torch.save({"odd": tensor}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "odd")


@FORMATS
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, new, drawn):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(drawn.draw(damaged(content({"a": TENSORS["a"]}, new))))
    read_or_refuse(lambda: read_all(tmp_path), path)


def zipped(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("archive/data.pkl", pickled)
        parts.writestr("archive/version", "3\n")
    return file.getvalue()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(zipped(b"\x80\x02}." + bytes(2**24)))
    refused(tmp_path, "larger than the file")


def test_a_dict_with_its_own_methods_is_read_by_dicts(tmp_path):
    # An OrderedDict whose `items` is the number 5.
    hostile = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x05sb."
    (tmp_path / "pytorch_model.bin").write_bytes(zipped(hostile))
    assert read_all(tmp_path) == {}


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for path in (tmp_path / "nope.x", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            tensor_files.load_torch_file(path)
