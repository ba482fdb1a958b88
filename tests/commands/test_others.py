"""The small commands on one run: evaluate, report, runs, data, convert, compare, bench."""

import json
import math
import re
import shutil
import sys

import helpers
import numpy as np
import pytest

from gptjax import config_io, evals, run
from gptjax.commands import bench
from gptjax.data import token_files
from gptjax.errors import UserError


def number(out, name):
    return float(re.search(rf"^{name} +([\d.]+)", out, re.M)[1])


def test_evaluate_measures_what_training_measured(trained, gptjax):
    out = gptjax("evaluate", "--run-dir", trained[0], "--split=val", "--checkpoint", "30")
    last = helpers.logged(trained[0])[-1]["val_loss"]
    assert number(out, "loss") == pytest.approx(last, abs=1e-4)
    assert out.startswith(f"{trained[0]}, step 30, in float32, on the val split: ")


def test_evaluate_computes_the_mean_loss_of_a_text(trained, gptjax, tmp_path):
    text = helpers.TEXT[: 1 + 6 * 16]
    (tmp_path / "t.txt").write_text(text)
    model = run.load(trained[0])
    ids = model.tokenizer.encode(text)
    expected = np.mean([model.loss(ids[at : at + 17]) for at in range(0, 96, 16)])
    out = gptjax("evaluate", trained[0], "--text", "t.txt", "--strategy", "fsdp")
    assert number(out, "loss") == pytest.approx(expected, abs=1e-4)
    assert number(out, "bits per character") == pytest.approx(expected / math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nope", "--split", "val"], "no run in nope"),
        (["RUN"], "on what"),
        (
            ["RUN", "--split", "val", "--data-dir", "~no.such.user/x"],
            "~no.such.user/x: there is no such home",
        ),
        (["RUN", "--split", "val", "--data-dir", "nope"], "no longer at nope"),
        (["RUN", "--split", "val", "--text", "x"], "exclude each other"),
        (["RUN", "--text", ""], "--text is empty"),
        (["RUN", "--split", "val", "--stride", "17"], "--stride 17 exceeds the block_size 16"),
        (["RUN", "--split", "val", "--stride", "0"], "stride 0 must be at least 1"),
        (["RUN", "--split", "val", "--batch-size", "9"], "9 does not divide over 8 devices"),
        (["RUN", "--text", "nope.txt"], "no text at 'nope.txt'"),
        (["RUN", "--hellaswag", "nope.jsonl"], "cannot read nope.jsonl: No such file"),
        (["RUN", "--text", "x", "--limit", "2"], "--limit goes with --tasks"),
        (["RUN", "--split", "val", "--task-data", "a=b"], "--task-data goes with --tasks"),
        (
            ["RUN", "--tasks", "a", "--task-data", "b"],
            "'b' is no task with its data",
        ),
        (["RUN", "--hellaswag", "x", "--stride", "2"], "goes with --text or --split or --wikitext"),
        (["RUN", "--lambada", "x", "--hellaswag-style", "harness"], "style goes with --hellaswag"),
        (["RUN", "--lambada", "nope.jsonl"], "cannot read nope.jsonl"),
        (["RUN", "--wikitext", "nope.raw"], "cannot read nope.raw"),
        (["--split", "val"], "RUN missing: gptjax evaluate RUN"),
    ],
)
def test_evaluate_refuses_bad_input(trained, gptjax, argv, words):
    with pytest.raises(UserError, match=words):
        gptjax("evaluate", *(trained[0] if x == "RUN" else x for x in argv))


def test_evaluate_gives_accuracies_on_hellaswag(trained, gptjax, tmp_path):
    row = {"ctx": "now is", "endings": ["the", "winter", "of our", "sun"], "label": 1}
    (tmp_path / "h.jsonl").write_text(json.dumps(row))
    out = gptjax("evaluate", trained[0], "--hellaswag", "h.jsonl")
    assert "1 questions in the completion style" in out and "acc_bytes" not in out
    assert number(out, "acc") in (0, 1) and number(out, "acc_norm") in (0, 1)
    row |= {"activity_label": "sun", "ctx_a": "now", "ctx_b": "is"}
    (tmp_path / "h.jsonl").write_text(json.dumps(row))
    flags = ["--hellaswag", "h.jsonl", "--hellaswag-style", "harness"]
    out = gptjax("evaluate", trained[0], *flags, "--strategy", "shard_map")
    assert "1 questions in the harness style" in out
    assert {number(out, name) for name in ("acc", "acc_norm", "acc_bytes")} <= {0, 1}


def test_evaluate_gives_the_perplexity_of_lambada(trained, gptjax, tmp_path):
    model = run.load(trained[0])
    (tmp_path / "l.jsonl").write_text('{"text": "of the sun"}\n')
    expected = -model.score("of the sun")[-4:].sum()  # " sun"
    out = gptjax("evaluate", trained[0], "--lambada", "l.jsonl")
    assert number(out, "perplexity") == pytest.approx(math.exp(expected), rel=1e-3)
    assert number(out, "acc") == 0


