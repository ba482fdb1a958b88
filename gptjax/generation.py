"""Prompts into tokens, and tokens into growing text. Needs no JAX."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError


def prompt_ids(
    tokenizer: Tokenizer, prompt: str | None, *, skip_unknown: bool = False
) -> np.ndarray:
    """int [P]: the tokens of a prompt. None is a line end, or token 0 of a tokenizer that has none.
    An empty prompt is the token that ends a document: another one begins there.

    Raises:
        UserError: it is empty, and there is no such token; or the tokenizer does not know a
            character.
    """
    ids = tokenizer.encode(prompt or "", skip_unknown=skip_unknown)
    if prompt is None:
        ids = tokenizer.encode("\n", skip_unknown=True)
        return ids if len(ids) else np.zeros(1, np.int32)
    if prompt == "" and tokenizer.eot is not None:
        return np.array([tokenizer.eot], np.int32)
    if not len(ids):
        raise UserError("the prompt is empty; give at least one character that the model knows")
    return ids


class GrowingText:
    """The text of one sample, which ends before a stop text or at the end-of-text token."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), eot: int | None = None):
        """`eot`: the token that ends it; None: no token does."""
        self.text = ""
        self.ended = False
        self._tokenizer, self._stops, self._eot = tokenizer, stops, eot
        self._whole = ""
        """The text up to a token after which no character was incomplete."""
        self._ids: list[int] = []
        """The tokens since then."""
        self._taken = 0

    @property
    def whole(self) -> int:
        """How many characters there are up to the last token after which none was incomplete."""
        return len(self._whole)

    def extend(self, ids: np.ndarray) -> None:
        """Add int [n] tokens; those after the end are left out."""
        if self.ended:
            return
        new = ids.tolist()
        if self._eot in new:
            new, self.ended = new[: new.index(self._eot)], True
        self._ids += new
        known = len(self._whole)
        end = self._tokenizer.decode(self._ids)
        self.text = self._whole + end
        if not end.endswith("\ufffd"):
            self._whole, self._ids = self.text, []
        # What was whole before has no stop text, though one may begin at its end.
        places = ((s, self.text.find(s, max(0, known - len(s)))) for s in self._stops)
        found = [(at + len(s), at) for s, at in places if at >= 0]
        if found:
            # The stop that was complete first: so it does not matter how many tokens come at once.
            self.text, self.ended = self.text[: min(found)[1]], True

    def take(self, *, keep: bool = True) -> str:
        """What has come since the last call and cannot change any more: no incomplete character,
        no beginning of a stop text. `keep`: whether it stays part of `text`, which otherwise never
        grows long."""
        text = self.text
        if not self.ended:
            text = text.rstrip("\ufffd")
            partial = [
                n
                for stop in self._stops
                for n in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:n])
            ]
            text = text[: len(text) - max(partial, default=0)]
        new, self._taken = text[self._taken :], max(self._taken, len(text))
        if not keep:
            cut = min(self._taken, len(self._whole))
            self.text, self._whole = self.text[cut:], self._whole[cut:]
            self._taken -= cut
        return new


def grow(texts: Sequence[GrowingText], pieces: Iterable[np.ndarray]) -> Iterator[int]:
    """Add each of `pieces`, int [B, n] tokens, to the B texts as it comes, until all have ended.
    Yields n after each piece, and 0 at the end, when all that is left of a text can be taken."""
    for new in pieces:
        for text, ids in zip(texts, new, strict=True):
            text.extend(ids)
        yield new.shape[1]
        if all(text.ended for text in texts):
            break
    for text in texts:
        text.ended = True
    yield 0
