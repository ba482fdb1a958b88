"""lm-evaluation-harness on a run: the numbers that it has for the run's Hugging Face export."""

import importlib
import json
import math

import jax
import numpy as np
import pytest
from fuzz import damaged, read_or_refuse
from helpers import TEXT
from hypothesis import HealthCheck, given, settings

from gptjax import model
from gptjax.config import ModelConfig
from gptjax.data.tokenizers import BpeTokenizer, CharTokenizer
from gptjax.devices.strategy import get_strategy
from gptjax.errors import UserError
from gptjax.evals import hellaswag, lambada
from gptjax.run import Run

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra harness")
harness = importlib.import_module("gptjax.evals.harness")

HELLASWAG = [
    {
        "activity_label": "Baking bread",
        "ctx_a": "A woman stands in a kitchen.",
        "ctx_b": "she [title] kneads",
        "endings": ["the dough [substeps] on a board. ", "a bicycle.", "pâté  twice.", "slowly."],
        "label": "0",
    },
    {
        "activity_label": "Skiing",
        "ctx_a": "A man looks down a slope. " * 9,  # longer than the block
        "ctx_b": "",
        "endings": ["he goes down.", "he eats a tree.", "home", "to bed."],
        "label": "2",
    },
]
LAMBADA = [
    {"text": "She opened the door and saw her old friend Marcus"},
    {"text": "a word " * 60 + "end"},
    {"text": "Good day\n\nsaid the fox  quietly."},
]
WIKITEXT = [
    {"page": " = Tower = \n \n It is 300 @.@ 5 metres ( tall ) . " + "People climb it . " * 30},
    {"page": " = Fox = \n A small fox \U0001f600 ."},
]
DATA = {"hellaswag": HELLASWAG, "lambada_openai": LAMBADA, "wikitext": WIKITEXT}


@pytest.fixture(scope="module")
def run():
    tokenizer = BpeTokenizer.train([TEXT], 300)
    config = ModelConfig(2, 2, 16, block_size=40, vocab_size=300, dtype="float32")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda s: jax.numpy.asarray(rng.normal(0, 0.3, s.shape), "f4"), shapes)
    return Run(config, params, tokenizer)


@pytest.fixture(scope="module")
def ours(run):
    return harness.HarnessModel(run, strategy=get_strategy("pmap", jax.devices()[:2]), batch_size=3)


@pytest.fixture
def files(tmp_path):
    for name, rows in DATA.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: tmp_path / f"{name}.jsonl" for name in DATA}


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


PAIRS = [
    ("now is the", " winter"),
    ("now is the ", "winter of our discontent"),  # the space belongs to what follows
    ("", "winter"),
    ("glorious summer " * 30, "by this sun"),
]


def test_a_continuation_has_the_likelihood_that_the_logits_say(run, ours):
    expected = []
    for context, text in PAIRS:
        ids = run.tokenizer.encode(context + text)
        count = len(ids) - len(run.tokenizer.encode(context.rstrip()))
        ids = np.concatenate([[run.tokenizer.eot] * (not context), ids])[-41:].astype(int)
        logits = run.logits(ids[:-1]).astype(float)[-count:]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = ids[-count:]
        greedy = (logits.argmax(-1) == chosen).all()
        expected.append((logs[np.arange(count), chosen].sum(), greedy))
    found = ours.loglikelihood(requests("loglikelihood", PAIRS))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-5)


