"""The off-switch of what makes runs faster."""

import re

import pytest
from helpers import ROOT

from gptjax import tricks
from gptjax.errors import UserError


def test_tricks_are_on_unless_they_are_named(monkeypatch):
    monkeypatch.delenv("GPTJAX_TRICKS", raising=False)
    assert all(tricks.enabled(name) for name in tricks.TRICKS)
    first, second, *rest = tricks.TRICKS
    monkeypatch.setenv("GPTJAX_TRICKS", f"-{first},-{second}")
    assert not tricks.enabled(first) and not tricks.enabled(second)
    assert all(tricks.enabled(name) for name in rest)


@pytest.mark.parametrize("value", ["malloc", "-mallocs", "-malloc,on", "-"])
def test_a_misspelt_trick_is_refused(monkeypatch, value):
    monkeypatch.setenv("GPTJAX_TRICKS", value)
    with pytest.raises(UserError, match="expected some of -hashed_random"):
        tricks.enabled("malloc")


def test_the_list_has_exactly_the_tricks_that_ask():
    sources = [path.read_text() for path in (ROOT / "gptjax").rglob("*.py")]
    asked = {name for text in sources for name in re.findall(r'tricks\.enabled\("(\w+)"\)', text)}
    assert asked == set(tricks.TRICKS)
