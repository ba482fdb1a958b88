"""The notebooks: what a reader sees is what is printed."""

import ast
import copy
import os

import pytest
from helpers import ROOT, SHAKESPEARE

pytest.importorskip("jupytext", reason="needs the extra `examples`")
pytest.importorskip("nbclient", reason="needs the extra `examples`")
import nbformat

from examples import execute

NAMES = [path.stem for path in execute.NOTEBOOKS]
LONG = [name for name in NAMES if "02" <= name < "11"]
"""Which CI leaves out; the others use the package most."""
NEEDS_TORCH = "12_pytorch", "14_gpt2"


def frozen(name: str):
    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_have_the_same_cells(name):
    text, made = execute.read(ROOT / "examples" / f"{name}.py"), frozen(name)
    assert [(c.cell_type, c.source, c.metadata) for c in text.cells] == [
        (c.cell_type, c.source, c.metadata) for c in made.cells
    ]
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {kind for cell in code for kind, _ in execute.outputs(cell)} <= {
        "stdout", "image/png/text/plain",
    }  # fmt: skip  # no warnings, no errors


def test_the_first_rung_shows_all_that_the_others_import():
    module = (ROOT / "examples/ladder.py").read_text()
    cells = "\n\n".join(cell.source for cell in frozen("01_bigram").cells)
    for statement in ast.parse(module).body[1:]:  # all but the docstring
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            assert ast.get_source_segment(module, statement) in cells


def test_the_table_is_that_of_the_notebooks():
    assert execute.table() in (ROOT / "examples/README.md").read_text()


@pytest.mark.parametrize(
    "was, now, equal",
    [
        ("loss 2.450, shape (16, 64)", "loss 2.470, shape (16, 64)", True),
        ("loss 2.450, shape (16, 64)", "loss 2.550, shape (16, 64)", False),
        ("loss 2.450, shape (16, 64)", "loss 2.450, shape (16, 65)", False),
        ("equal: True", "equal: False", False),
        ("after 3.1 s, 0.31 ms each", "after 12.0 s, 9.87 ms each", True),
        ("4,225 parameters", "4,226 parameters", False),
        ("[0.5  1.  ]", "[0.50 1. ]", True),
        ("-0.00", "0.01", True),
        ("error 1.0e-07", "error 3.0e-07", False),
    ],
)
def test_numbers_are_compared_within_the_tolerance(was, now, equal):
    assert execute.same(was, now) == equal


def test_a_stale_notebook_is_noticed():
    """One change at a time, in what was printed and in what is executed."""
    good = frozen("04_averaging")
    assert execute.differences(good, good) == []
    at = next(n for n, c in enumerate(good.cells) if "validation loss" in str(c.get("outputs")))
    for change in ("text", "outputs", "source"):
        stale = copy.deepcopy(good)
        if change == "text":
            output = stale.cells[at].outputs[0]
            output.text = output.text.replace("validation loss ", "validation loss 1")
        elif change == "outputs":
            stale.cells[at].outputs = []
        else:
            stale.cells[at].source += "\nprint()"
        assert len(execute.differences(stale, good)) == 1, change


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="Tiny Shakespeare is not here")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in NAMES]
)
def test_executed_anew_it_prints_the_same(name):
    if name in NEEDS_TORCH:
        pytest.importorskip("transformers", reason="needs PyTorch and transformers")
    if name == "14_gpt2" and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's merges are not on this machine (TIKTOKEN_CACHE_DIR)")
    fresh = execute.execute(ROOT / "examples" / f"{name}.py")
    assert execute.differences(frozen(name), fresh) == []