def test_the_likeliest_continuation_is_greedy(run, ours):
    before = run.tokenizer.encode("now is")
    second, likeliest = np.argsort(run.logits(before)[-1])[-2:]
    texts = [run.tokenizer.decode([each]) for each in (likeliest, second)]
    for text, token in zip(texts, (likeliest, second), strict=True):
        assert run.tokenizer.encode("now is" + text).tolist() == [*before, token]
    found = ours.loglikelihood(requests("loglikelihood", [("now is", text) for text in texts]))
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.slow
def test_what_is_generated_is_the_greedy_continuation(run, ours):
    long = TEXT[:300]
    asked = [
        ("now is", {"until": ["zzz"], "max_gen_toks": 8}),
        ("now is", {"until": "", "max_gen_toks": 8, "do_sample": True, "temperature": 0.0}),
        ("now is", {"max_new_tokens": 8}),  # as the harness, also by Hugging Face's name
        (long, {"max_gen_toks": 8, "do_sample": False, "temperature": 2.0}),
    ]
    found = ours.generate_until(requests("generate_until", asked))
    ids = [run.tokenizer.encode("now is").tolist(), run.tokenizer.encode(long)[-32:].tolist()]
    for own in ids:
        for _ in range(8):
            padded = own + [0] * (40 - len(own))
            own.append(int(run.logits(padded)[len(own) - 1].argmax()))
    assert run.tokenizer.eot not in ids[0] + ids[1]
    texts = [run.tokenizer.decode(own[-8:]) for own in ids]
    assert found == [texts[0], texts[0], texts[0], texts[1]]
    asked = [("now is", {"max_gen_toks": 8, "temperature": 9.0})]  # which alone means to sample
    assert ours.generate_until(requests("generate_until", asked)) != [texts[0]]
    stop = texts[0][3:5]
    asked = [("now is", {"until": [stop], "max_gen_toks": 8})]
    assert ours.generate_until(requests("generate_until", asked)) == [texts[0].split(stop)[0]]
    with pytest.raises(UserError, match="40 new tokens, which leave no room"):
        ours.generate_until(requests("generate_until", [("now is", {"max_gen_toks": 40})]))


def test_a_long_text_is_predicted_block_by_block(run, ours):
    texts = ["winter", TEXT[:500], ""]
    expected = []
    for text in texts:
        ids = [run.tokenizer.eot, *run.tokenizer.encode(text).tolist()]
        parts = [ids[at : at + 41] for at in range(0, len(ids) - 1, 40)]
        # The last one has a whole block's context.
        last = (len(ids) - 1) % 40 or 40
        whole = parts[:-1] if len(parts) > 1 else []
        total = -sum(run.loss(part) * (len(part) - 1) for part in whole)
        if len(ids) > 1:
            total += run.score(ids[-41:])[-last:].sum(dtype=float)
        expected.append(total)
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_report_has_a_line_for_each_number(ours, files):
    del files["hellaswag"]
    result = harness.evaluate(ours, ["wikitext", "lambada_openai"], files, limit=2)
    title, *lines = result.report().split("\n")
    assert title == f"lm-evaluation-harness {lm_eval.__version__}"
    cells = [line.split() for line in lines]
    assert cells[0] == "task version metric value stderr few-shot examples".split()
    # The metrics of a task are means, or functions of the mean, of its likelihoods.
    texts = [row["text"] for row in LAMBADA[:2]]
    pairs = [(text.rpartition(" ")[0], " " + text.rpartition(" ")[2]) for text in texts]
    likelihoods, greedy = zip(*ours.loglikelihood(requests("loglikelihood", pairs)), strict=True)
    expected = math.exp(-np.mean(likelihoods)), np.mean(greedy)
    rows = {(row[0], row[2]): row for row in cells[1:]}
    assert [*rows] == [
        ("wikitext", "word_perplexity"), ("wikitext", "byte_perplexity"),
        ("wikitext", "bits_per_byte"), ("lambada_openai", "perplexity"), ("lambada_openai", "acc"),
    ]  # fmt: skip
    for metric, value in zip(("perplexity", "acc"), expected, strict=True):
        row = rows["lambada_openai", metric]
        assert row[3] == f"{value:.4f}" and row[5:] == ["0", "2"]
    assert rows["wikitext", "bits_per_byte"][4] == "-"


def test_our_own_hellaswag_and_lambada_have_the_same_numbers(run, ours, files):
    del files["wikitext"]
    expected = [row.value for row in harness.evaluate(ours, [*files], files, limit=3).rows]
    settings = {"config": run.config, "name": "x", "batch_size": 2}
    questions = hellaswag.read_questions(files["hellaswag"], run.tokenizer, "harness")
    found = hellaswag.evaluate_questions(ours._scores, questions, style="harness", **settings)
    passages = lambada.read_passages(files["lambada_openai"], run.tokenizer)
    last = lambada.evaluate_passages(ours._scores, passages, **settings)
    assert [found.acc, found.acc_norm, last.acc] == [*expected[:2], expected[3]]
    assert last.perplexity == pytest.approx(expected[2], rel=1e-4)


