"""Whatever a file holds, its reader gives a whole result or one clear line, and nothing else."""

import contextlib
import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import tiktoken
import torch
from conftest import TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import prepared
from test_tokenizers import GPT2, TINY_RANKS, needs_gpt2

from gptjax import checkpoint, convert, corpus, data, evaluate, hf_tokenizer, metrics, weights
from gptjax import config as config_lib
from gptjax import tokenizers as tokenizers_lib
from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.model import init_params
from gptjax.state_dict import places
from gptjax.tokenizers import CharTokenizer, Gpt2Tokenizer, SentencePieceTokenizer

FEW = settings(max_examples=40, suppress_health_check=list(HealthCheck))
MODEL = ModelConfig(1, 1, 4, block_size=8, vocab_size=5, gelu="erf")
CHAR, BYTES = CharTokenizer("\n abc"), Gpt2Tokenizer(TINY_RANKS)
PIECES = SentencePieceTokenizer.train([TEXT], 400)
TENSORS = {"a": np.ones((2, 3), "f4"), "b": np.ones(2, "f2")}

DEEP = "@deep@"  # stands for lists in lists, more of them than the library can write
ODD = st.recursive(
    st.sampled_from([
        None, True, "", "\ud800", "a\nb\x1b[2J\0", "gpt2", "x" * 9999, [], {}, DEEP, DEEP, 0, 1, -1,
        0.5, 1e308, 2**31, 2**63, 10**400, -(10**400), int("9" * 4300), np.nan, np.inf, -np.inf,
    ]) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)  # fmt: skip


@st.composite
def odd_values(draw, root, value=ODD):
    """`root` with other values anywhere in it, or with something left out."""
    for _ in range(draw(st.integers(1, 3))):
        holder = node = {"": root}
        key = ""
        while isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
            node[key] = node = node[key].copy()
            keys = range(len(node)) if isinstance(node, list) else [*node][:40]
            key = draw(st.sampled_from(keys))
        if node is not holder and not draw(st.integers(0, 6)):
            del node[key]
        else:
            name = draw(st.sampled_from(["x\ny", "\ud800", "text"]) | st.text())
            rename = isinstance(node, dict) and not draw(st.integers(0, 6))
            node[name if rename and node is not holder else key] = draw(value)
        root = holder[""]
    return root


@st.composite
def damaged(draw, whole):
    """`whole` with broken bytes, other bytes, or odd values in (the first line of) its JSON."""
    for first in (whole, whole.split(b"\n")[0]):
        with contextlib.suppress(ValueError):
            root = json.loads(first)
            if draw(st.booleans()):
                text = json.dumps(draw(odd_values(root)), ensure_ascii=draw(st.booleans()))
                # Near 1000 Python can read it, but go no deeper to work with it.
                depth = draw(st.integers(850, 1000) | st.integers(1, 30) | st.just(100_000))
                text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
                return text.encode("utf-8", "surrogatepass") + whole[len(first) :]
    for _ in range(draw(st.integers(1, 3))):
        at, bit = draw(st.integers(0, len(whole))), 1 << draw(st.integers(0, 7))
        end = at + draw(st.integers(1, 16))
        before, part, after, new = whole[:at], whole[at:end], whole[end:], draw(st.binary())
        flipped = bytes(byte ^ bit for byte in part[:1]) + part[1:]
        middle = draw(st.sampled_from([b"", part + part, flipped, new, None]))
        whole = draw(st.sampled_from([before, new])) if middle is None else before + middle + after
    return whole


def clear(read, where):
    """What it reads, or None where the error is one line that names the place."""
    try:
        return read()
    except UserError as error:
        message = str(error)
    assert str(where) in message and message.isprintable() and len(message) < 4000, message
    return None


# ---------------------------------------------------------------- the readers of JSON and text


