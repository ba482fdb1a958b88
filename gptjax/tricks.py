"""The switch for what makes a run faster. It changes no result beyond rounding (without
`hashed_random` the random numbers are others, with the same distribution).

By default all are on. GPTJAX_TRICKS=-malloc,-hashed_random turns these two off, to measure what
they bring or to rule them out as the cause of a fault. Each one's number stands where it is used.
"""

import os

from gptjax.errors import UserError

TRICKS = "hashed_random", "logit_threshold", "malloc", "sampling_kernels", "thread_per_device"


def enabled(name: str) -> bool:
    """Whether the trick is on: when it is called, which for a jitted function is when it is traced.

    Raises:
        UserError: GPTJAX_TRICKS names something else.
    """
    off = [word for word in os.environ.get("GPTJAX_TRICKS", "").split(",") if word]
    if unknown := [word for word in off if word[0] != "-" or word[1:] not in TRICKS]:
        known = ", ".join(f"-{trick}" for trick in TRICKS)
        raise UserError(f"GPTJAX_TRICKS: unknown {unknown[0]!r}; expected some of {known}")
    return f"-{name}" not in off
