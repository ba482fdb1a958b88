"""A split of a data set on the Hugging Face Hub, streamed (by `datasets`, an extra)."""

import re
from collections.abc import Iterator
from typing import Any

from gptjax.data import readers
from gptjax.errors import UserError, first_line, quoted

PREFIX = "hf://"
NAME = re.compile(r"hf://([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?:([^/:]+)")


class Split:
    """hf://OWNER/NAME:SPLIT, or hf://OWNER/NAME/SUBSET:SPLIT. A split may be a part: train[:1%]."""

    def __init__(self, source: str):
        """Raises UserError: it is not spelled so."""
        found = NAME.fullmatch(source)
        if not found:
            raise UserError(
                f"{source} names no split of a data set; expected hf://OWNER/NAME:SPLIT, such as"
                " hf://roneneldan/TinyStories:train"
            )
        self._source, self._revision = source, ""
        self._name, self._subset, self._split = found.groups()

    def identity(self) -> list[Any]:
        """With the commit that the data set is at; the texts are those of this commit from then on.
        Raises UserError: the Hub cannot be asked, or does not have it."""
        if not self._revision:
            import huggingface_hub  # slow, and only needed here

            try:
                self._revision = huggingface_hub.HfApi().dataset_info(self._name).sha or ""
            except Exception as error:  # of a network, or the Hub's answer
                raise self._failure(error) from None
        return [self._source, self._revision]

    def texts(self, field: str) -> Iterator[str]:
        """Raises UserError: they cannot be read, or a row has no such field."""
        try:  # optional
            import datasets
        except ImportError:
            how = "pip install 'gptjax[data]'"
            raise UserError(f"reading {self._source} takes datasets: {how}") from None
        self.identity()
        number = 0
        try:
            rows = datasets.load_dataset(
                self._name, self._subset, split=self._split, streaming=True,
                revision=self._revision,
            )  # fmt: skip
            for number, row in enumerate(rows, 1):
                try:
                    text = readers.of_row(row, field)
                except readers.MISSING:
                    raise UserError(
                        f"{self._source}, row {number} has no string `{field}`:"
                        f" {quoted(row)[:80]} (--data.text-field names another field)"
                    ) from None
                yield text
        except UserError:
            raise
        except Exception as error:  # of a network, or what the rows lie in
            raise self._failure(error) from None
        if not number:
            raise UserError(f"{self._source} is empty; expected text")

    def _failure(self, error: Exception) -> UserError:
        return UserError(f"cannot read {self._source}: {first_line(error)}")
