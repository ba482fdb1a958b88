"""One text's way through a model, step by step, with the model's own numbers.

`walk` says what there is to see as sections of plain blocks; `explain` prints them, or makes a page
of them. Letters in shapes: T tokens, V vocabulary, C n_embd, H heads, D head size, L layers.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gptjax.config import ModelConfig
from gptjax.data.corpus import Corpus
from gptjax.data.tokenizers import Gpt2Tokenizer, SentencePieceTokenizer, Tokenizer
from gptjax.errors import UserError
from gptjax.layers import sinusoids
from gptjax.run import Run

FEW = 6
"""Numbers of a vector that are shown."""
FIRST = [*map(str, range(FEW)), ""]
"""The titles of their columns."""
ACTIVATIONS = {"gelu_tanh": "GELU", "gelu_erf": "GELU", "relu": "ReLU", "silu": "SiLU"}
MOST_TOKENS = 128
"""Of a prompt: a page holds the weights of all heads."""
PIECES_FROM = 300_000
"""Characters of the built-in text that the example of sub-word pieces is learned from."""


class Guess(NamedTuple):
    """A token that may follow, and how likely it is."""

    token: str
    share: float


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of texts and numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """str, int, float or Guess; None is an empty cell."""
    caption: str = ""
    heat: Literal["", "share", "signed"] = ""
    """How numbers are coloured on a page: a share of 1, or by sign and size."""
    digits: int | None = None
    """Of floats, after the point; None: as many as show the size of the largest."""

    @property
    def places(self) -> int:
        if self.digits is not None:
            return self.digits
        top = max((abs(x) for row in self.rows for x in row if isinstance(x, float)), default=1.0)
        return min(5, max(2, 1 - math.floor(math.log10(top)))) if 0 < top < math.inf else 2


@dataclasses.dataclass(frozen=True)
class Bars:
    """One number for each label, 0 or more."""

    labels: Sequence[str]
    values: Sequence[float]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Heads:
    """What all heads look at."""

    tokens: Sequence[str]
    weights: np.ndarray
    """float32 [L, H, T, T]; rows sum to 1."""


@dataclasses.dataclass(frozen=True)
class Section:
    """One step of the way."""

    title: str
    text: Sequence[str]
    """Paragraphs, before the blocks."""
    blocks: Sequence[Table | Bars | Heads]


def walk(run: Run, prompt: str, *, trained: bool = True) -> list[Section]:
    """The sections, in the order in which the model computes. Of a model that is not `trained` they
    say what is chance.

    Raises:
        UserError: the prompt is empty, too long for the model, or has unknown characters.
    """
    ids = run.tokenizer.encode(prompt)
    if len(ids) < 2:
        raise UserError("explaining takes a prompt of at least two tokens")
    if len(ids) > MOST_TOKENS:
        raise UserError(f"{len(ids)} tokens are more than can be looked at; give {MOST_TOKENS}")
    if not run.config.n_layer:
        raise UserError("a model without layers has no attention to explain")
    seen = run.activations(ids)
    step = _Walk(run, prompt, ids, seen, [shown(run.tokenizer, i) for i in ids], trained)
    return [
        step.text_into_tokens(), step.ids_and_targets(), step.embedding(), step.dropout(),
        step.layer_norm(), step.averages(), step.one_head(), step.all_heads(), step.joined(),
        step.mlp(), step.residual_stream(), step.next_token(), step.logit_lens(), step.shapes(),
    ]  # fmt: skip


def shown(tokenizer: Tokenizer, id_: int) -> str:
    """A token as it is printed: with visible white space."""
    text = tokenizer.decode([int(id_)])
    for char, sign in ((" ", "\u2423"), ("\n", "\u23ce"), ("\t", "\u21e5"), ("\r", "\u240d")):
        text = text.replace(char, sign)
    return text if text and text.isprintable() and "\ufffd" not in text else f"[{id_}]"


def counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'s' * (count != 1)}"


def percent(share: float) -> str:
    if share < 0.001:
        return "<0.1%"
    return f"{share:.1%}" if share < 0.095 else f"{share:.0%}"


def _softmax(x: np.ndarray) -> np.ndarray:
    wide = np.exp(x - x.max(-1, keepdims=True))
    return wide / wide.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The steps. Each is a section."""

    run: Run
    prompt: str
    ids: np.ndarray
    seen: dict[str, np.ndarray]
    tokens: list[str]
    trained: bool

    @property
    def _head(self) -> int:
        """Of layer 0: the one that decides most clearly where the last token looks."""
        return int(np.argmax(self.seen["h.0.attn.weights"][:, -1].max(-1)))

    def _row(self, label: str, vector: np.ndarray) -> list[Any]:
        missing = [None] * (FEW - len(vector))
        return [label, *map(float, vector[:FEW]), *missing, "..." if len(vector) > FEW else None]

    def _param(self, *path: str) -> np.ndarray:
        found: Any = self.run.params
        for name in path:
            found = found[name]
        return np.asarray(found, np.float32)

    def text_into_tokens(self) -> Section:
        known: list[tuple[str, int | None, list[str]]] = [
            ("bytes (in hex)", 256, [f"{byte:02x}" for byte in self.prompt.encode()]),
        ]
        own = self.run.tokenizer
        characters = own.n_vocab if own.kind == "char" else len(set(self.prompt))
        name = "characters" if own.kind == "char" else "characters (those of this prompt)"
        known.append((name, characters, [_visible(char) for char in self.prompt]))
        for name, tokenizer in _examples(own):
            if tokenizer is None:
                known.append((name, None, []))
            else:
                split = [shown(tokenizer, i) for i in tokenizer.encode(self.prompt)]
                known.append((name, tokenizer.n_vocab, split))
        rows = [
            [name, size, len(split) or None, " ".join(split) or "not on this machine"]
            for name, size, split in known
        ]
        kinds = {"char": "characters", "gpt2": "GPT-2's byte-pair encoding (BPE, by tiktoken)"}
        return Section(
            "Text becomes tokens",
            [
                "A network computes with numbers, so a text is cut into tokens, and each kind of"
                " token has a number; together they are the vocabulary. There is a choice to make:"
                " a small vocabulary makes long sequences, a large one short ones; but the model"
                " must learn a vector for each of its tokens.",
                f"This model reads {kinds.get(own.kind, 'sub-word pieces')}, with a vocabulary of"
                f" {own.n_vocab:,}. The prompt is {len(self.ids)} tokens."
                + (
                    ""
                    if own.eot is None
                    else f" One of the vocabulary, number {own.eot:,}, marks the end of a text."
                ),
            ],
            [Table(["cut into", "vocabulary", "tokens here", "the prompt"], rows)],
        )

    def ids_and_targets(self) -> Section:
        decode, rows = self.run.tokenizer.decode, []
        for i in range(1, min(len(self.ids), FEW)):
            context = _visible(decode(self.ids[:i].tolist()))
            rows.append([i, context, self.tokens[i], int(self.ids[i])])
        if len(self.ids) > FEW:
            rows.append(["...", None, None, None])
        return Section(
            "Each token is predicted from those before it",
            [
                "The ids are what the model sees. From one text of T tokens it learns T - 1 times"
                " at once: at every position, what comes next?",
            ],
            [
                Table(["position", *map(str, range(len(self.ids)))],
                      [["token", *self.tokens], ["id", *map(int, self.ids)]]),
                Table(["", "context", "target", "id"], rows),
            ],
        )  # fmt: skip

    def embedding(self) -> Section:
        config = self.run.config
        wte = self._param("wte")[: config.vocab_size]
        learned = config.position == "learned"
        wpe = self._param("wpe") if learned else sinusoids(config.block_size, config.n_embd)
        rows = []
        for i in range(min(3, len(self.ids))):
            token, position = wte[self.ids[i]], wpe[i]
            rows += [
                self._row(f"token {self.tokens[i]}", token),
                self._row(f"position {i}", position),
                self._row("sum", token + position),
            ]
        unit = wte / np.maximum(np.linalg.norm(wte, axis=1, keepdims=True), 1e-12)
        near = unit @ unit[self.ids[0]]
        order = np.argsort(-near)[1 : FEW + 1]
        how = "learned too" if learned else "fixed waves of different lengths"
        unused = config.padded_vocab_size - len(wte)
        padding = f" (and {unused} unused rows, for a size that suits hardware)" if unused else ""
        return Section(
            "A token and its position become a vector",
            [
                f"Row {int(self.ids[0])} of the token table [{config.vocab_size:,} x"
                f" {config.n_embd}]{padding} belongs to “{self.tokens[0]}”. A second table has a"
                f" row for each of the {config.block_size:,} positions ({how}). Their sum knows"
                " both what stands there and where.",
                "The rows begin as random directions. "
                + (
                    "What training has brought together can be"
                    if self.trained
                    else "This model is untrained, so it is chance which are near each other, as"
                )
                + " seen by the cosine of the angle between two: 1 is the same direction, 0 a right"
                " angle.",
            ],
            [
                Table(["", *FIRST], rows, "the first numbers of each vector", "signed"),
                Table(
                    ["nearest to", *(shown(self.run.tokenizer, i) for i in order)],
                    [[self.tokens[0], *map(float, near[order])]],
                    "cosine of the angle", "signed",
                ),
            ],
        )  # fmt: skip

    def dropout(self) -> Section:
        x, rate = self.seen["embedding"][0], self.run.config.dropout
        kept = np.random.default_rng(0).random(len(x)) >= 0.5
        words = [*("yes" if keep else "no" for keep in kept[:FEW]), *[None] * FEW][:FEW]
        own = (
            f"This model's own rate is {rate:.0%}."
            if rate
            else "This model's own rate is 0: nothing is dropped."
        )
        return Section(
            "Dropout: in training only, some numbers are zeroed",
            [
                "So that the network relies on no single number, training sets a random share of"
                " them to zero and scales the others up, which keeps their sum as it was on"
                " average. Below each is dropped with a probability of one half, as a coin is"
                f" tossed: {int((~kept).sum())} of {len(x)} are. {own} When a model writes, nothing"
                " is dropped.",
            ],
            [
                Table(
                    ["", *FIRST],
                    [
                        self._row(f"before, {self.tokens[0]}", x),
                        ["kept?", *words, None],
                        self._row("after", np.where(kept, x * 2, 0)),
                    ],
                    heat="signed",
                )
            ],
        )

    def layer_norm(self) -> Section:
        x, out = self.seen["embedding"], self.seen["h.0.ln_1"]
        mean, var = x.mean(-1), x.var(-1)
        epsilon = self.run.config.layer_norm_epsilon
        norm = (x - mean[:, None]) / np.sqrt(var + epsilon)[:, None]
        rows = [
            [token, *map(float, (mean[i], var[i], norm[i].mean(), norm[i].var(), out[i].var()))]
            for i, token in enumerate(self.tokens[: 2 * FEW])
        ]
        rows += [["...", *[None] * 5]] * (len(self.tokens) > len(rows))
        return Section(
            "LayerNorm: each token's vector is brought to one scale",
            [
                "Before each part of a block, every token's vector is shifted to mean 0 and scaled"
                f" to variance 1 (a little less: {np.format_float_positional(epsilon)} is added to"
                " the variance before it is divided by its root, which is never 0 then); then each"
                " of its numbers gets a learned gain"
                + (" and shift." if self.run.config.bias else "."),
            ],
            [
                Table(
                    ["token", "mean before", "variance before", "mean after", "variance after",
                     "variance after gain" + " and shift" * self.run.config.bias],
                    rows, digits=4,
                )
            ],
        )  # fmt: skip

    def averages(self) -> Section:
        size = min(5, len(self.tokens))
        names = self.tokens[:size]
        even = np.tril(np.ones((size, size))) / np.arange(1, size + 1)[:, None]
        real = self.seen["h.0.attn.weights"][self._head, :size, :size]

        def triangle(weights: np.ndarray, caption: str) -> Table:
            rows = [
                [names[i], *(float(w) if j <= i else None for j, w in enumerate(weights[i]))]
                for i in range(size)
            ]
            return Table(["", *names], rows, caption, "share")

        return Section(
            "Looking back, at its simplest: a plain average",
            [
                "A token may look at itself and at those before it, never ahead: that would be"
                " reading the answer. The simplest way is to average them, each with the same"
                " weight. As a matrix that is a triangle whose rows sum to 1: the softmax of"
                " zeros, with what lies ahead masked by minus infinity.",
                "Attention puts weights there that depend on the text: the second triangle is what"
                f" head {self._head} of this model's first layer does with the same tokens (the"
                " head with the largest single weight for the last token).",
            ],
            [triangle(even, "averages"), triangle(real, f"layer 0, head {self._head}")],
        )

    def one_head(self) -> Section:
        config, last = self.run.config, len(self.ids) - 1
        layer = 0
        weights = self.seen[f"h.{layer}.attn.weights"]
        head, size = self._head, config.head_size
        q, k, v = (
            part[:, head * size : (head + 1) * size]
            for part in np.split(self.seen[f"h.{layer}.attn.c_attn"], 3, axis=-1)
        )
        scores = k @ q[last]
        divided = config.scale_attn_weights
        root = f"\u221a{size}" if divided else "1"
        scaled, shares = scores / (math.sqrt(size) if divided else 1), weights[head, last]
        rows = [
            [token, float(scores[j]), float(scaled[j]), Guess("", float(shares[j]))]
            for j, token in enumerate(self.tokens)
        ]
        ends = sorted({0, last})
        vectors = [
            self._row(f"query of {self.tokens[last]}", q[last]),
            *(self._row(f"key of {self.tokens[j]}", k[j]) for j in ends),
            *(self._row(f"value of {self.tokens[j]}", v[j]) for j in ends),
            self._row("sum of weight x value", shares @ v),
        ]
        most = int(np.argmax(shares))
        by_hand = (
            f" For “{self.tokens[most]}”, at position {most}: {scores[most]:.3f} / {root} ="
            f" {scaled[most]:.3f}, and e^{scaled[most]:.3f} divided by the sum of all such powers"
            f" is {shares[most]:.3f}."
        )
        near = " Tokens farther back than the window are masked." if _is_banded(config, 0) else ""
        return Section(
            f"One head by hand: layer {layer}, head {head}",
            [
                "Three matrices make of each token's vector a query (what am I looking for?), a key"
                f" (what do I offer?) and a value (what do I pass on?), {size} numbers each. The"
                " product of a query and a key is how well they match; "
                + (
                    f"divided by the root of {size} it does not grow with the size of the head, and"
                    if divided
                    else ""
                )
                + f" softmax makes shares of it.{near}",
                f"Below, “{self.tokens[last]}”, the last token, looks back. What the head passes on"
                f" is the sum of the values, each times its weight.{by_hand}",
            ],
            [
                Table(["", *FIRST], vectors, "the first numbers", "signed"),
                Table(["looks at", "query x key", f"/ {root}", "weight"], rows, digits=3),
            ],
        )

    def all_heads(self) -> Section:
        config = self.run.config
        weights = np.stack([self.seen[f"h.{i}.attn.weights"] for i in range(config.n_layer)])
        back = np.arange(len(self.ids))
        entropy = -(weights[:, :, -1] * np.log(np.maximum(weights[:, :, -1], 1e-12))).sum(-1)
        rows = []
        for layer in range(config.n_layer):
            for head in range(config.n_head):
                row = weights[layer, head, -1]
                at = int(row.argmax())
                mean = float((row * (back[-1] - back)).sum())
                spread = float(np.exp(entropy[layer, head]))
                rows.append([f"{layer}.{head}", self.tokens[at], float(row[at]), mean, spread])
        return Section(
            "What every head looks at",
            [
                f"The model has {counted(config.n_layer, 'layer')} of"
                f" {counted(config.n_head, 'head')}. Each can learn to look for something else: the"
                " token before, the last space, the same token further back. Here is where"
                f" “{self.tokens[-1]}” looks. (Tokens in effect: how many there would be if all had"
                " equal weight; e to the power of the entropy.)",
            ],
            [
                Heads(self.tokens, weights),
                Table(
                    ["layer.head", "looks most at", "weight", "tokens back, on average",
                     "tokens in effect"],
                    rows,
                ),
            ],
        )  # fmt: skip

    def joined(self) -> Section:
        config = self.run.config
        x, joined = self.seen["embedding"], self.seen["h.0.attn.joined"]
        added = self.seen["h.0.attn.c_proj"]
        rows = [
            [token, *(float(np.linalg.norm(part[i])) for part in (x, joined, added, x + added))]
            for i, token in enumerate(self.tokens[: 2 * FEW])
        ]
        rows += [["...", *[None] * 4]] * (len(self.tokens) > len(rows))
        return Section(
            "The heads are joined, and their finding is added",
            [
                f"{config.n_head} heads of {config.head_size} numbers side by side are"
                f" {config.n_embd} again. One more matrix mixes them, and the result is added to"
                " what the token was before, rather than put in its place. That way every layer"
                " only has to learn what to change, and what is learned from an error (its"
                " gradient) reaches the first layer undamped. This sum, which runs through all"
                " layers, is called the residual stream.",
            ],
            [
                Table(
                    ["token", "before", "heads joined", "added", "after"], rows,
                    "length of each vector (the root of the sum of its squares), layer 0",
                )
            ],
        )  # fmt: skip

    def mlp(self) -> Section:
        config, activation = self.run.config, ACTIVATIONS[self.run.config.activation]
        before, hidden = self.seen["h.0.mlp.c_fc"], self.seen["h.0.mlp.hidden"]
        out, wide = self.seen["h.0.mlp.c_proj"], config.inner_size
        last = len(self.ids) - 1
        active = [
            float((self.seen[f"h.{i}.mlp.c_fc"] > 0).mean()) for i in range(config.n_layer)
        ]  # fmt: skip
        return Section(
            f"The MLP: wider, through {activation}, and back",
            [
                "Attention moved information between tokens; now each token works on its own. Its"
                f" vector is widened from {config.n_embd} to {wide} numbers, passed through"
                f" {activation} (which passes positive numbers and mutes negative ones), and"
                f" brought back to {config.n_embd}. The result is added, as before.",
            ],
            [
                Table(
                    ["", "size", *FIRST],
                    [
                        ["in", config.n_embd, *self._row("", self.seen["h.0.ln_2"][last])[1:]],
                        ["widened", wide, *self._row("", before[last])[1:]],
                        [f"after {activation}", wide, *self._row("", hidden[last])[1:]],
                        ["out", config.n_embd, *self._row("", out[last])[1:]],
                    ],
                    f"the first numbers of {self.tokens[last]} in layer 0", "signed",
                ),
                Bars([f"layer {i}" for i in range(config.n_layer)], active,
                     "share of the widened numbers that are positive"),
            ],
        )  # fmt: skip

    def residual_stream(self) -> Section:
        config = self.run.config

        def size(x: np.ndarray) -> float:
            return float(np.linalg.norm(x, axis=-1).mean())

        labels, sizes = ["embedding"], [size(self.seen["embedding"])]
        rows = []
        for i in range(config.n_layer):
            labels.append(f"after layer {i}")
            sizes.append(size(self.seen[f"h.{i}"]))
            attention = self.seen[f"h.{i}.attn.c_proj"]
            rows.append([f"layer {i}", size(attention), size(self.seen[f"h.{i}.mlp.c_proj"])])
        return Section(
            "The residual stream over depth",
            [
                "Every layer adds to the stream, so its vectors mostly grow; each LayerNorm brings"
                f" what it reads back to one scale. Here they go from {sizes[0]:.2f} to"
                f" {sizes[-1]:.2f}.",
            ],
            [
                Bars(labels, sizes, "mean length of the tokens' vectors"),
                Table(["", "added by attention", "added by the MLP"], rows),
            ],
        )

    def next_token(self) -> Section:
        logits = self.seen["logits"].astype(np.float64)
        shares = _softmax(logits)
        largest = logits.max(-1)
        total = largest + np.log(np.exp(logits - largest[:, None]).sum(-1))
        rows, nats = [], []
        for i, token in enumerate(self.tokens):
            best = np.argsort(-shares[i], kind="stable")[:5]
            guesses = [Guess(shown(self.run.tokenizer, j), float(shares[i, j])) for j in best]
            real: list[Any] = [None, None]
            if i + 1 < len(self.ids):
                share = float(shares[i, self.ids[i + 1]])
                nats.append(float(total[i] - logits[i, self.ids[i + 1]]))
                real = [Guess(self.tokens[i + 1], share), f"{nats[-1]:.2f}"]
            rows.append([token, *guesses, *[None] * (5 - len(guesses)), *real])
        mean, size = float(np.mean(nats)), self.run.config.vocab_size or 0
        return Section(
            "What comes next?",
            [
                "A last LayerNorm, and a product with "
                + ("the token table once more" if self.run.config.tied_head else "a matrix")
                + f" gives a score (logit) for each of the {size:,} kinds of token; softmax makes"
                " probabilities of them. Here are the five likeliest to follow each token, and what"
                " really followed. To write, a model draws one of them (how boldly is for"
                " temperature, top-k and top-p to say), adds it to the text, and begins again.",
                f"The loss is the mean of \u2212log(probability), by the natural logarithm:"
                f" {mean:.3f} nats a token on this prompt. Guessing evenly would be log({size:,}) ="
                f" {math.log(size):.3f}"
                + ("." if self.trained else ", and an untrained model does no better."),
            ],
            [Table(["after", "1st", "2nd", "3rd", "4th", "5th", "what came", "\u2212log p"], rows)],
        )

    def logit_lens(self) -> Section:
        config = self.run.config
        norm = {name: self._param("ln_f", name) for name in self.run.params["ln_f"]}
        head = self._param("wte" if config.tied_head else "lm_head")[: config.vocab_size]
        tail = slice(max(0, len(self.ids) - FEW), None)
        rows = []
        stages = ["embedding", *(f"h.{i}" for i in range(config.n_layer))]
        for stage in stages:
            x = self.seen[stage][tail]
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt(x.var(-1, keepdims=True) + config.layer_norm_epsilon)
            shares = _softmax((x * norm["scale"] + norm.get("bias", 0)) @ head.T)
            best = shares.argmax(-1)
            name = "embedding" if stage == "embedding" else f"after layer {stage[2:]}"
            guesses = (
                Guess(shown(self.run.tokenizer, j), float(share[j]))
                for j, share in zip(best, shares, strict=True)
            )
            rows.append([name, *guesses])
        return Section(
            "How the guess forms, layer by layer",
            [
                "The final LayerNorm and head can read the stream after any layer, as if the model"
                " ended there (the logit lens, nostalgebraist 2020). The last row is what it says"
                " in the end."
                + (
                    " (The embedding by itself often names its own token: the head is the same"
                    " table, and a row's product with itself is usually the largest.)"
                    if config.tied_head
                    else ""
                ),
            ],
            [Table(["", *(f"after {token}" for token in self.tokens[tail])], rows)],
        )

    def shapes(self) -> Section:
        config, t = self.run.config, len(self.ids)
        c, v, layers = config.n_embd, config.vocab_size or 0, config.n_layer
        h, d = config.n_head, config.head_size
        counts = _counts(self.run.params)
        rows: list[list[Any]] = [
            ["token ids", f"(1, {t})", None],
            ["token embedding", f"(1, {t}, {c})", counts["wte"]],
            ["+ position embedding", f"(1, {t}, {c})", counts.get("wpe", 0)],
            [f"each of {layers} layers: LayerNorm", f"(1, {t}, {c})", counts["ln_1"]],
            ["  queries, keys, values", f"3 x (1, {h}, {t}, {d})", counts["attn.c_attn"]],
            ["  weights", f"(1, {h}, {t}, {t})", None],
            ["  heads", f"(1, {h}, {t}, {d})", None],
            ["  joined, mixed, added", f"(1, {t}, {c})", counts["attn.c_proj"]],
            ["  LayerNorm", f"(1, {t}, {c})", counts["ln_2"]],
            ["  MLP, wide", f"(1, {t}, {config.inner_size})", counts["mlp.c_fc"]],
            ["  MLP, back, added", f"(1, {t}, {c})", counts["mlp.c_proj"]],
            ["LayerNorm", f"(1, {t}, {c})", counts["ln_f"]],
            ["logits", f"(1, {t}, {v})", counts.get("lm_head", 0)],
            ["all", None, sum(counts.values())],
        ]
        tied = " The head has none of its own: it is the token table." if config.tied_head else ""
        return Section(
            "Every shape on the way",
            [
                "(batch, tokens, numbers of each), and the parameters that each step has; those of"
                f" the layers are for all {layers} together.{tied}",
            ],
            [Table(["step", "shape", "parameters"], rows)],
        )