def use(tokenizer):
    """What is read as a tokenizer works."""
    if tokenizer is not None:
        tokenizer.encode("ab \n\u2581\0é\ud800", skip_unknown=True)
        tokenizer.decode(range(min(tokenizer.n_vocab, 1000)))


def read_facts(path):
    facts, _ = checkpoint._read_record(path.parent)
    clear(lambda: tokenizers_lib.from_json(facts.tokenizer, "here"), "here")
    assert facts.config.model.padded_vocab_size and f"{facts.best_val_loss or 0:.4f}"


def sign_and_read_facts(path):
    """As if another version had written them."""
    with contextlib.suppress(Exception):
        whole = json.loads(path.read_bytes())
        whole["custom_metadata"] = checkpoint._signed(whole["custom_metadata"])
        path.write_text(json.dumps(whole))
    read_facts(path)


def read_tensors(path):
    tensors = weights.hugging_face_tensors(path.parent)
    for name in [*tensors.names()]:
        tensors.shape(name)
        tensors.read(name)


def torch_file(found, new=True):
    file = io.BytesIO()
    torch.save(found, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


SETTINGS = config_lib.to_json(TrainConfig(model=MODEL))
FACTS = {"config": json.loads(SETTINGS), "tokenizer": "{}", "data_fingerprint": "f",
         "best_val_loss": 1.5}  # fmt: skip
RECORD = json.dumps({"custom_metadata": checkpoint._signed({"facts": FACTS, "digests": {}})})
ROW = json.dumps(dict.fromkeys(metrics.FIELDS, 1.5) | {"step": 10, "val_loss": None}) + "\n"
QUESTION = '{"ctx": "a b", "endings": ["a", "b", "c", "a"], "label": 3}\n'
DOCUMENT = '{"text": "a b", "id": 3}\n'
INDEX = {"weight_map": dict.fromkeys(TENSORS, "part.safetensors")}
TORCH = {name: torch.tensor(array) for name, array in TENSORS.items()}
META_PKL = {"vocab_size": 4, "itos": dict(enumerate("abc\n"))}


def ours(path):
    use(data.read_tokenizer(path.parent))


def theirs(path):
    use(hf_tokenizer.read(path.parent))


READERS = {  # a file by its name, whole: None where `folders` makes it; its reader
    "set/meta.json": (None, lambda path: data.load(path.parent)),
    "set/tokenizer.json": (None, lambda path: data.load(path.parent)),
    "set/val.bin": (None, lambda path: data.load(path.parent)),
    "pickled/meta.pkl": (pickle.dumps(META_PKL), ours),
    "pickled in ASCII/meta.pkl": (pickle.dumps(META_PKL, 0), ours),
    "char/tokenizer.json": (tokenizers_lib.to_json(CHAR), ours),
    "gpt2/tokenizer.json": (tokenizers_lib.to_json(BYTES), ours),
    "sentencepiece/tokenizer.json": (tokenizers_lib.to_json(PIECES), ours),
    "settings.json": (SETTINGS, lambda p: config_lib.from_json(p.read_text("latin-1"), str(p))),
    "step/_CHECKPOINT_METADATA": (RECORD, read_facts),
    "signed/_CHECKPOINT_METADATA": (RECORD, sign_and_read_facts),
    "metrics.jsonl": (ROW * 2, lambda path: [
        f"{row[name] or 0:.2f}" for row in metrics.read(path) for name in {*row} & {*metrics.FIELDS}
    ]),
    "documents.jsonl": (DOCUMENT * 2, lambda path: [
        piece.encode() for document in corpus.read_documents([path]) for piece in document
    ]),
    "questions.jsonl": (QUESTION * 2, lambda path: [
        evaluate.read_hellaswag(path, tokenizer) for tokenizer in (CHAR, BYTES, PIECES)
    ]),
    "one/model.safetensors": (safetensors.numpy.save(TENSORS), read_tensors),
    f"index/{weights.INDEX}": (json.dumps(INDEX), read_tensors),
    "torch/pytorch_model.bin": (torch_file(TORCH), read_tensors),
    "old torch/pytorch_model.bin": (torch_file(TORCH, False), read_tensors),
    "model/config.json": (None, lambda path: convert.read_hugging_face(path.parent)),
    "hf char/tokenizer.json": (None, theirs),
    "hf gpt2/tokenizer.json": (None, theirs),
    "hf sentencepiece/tokenizer.model": (None, theirs),
    "hf merges/vocab.json": (None, theirs),
    "hf merges/merges.txt": (None, theirs),
    "hf merges/added_tokens.json": ("{}", theirs),
}  # fmt: skip


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("scratch")
    prepared(scratch)
    for path in map(scratch.joinpath, READERS):
        path.parent.mkdir(exist_ok=True)
    kinds = {"char": CHAR, "gpt2": BYTES, "sentencepiece": PIECES, "merges": BYTES}
    for name, tokenizer in kinds.items():
        hf_tokenizer.write(tokenizer, scratch / f"hf {name}", 8)
    (scratch / "hf merges/tokenizer.json").unlink()
    safetensors.numpy.save_file(TENSORS, scratch / "index/part.safetensors")
    config, tensors = convert.hf_model(init_params(MODEL, 0), MODEL)
    (scratch / "model/config.json").write_text(json.dumps(config | {"n_inner": None}))
    safetensors.numpy.save_file(tensors, scratch / "model/model.safetensors")
    for name, (content, _) in READERS.items():
        if content is not None:
            content = content if isinstance(content, bytes) else content.encode()
            (scratch / name).write_bytes(content)
    return scratch


@FEW
@given(drawn=st.data())
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_clear_line(scratch, name, drawn):
    path, (_, read) = scratch / name, READERS[name]
    whole = path.read_bytes()
    read(path)
    try:
        path.write_bytes(drawn.draw(damaged(whole)))
        clear(lambda: read(path), path.parent)
    finally:
        path.write_bytes(whole)


@FEW
@given(
    content=st.binary(max_size=30) | damaged("aé中😀\ufeff \n".encode() * 3), size=st.integers(1, 9)
)
def test_a_text_file_is_read_exactly_where_it_is_utf8_without_nul(scratch, content, size):
    path = scratch / "t.txt"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "READ_BYTES", size)
        found = clear(lambda: ["".join(d) for d in corpus.read_documents([path])], path)
    text = "" if b"\0" in content else content.decode(errors="replace").removeprefix("\ufeff")
    assert found == ([text] if text and text.encode() in content else None)