def test_evaluate_gives_the_perplexity_of_the_words_of_wikitext(trained, gptjax, tmp_path):
    model = run.load(trained[0])
    (tmp_path / "wiki.test.raw").write_text("the sun . \n")
    expected = -model.score("the sun.\n")[1:].sum() / 3
    out = gptjax("evaluate", trained[0], "--wikitext", "wiki.test.raw", "--stride", "8")
    assert number(out, "word perplexity") == pytest.approx(math.exp(expected), rel=1e-3)


def test_evaluate_runs_tasks_of_the_harness(trained, gptjax, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    row = {"activity_label": "summer", "ctx_a": "now is the", "ctx_b": "winter", "label": "1"}
    row["endings"] = ["of", "of our", "made", "glorious"]
    (tmp_path / "h.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    flags = "--tasks hellaswag --task-data hellaswag=h.jsonl --limit 2".split()
    title, _, acc, acc_norm = gptjax("evaluate", trained[0], *flags).splitlines()
    assert title.startswith(f"{trained[0]}, step 30, in float32, on lm-evaluation-harness ")
    for line, metric in ((acc, "acc"), (acc_norm, "acc_norm")):
        assert re.fullmatch(rf"hellaswag +1.0 +{metric} +[01].0000 +0.0000 +0 +2", line), line


def test_without_the_harness_its_tasks_are_refused(trained, gptjax, monkeypatch):
    monkeypatch.delitem(sys.modules, "gptjax.evals.harness", raising=False)
    monkeypatch.delattr(evals, "harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'gptjax\[harness\]'"):
        gptjax("evaluate", trained[0], "--tasks", "hellaswag")


def test_runs_lists_every_run_of_a_folder(trained, gptjax, tmp_path):
    shutil.copytree(trained[0], tmp_path / "runs" / "good")
    shutil.copytree(trained[0], tmp_path / "runs" / "bad")
    for path in (tmp_path / "runs" / "bad" / "checkpoints").glob("*.json"):
        path.write_text("{")
    (tmp_path / "runs" / "no run").mkdir()
    (tmp_path / "runs" / "no run" / "config.json").write_text(
        "{}"
    )  # as Hugging Face's folders have
    best = min(row["val_loss"] for row in helpers.logged(trained[0]) if row["val_loss"])
    model = config_io.run_settings(json.loads((trained[0] / "config.json").read_text()), "x")[0]
    titles, bad, good = (re.split("  +", line) for line in gptjax("runs").splitlines())
    assert titles == ["run", "step", "best loss", "parameters", "size", "changed"]
    assert bad[:4] == ["bad", "30", "damaged", "damaged"]
    assert good[:4] == ["good", "30", f"{best:.4f}", f"{model.model.num_parameters():,}"]
    size = sum(path.stat().st_size for path in trained[0].rglob("*") if path.is_file())
    assert good[4] == f"{size / 1000:.3g} KB" and re.fullmatch(r"[\d-]+ [\d:]+", good[5])
    assert gptjax("runs", "runs/good").splitlines()[1].startswith("good ")


def test_runs_without_any_says_so(gptjax, tmp_path):
    with pytest.raises(UserError, match="no folder runs; name one: gptjax runs FOLDER"):
        gptjax("runs")
    with pytest.raises(UserError, match=r"no runs in \."):
        gptjax("runs", ".")


def test_report_writes_a_page_into_the_run_or_what_it_is_told(trained, gptjax, tmp_path):
    for library in ("matplotlib", "plotly", "jinja2"):
        pytest.importorskip(library, reason="reports need the extra viz")
    shutil.copytree(trained[0], tmp_path / "run")
    assert gptjax("report", "run") == "wrote run/report.html\n"
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    (shown,) = json.loads(page.split('id="data">')[1].split("</script>")[0])["runs"]
    assert shown["rows"]["val_loss"] == [row["val_loss"] for row in helpers.logged(trained[0])]
    assert shown["starts"][0]["machine"]
    assert gptjax("report", "run", "--run-dir", "run", "--out", "both.svg") == "wrote both.svg\n"
    assert "<svg" in (tmp_path / "both.svg").read_text()
    with pytest.raises(UserError, match="leave out --out"):
        gptjax("report", "run", "--live", "--out", "x.html")


@pytest.mark.parametrize("name", ["run", "fresh.py"])
def test_explain_walks_through_a_run_or_an_untrained_config(
    trained, gptjax, text_file, tmp_path, name
):
    pytest.importorskip("jinja2", reason="pages need the extra viz")
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "fresh.py").write_text(
        "from gptjax.config import *\n"
        "config = TrainConfig(ModelConfig(2, 2, 16, 16), DataConfig('text.txt'))"
    )
    out = gptjax("explain", name, "--prompt", "now is", "--out", "walk.html")
    assert "14. Every shape on the way" in out and out.endswith("wrote walk.html\n")
    assert out.count("untrained") == (0 if name == "run" else 3)
    assert "now is" in (tmp_path / "walk.html").read_text()


def test_a_config_in_a_folder_is_explained_as_one(gptjax, text_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "fresh.py").write_text(
        "from gptjax.config import *\n"
        "config = TrainConfig(ModelConfig(1, 2, 16, 16), DataConfig('text.txt'))"
    )
    assert "(untrained)" in gptjax("explain", "mine/fresh.py", "--prompt", "now is")


def test_explain_asks_the_hub_for_a_name_with_an_owner(gptjax, monkeypatch):
    monkeypatch.setattr(run, "from_pretrained", lambda name: (_ for _ in ()).throw(UserError(name)))
    with pytest.raises(UserError, match="openai-community/gpt2"):
        gptjax("explain", "openai-community/gpt2")


def test_explain_follows_an_imported_model(trained, gptjax, tmp_path):
    gptjax("convert", "export", trained[0], "hf")
    ours, again = (gptjax("explain", name, "--prompt", "now is") for name in (trained[0], "hf"))
    numbers = re.compile(r"-?\d+\.\d+")
    assert len(numbers.findall(ours)) > 200
    assert numbers.findall(ours) == numbers.findall(again)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no run in runs/quickstart yet; train one .gptjax train., or see an untrained"),
        (["nope"], "there is no run nope, and no config file nope"),
        (["runs/nope"], "there is no run runs/nope, and no config file runs/nope"),
        (["RUN", "--prompt", "n"], "at least two tokens"),
        (["RUN", "--prompt", "caf\u00e9"], "is not one of the 44 characters.*--unknown skip"),
        (["RUN", "--prompt", "now is the winter of"], "20 tokens do not fit"),
        (["RUN", "--prompt", "now", "--out", "x.png"], r"the name of an \.html file"),
        (["RUN", "--prompt", "now", "--out", "nope/x.html"], "in a folder that exists"),
    ],
)
def test_explain_refuses_bad_input(trained, gptjax, argv, words):
    with pytest.raises(UserError, match=words):
        gptjax("explain", *(trained[0] if x == "RUN" else x for x in argv))


