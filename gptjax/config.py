"""The experiment: what is trained, on which text, and how.

Equal experiments on equal data give the same numbers. Where, how fast and how often they are
reported is circumstance (`runtime_config`). `config_io` reads both from flags, JSON and Python
files.
"""

import dataclasses
import re
import sys
from typing import Any, Literal

from gptjax.settings import Config

MAX_LAYERS = 100_000

TokenizerKind = Literal["char", "gpt2", "bpe", "sentencepiece", "json"]

OptimizerKind = Literal["adamw", "muon"]

Activation = Literal["gelu_tanh", "gelu_erf", "relu", "silu"]


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """The network. Field names are GPT-2's and nanoGPT's; the defaults are GPT-2 124M."""

    prefix = "model."

    n_layer: int = 12
    """Transformer blocks; 0 leaves embeddings and the output head only."""
    n_head: int = 12
    """Attention heads; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    block_size: int = 1024
    """Longest context, in tokens."""
    vocab_size: int | None = None
    """Token ids the model knows. None: as many as the tokenizer has."""
    vocab_multiple: int = 1
    """Pad the embedding to a multiple of this many rows (64 or 128 suits matrix units); padded ids
    have no logits."""
    dropout: float = 0.0
    """Probability of dropping embeddings, attention weights and residual branches, in [0, 1)."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Bias of the query/key/value projection. None: as `bias`."""
    activation: Activation = "gelu_tanh"
    """Of the MLP: GELU by tanh is GPT-2's and Hugging Face's, by erf nanoGPT's."""
    n_inner: int | None = None
    """Width of the MLP's hidden layer. None: 4 n_embd."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance that a LayerNorm divides by."""
    scale_attn_weights: bool = True
    """Divide attention's scores by the root of the head size."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Divide them by the layer's number too, from 1 (Hugging Face's name)."""
    position: Literal["learned", "sinusoidal"] = "learned"
    """Position embedding: a learned table, or the fixed sinusoids of "Attention is all you need"
    (section 3.5)."""
    tied_head: bool = True
    """Share the output head's matrix with the token embedding."""
    attention_pattern: tuple[Literal["dense", "banded"], ...] = ("dense",)
    """Attention per layer, repeated over the depth; GPT-3 alternates dense and banded."""
    attention_window: int = 256
    """Tokens that a banded layer sees, the current one included."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; parameters stay float32. auto: bfloat16 on GPU and TPU, float32 on CPU,
    decided when a run begins and kept from then on."""
    lora_rank: int = 0
    """Fine-tune by LoRA: beside the kernels of lora_targets low-rank adapters of this rank, which
    alone are trained; with --init-from. Loading the run adds them to the kernels. 0: none."""
    lora_alpha: float = 16.0
    """Of LoRA: what adapters compute is multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[Literal["c_attn", "c_proj", "c_fc", "attn", "mlp"], ...] = ("c_attn",)
    """Of LoRA: the linear layers that get adapters, by GPT-2's names; attn and mlp are both of that
    part."""

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding."""
        assert self.vocab_size is not None, "vocab_size is unknown until a tokenizer is chosen"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def use_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def inner_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def query_scales(self) -> tuple[float, ...]:
        """Per layer, what queries are multiplied by before attention, which divides the scores by
        the root of the head size."""
        scale = 1.0 if self.scale_attn_weights else self.head_size**0.5
        by_layer = self.scale_attn_by_inverse_layer_idx
        return tuple(scale / (i + 1) if by_layer else scale for i in range(self.n_layer))

    @property
    def windows(self) -> tuple[int, ...]:
        """Per layer, how many tokens attention sees, the current one included."""
        reach = {"dense": self.block_size, "banded": min(self.attention_window, self.block_size)}
        pattern = self.attention_pattern
        return tuple(reach[pattern[i % len(pattern)]] for i in range(self.n_layer))

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Numbers in all arrays; without `embeddings`, those outside wte, wpe and an untied
        head."""
        c, bias = self.n_embd, int(self.bias)
        norm = c * (1 + bias)
        attention = 4 * c * c + 3 * c * int(self.use_qkv_bias) + c * bias
        mlp = 2 * c * self.inner_size + (self.inner_size + c) * bias
        total = self.n_layer * (2 * norm + attention + mlp) + (norm if self.n_layer else 0)
        total += self.num_adapter_parameters()
        if embeddings:
            total += self.padded_vocab_size * c * (1 if self.tied_head else 2)
            total += self.block_size * c if self.position == "learned" else 0
        return total

    def num_adapter_parameters(self) -> int:
        """Those of LoRA."""
        c, inner = self.n_embd, self.inner_size
        sizes = {
            ("attn", "c_attn"): 4 * c, ("attn", "c_proj"): 2 * c,
            ("mlp", "c_fc"): c + inner, ("mlp", "c_proj"): inner + c,
        }  # fmt: skip
        adapted = sum(size for (part, name), size in sizes.items() if self.adapts(part, name))
        return self.n_layer * self.lora_rank * adapted

    def adapts(self, part: str, name: str) -> bool:
        """Whether the linear layer `name` of a block's `part` has an adapter."""
        return self.lora_rank > 0 and not {part, name}.isdisjoint(self.lora_targets)

    def flops_per_token(self) -> float:
        """Floating-point operations of one training step per token: 6 N + 12 L C T, with N the
        parameters that multiply (PaLM, arXiv:2204.02311, appendix B); of those that have adapters
        instead of a gradient 4 N."""
        multiplied = self.num_parameters(embeddings=False) + self.padded_vocab_size * self.n_embd
        adapters = self.num_adapter_parameters()
        each = 4 * (multiplied - adapters) + 6 * adapters if self.lora_rank else 6 * multiplied
        return each + 12 * self.n_embd * sum(self.windows)

    def problems(self) -> list[str]:
        out = self._check_ints(0, "n_layer")
        out += self._check_ints(1, "n_head", "n_embd", "block_size", "attention_window")
        out += self._check_ints(1, "vocab_size", "vocab_multiple", "n_inner")
        if self.n_layer > MAX_LAYERS:  # each takes memory, even where only shapes are made
            out.append(f"model.n_layer {self.n_layer} must be at most {MAX_LAYERS}")
        if self.n_head > 0 and self.n_embd > 0 and self.n_embd % self.n_head:
            divisors = [h for h in range(1, min(self.n_embd, 4096) + 1) if self.n_embd % h == 0]
            nearest = sorted(sorted(divisors, key=lambda h: abs(h - self.n_head))[:3])
            out.append(
                f"model.n_embd {self.n_embd} is not divisible by model.n_head {self.n_head};"
                f" n_head may be {' or '.join(map(str, nearest))}"
            )
        if not 0 <= self.dropout < 1:
            out.append(f"model.dropout {self.dropout} is outside [0, 1)")
        if not 0 < self.layer_norm_epsilon < 1:
            out.append(f"model.layer_norm_epsilon {self.layer_norm_epsilon} is outside (0, 1)")
        if not self.attention_pattern:
            out.append("model.attention_pattern is empty; expected dense and/or banded")
        out += self._check_ints(0, "lora_rank")
        if self.lora_rank > self.n_embd > 0:
            out.append(f"model.lora_rank {self.lora_rank} must be at most n_embd {self.n_embd}")
        if not 0 < self.lora_alpha <= sys.float_info.max:
            out.append(f"model.lora_alpha {self.lora_alpha} must be a finite number above 0")
        for name in ("lora_alpha", "lora_targets"):
            if not self.lora_rank and getattr(self, name) != getattr(ModelConfig, name):
                out.append(f"model.{name} takes a model.lora_rank above 0")
        if not self.lora_targets:
            out.append("model.lora_targets is empty; expected c_attn, c_proj, c_fc, attn or mlp")
        if self.position == "sinusoidal" and self.n_embd % 2:
            out.append(f"model.n_embd {self.n_embd} must be even for sinusoidal positions")
        return out


