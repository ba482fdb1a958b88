"""Execute the notebooks and freeze what they print.

    python -m examples.execute                  all of them, a few minutes on two cores
    python -m examples.execute 05_one_head ...  these

NN_NAME.py is the notebook as text (jupytext's percent format), and the one that is edited.
NN_NAME.ipynb is made of it: the same cells with what they printed. README.md gets the table of all.
`tests/test_examples.py` executes all anew and compares.

Two tags of a cell say what may not be compared: numbers-vary (numbers that depend on the machine)
and text-varies (all of it: text drawn from a trained model). Times are never compared.
"""

import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
TABLE = re.compile(r"(?<=<!-- made by examples/execute\.py -->\n).*?(?=<!-- end -->)", re.DOTALL)

TOLERANCE = 0.02
"""Of numbers with a decimal point, relative: another CPU sums in another order, and 1000 steps of
training amplify that. Whole numbers must be equal."""

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?")
TIME = re.compile(rf"{NUMBER.pattern} m?s\b")
RESULT = re.compile(r"([\d,]+) parameters, validation loss ([\d.]+)")


def read(path: Path) -> Any:
    """A notebook of NN_NAME.py, without outputs; cells are numbered, so that ids do not change."""
    notebook = jupytext.read(path)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(path: Path) -> Any:
    """The notebook after a run in a kernel of its own, with its time in seconds in `metadata`."""
    notebook = read(path)
    ours = ("JAX_", "XLA_", "GPTJAX_TRICKS", "MPLBACKEND")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(FOLDER.parent)}
    start = time.perf_counter()
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # it warns of its own way to talk to us
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=environment)
    notebook.metadata["seconds"] = round(time.perf_counter() - start)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def outputs(cell: Any) -> list[tuple[str, str]]:
    """(kind, text) of each output; of a picture only that there is one."""
    found = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        text = output.get("text", "" if "image/png" in data else data.get("text/plain", ""))
        found.append((output.get("name") or "/".join(sorted(data)) or output.output_type, text))
    return found


def differences(frozen: Any, fresh: Any) -> list[str]:
    """What a reader of the frozen notebook would be told wrongly, in words."""
    found = []
    if [cell.source for cell in frozen.cells] != [cell.source for cell in fresh.cells]:
        found.append("the cells are not those of the .py file: run python -m examples.execute")
    for number, (old, new) in enumerate(zip(frozen.cells, fresh.cells, strict=False)):
        tags = new.metadata.get("tags", [])
        before, after = outputs(old), outputs(new)
        if "text-varies" in tags:
            before, after = ([(kind, "") for kind, _ in found] for found in (before, after))
        if [kind for kind, _ in before] != [kind for kind, _ in after]:
            found.append(f"cell {number} printed {before}, now {after}")
            continue
        for (_, was), (_, now) in zip(before, after, strict=True):
            if not same(was, now, numbers="numbers-vary" not in tags):
                found.append(f"cell {number} printed:\n{was}\nnow:\n{now}")
    return found


def same(was: str, now: str, *, numbers: bool = True) -> bool:
    """Whether two texts are equal, but for times and, within TOLERANCE, numbers with a point."""
    texts = [TIME.sub("TIME", text) for text in (was, now)]
    shapes = [NUMBER.sub("0", text).split() for text in texts]
    if shapes[0] != shapes[1]:
        return False
    pairs = zip(*map(NUMBER.findall, texts), strict=True)
    return not numbers or all(a == b or _near(a, b) for a, b in pairs)


def _near(a: str, b: str) -> bool:
    if "." not in a + b and "e" not in a + b:
        return False
    x, y = (float(number.replace(",", "")) for number in (a, b))
    mantissa, _, exponent = a.partition("e")
    last_digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(x - y) <= max(TOLERANCE * max(abs(x), abs(y)), 1.01 * last_digit)


def table() -> str:
    """All notebooks, as Markdown: idea as their first cells say it, the last loss they print."""
    lines = [
        "| notebook | idea | parameters | validation loss | seconds | in a tutorial |",
        "|---|---|---|---|---|---|",
    ]
    for path in NOTEBOOKS:
        notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
        first = " ".join(notebook.cells[0].source.split())
        title = first.partition("**")[0].removeprefix("# ").strip()
        idea, tutorial = re.findall(r"\*\*[\w ]+:\*\* (.*?)(?=\. \W*[A-Z])", first)[:2]
        printed = "".join(text for cell in notebook.cells for _, text in outputs(cell))
        # The last rung prints its result as a row of the ladder.
        results = RESULT.findall(printed) or re.findall(
            rf"{path.stem} +([\d,]+) +([\d.]+)", printed
        )
        parameters, loss = (results or [("", "")])[-1]
        cells = (
            f"[{title}]({path.stem}.ipynb)", idea, parameters, loss,
            notebook.metadata["seconds"], tutorial,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    known = {path.stem: path for path in NOTEBOOKS}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"error: no notebook {unknown[0]}; expected one of {', '.join(known)}")
    total = 0
    for name in names or known:
        print(f"{name:16}", end=" ", flush=True)
        try:
            notebook = execute(known[name])
        except nbclient.exceptions.CellExecutionError as error:
            sys.exit(f"failed:\n{error}")
        for kind, text in (output for cell in notebook.cells for output in outputs(cell)):
            if kind == "stderr":
                sys.exit(f"printed a warning:\n{text}")
        nbformat.write(notebook, known[name].with_suffix(".ipynb"))
        total += notebook.metadata["seconds"]
        print(f"{notebook.metadata['seconds']:3} s", flush=True)
    print(f"{'together':16} {total:3} s")
    with contextlib.suppress(FileNotFoundError):  # not all are executed yet
        made = table()
        readme = FOLDER / "README.md"
        readme.write_text(TABLE.sub(lambda _: made, readme.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
