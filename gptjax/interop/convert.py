"""Models of other programs into ours and back: in memory, and as run directories.

An imported run is an ordinary one: sample from it, evaluate it, train on.
"""

import dataclasses
import re
from pathlib import Path
from typing import Literal

import safetensors

from gptjax import files, finetune, program, run_metadata
from gptjax.checkpoint import Checkpoints
from gptjax.config_io import save_run_settings
from gptjax.data import token_files, tokenizers
from gptjax.data.tokenizers import Gpt2Tokenizer, SentencePieceTokenizer, Tokenizer
from gptjax.errors import RunError, UserError, first_line
from gptjax.interop import gguf, hf_tokenizer, huggingface, model_card, nanogpt, tensorflow
from gptjax.interop.tensor_files import SAFETENSORS
from gptjax.interop.weights import Gelu, Weights
from gptjax.run_metadata import CheckpointMetadata

Format = Literal["hf", "nanogpt", "safetensors", "gguf"]

GPT2_IDS = 50257
MAX_PADDING = 1024
"""Rows of an embedding that may be there for its shape alone (nanoGPT has 50304 for 50257 ids)."""


def read_pretrained(
    source: str, *, tokenizer: str | None = None, optimizer: bool = True, gelu: Gelu = "erf"
) -> tuple[Weights, Tokenizer]:
    """A model and its tokenizer.

    Args:
        source: a folder in Hugging Face's format, nanoGPT's ckpt.pt or its folder, a folder with
            OpenAI's TensorFlow checkpoint, or, if nothing of that name is here, a model on the
            Hugging Face Hub such as gpt2-xl.
        tokenizer: see `find_tokenizer`.
        optimizer, gelu: of a ckpt.pt, see `nanogpt.read`.

    UserError: there is no such model or tokenizer, it is damaged, or we cannot compute exactly
    what it does. RunError: a download fills the disk.
    """
    path = files.path(source)
    if (path / "checkpoints").is_dir():
        raise UserError(f"{source} is a run of gptjax already")
    # A mistyped path must not become somebody's repository.
    nowhere = not path.exists() and (path.parent == Path(".") or not path.parent.exists())
    if nowhere and source.strip(".") and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        path = huggingface.download(source)
    checkpoint = path if path.is_file() else path / "ckpt.pt"
    alone = path if path.suffix == ".safetensors" else path / SAFETENSORS
    if (path / "config.json").is_file():
        weights = huggingface.read(path)
    elif (path / tensorflow.HPARAMS).is_file():
        weights = tensorflow.read(path)
    elif alone.is_file():
        weights, path = huggingface.read_alone(alone), alone.parent
    elif checkpoint.is_file():
        weights, path = nanogpt.read(checkpoint, optimizer=optimizer, gelu=gelu), checkpoint.parent
    else:
        raise UserError(
            f"no model at {source!r}: expected a Hugging Face folder (config.json), nanoGPT's"
            " ckpt.pt, OpenAI's folder (hparams.json), or a name on the Hugging Face Hub such as"
            " gpt2-xl"
        )
    rows = weights.config.model.padded_vocab_size
    data = nanogpt.vocabulary_folder(weights.dataset, path)
    if data and not (tokenizer or token_files.read_tokenizer(path)):
        path = data
        note = f"its vocabulary is that of {data / 'meta.pkl'}: it was trained on {data.name}"
        weights = weights._replace(notes=(*weights.notes, note))
    found = find_tokenizer(tokenizer, path, rows)
    if found.kind == "json":
        note = "its tokenizer.json is of no kind that we know; it is used as it is"
        weights = weights._replace(notes=(*weights.notes, note))
    # Padding is usually up to a power of two.
    likely = (1, *(2**n for n in range(3, 14)), rows)
    multiple = next(m for m in likely if -(-found.n_vocab // m) * m == rows)
    settings = {"model.vocab_size": found.n_vocab, "model.vocab_multiple": multiple}
    config = weights.config.replace(settings | {"data.tokenizer": found.kind})
    return weights._replace(config=config), found


def find_tokenizer(name: str | None, folder: Path, rows: int) -> Tokenizer:
    """The tokenizer of a model whose embedding has `rows`: that of the folder `name`, or GPT-2's
    for "gpt2"; None: the one beside the weights in `folder`, or GPT-2's if the size is right.
    UserError: there is none, or it has more ids than the embedding, or far fewer."""
    where, found = files.path(name) if name else folder, None
    if name != "gpt2":
        run = run_metadata.newest_metadata(where)
        found = tokenizers.from_json(run.tokenizer, str(where)) if run else None
        found = found or token_files.read_tokenizer(where) or hf_tokenizer.read(where)
    if name == "gpt2" or (not (name or found) and GPT2_IDS <= rows <= GPT2_IDS + MAX_PADDING):
        found = Gpt2Tokenizer()
    if found is None:
        raise UserError(
            f"no tokenizer lies in {where} for the model's {rows} ids; --tokenizer takes gpt2, a"
            " run or data folder of gptjax, or a folder with tokenizer files of Hugging Face or"
            " nanoGPT (meta.pkl)"
        )
    if not found.n_vocab or not 0 <= rows - found.n_vocab <= MAX_PADDING:
        raise UserError(
            f"the {found.kind} tokenizer has {found.n_vocab} ids, but the model knows {rows}; name"
            " another with --tokenizer"
        )
    return found


def write_pretrained(
    weights: Weights, tokenizer: Tokenizer, folder: Path, format: Format = "hf", *,
    keep_padding: bool = False,
) -> None:  # fmt: skip
    """Write a model for other programs; `folder` appears when it is complete.

    Args:
        format: "hf": `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads it;
            "nanogpt": nanoGPT's `sample.py --out_dir=FOLDER` does; "safetensors": the weights
            alone, of any model, under Hugging Face's names; "gguf": llama.cpp loads
            FOLDER/model.gguf.
        keep_padding: with the embedding's padded rows (not in GGUF). They have no logits here, but
            would have in PyTorch.

    UserError: the format cannot express the model, or `folder` exists. RunError: it cannot be
    written.
    """
    config = weights.config.model
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name another folder or delete it")
    missing: list[str] = []
    if format == "hf":
        missing = huggingface.obstacles(config)
    elif format == "nanogpt":
        missing = nanogpt.obstacles(config, tokenizer)
    elif format == "gguf":
        missing = gguf.obstacles(config, tokenizer)
    if (
        format in ("hf", "gguf")
        and isinstance(tokenizer, SentencePieceTokenizer)
        and not tokenizer.merges_pairs()
    ):
        missing.append("a SentencePiece model that is not byte-pair encoding")
    if missing:
        note = "; the flags are those to train with" if "--" in "".join(missing) else ""
        raise UserError(f"the format {format} cannot express {', '.join(missing)}{note}")
    try:
        with files.new_folder(folder) as scratch:
            if format == "hf":
                huggingface.write(weights, tokenizer, scratch, keep_padding=keep_padding)
            elif format == "gguf":
                gguf.write(weights, tokenizer, scratch)
            elif format == "safetensors":
                huggingface.write_tensors(weights, scratch, keep_padding=keep_padding)
            else:
                nanogpt.write(weights, tokenizer, scratch, folder, keep_padding=keep_padding)
            if format in ("hf", "gguf"):
                card = model_card.text(weights, tokenizer, folder.absolute().name, format)
                (scratch / "README.md").write_text(card)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise RunError(f"cannot write {folder}: {first_line(error)}") from None


def import_model(
    source: str, run_dir: Path, *, tokenizer: str | None = None, optimizer: bool = True,
    gelu: Gelu = "erf",
) -> str:  # fmt: skip
    """Make a run directory with one checkpoint from what `read_pretrained` reads; a text that says
    what was imported and how to go on. UserError: `run_dir` holds a run, or as `read_pretrained`.
    RunError: it cannot be written."""
    if run_metadata.newest_metadata(run_dir) or run_dir.is_file():
        raise UserError(f"{run_dir} holds a run already or is a file; name another folder")
    weights, found = read_pretrained(source, tokenizer=tokenizer, optimizer=optimizer, gelu=gelu)
    write_run(weights, found, run_dir)
    model = weights.config.model
    spare = model.padded_vocab_size - found.n_vocab
    padding = f", {spare} rows of the embedding taken for padding" if spare else ""
    state = f", step {weights.step}, with its optimizer's state" if weights.opt_state else ""
    return "\n".join([
        *(f"note: {note}" for note in weights.notes),
        f"imported {model.num_parameters():,} parameters ({model.n_layer} layers, {model.n_head}"
        f" heads, {model.n_embd} wide, block {model.block_size}, {model.activation},"
        f" {found.kind} tokenizer{padding}{state}) from {source}",
        f"sample: {program.command('generate', '--run-dir', run_dir)}",
    ])  # fmt: skip


def write_run(weights: Weights, tokenizer: Tokenizer, run_dir: Path) -> None:
    """A run directory with one checkpoint. RunError: it cannot be written."""
    runtime = dataclasses.replace(weights.runtime, run_dir=str(run_dir))
    metadata = CheckpointMetadata(weights.config, runtime, tokenizers.to_json(tokenizer))
    arrays = {"params": weights.params}
    if weights.opt_state is not None:
        arrays["opt_state"] = weights.opt_state
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with Checkpoints(run_dir, runtime.keep_checkpoints) as checkpoints:
            checkpoints.save(weights.step, arrays, metadata.to_dict())
        save_run_settings(run_dir / "config.json", weights.config, runtime)
    except OSError as error:
        raise RunError(f"cannot write {run_dir}: {error.strerror}") from None


def export_model(
    run_dir: Path, folder: Path, format: Format = "hf", *, checkpoint: str = "best",
    keep_padding: bool = False, push: str | None = None,
) -> str:  # fmt: skip
    """Write a run's checkpoint as `write_pretrained` does, and `push` it to the model of that name
    on the Hugging Face Hub; a text that says what was written. UserError: there is no such run or
    checkpoint; both errors also as `write_pretrained` and `huggingface.upload`."""
    loaded = run_metadata.load_checkpoint(run_dir, checkpoint, optimizer=format == "nanogpt")
    of, opt_state, notes = loaded.metadata, loaded.opt_state, list[str]()
    if opt_state is not None and of.config.optimizer.kind != "adamw":
        opt_state = None  # nanoGPT's train.py knows AdamW only
        notes.append(
            f"note: without the state of {of.config.optimizer.kind}, which nanoGPT does not know:"
            " sample.py reads it, train.py cannot resume it"
        )
    if opt_state is not None and of.config.optimizer.lr_schedule != "cosine":
        notes.append("note: nanoGPT's train.py would go on by a cosine, not in a straight line")
    if opt_state is not None and finetune.is_partial(of.config):
        opt_state = None
        notes.append("note: without the optimizer's state, which is not of all parameters")
    weights = Weights(
        of.config.replace(model=loaded.model), loaded.params, of.runtime, loaded.step, opt_state,
        of.best_val_loss, of.val_loss, of.data_fingerprint, trained=of.config,
    )  # fmt: skip
    tokenizer = tokenizers.from_json(of.tokenizer, str(run_dir))
    write_pretrained(weights, tokenizer, folder, format, keep_padding=keep_padding)
    said = [*notes, f"wrote {folder} ({format})"]
    if (folder / "meta.pkl").exists():
        said.append(
            "its ckpt.pt names this folder, where nanoGPT finds meta.pkl: if you move it, copy"
            " meta.pkl to the data folder that nanoGPT looks in"
        )
    if push:
        said.append(f"pushed it to {huggingface.upload(folder, push)}")
    return "\n".join(said)