@FEW
@given(drawn=st.data())
def test_odd_values_in_a_safetensors_header_are_clear_errors(scratch, drawn):
    whole = safetensors.numpy.save(TENSORS)
    end = 8 + int.from_bytes(whole[:8], "little")
    header = drawn.draw(damaged(whole[8:end]))
    (scratch / "header").mkdir(exist_ok=True)
    path = scratch / "header/model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + whole[end:])
    clear(lambda: read_tensors(path), path)


SHARED: list = []
for _ in range(60):
    SHARED = [SHARED, SHARED]  # 2**60 lists to whoever counts them
VALUES = st.sampled_from([None, "x", 3, "a\nb", 1.5, np.nan, "huge", "shared", [], {}])
TENSOR = st.sampled_from([
    torch.ones(3), torch.ones(()), torch.tensor(np.nan), torch.ones(1).expand(2**40),
    torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.cfloat),
    torch.ones(1, dtype=torch.bfloat16).expand(2**40), torch.nested.nested_tensor([torch.ones(2)]),
])  # fmt: skip


@FEW
@given(drawn=st.data())
def test_odd_values_in_nanogpts_file_are_clear_errors(scratch, drawn):
    every = places(MODEL, "out_in")
    order = convert._adamw_order(MODEL)
    moments = [{m: torch.ones(every[n].shape) for m in ("exp_avg", "exp_avg_sq")} for n in order]
    whole = {
        "model": {name: torch.ones(place.shape) for name, place in every.items()},
        "model_args": {f: getattr(MODEL, f) for f in ("n_layer", "n_head", "n_embd", "block_size",
                                                      "vocab_size", "bias")},
        "config": {"learning_rate": 1e-3, "batch_size": 2, "gradient_accumulation_steps": 2},
        "optimizer": {"state": {i: m | {"step": torch.tensor(3.0)} for i, m in enumerate(moments)},
                      "param_groups": [{"params": [*range(len(order))]}]},
        "iter_num": 3,
    }  # fmt: skip
    path = scratch / "ckpt.pt"
    path.write_bytes(torch_file(spelled_out(drawn.draw(odd_values(whole, VALUES | TENSOR)))))
    clear(lambda: convert.read_nanogpt(path), path)