def _is_banded(config: ModelConfig, layer: int) -> bool:
    return config.attention_pattern[layer % len(config.attention_pattern)] == "banded"


def _visible(text: str) -> str:
    return text.replace(" ", "\u2423").replace("\n", "\u23ce").replace("\t", "\u21e5")


def _counts(params: Any) -> dict[str, int]:
    """How many numbers each part has: {"wte": ..., "attn.c_attn": ..., ...}."""
    found: dict[str, int] = {}

    def add(tree: Any, path: tuple[str, ...]) -> None:
        if hasattr(tree, "items"):
            for name, inner in tree.items():
                add(inner, (*path, name))
            return
        names = [name for name in path if name not in ("h", "kernel", "bias", "scale")]
        found[".".join(names)] = found.get(".".join(names), 0) + int(tree.size)

    add(params, ())
    return found


def _examples(own: Tokenizer) -> Iterable[tuple[str, Tokenizer | None]]:
    """Sub-word tokenizers to compare with: the model's own, or ones that are at hand."""
    if own.kind not in ("char", "gpt2"):
        yield "pieces", own
    else:
        pieces = Corpus("builtin").pieces("\n")
        text, taken = [], 0
        while taken < PIECES_FROM:
            text.append(next(pieces) or "")
            taken += len(text[-1])
        yield "pieces, of Python's library", SentencePieceTokenizer.train(text, 512)
    if own.kind == "gpt2":
        yield "GPT-2's pieces", own
    else:
        try:
            yield "GPT-2's pieces", Gpt2Tokenizer()
        except UserError:
            yield "GPT-2's pieces", None