@dataclasses.dataclass(frozen=True)
class DataConfig(Config):
    """The text and how it becomes tokens. A run is bound to its tokens, by their fingerprint, not
    to where they lie: `source` and `dir` may change on resume."""

    prefix = "data."

    source: str | None = "builtin"
    """builtin (the Python standard library's own source), shakespeare (downloaded once), a file of
    text, JSON (.jsonl) or a table (.parquet, .arrow), compressed or not, a folder, a glob of them,
    or hf://OWNER/NAME:SPLIT on the Hugging Face Hub. None: still to be named, as for imported
    weights. As a flag also --data."""
    tokenizer: TokenizerKind = "char"
    """char: one token a character; gpt2: GPT-2's byte-pair encoding; bpe: one of the same kind
    trained on the text itself; sentencepiece: a model trained on the text; json: that of
    tokenizer_file."""
    sentencepiece_vocab_size: int = 4096
    """Vocabulary of the sentencepiece model, in pieces."""
    val_fraction: float = 0.1
    """Share of the text's characters, at its end, held out for validation, in [0, 1). 0: none;
    there are no validation losses then, and the best checkpoint is the newest."""
    dir: str | None = None
    """Use this prepared folder as it is (also nanoGPT's train.bin, val.bin, meta.pkl). None:
    prepare `source` under data/."""

    end_of_text: str | None = None
    """What ends a document within a file, such as "<|endoftext|>". None: a document is a file, or a
    line of JSON."""
    mix: tuple[str, ...] = ()
    """Several texts instead of one, each a `source` with its weight: a.txt=0.7 b/=0.3. Each
    sequence of a batch is of one of them, drawn by weight. Of each the end is held out."""
    val_source: str | None = None
    """A text of its own for validation, as `source`; all of `source` is for training then."""
    bpe_vocab_size: int = 4096
    """Vocabulary of the bpe tokenizer, in tokens; fewer, if the text has no more to merge."""
    tokenizer_file: str | None = None
    """A tokenizer.json of the package `tokenizers`."""
    special_tokens: tuple[str, ...] = ()
    """Words such as "<|user|>" that are a token each wherever a text has them; with gpt2 or bpe."""
    text_field: str = "text"
    """Field that holds the text, of JSON or a table; "meta.body" is the field body of meta."""
    pack: Literal["blocks", "documents"] = "blocks"
    """What a token sees of the documents before its own in a sequence. blocks: them too, as in
    nanoGPT; documents: nothing, and positions count from each document's beginning."""

    @property
    def packed(self) -> bool:
        """Whether attention keeps documents apart."""
        return self.pack == "documents"

    @property
    def sources(self) -> list[str | None]:
        """Of the mix, or the one."""
        return [each.rpartition("=")[0] for each in self.mix] or [self.source]

    @property
    def weights(self) -> list[float]:
        """Of the sources; their sum is 1."""
        found = [float(each.rpartition("=")[2]) for each in self.mix] or [1.0]
        return [weight / sum(found) for weight in found]

    def problems(self) -> list[str]:
        out = self._check_ints(1, "sentencepiece_vocab_size", "bpe_vocab_size")
        if self.tokenizer != "json" and self.tokenizer_file is not None:
            out.append(
                f"data.tokenizer_file {self.tokenizer_file!r} goes with data.tokenizer json, not"
                f" {self.tokenizer}"
            )
        words = [token for token in self.special_tokens if len(token.split()) != 1]
        different = {"<|endoftext|>", *self.special_tokens}
        if words or len(different) <= len(self.special_tokens):
            out.append(
                f"data.special_tokens {self.special_tokens!r} must be different words without white"
                " space; <|endoftext|> is one already"
            )
        if self.special_tokens and self.tokenizer not in ("gpt2", "bpe"):
            out.append(f"data.special_tokens take tokenizer gpt2 or bpe, not {self.tokenizer}")
        if self.end_of_text is not None and len(self.end_of_text.split()) != 1:
            out.append(f"data.end_of_text {self.end_of_text!r} must be a word without white space")
        for each in self.mix:
            name, _, weight = each.rpartition("=")
            if not name or not re.fullmatch(r"\d+\.?\d*|\.\d+", weight) or not float(weight):
                out.append(
                    f"data.mix {each!r} is no text with its weight, a number above 0: a.txt=0.7"
                )
        if self.mix and "source" in self.given and self.source is not None:
            out.append(f"data.source {self.source!r} and data.mix are both given; name one of them")
        if self.text_field == "":
            out.append("data.text_field is empty; name the field that holds the text")
        if self.source == "":
            out.append("data.source is empty; name a file, a folder or a glob")
        if self.dir == "":
            out.append("data.dir is empty; name a prepared folder")
        if not 0 <= self.val_fraction < 1:
            out.append(f"data.val_fraction {self.val_fraction} is outside [0, 1)")
        return out


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Config):
    """AdamW, gradient clipping, and a learning rate with linear warm-up and cosine decay, all as
    in nanoGPT; or Muon."""

    kind: OptimizerKind = dataclasses.field(default="adamw", kw_only=True)
    """adamw; or muon, which needs fewer steps: Muon for the matrices of the blocks, AdamW for the
    rest. As a flag also --optimizer."""
    learning_rate: float = 1e-3
    """Peak learning rate (of AdamW)."""
    min_lr: float = 1e-4
    """Learning rate at and after the end of the decay."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    lr_decay_steps: int | None = None
    """Step at which the decay ends. None: max_steps, fixed when the run begins: a run that is made
    longer later goes on at min_lr."""
    lr_schedule: Literal["cosine", "linear"] = dataclasses.field(default="cosine", kw_only=True)
    """How the rate falls from its peak to min_lr."""
    layer_decay: float = dataclasses.field(default=1.0, kw_only=True)
    """A layer's rate is that of the layer above it times this, in (0, 1]; embeddings are below the
    first layer, ln_f and an untied head have the full rate (ULMFiT's discriminative rates)."""
    muon_learning_rate: float = dataclasses.field(default=0.02, kw_only=True)
    """Peak rate of what Muon updates. It rises and falls as learning_rate does."""
    muon_beta: float = dataclasses.field(default=0.95, kw_only=True)
    """Decay of Muon's momentum, in [0, 1)."""
    muon_iterations: int = dataclasses.field(default=5, kw_only=True)
    """Of the orthogonalisation (Newton and Schulz's), at most 20. 4 cost less, and did as well with
    models of 0.8M parameters."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings (never of biases and LayerNorms)."""
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    beta2: float = 0.99
    """Decay of the second moment, in [0, 1)."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""

    def problems(self) -> list[str]:
        out = self._check_ints(0, "warmup_steps")
        out += self._check_ints(1, "lr_decay_steps", "muon_iterations")
        if self.muon_iterations > 20:  # each is unrolled, and 10 converge
            out.append(f"muon_iterations {self.muon_iterations} must be at most 20")
        for name in (
            "learning_rate", "min_lr", "muon_learning_rate", "weight_decay", "grad_clip",
        ):  # fmt: skip
            value = getattr(self, name)
            # Not `isfinite`, which has no answer for a whole number that no float holds.
            if not 0 <= value <= sys.float_info.max:
                out.append(f"{name} {value} must be a finite number of at least 0")
        for name in ("beta1", "beta2", "muon_beta"):
            if not 0 <= getattr(self, name) < 1:
                out.append(f"{name} {getattr(self, name)} is outside [0, 1)")
        if not 0 < self.layer_decay <= 1:
            out.append(f"layer_decay {self.layer_decay} is outside (0, 1]")
        if self.min_lr > self.learning_rate:
            out.append(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}")
        if self.kind == "muon" and not self.learning_rate:
            out.append("learning_rate 0.0 must be above 0 with muon, whose rate follows it")
        return out


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """One experiment."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    init_from: str | None = None
    """Start from the best weights of this run (an imported one, say) and its architecture, with a
    fresh optimizer. A smaller model.block_size crops its position table. None: random weights."""
    freeze: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    """Parameters that stay as they are, by GPT-2's names, or the beginning of one, or patterns: wte
    h.0 'h.*.attn' 'h.[0-5].mlp.c_fc.kernel' '*.bias'."""
    seed: int = 1337
    """Seeds the initial weights, the data order and dropout."""
    batch_size: int = 12
    """Sequences per optimizer step, over all devices, hosts and accumulation steps."""
    max_steps: int = 2000
    """Optimizer steps of the whole run."""

    @property
    def lr_decay_steps(self) -> int:
        """Step at which the decay ends."""
        return self.optimizer.lr_decay_steps or self.max_steps

    def problems(self) -> list[str]:
        out = self._check_ints(0, "seed") + self._check_ints(1, "batch_size", "max_steps")
        if self.init_from == "":
            out.append("init_from is empty; name a run")
        return out


# -------------------------------------------------------------------------------- presets


def _gpt2(n_layer: int, n_head: int, n_embd: int, **other: Any) -> ModelConfig:
    return ModelConfig(n_layer, n_head, n_embd, vocab_size=50257, **other)


def _gpt3(n_layer: int, n_head: int, n_embd: int) -> ModelConfig:
    # "Alternating dense and locally banded sparse attention patterns" (arXiv:2005.14165, section
    # 2.1). The paper gives no bandwidth; 256 of the 2048-token context is our choice.
    return _gpt2(n_layer, n_head, n_embd, block_size=2048, attention_pattern=("dense", "banded"))


PRESETS: dict[str, ModelConfig] = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    # GPT-3, table 2.1, as (n_layers, n_heads, d_model). Two rows contradict themselves, because
    # n_heads x d_head should be d_model: XL lists 24 x 128 for 2048, where 16 heads fit and give
    # the stated 1.3B; 13B lists d_model 5140 for 40 x 128 = 5120, where 5120 fits.
    "gpt3-small": _gpt3(12, 12, 768),
    "gpt3-medium": _gpt3(24, 16, 1024),
    "gpt3-large": _gpt3(24, 16, 1536),
    "gpt3-xl": _gpt3(24, 16, 2048),
    "gpt3-2.7b": _gpt3(32, 32, 2560),
    "gpt3-6.7b": _gpt3(32, 32, 4096),
    "gpt3-13b": _gpt3(40, 40, 5120),
    "gpt3-175b": _gpt3(96, 96, 12288),
}

FINETUNE = TrainConfig(
    data=DataConfig(source=None),
    optimizer=OptimizerConfig(learning_rate=3e-5, min_lr=3e-6, beta2=0.95, muon_learning_rate=1e-3),
)
"""To go on from pretrained weights, on a text that has to be named: nanoGPT's learning rate for
that."""
