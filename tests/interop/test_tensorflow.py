"""OpenAI's TensorFlow checkpoints, written here by the format's description: LevelDB's
table_format.md and TensorFlow's tensor_bundle.proto. (TensorFlow 2.21 reads what `write` makes, and
`read` what TensorFlow writes.)"""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from fuzz import damaged, read_or_refuse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import assert_bitwise, random_params

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.interop import hf_tokenizer, tensorflow
from gptjax.interop.convert import read_pretrained

NUMBERS = {"float32": 1, "int64": 9, "bfloat16": 14, "float16": 19}


def varint(n: int) -> bytes:
    out = b""
    while n >= 128:
        out, n = out + bytes([n % 128 + 128]), n // 128
    return out + bytes([n])


def message(*fields) -> bytes:
    """Of (number, value): whole numbers, or messages as bytes."""
    out = b""
    for number, value in fields:
        if isinstance(value, bytes):
            out += varint(8 * number + 2) + varint(len(value)) + value
        elif value:
            out += varint(8 * number) + varint(value)
    return out


def crc(data: bytes) -> bytes:
    """CRC-32C, masked as LevelDB's."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ 0x82F63B78 * (value & 1)
    value ^= 0xFFFFFFFF
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def block(entries) -> bytes:
    """Every third key is written whole."""
    out, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % 3:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += (
            varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        )
        before = key
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def write(folder, tensors, name="model.ckpt", per_block=7):
    data, entries = b"", [(b"", message((1, 1), (3, message((1, 1)))))]
    for key in sorted(tensors):
        array = np.asarray(tensors[key])
        shape = b"".join(message((2, message((1, size)))) for size in array.shape)
        raw = array.tobytes()
        value = message((1, NUMBERS[array.dtype.name]), (2, shape), (4, len(data)), (5, len(raw)))
        entries.append((key.encode(), value + bytes([8 * 6 + 5]) + crc(raw)))
        data += raw
    out, index = b"", []

    def add(part) -> bytes:
        nonlocal out
        handle = varint(len(out)) + varint(len(part))
        out += part + b"\0" + crc(part + b"\0")
        return handle

    for at in range(0, len(entries), per_block):
        part = entries[at : at + per_block]
        index.append((part[-1][0], add(block(part))))
    footer = add(block([])) + add(block(index))
    out += footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    (folder / f"{name}.index").write_bytes(out)
    (folder / f"{name}.data-00000-of-00001").write_bytes(data)


TINY = ModelConfig(2, 2, 8, block_size=5, vocab_size=263)
HPARAMS = {"n_vocab": 263, "n_ctx": 5, "n_embd": 8, "n_head": 2, "n_layer": 2}


def openais(params, dtype="float32"):
    """Under OpenAI's names; linear weights are convolutions of width 1."""
    out = {"model/wte": params["wte"], "model/wpe": params["wpe"]}
    for layer in (0, 1):
        for part, inner in params["h"].items():
            for name, arrays in [("", inner)] if "scale" in inner else inner.items():
                where = f"model/h{layer}/{part}/{name}".rstrip("/")
                for kind, array in arrays.items():
                    short = {"kernel": "w", "scale": "g", "bias": "b"}[kind]
                    out[f"{where}/{short}"] = array[layer][None] if short == "w" else array[layer]
    out |= {"model/ln_f/g": params["ln_f"]["scale"], "model/ln_f/b": params["ln_f"]["bias"]}
    return {name: array.astype(dtype) for name, array in out.items()}


def make(folder, tensors):
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    write(folder, tensors)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_value_comes_back(tmp_path, dtype):
    params, numbers = random_params(TINY), {"global_step": np.int64(3)}
    tensors = openais(params, dtype)
    moments = {f"{name}/{more}": x for name, x in tensors.items() for more in ("Adam", "Adam_1")}
    make(tmp_path, tensors | moments | numbers)
    found = tensorflow.read(tmp_path)
    assert found.config.model == TINY
    half = {name: np.asarray(x, dtype).astype("f4") for name, x in openais(params).items()}
    assert_bitwise({k: found.params[k] for k in ("wte", "wpe")},
                   {k: half[f"model/{k}"] for k in ("wte", "wpe")})  # fmt: skip
    if dtype == np.float32:
        assert_bitwise(found.params, params)


def test_it_is_imported_with_openais_tokenizer(tmp_path, byte_pairs):
    make(tmp_path, openais(random_params(TINY)))
    hf_tokenizer.write(byte_pairs, tmp_path, 5)
    for theirs, ours in {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}.items():
        (tmp_path / theirs).rename(tmp_path / ours)
    (tmp_path / "tokenizer.json").unlink()
    weights, tokenizer = read_pretrained(str(tmp_path))
    assert tokenizer.state() == byte_pairs.state() and weights.config.data.tokenizer == "gpt2"


def test_the_newest_of_several_checkpoints_is_read(tmp_path):
    params = random_params(TINY, seed=1)
    make(tmp_path, openais(random_params(TINY)))
    write(tmp_path, openais(params), "model-200")
    with pytest.raises(UserError, match=r"holds 2 checkpoints .* file `checkpoint`"):
        tensorflow.read(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model-200"\nall_model: "x"\n')
    assert_bitwise(tensorflow.read(tmp_path).params, params)


@pytest.mark.parametrize("change", [
    lambda f: (f / "model.ckpt.index").unlink(),
    lambda f: (f / "model.ckpt.data-00000-of-00001").unlink(),
    lambda f: (f / "model.ckpt.data-00000-of-00001").write_bytes(b""),
    lambda f: (f / "hparams.json").write_text('{"n_layer": 2}'),
    lambda f: (f / "hparams.json").write_text(json.dumps(HPARAMS | {"n_layer": 3})),
    lambda f: write(f, {"model/wte": np.ones((3, 8), np.int64)}),
])  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, change):
    make(tmp_path, openais(random_params(TINY)))
    change(tmp_path)
    assert read_or_refuse(lambda: tensorflow.read(tmp_path), tmp_path) is None


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, drawn):
    if not (tmp_path / "whole").exists():
        (tmp_path / "whole").mkdir()
        make(tmp_path / "whole", openais(random_params(TINY)))
    for path in (tmp_path / "whole").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / drawn.draw(st.sampled_from(["model.ckpt.index", "hparams.json"]))
    path.write_bytes(drawn.draw(damaged(path.read_bytes())))
    read_or_refuse(lambda: tensorflow.read(tmp_path), tmp_path)