def test_a_folder_has_a_file_for_each_split(ours, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for split, rows in (("train", HELLASWAG[1:] * 3), ("val", HELLASWAG[:1])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"hellaswag_{split}.jsonl").write_text(lines)
    prompts = []

    def loglikelihood(asked):
        prompts.extend(asked)
        return [(0.0, True)] * 4

    monkeypatch.setattr(ours, "loglikelihood", loglikelihood)
    found = harness.evaluate(ours, ["hellaswag"], {"hellaswag": tmp_path}, num_fewshot=2)
    assert prompts[0].args[0].count("Skiing: A man looks") == 2
    assert [(row.metric, row.few_shot, row.examples) for row in found.rows] == [
        ("acc", 2, 1),
        ("acc_norm", 2, 1),
    ]
    (tmp_path / "data" / "hellaswag_train.jsonl").unlink()
    with pytest.raises(UserError, match=f"{tmp_path} has no file of the train split"):
        harness.evaluate(ours, ["hellaswag"], {"hellaswag": tmp_path})


def test_what_lies_beside_a_split_is_not_mixed_in(tmp_path):
    """As other languages and subsets do in copies of public repositories."""
    for name in ("x/test-00000-of-00002", "x/test-00001-of-00002", "x/lambada_test_de", "y/test"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a b"}\n')
        if name.endswith("1-of-00002"):
            assert len(harness._Splits(tmp_path)["test"]) == 2
    listed = "x/lambada_test_de.jsonl, x/test.jsonl, y/test.jsonl; name one"
    with pytest.raises(UserError, match=f"several files of the test split: {listed}"):
        harness._Splits(tmp_path)["test"]


def test_what_cannot_be_evaluated_is_said_in_one_line(ours, run, files, tmp_path):
    with pytest.raises(UserError, match=r"data for lambada_openai, but .* hellaswag"):
        harness.evaluate(ours, ["hellaswag"], files | {"hellaswag": tmp_path})
    with pytest.raises(UserError, match="one split, but the 1 solved examples before"):
        harness.evaluate(ours, [*files], files, num_fewshot=1)
    with pytest.raises(UserError, match=r"cannot evaluate wikitext: KeyError: 'page' \(data that"):
        harness.evaluate(ours, ["wikitext"], {"wikitext": files["lambada_openai"]})
    characters = harness.HarnessModel(
        Run(run.config.replace(vocab_size=256), run.params, CharTokenizer("abc"))
    )
    with pytest.raises(UserError, match="char tokenizer has no token that ends a text"):
        characters.loglikelihood(requests("loglikelihood", [("", "a")]))
    too_long = requests("loglikelihood", [("now", " is" * 41)])
    with pytest.raises(UserError, match=r"1 of 1 continuations are longer than .* 40"):
        ours.loglikelihood(too_long)


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_a_near_one(ours):
    """All tasks are indexed for that."""
    with pytest.raises(UserError, match=r"no task 'hellasvag' in .*; did you mean hellaswag\?"):
        harness.evaluate(ours, ["hellasvag"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged(json.dumps(LAMBADA[0]).encode() + b"\n"))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("rows") / "test.jsonl"
    path.write_bytes(content)
    read_or_refuse(lambda: harness._Splits(path)["test"], path)


@pytest.mark.slow
def test_the_numbers_are_those_of_the_exported_model(run, ours, files, tmp_path):
    pytest.importorskip("torch", reason="needs the extra torch")
    from lm_eval.models.huggingface import HFLM

    run.save_pretrained(tmp_path / "exported")
    theirs = HFLM(str(tmp_path / "exported"), device="cpu", dtype="float32", batch_size=4)
    for kind, arguments in (
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [("winter",), (TEXT[:500],), ("\U0001f600",)]),
    ):
        expected, found = (getattr(m, kind)(requests(kind, arguments)) for m in (theirs, ours))
        np.testing.assert_allclose(np.array(found, float), np.array(expected, float), atol=1e-3)
    options = {"until": ["\n"], "max_gen_toks": 8}
    asked = [("now is the", options), (TEXT[:300], options)]
    expected, found = (m.generate_until(requests("generate_until", asked)) for m in (theirs, ours))
    assert found == expected
    expected, found = (harness.evaluate(m, [*DATA], files).rows for m in (theirs, ours))
    assert len(found) == 7
    for row, other in zip(found, expected, strict=True):
        assert row[:2] + row[4:] == other[:2] + other[4:]
        assert row.value == pytest.approx(other.value, rel=1e-4), row