def test_data_prepares_a_text_for_training(gptjax, text_file, tmp_path):
    out = gptjax("data", "text.txt", "--out", "set", "--val-fraction", "0.2")
    assert out.endswith("train on it: gptjax train --data.dir set\n")
    size = {name: (tmp_path / "set" / f"{name}.bin").stat().st_size for name in ("train", "val")}
    assert size["val"] / sum(size.values()) == pytest.approx(0.2, abs=0.001)
    assert np.fromfile(tmp_path / "set" / "train.bin", "<u2").max() < 100
    with pytest.raises(UserError, match=r"val_fraction 2\.0 is outside"):
        gptjax("data", "text.txt", "--val-fraction", "2")
    for argv in ([], ["text.txt", "--mix", "text.txt=1"]):
        with pytest.raises(UserError, match="gptjax data SOURCE names one text, --mix several"):
            gptjax("data", *argv)
    (tmp_path / "b.txt").write_text(helpers.TEXT)
    mix = ["text.txt=3", "b.txt=1"]
    out = gptjax("data", "--mix", *mix, "--out", "mixed")
    assert out.endswith(f"train --data.mix {' '.join(mix)} --data.dir mixed\n")
    found = token_files.load(tmp_path / "mixed")
    assert [name for name, _ in found.parts] == ["text.txt", "b.txt"] and "None" not in out


def test_convert_exports_and_imports_the_same_model(trained, gptjax, tmp_path):
    assert gptjax("convert", "export", trained[0], "hf").startswith("wrote hf (hf)")
    assert "imported 4" in gptjax("convert", "import", "hf", "--run-dir", "back")
    text = helpers.TEXT[:15]
    assert np.allclose(run.load(trained[0]).logits(text), run.load(tmp_path / "back").logits(text))
    with pytest.raises(UserError, match="back holds a run already"):
        gptjax("convert", "import", "hf", "back")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "import or export"),
        ("imprt a b", "import or export"),
        ("import a", "RUN missing: gptjax convert import SOURCE RUN"),
        ("export a", "FOLDER missing: gptjax convert export RUN FOLDER"),
        ("import a b --tokenizer=", "--tokenizer is empty"),
        ("export a b --format onnx", "--format 'onnx': expected 'hf' or 'nanogpt'"),
    ],
)
def test_convert_refuses_bad_input(gptjax, argv, words):
    with pytest.raises(UserError, match=words):
        gptjax("convert", *argv.split())


@pytest.mark.slow
def test_compare_finds_the_same_numbers(trained, gptjax):
    pytest.importorskip("transformers", reason="comparing needs PyTorch and transformers")
    out = gptjax("compare", trained[0], "--steps", "2", "--greedy-tokens", "5")
    assert re.search(r"all \d+ numbers agree within their tolerances\n$", out)


def test_compare_refuses_bad_input(gptjax):
    with pytest.raises(UserError, match=r"steps 0 must be.*seed -1 must be"):
        gptjax("compare", "run", "--steps", "0", "--seed", "-1")


def test_bench_says_where_it_is_when_installed(gptjax, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    with pytest.raises(UserError, match="not installed; run this command in a checkout"):
        gptjax("bench", "train")
