"""A run goes on where it was left, as if nothing had been; and what may change meanwhile."""

import dataclasses
import shutil
import tarfile
from pathlib import Path

import numpy as np
import numpy_gpt
import pytest
import tiny_runs
from helpers import assert_same_run, largest_gap, logged
from tiny_runs import Recorder

import gptjax
from gptjax import resume, run_logs, run_metadata
from gptjax.checkpoint import Checkpoints
from gptjax.config import ModelConfig, OptimizerConfig
from gptjax.data import token_files
from gptjax.data.batches import windows_over
from gptjax.devices import setup
from gptjax.errors import UserError
from gptjax.interop import convert


@pytest.fixture(scope="module")
def stopped(tiny, train_tiny, tmp_path_factory) -> Path:
    """The run `tiny`, stopped after step 7; to be copied."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    recorder = train_tiny(tiny.config, run_dir, Recorder(stop_after=5))
    assert recorder.events[-3:] == [("step", 7), ("save", 7), "end"]
    assert recorder.trainer.stopped_by == 15
    return run_dir


@pytest.fixture
def copy(stopped, tmp_path) -> Path:
    """Of the stopped run."""
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture
def complete(tiny, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(tiny.run_dir, tmp_path / "run")


def test_a_resumed_run_equals_the_uninterrupted_one(tiny, train_tiny, copy):
    recorder = train_tiny(tiny.config, copy)
    assert recorder.trainer.start.origin == "resumed at step 7"
    assert recorder.trainer.start.notes == []
    # The rest of what the other run told.
    assert recorder.events == ["start", *tiny.recorder.events[12:]]
    assert_same_run(copy, tiny.run_dir, 12)
    times = [row["seconds"] for row in run_logs.read_metrics(copy / "metrics.jsonl")]
    assert times == sorted(times)


@pytest.mark.slow
def test_a_resumed_run_of_muon_equals_the_uninterrupted_one(tiny, train_tiny, tmp_path):
    """Its state has other arrays. Also where devices share them out, and in an export."""
    rates = dataclasses.replace(tiny.config.optimizer, kind="muon")
    config = dataclasses.replace(tiny.config, optimizer=rates, max_steps=6)
    config = config.replace({"model.activation": "gelu_erf"})  # nanoGPT's
    for name, recorder in (("whole", None), ("stopped", Recorder(stop_after=2))):
        train_tiny(config, tmp_path / name, recorder, strategy="fsdp")
    shutil.copytree(tmp_path / "stopped", tmp_path / "elsewhere")
    train_tiny(config, tmp_path / "stopped", strategy="fsdp")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", 6)
    train_tiny(config, tmp_path / "elsewhere")
    gap = largest_gap(tmp_path / "elsewhere", tmp_path / "whole")
    assert gap < 1e-4
    with pytest.raises(UserError, match=r"optimizer\.kind: 'muon' in the run, 'adamw' now"):
        train_tiny(config.replace({"optimizer.kind": "adamw"}), tmp_path / "elsewhere")
    said = convert.export_model(tmp_path / "whole", tmp_path / "nanogpt", "nanogpt")
    assert "note: without the state of muon" in said
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    assert "optimizer" not in torch.load(tmp_path / "nanogpt" / "ckpt.pt")


def test_the_best_loss_so_far_counts_after_a_resume(tiny, train_tiny, copy):
    with Checkpoints(copy) as checkpoints:
        fields = checkpoints.read_metadata(7) | {"best_val_loss": 1.0}
        checkpoints.update_metadata(7, fields, writes=True)
    recorder = train_tiny(tiny.config, copy)
    found = [event for event in recorder.events if event[0] == "evaluate"]
    assert found == [("evaluate", 8, False), ("evaluate", 12, False)]


def test_a_stop_during_an_evaluation_is_made_up_for(tiny, train_tiny, tmp_path):
    run_dir = tmp_path / "run"
    recorder = train_tiny(tiny.config, run_dir, Recorder(stop_after=3, ask_again=3))
    assert recorder.events[-3:] == [("step", 3), ("save", 4), "end"]
    # And once more, during the evaluation that is made up for.
    recorder = train_tiny(tiny.config, run_dir, Recorder(stop_after=4, ask_again=3))
    assert recorder.events == ["start", ("save", 4), "end"]
    assert run_metadata.newest_metadata(run_dir).unfinished["step"] == 4
    assert [row["step"] for row in logged(run_dir)] == [0, 2]
    recorder = train_tiny(tiny.config, run_dir)
    assert recorder.events[:4] == ["start", ("step", 4), ("save", 4), ("evaluate", 4, True)]
    assert recorder.events[4:] == tiny.recorder.events[9:]
    assert_same_run(run_dir, tiny.run_dir, 12)


def test_accumulation_steps_may_change(tiny, train_tiny, copy):
    recorder = train_tiny(tiny.config, copy, gradient_accumulation_steps=2)
    assert recorder.trainer.start.notes == []  # the evaluations are over the same windows
    assert 0 < largest_gap(copy, tiny.run_dir) < 1e-5
    assert run_metadata.newest_metadata(copy).runtime.gradient_accumulation_steps == 2


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_evaluation_windows_do_not_depend_on_accumulation(tiny, steps):
    runtime = dataclasses.replace(
        tiny_runs.RUNTIME, gradient_accumulation_steps=steps, eval_full_split=False
    )
    assert runtime.eval_windows(tiny.config) == 20 * 16


def test_losses_over_other_windows_start_a_new_best(tiny, train_tiny, complete):
    config = tiny.config.replace({"max_steps": 14})
    other = {"eval_full_split": False, "eval_batches": 1, "eval_interval": 1}
    recorder = train_tiny(config, complete, **other)
    (note,) = [note for note in recorder.trainer.start.notes if "windows" in note]
    predicted, block = len(recorder.trainer.dataset.val) - 1, config.model.block_size
    assert f"over 16 validation windows now, over {-(-predicted // block)} before" in note
    assert ("evaluate", 13, True) in recorder.events
    losses = {row["step"]: row["val_loss"] for row in recorder.rows}
    best = min(losses, key=losses.get)
    with Checkpoints(complete) as checkpoints:
        # Among losses that compare, whatever was measured before.
        assert checkpoints.candidates("best")[0] == best
        assert run_metadata.read(checkpoints, 14).best_val_loss == losses[best]
        assert run_metadata.read(checkpoints, 14).eval_windows == 16


def test_dtype_is_decided_at_the_start_and_kept(tiny, train_tiny, complete, monkeypatch):
    auto = tiny.config.replace({"max_steps": 13})
    assert auto.model.dtype == "auto"

    def as_on_a_gpu(model, device=None):
        return dataclasses.replace(model, dtype="bfloat16") if model.dtype == "auto" else model

    monkeypatch.setattr(setup, "resolve_dtype", as_on_a_gpu)
    recorder = train_tiny(auto, complete)
    assert recorder.trainer.config.model.dtype == "float32"
    notes = " ".join(recorder.trainer.start.notes)
    assert "computes in float32, as it began; here a new one would in bfloat16" in notes
    assert run_metadata.newest_metadata(complete).config.model.dtype == "float32"
    assert '"dtype": "float32"' in (complete / "config.json").read_text()
    assert resume.resolve(auto).model.dtype == "bfloat16"  # of a new run
    given = auto.replace({"model.dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"model\.dtype: 'float32' in the run, 'bfloat16' now"):
        train_tiny(given, complete)


def test_another_attention_kernel_is_announced(tiny, train_tiny, complete):
    with Checkpoints(complete) as checkpoints:
        step = checkpoints.latest_step
        saved = run_metadata.read(checkpoints, step)
        assert saved.attention == "xla"
        moved = dataclasses.replace(saved, attention="cudnn")
        checkpoints.update_metadata(step, moved.to_dict(), writes=True)
    notes = train_tiny(tiny.config, complete).trainer.start.notes
    assert len(notes) == 1 and "attention is computed by xla" in notes[0] and "cudnn" in notes[0]


def test_more_steps_are_one_setting_and_go_on_at_min_lr(tiny, train_tiny, complete):
    recorder = train_tiny(tiny.config.replace({"max_steps": 15}), complete)
    assert [row["step"] for row in recorder.rows] == [13, 14, 15]
    assert {row["learning_rate"] for row in recorder.rows} == {np.float32(1e-3)}
    (note,) = recorder.trainer.start.notes
    assert "decay ended at step 12; the steps after it run at min_lr 0.001" in note
    saved = run_metadata.newest_metadata(complete).config
    assert (saved.max_steps, saved.lr_decay_steps) == (15, 12)
    # Again with the first number: there is nothing left to do.
    assert train_tiny(tiny.config, complete).events == ["start", "end"]


def test_another_experiment_is_refused_with_both_values(tiny, train_tiny, complete):
    before = (complete / "config.json").read_bytes()
    changes = {"seed": 3, "batch_size": 32, "model.n_layer": 2, "optimizer.lr_decay_steps": 40}
    with pytest.raises(UserError) as caught:
        train_tiny(tiny.config.replace(changes), complete)
    for words in ("seed: 1337 in the run, 3 now", "batch_size: 16 in the run, 32 now",
                  "model.n_layer: 1 in the run, 2 now", "lr_decay_steps: 12 in the run, 40 now",
                  "name another --run-dir"):  # fmt: skip
        assert words in str(caught.value)
    assert (complete / "config.json").read_bytes() == before


def test_the_text_may_lie_elsewhere_if_its_tokens_are_the_same(tiny, train_tiny, complete):
    moved = complete.parent / "moved"
    shutil.copytree(tiny.config.data.dir, moved)
    config = tiny.config.replace({"data.source": None, "data.dir": str(moved)})
    assert train_tiny(config, complete).trainer.dataset.fingerprint
    path = moved / "train.bin"
    tokens = np.fromfile(path, token_files.load(moved).train.dtype)
    tokens[100] = (tokens[100] + 1) % 10
    tokens.tofile(path)
    with pytest.raises(
        UserError, match=r"the tokens: fingerprint \w{12} in the run, \w{12} in .*moved now"
    ):
        train_tiny(config, complete)


def test_another_text_is_not_taken_for_the_prepared_one(tiny, train_tiny, tmp_path):
    assert tiny.config.data.dir
    config = tiny.config.replace({"data.source": "other.txt"})
    with pytest.raises(UserError, match=r"was made from .*text\.txt, not from other\.txt"):
        train_tiny(config, tmp_path / "run")


def test_a_fine_tuned_run_moves_with_its_folder(tiny, train_tiny, tmp_path):
    origin, tuned = tmp_path / "here" / "origin", tmp_path / "here" / "tuned"
    shutil.copytree(tiny.run_dir, origin)
    # Its architecture, its tokenizer and its vocabulary are those of the weights.
    config = dataclasses.replace(tiny.config, model=ModelConfig(dropout=0.1), init_from=str(origin))
    recorder = train_tiny(config, tuned)
    assert recorder.trainer.start.origin == f"from {origin}"
    assert recorder.rows[0]["val_loss"] == tiny.recorder.rows[-1]["val_loss"]
    moved = (tmp_path / "here").rename(tmp_path / "there") / "tuned"
    shutil.rmtree(tmp_path / "there" / "origin")  # it is not needed any more
    again = dataclasses.replace(config, init_from=str(tmp_path / "there" / "origin"))
    assert train_tiny(again, moved).events == ["start", "end"]
    for wrong in (None, "other"):
        with pytest.raises(UserError, match=r"tuned began with the weights of .*origin, not of"):
            train_tiny(dataclasses.replace(config, init_from=wrong), moved)
    with pytest.raises(UserError, match=r"no run in .*origin"):
        train_tiny(config, tmp_path / "new")


def damage(run_dir, step):
    """Change one bit of its largest file."""
    largest = max((run_dir / "checkpoints" / str(step)).rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)


def test_a_corrupted_checkpoint_is_set_aside_for_the_one_before(tiny, train_tiny, complete):
    damage(complete, 12)
    recorder = train_tiny(tiny.config, complete)
    (note,) = recorder.trainer.start.notes
    assert note.startswith("warning: ") and f"moved to {complete}/damaged-12" in note
    assert recorder.trainer.start.step == 8 and (complete / "damaged-12").is_dir()
    assert_same_run(complete, tiny.run_dir, 12)


def test_where_no_checkpoint_is_whole_nothing_starts_anew(tiny, train_tiny, complete):
    for step in (8, 12):
        (complete / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").unlink()
        damage(complete, step)
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint of .* is whole.*name another --run-"):
            train_tiny(tiny.config, complete)
    assert Checkpoints(complete).steps == []


ARCHITECTURE = ModelConfig(n_layer=2, n_head=4, n_embd=16, block_size=64, vocab_size=44, bias=False)


def test_weights_bring_the_architecture_that_was_not_given():
    wanted = ModelConfig(dropout=0.2, dtype="bfloat16")
    expected = dataclasses.replace(ARCHITECTURE, dropout=0.2, dtype="bfloat16")
    assert resume.adopt(wanted, ARCHITECTURE) == expected
    assert resume.adopt(ModelConfig(n_layer=2), ARCHITECTURE).n_embd == 16
    assert resume.adopt(ModelConfig(block_size=32), ARCHITECTURE).block_size == 32


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n_layer": 12}, "model.n_layer 12 is not the weights' 2: leave it out"),
        ({"bias": True}, "model.bias True is not the weights' False"),
        ({"n_head": 12, "n_embd": 768}, "n_head 12 .*; model.n_embd 768 is not"),
        ({"block_size": 1024}, "model.block_size 1024 exceeds the weights' 64"),
    ],
)
def test_a_given_setting_is_kept_though_it_equals_a_default(given, words):
    assert ModelConfig(**given) == ModelConfig()
    with pytest.raises(UserError, match=words):
        resume.adopt(ModelConfig(**given), ARCHITECTURE)


@pytest.mark.parametrize(
    ("changes", "state_of"),
    [({}, ""), ({"optimizer.kind": "muon"}, "adamw"), ({"freeze": ("wte",)}, "all parameters")],
)
def test_imported_weights_begin_their_own_schedule(tiny, train_tiny, complete, changes, state_of):
    """Their settings are defaults that nobody has chosen: max_steps 2000, say."""
    with Checkpoints(complete) as checkpoints:
        step = checkpoints.latest_step
        saved = run_metadata.read(checkpoints, step)
        longer = dataclasses.replace(saved.config, max_steps=2000, optimizer=OptimizerConfig())
        imported = dataclasses.replace(saved, config=longer, data_fingerprint=None)
        checkpoints.update_metadata(step, imported.to_dict(), writes=True)
    config = tiny.config.replace({"max_steps": 14} | changes)
    trainer = train_tiny(config, complete).trainer
    assert trainer.config.lr_decay_steps == 14 and trainer.start.origin.startswith("imported")
    kind = config.optimizer.kind
    notes = [f"note: {kind} begins anew; the imported state is that of {state_of}"]
    assert trainer.start.notes == (notes if state_of else [])


def test_a_given_tokenizer_must_be_the_weights(tiny):
    config = tiny.config.replace({"init_from": str(tiny.run_dir)})
    given = config.replace({"data.tokenizer": "gpt2", "model.vocab_size": None})
    with pytest.raises(UserError, match=r"data\.tokenizer gpt2 is not the weights' char"):
        resume.adopt_weights(given, "nowhere")


FIRST_EDITION_TEXT = ":" + 9 * " "
"""What it found likeliest after "RICHARD": to the end of its block, and one more."""

FIRST_EDITION_LOSSES = {45: 2.9515068531036377, 50: 2.8786661624908447}
FIRST_EDITION_VALIDATION = 2.887993183060597
"""Of its own steps from 40 to 50."""


@pytest.fixture
def first_edition(tmp_path):
    """A run of 40 steps of `helpers.TEXT` that gptjax 0.1 trained."""
    with tarfile.open(Path(__file__).parent / "data" / "first_edition_run.tar.gz") as archive:
        # Python before 3.11.4 has no filters.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path)
    return tmp_path / "tiny"


def test_a_run_of_the_first_edition_opens(first_edition, tiny):
    run, metadata = gptjax.load(first_edition), run_metadata.newest_metadata(first_edition)
    assert run.step == 40 and metadata.data_fingerprint == tiny.run.data_fingerprint
    assert metadata.eval_windows == metadata.runtime.eval_windows(metadata.config) == 32
    tokens = token_files.load(Path(tiny.config.data.dir)).val
    nats = [
        numpy_gpt.nats(run.config, run.params, tokens[start:end][None].astype(int))
        for start, end, _ in windows_over(len(tokens), 16, at_most=32)
    ]
    # The loss that it measured itself is that of its weights.
    expected = np.concatenate(nats, axis=1).mean()
    assert metadata.val_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_run_of_the_first_edition_is_sampled_from(first_edition):
    run = gptjax.load(first_edition)
    assert run.step == 40
    found = run.generate("RICHARD", max_new_tokens=len(FIRST_EDITION_TEXT), temperature=0.0)
    assert found == FIRST_EDITION_TEXT


@pytest.mark.slow
def test_a_run_of_the_first_edition_goes_on(first_edition, train_tiny, tiny):
    metadata = run_metadata.newest_metadata(first_edition)
    config = metadata.config.replace({"max_steps": 50, "data.dir": tiny.config.data.dir})
    recorder = tiny_runs.Recorder()
    runtime = dataclasses.replace(metadata.runtime, num_devices=None)
    fields = {field.name: getattr(runtime, field.name) for field in dataclasses.fields(runtime)}
    del fields["run_dir"]
    train_tiny(config, first_edition, recorder, **fields)
    rows = {row["step"]: row for row in recorder.rows}
    for step, loss in FIRST_EDITION_LOSSES.items():
        assert rows[step]["train_loss"] == pytest.approx(loss, abs=1e-6)
    assert rows[50]["val_loss"] == pytest.approx(FIRST_EDITION_VALIDATION, abs=1e-6)
    assert "windows" not in " ".join(recorder.trainer.start.notes)
