"""A walk through a model (`walk`), printed or as a page."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gptjax.run import Run
from gptjax.viz import page
from gptjax.viz.walk import Bars, Guess, Heads, Section, Table, counted, percent

MOST_COLUMNS, MOST_ROWS = 12, 24
"""Of a table that is printed; a page can be scrolled."""


def describe(run: Run) -> str:
    config = run.config
    trained = f", after {run.step:,} steps" if run.step else ""
    biases = "" if config.bias else ", no biases"
    return (
        f"{config.num_parameters():,} parameters{trained}: {counted(config.n_layer, 'layer')} of"
        f" {counted(config.n_head, 'head')}, {config.n_embd} numbers a token, a context of"
        f" {config.block_size:,} tokens{biases}"
    )


def show(run: Run, name: str, sections: Sequence[Section], console: Console) -> None:
    """Print the walk."""
    console.print(f"{name}: {describe(run)}\n", soft_wrap=False)
    for number, section in enumerate(sections, 1):
        console.print(Text(f"{number}. {section.title}", style="bold"), soft_wrap=False)
        for paragraph in section.text:
            console.print(f"\n{paragraph}", soft_wrap=False)
        for block in section.blocks:
            if isinstance(block, Heads):
                continue  # their table follows; all of their weights are for a page
            console.print()
            if block.caption:
                console.print(Text(block.caption, style="italic"), soft_wrap=False)
            table = _bars(block) if isinstance(block, Bars) else _table(block)
            console.print(table, soft_wrap=False)
        console.print()


def _table(block: Table) -> RichTable:
    out = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown, cut = block.columns[:MOST_COLUMNS], len(block.columns) > MOST_COLUMNS
    for title, right in zip(shown, _numeric(block), strict=False):
        out.add_column(Text(title), justify="right" if right else "left", overflow="fold")
    if cut:
        out.add_column("...")
    for row in block.rows[:MOST_ROWS]:
        cells = [Text(cell(value, block.places)) for value in row[:MOST_COLUMNS]]
        out.add_row(*cells, "..." if cut else None)
    if len(block.rows) > MOST_ROWS:
        out.add_row(f"... {len(block.rows) - MOST_ROWS} more")
    return out


def _numeric(block: Table) -> list[bool]:
    """Which columns are of numbers."""
    columns = zip(*block.rows, strict=True)
    return [any(isinstance(x, int | float) for x in column) for column in columns]


def _bars(block: Bars) -> RichTable:
    out = RichTable(box=None, show_header=False, pad_edge=False)
    most = max(block.values) or 1.0
    for label, value in zip(block.labels, block.values, strict=True):
        out.add_row(label, Text(f"{value:.2f}"), "\u2588" * max(1, round(30 * value / most)))
    return out


def cell(value: Any, digits: int) -> str:
    if value is None:
        return ""
    if isinstance(value, Guess):
        return f"{value.token} {percent(value.share)}".strip()
    if isinstance(value, float):
        return f"{value:z.{digits}f}"  # z: never -0.00
    return f"{value:,}" if isinstance(value, int) else str(value)


def to_html(run: Run, name: str, prompt: str, sections: Sequence[Section]) -> str:
    """The walk as a page."""
    return page.render(
        "explain.html",
        name=name,
        prompt=prompt,
        summary=describe(run),
        sections=[
            {
                "title": section.title,
                "text": section.text,
                "blocks": [_as_dict(block) for block in section.blocks],
            }
            for section in sections
        ],
    )


def _as_dict(block: Table | Bars | Heads) -> dict[str, Any]:
    """For the template."""
    if isinstance(block, Heads):
        layers, heads, size, _ = block.weights.shape
        sizes = {"layers": layers, "heads": heads, "tokens": [*block.tokens], "size": size}
        return {"kind": "heads", "data": sizes | {"weights": page.shares(block.weights)}}
    if isinstance(block, Bars):
        most = max(block.values) or 1.0
        bars = [
            (label, f"{value:.2f}", value / most)
            for label, value in zip(block.labels, block.values, strict=True)
        ]
        return {"kind": "bars", "caption": block.caption, "rows": bars}
    numbers = [abs(x) for row in block.rows for x in row if isinstance(x, float)]
    top = 1.0 if block.heat == "share" else float(np.max(numbers, initial=1e-12))

    def as_dict(value: Any) -> dict[str, Any]:
        heat = None
        if isinstance(value, Guess):
            heat = value.share
        elif block.heat and isinstance(value, float):
            heat = value / top
        number = isinstance(value, int | float)
        return {"text": cell(value, block.places), "number": number, "heat": heat}

    return {
        "kind": "table", "caption": block.caption,
        "columns": [*zip(block.columns, _numeric(block), strict=True)],
        "rows": [[as_dict(value) for value in row] for row in block.rows],
    }  # fmt: skip