def spelled_out(node):
    """With what hypothesis could not print."""
    if isinstance(node, dict):
        return {key: spelled_out(value) for key, value in node.items()}
    if isinstance(node, list):
        return [*map(spelled_out, node)]
    odd = {"huge": 2**100_000, "shared": SHARED}
    return odd.get(node, node) if isinstance(node, str) else node


def zipped(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("archive/data.pkl", pickled)
        parts.writestr("archive/version", "3\n")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pickled/meta.pkl", b"\x80\x04}r\xff\xff\xff\x7f.", "itos"),  # a memo of 2**31 places
        ("pickled/meta.pkl", b"\x80\x04}N" + b"\x85" * 10**6 + b"Ns.", "more than dicts"),
        ("pickled/meta.pkl", b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b".", "more than dicts"),
        ("torch/pytorch_model.bin", zipped(b"\x80\x02}." + bytes(2**24)), "larger than the file"),
        ("torch/pytorch_model.bin", torch_file({"a": torch.ones(1).expand(2**40)}), "fewer values"),
        ("torch/pytorch_model.bin",
         zipped(b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x05sb."), ""),
        ("gpt2/tokenizer.json", b'{"kind": "gpt2", "pieces": "YQ== YQ=="}', "not distinct"),
    ],
)  # fmt: skip
def test_a_hostile_file_takes_no_memory_and_does_not_crash(scratch, name, content, words):
    path, (_, read) = scratch / name, READERS[name]
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        with contextlib.nullcontext() if not words else pytest.raises(UserError, match=words):
            read(path)
    finally:
        path.write_bytes(whole)


def test_a_token_as_long_as_a_book_is_refused_before_it_takes_hours(tmp_path):
    longer = [b"a" * 2**k for k in range(1, 18)]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {piece: 256 + i for i, piece in enumerate(longer)}
    vocab = {"".join(map(hf_tokenizer._CHARACTER.get, piece)): i for piece, i in ranks.items()}
    merges = [[piece.decode()[: len(piece) // 2]] * 2 for piece in longer]
    whole = hf_tokenizer._gpt2_json(vocab, merges) | {"normalizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="longer than 256"):
        hf_tokenizer.read(tmp_path)


@needs_gpt2
@FEW
@given(st.text(alphabet="a1' \n\t\u2003\x1c\x85é", max_size=60))
def test_long_white_space_is_cut_out_without_a_change_of_tokens(text):
    wanted = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers_lib, "LONG_SPACE", 2)
        assert GPT2.encode(text).tolist() == wanted


@needs_gpt2
def test_a_megabyte_of_white_space_does_not_overflow_a_stack():
    for text in (" " * 1_100_000 + "x", "x" + "\n" * 1_100_000):
        assert GPT2.decode(GPT2.encode(text)) == text


def test_a_tokenizer_without_ids_is_refused(scratch, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"kind": "char", "characters": ""}')
    with pytest.raises(UserError, match="has 0 ids"):
        convert.find_tokenizer(str(tmp_path), tmp_path, 5)
