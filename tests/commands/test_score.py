"""gptjax score: the log-probability of each line, as the API computes it."""

import json

import pytest

from gptjax import run
from gptjax.errors import UserError

LINES = ["now is the winter of our discontent", "n", "RICHARD:"]


def test_each_line_is_a_text(trained, gptjax, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("\n\n".join(LINES) + "\n")
    model = run.load(trained[0], dtype="float32")
    expected = [model.score(line)[1:] for line in LINES]
    told = gptjax("score", trained[0], "lines.txt").splitlines()
    for line, text, scores in zip(told, LINES, expected, strict=True):
        total, count, said = line.split(maxsplit=2)
        assert float(total) == pytest.approx(scores.sum(), abs=1e-3)
        assert int(count) == len(text) - 1 and said == repr(text)
    assert "3 texts: log-probability -" in capsys.readouterr().err


def test_tokens_in_a_table_and_in_json(trained, gptjax, tmp_path):
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": x}) for x in LINES))
    argv = ["score", trained[0], "lines.jsonl", "--tokens"]
    found = [json.loads(line) for line in gptjax(*argv, "--json").splitlines()]
    assert [each["text"] for each in found] == ["".join(x["tokens"]) for x in found] == LINES
    scores = run.load(trained[0], dtype="float32").score(LINES[0])[1:]
    assert found[0]["token_logprobs"] == [None, *map(pytest.approx, scores.round(6).tolist())]
    rows = [row.split(maxsplit=1) for row in gptjax(*argv).splitlines()[1:4]]
    assert [own for _, own in rows] == ["'n'", "'o'", "'w'"]
    assert [x for x, _ in rows] == ["-", *(f"{score:.4f}" for score in scores[:2])]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["empty.txt"], "empty.txt has no texts; expected one in each line"),
        (["bad.txt"], "text 2: the character 'Ω'"),
        ([], "FILE missing"),
    ],
)
def test_bad_input_is_named(trained, gptjax, tmp_path, argv, words):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.txt").write_text("now\nΩ\n")
    with pytest.raises(UserError, match=words):
        gptjax("score", trained[0], *argv)
