"""HTML pages that are complete in themselves: styles, scripts and data inside, nothing loaded."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import RunError, UserError

FOLDER = Path(__file__).parent / "pages"


def render(template: str, **values: Any) -> str:
    """A page of `pages/`, with `values` filled in and escaped. UserError: jinja2 is missing."""
    try:  # optional
        import jinja2
        import markupsafe
    except ImportError:
        raise UserError("pages need jinja2: pip install 'gptjax[viz]'") from None

    def inline(name: str) -> markupsafe.Markup:
        return markupsafe.Markup((FOLDER / name).read_text(encoding="utf-8"))

    def data(value: Any) -> markupsafe.Markup:
        """As JSON within a script element, which "</script>" in a text would end."""
        text = json.dumps(value, allow_nan=False).replace("<", "\\u003c")
        return markupsafe.Markup(text)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals |= {"inline": inline, "data": data}
    return environment.get_template(template).render(**values)


def write(out: Path, page: str) -> None:
    """Raises UserError or RunError: it cannot be written."""
    if out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder; name a file in it")
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}") from None


def shares(array: np.ndarray) -> str:
    """Numbers of 0 to 1 as bytes in base64, for a page's script."""
    return base64.b64encode(np.round(array * 255).astype(np.uint8).tobytes()).decode()
