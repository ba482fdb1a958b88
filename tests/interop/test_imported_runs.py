"""Whole commands: a model comes from a Hub, and training goes on from imported weights."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from helpers import TEXT, TRAIN, assert_one_clear_line
from small_models import SMALL, assert_bitwise, random_params

from gptjax import run_metadata
from gptjax.checkpoint import Checkpoints
from gptjax.config import FINETUNE, ModelConfig, TrainConfig
from gptjax.data import token_files
from gptjax.data.tokenizers import CharTokenizer
from gptjax.interop import convert, parameter_names
from gptjax.interop.weights import Weights

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHARS = CharTokenizer("".join(sorted(set(TEXT))))
MODEL = ModelConfig(2, 2, 16, block_size=12, vocab_size=CHARS.n_vocab, activation="gelu_erf")
FEW = "--sample-tokens 0 --eval-full-split --batch-size 4"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as one model needs: `folder`, as some/model."""

    folder = Path()

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path in ("/api/models/some/model/revision/main", "/api/models/some/model"):
            files = [{"rfilename": f.name} for f in self.folder.iterdir()]
            found = {"id": "some/model", "sha": COMMIT, "siblings": files, "private": False}
            return self.answer(json.dumps(found).encode(), "application/json")
        if path.startswith("/api/models/some/model/tree/"):
            found = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f"{i:040}"}
                for i, f in enumerate(self.folder.iterdir())
            ]
            return self.answer(json.dumps(found).encode(), "application/json")
        if "/some/model/resolve/" in path and (self.folder / name).is_file():
            return self.answer((self.folder / name).read_bytes(), "application/octet-stream")
        return self.send_error(404)

    def answer(self, body, kind):
        self.send_response(200)
        for header in {"Content-Type": kind, "Content-Length": str(len(body)),
                       "ETag": f'"{hash(body):x}"', "X-Repo-Commit": COMMIT}.items():  # fmt: skip
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_model_is_fetched_from_the_hub(command, tmp_path):
    params = random_params(SMALL)
    chars = CharTokenizer("".join(map(chr, range(65, 88))))
    convert.write_pretrained(Weights(TrainConfig(SMALL), params), chars, tmp_path / "published")
    (tmp_path / "published" / "never.fetched").write_text("by us")
    handler = type("Handler", (Hub,), {"folder": tmp_path / "published"})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        result = command(
            "-m", "gptjax", "convert", "import", "some/model", "run",
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "home"),
            HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0",
        )  # fmt: skip
        server.shutdown()
        thread.join()
    assert result.returncode == 0, result.stderr
    assert "from some/model" in result.stdout
    assert not list((tmp_path / "home").rglob("never.fetched"))
    loaded = run_metadata.load_checkpoint(tmp_path / "run", "best")
    for name in ("wte", "wpe"):
        assert np.array_equal(loaded.params[name], params[name])


def test_a_hub_name_without_a_network_is_one_clear_line(command):
    result = command(
        "-m", "gptjax", "convert", "import", "gpt2-xl", "run", HF_HUB_OFFLINE="1", HF_HOME="empty"
    )
    assert_one_clear_line(result, "'gpt2-xl'", "Hugging Face Hub", "check the name")


@pytest.fixture
def imported(tmp_path):
    """Random weights, as imported at step 2, in run/."""
    (tmp_path / "text.txt").write_text(TEXT)
    params, config = random_params(MODEL), dataclasses.replace(FINETUNE, model=MODEL)
    convert.write_run(Weights(config, params, step=2), CHARS, tmp_path / "run")
    return params


def test_an_imported_run_needs_a_text_then_counts_on(imported, command, tmp_path):
    assert_one_clear_line(command(TRAIN, "--run-dir", "run"), "--data.source")
    flags = f"--run-dir run --data.source text.txt --max-steps 4 {FEW}".split()
    result = command(TRAIN, *flags)
    assert result.returncode == 0, result.stderr
    assert "(imported, at step 2)" in result.stdout
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest_step == 4
        assert run_metadata.read(checkpoints, 4).data_fingerprint


def test_new_runs_start_from_weights_with_a_cropped_block(imported, command, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from gptjax.parity import torch_gpt

    flags = f"--init-from run --run-dir new --data.source text.txt --model.block-size 8 {FEW}"
    # On two devices: nothing may wake JAX before they are made.
    result = command(TRAIN, *flags.split(), "--max-steps", 2, "--num-devices", 2)
    assert result.returncode == 0, result.stderr
    assert "from" in result.stdout and "2 x cpu" in result.stdout
    rows = [json.loads(row) for row in (tmp_path / "new/metrics.jsonl").read_text().splitlines()]
    found = next(row["val_loss"] for row in rows if row["step"] == 0)

    net = torch_gpt.from_state_dict(MODEL, parameter_names.to_torch(imported, MODEL, "out_in"))
    folder = json.loads((tmp_path / "new/config.json").read_text())["experiment"]["data"]["dir"]
    tokens = torch.from_numpy(np.array(token_files.load(tmp_path / folder).val[:], np.int64))
    total = 0.0
    for start in range(0, len(tokens) - 1, 8):
        window = tokens[None, start : start + 9]
        with torch.no_grad():
            nats = torch_gpt.cross_entropy(net(window[:, :-1]), window[:, 1:]).item()
        total += nats * (window.shape[1] - 1)
    assert found == pytest.approx(total / (len(tokens) - 1), rel=1e-5)

    result = command(TRAIN, "--run-dir", "new", "--max-steps", 3)
    assert result.returncode == 0 and "resumed at step 2" in result.stdout, result.stderr
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert run_metadata.read(checkpoints, 3).config.model.block_size == 8


def test_an_export_of_a_trained_run_comes_back(uninterrupted, command, tmp_path):
    run_dir, _ = uninterrupted
    result = command("-m", "gptjax", "convert", "export", run_dir, "out")
    assert result.returncode == 0, result.stderr
    weights, tokenizer = convert.read_pretrained(str(tmp_path / "out"))
    loaded = run_metadata.load_checkpoint(run_dir, "best")
    assert_bitwise(weights.params, {**loaded.params})
    assert weights.config.model.dropout == 0.1
    card, metadata = (tmp_path / "out" / "README.md").read_text(), loaded.metadata
    assert f"Validation loss: {metadata.val_loss:.4f} nats" in card
    assert f"`{metadata.data_fingerprint[:12]}`" in card and f"Steps: {loaded.step} of" in card
    assert json.loads(loaded.metadata.tokenizer) == tokenizer.state()
