"""Everything between the settings of a run and its loop: devices, data, the run directory, and that
all hosts agree on them."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console

from gptjax import attention, config_io, dry_run, files, finetune, resume, run_metadata
from gptjax.checkpoint import Checkpoints
from gptjax.config import TrainConfig
from gptjax.data import prepare, token_files
from gptjax.data.token_files import Dataset
from gptjax.data.tokenizers import Tokenizer
from gptjax.devices import hosts, memory, setup, topology
from gptjax.errors import RunError, UserError
from gptjax.run_lock import RunLock
from gptjax.runtime_config import DistributedConfig, RuntimeConfig
from gptjax.trainer import Callback, Trainer


def train(
    config: TrainConfig,
    runtime: RuntimeConfig,
    *,
    tokenizer: Tokenizer | None = None,
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], int] = lambda: 0,
    console: Console | None = None,
) -> Trainer | None:
    """Train in `runtime.run_dir`, from the start or from where the run was left.

    Args:
        tokenizer: that of the weights which the run starts from or resumes; None: the text's.
        stop: the signal on which this host shall stop and save, 0 while there is none.
        console: for what is done before training begins; None: quiet.

    Returns:
        The trainer, done or `stopped_by` a signal; None after a dry run.

    Raises:
        UserError: something about the settings, the data or the run directory is not as it must be.
        RunError: what was begun cannot be finished.
    """
    run_dir = files.path(runtime.run_dir or "")
    # What can be refused before a long text is tokenised is refused here.
    for folder in (run_dir, run_dir / "checkpoints"):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; expected a folder (--run-dir)")
    console = console or Console(quiet=True)
    with console.status("starting the devices"):
        start_devices(runtime.replace(device="cpu") if runtime.topology else runtime)
    devices = topology.devices(runtime.topology) if runtime.topology else jax.devices()
    # Not saved: hosts find each other again when the run is resumed.
    runtime = runtime.replace(distributed=DistributedConfig())
    runtime.divide_batch(config, len(devices))
    saved = run_metadata.newest_metadata(run_dir)
    # Imported weights have no schedule of their own: theirs begins here.
    trained = saved is not None and saved.data_fingerprint is not None
    config = resume.resolve(config, saved.config if saved and trained else None, devices[0])
    asked = runtime.compute.attention
    kernel, why = attention.choose(
        config.model, runtime.compute, devices[0], train=True, packed=config.data.packed
    )
    if asked not in ("auto", kernel):
        raise UserError(f"--attention {asked} does not fit here: {why}")
    finetune.check(config)
    if runtime.dry_run and (vocab_size := known_vocabulary(config, tokenizer)):
        model = config.model.replace(vocab_size=vocab_size)
        dry_run.print_training(config.replace(model=model), runtime, devices)
        return None
    config, dataset = open_data(config, tokenizer, console)
    if runtime.dry_run:
        dry_run.print_training(config, runtime, devices)
        return None
    if runtime.patience and not resume.eval_windows(config, runtime, dataset)[0]:
        raise UserError(
            "--patience takes a text for validation, and this one has none; name --data.val-source,"
            " or a --data.val-fraction above 0"
        )
    memory.refuse_too_large(config, runtime)
    try:
        with contextlib.closing(_lock(run_dir, config, runtime, dataset)):
            return _train_in(run_dir, config, runtime, dataset, callbacks, stop, console)
    except OSError as error:
        raise RunError(f"{error.filename or run_dir}: {error.strerror or error}") from error


def start_devices(runtime: RuntimeConfig) -> None:
    """Before anything else uses JAX."""
    setup.start(runtime)
    setup.use_compilation_cache(files.cache_dir() / "xla")


def known_vocabulary(config: TrainConfig, tokenizer: Tokenizer | None) -> int | None:
    """How many ids there will be; None where only the text can tell."""
    if tokenizer:
        return tokenizer.n_vocab
    known = {
        "gpt2": 50257 + len(config.data.special_tokens),
        "sentencepiece": config.data.sentencepiece_vocab_size,
    }
    return config.model.vocab_size or known.get(config.data.tokenizer)


def open_data(
    config: TrainConfig, tokenizer: Tokenizer | None, console: Console
) -> tuple[TrainConfig, Dataset]:
    """The prepared set, made first if it is missing; and `config` with `data.dir` and the model's
    vocabulary filled in. `tokenizer`: as for `train`.

    Raises:
        UserError: there is no such text or set, or it does not fit the model.
    """
    if tokenizer or not config.data.dir:
        ends = tokenizer.eot is not None if tokenizer else config.data.tokenizer != "char"
        _check_packing(config, config.data.tokenizer, ends)
    if config.data.dir:
        folder = files.path(config.data.dir)
    else:
        with console.status("finding the text"):  # which may have to be downloaded
            folder = prepare.default_dir(config.data)
    if tokenizer and not config.data.dir and not prepare.is_made_with(folder, tokenizer):
        folder = prepare.default_dir(config.data, tokenizer)
    there = bool(files.sizes(folder)) if files.is_remote(folder) else folder.exists()
    if not there:
        if config.data.dir:
            raise UserError(f"no folder {folder} (--data.dir); `gptjax data` makes one")
        try:
            prepare.prepare(config.data, folder, console, tokenizer)
        except UserError:
            if not folder.exists():  # else another process of this run was faster
                raise
    dataset = token_files.load(folder)
    _check_packing(config, dataset.tokenizer.kind, dataset.tokenizer.eot is not None)
    if config.data.mix and [name for name, _ in dataset.parts] != config.data.sources:
        raise UserError(
            f"{folder} (data.dir) is no mix of {' and '.join(map(str, config.data.sources))}"
            " (data.mix), in this order; leave out --data.dir"
        )
    named = config.data.source if config.data.dir and "source" in config.data.given else None
    # By name: a text that lies elsewhere is still the same one. ("." is no name.)
    names = Path(named or "").name, Path(dataset.source or "").name
    if all(names) and names[0] != names[1]:
        raise UserError(
            f"{folder} (data.dir) was made from {dataset.source}, not from {named} (data.source):"
            " name one of the two, and make the other None"
        )
    if tokenizer and tokenizer.state() != dataset.tokenizer.state():
        raise UserError(
            f"{folder} was made with another {dataset.tokenizer.kind} tokenizer than the"
            f" {tokenizer.kind} one of the weights; leave out --data.dir and name the text"
            " with --data.source"
        )
    n_vocab = dataset.tokenizer.n_vocab
    if config.model.vocab_size not in (None, n_vocab):
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is not the {n_vocab} ids of the"
            f" {dataset.tokenizer.kind} tokenizer of {folder}; leave it out"
            " (--model.vocab-multiple 64 pads the embedding)"
        )
    shortest = min([count for _, count in dataset.parts] or [len(dataset.train)])
    if shortest <= config.model.block_size:
        raise UserError(
            f"the training split of {folder}{' (of one text)' * bool(dataset.parts)} has {shortest}"
            f" tokens, but one block needs {config.model.block_size + 1}: use more text or"
            f" --model.block-size {max(1, shortest - 1)} or less"
        )
    model = config.model.replace(vocab_size=n_vocab)
    data = config.data.replace(dir=str(folder if files.is_remote(folder) else folder.absolute()))
    return config.replace(model=model, data=data), dataset


def _check_packing(config: TrainConfig, kind: str, ends: bool) -> None:
    """`ends`: whether that kind of tokenizer ends documents by a token."""
    if config.data.packed and not ends:
        raise UserError(
            "data.pack documents needs a tokenizer with an end-of-text token, such as gpt2 or bpe;"
            f" {kind} has none"
        )


def _lock(run_dir: Path, config: TrainConfig, runtime: RuntimeConfig, dataset: Dataset) -> RunLock:
    """The run directory, made and locked for this process; all hosts agree that it is one folder,
    and on what is to be done there."""
    data = config.data.replace(dir=None)
    anywhere = config.replace(init_from=None, data=data)
    # The runtime too: a host that evaluates at other steps would wait for the others forever.
    settings = config_io.run_settings_json(anywhere, runtime)
    if not hosts.all_equal(settings + dataset.fingerprint):
        raise UserError("the hosts have different settings or data; start the same command on all")
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(run_dir)
    holder = lock.acquire() if setup.is_main_host() else None
    if any(hosts.all_gather(int(holder is not None))):
        raise UserError(
            f"{run_dir} is in use by {holder or 'a process of the main host'}; wait for it or stop"
            " it, or name another --run-dir"
        )
    for _ in range(10):  # a network file system may take some seconds
        if hosts.all_equal(lock.holder()):
            return lock
        time.sleep(1)
    raise UserError(
        f"{run_dir} is not one folder for all hosts; name one that they share, or gs://..."
    )


def _train_in(
    run_dir: Path,
    config: TrainConfig,
    runtime: RuntimeConfig,
    dataset: Dataset,
    callbacks: Sequence[Callback],
    stop: Callable[[], int],
    console: Console,
) -> Trainer:
    callbacks = [*callbacks, _SavedSettings()]
    with Checkpoints(run_dir, runtime.keep_checkpoints, runtime.keep_every) as checkpoints:
        with console.status("making or loading the model"):
            trainer = Trainer(config, runtime, dataset, checkpoints, callbacks, stop)
        trainer.fit()
    return trainer


class _SavedSettings(Callback):
    """Makes the run directory what it is, once no callback has an objection to the start."""

    def on_start(self, trainer: Trainer) -> None:
        if setup.is_main_host():
            run_dir = trainer.checkpoints.run_dir
            trainer.checkpoints.directory.mkdir(parents=True, exist_ok=True)
            config_io.save_run_settings(run_dir / "config.json", trainer.config, trainer.runtime)
