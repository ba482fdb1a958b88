"""How many heads share a row."""

import pytest

from gptjax import head_rows


@pytest.mark.parametrize(
    ("n_head", "head_size", "lanes", "group"),
    [(12, 64, 128, 2), (12, 64, 1, 1), (25, 64, 128, 1), (40, 128, 128, 1), (6, 16, 128, 6),
     (16, 16, 128, 8), (12, 80, 128, 1), (4, 200, 128, 1), (1, 64, 128, 1)],
)  # fmt: skip
def test_a_row_has_as_many_heads_as_fit_and_divide(n_head, head_size, lanes, group):
    assert head_rows.group(n_head, head_size, lanes) == group
