"""What a user asks of a continuation."""

import dataclasses
from typing import Literal

from gptjax.settings import Config

Overflow = Literal["exact", "half", "stop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig(Config):
    """How a prompt is continued. Equal settings give the same text."""

    max_new_tokens: int = 500
    """Tokens to generate; 0: streams one sample for ever."""
    temperature: float = 0.8
    """Below 1 safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int = 200
    """Draw from the k likeliest tokens only; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability together, in (0, 1]."""
    min_p: float = 0.0
    """Draw from the tokens at least this many times as likely as the likeliest, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that are in the text already, or in the prompt, become less likely."""
    num_samples: int = 1
    """Continuations, generated side by side."""
    seed: int = 1337
    """The same seed and settings give the same text."""
    stop: tuple[str, ...] = ()
    """End a sample before any of these texts."""
    ignore_end_of_text: bool = False
    """Go on after the token that ends a document."""
    overflow: Overflow = "exact"
    """Past the model's block_size. exact: as an uncached model that sees the last block_size
    tokens; half: drop the older half and go on, much faster; stop: end there."""

    def problems(self) -> list[str]:
        out = self._check_ints(1, "num_samples")
        out += self._check_ints(0, "max_new_tokens", "top_k", "seed")
        if self.max_new_tokens == 0 and self.num_samples > 1:
            out.append("max_new_tokens 0 is for ever, of which there can be one sample only")
        if not 0 <= self.temperature <= 1e6:
            out.append(f"temperature {self.temperature} is outside [0, 1e6]")
        if not 0 < self.top_p <= 1:
            out.append(f"top_p {self.top_p} is outside (0, 1]")
        if not 0 <= self.min_p <= 1:
            out.append(f"min_p {self.min_p} is outside [0, 1]")
        if not 0 < self.repetition_penalty <= 1e6:
            out.append(f"repetition_penalty {self.repetition_penalty} is outside (0, 1e6]")
        return out + ["a stop text must not be empty"] * ("" in self.stop)
