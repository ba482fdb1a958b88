"""The circumstances of a run: where, on what and how often. They may change whenever it is
resumed, because they change no number of the training beyond rounding."""

import dataclasses
import re
from typing import Literal

from gptjax.config import TrainConfig
from gptjax.errors import UserError
from gptjax.settings import INT_LIMIT, Config

DeviceKind = Literal["auto", "cpu", "gpu", "tpu"]
StrategyKind = Literal["pmap", "shard_map", "fsdp"]
TrackerKind = Literal["tensorboard", "wandb", "trackio"]


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Config):
    """How the network is computed: the same function, up to rounding."""

    attention: Literal["auto", "xla", "blocks", "cudnn", "splash"] = "auto"
    """Attention kernel. auto: flash attention where it applies (cuDNN's on NVIDIA GPUs, splash
    attention on TPUs), some queries at a time (blocks) on a CPU, all scores at once (xla)
    elsewhere."""
    remat: Literal["auto", "none", "elementwise", "mlp", "attention", "full"] | bool = "auto"
    """What the backward pass computes again: less memory, more time. elementwise: all but matrix
    products and attention; mlp, attention: that part of a block as well; full (--remat alone): the
    whole block. auto: elementwise where layers are a loop, else none."""
    scan_unroll: int = 0
    """Layers unrolled in the scan over blocks. 0: all of them up to 12 layers without remat, but
    not on TPUs or under fsdp; else 1."""

    def problems(self) -> list[str]:
        return self._check_ints(0, "scan_unroll")


@dataclasses.dataclass(frozen=True)
class DistributedConfig(Config):
    """How several hosts find each other. All None: by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID, or by what SLURM or a TPU pod says; else there is one host."""

    prefix = "distributed."

    coordinator_address: str | None = None
    """host:port of process 0, which all hosts can reach."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """This process's number, from 0."""
    initialization_timeout: int = 1800
    """Seconds to wait for the others at the start; a pod may take long to come up."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a host counts as dead, and the others end."""

    def problems(self) -> list[str]:
        out = self._check_ints(1, "num_processes", "initialization_timeout", "heartbeat_timeout")
        out += self._check_ints(0, "process_id")
        names = "coordinator_address", "num_processes", "process_id"
        missing = [name for name in names if getattr(self, name) is None]
        if missing and len(missing) < len(names):
            out.append(
                "distributed.coordinator_address, num_processes and process_id go together;"
                f" missing: {', '.join(missing)}"
            )
        if not re.fullmatch(r"\S+:\d{1,5}", self.coordinator_address or "none:0"):
            out.append(
                f"distributed.coordinator_address {self.coordinator_address!r} is not host:port"
            )
        if (self.process_id or 0) >= (self.num_processes or INT_LIMIT):
            out.append(
                f"distributed.process_id {self.process_id} is not below num_processes"
                f" {self.num_processes}; they count from 0"
            )
        return out


@dataclasses.dataclass(frozen=True)
class RuntimeConfig(Config):
    """Everything about a run that is not the experiment."""

    run_dir: str | None = None
    """Where checkpoints and metrics go; a run that exists there is resumed. None: runs/ and the
    config's name."""

    log_interval: int = 10
    """Steps between progress lines."""
    eval_interval: int = 250
    """Steps between evaluations. Each is followed by a sample, and by a checkpoint if one is due or
    the loss is the best so far."""
    eval_batches: int = 20
    """Batches per evaluation: eval_batches x batch_size windows of the validation split, always the
    same."""
    eval_full_split: bool = False
    """Evaluate on the whole validation split, exactly, instead of eval_batches batches."""
    patience: int | None = dataclasses.field(default=None, kw_only=True)
    """Stop early, after so many evaluations in a row without a better validation loss. None:
    never."""
    save_interval: int | None = None
    """Steps between checkpoints. None: as eval_interval."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the best by validation loss is kept besides."""
    keep_every: int | None = None
    """Keep the checkpoints at multiples of this step too, for good."""
    sample_tokens: int = 300
    """Tokens of the sample printed after each evaluation; 0 prints none."""

    track: tuple[TrackerKind, ...] = ()
    """Also give losses, speed, samples and settings to tensorboard, wandb, trackio, or several of
    them. (Each takes the extra of its name.)"""
    watch: int | None = None
    """Steps between norms of each parameter and of its gradient, for what --track names. Each time
    costs about a step. None: never."""

    profile_steps: str | None = None
    """Trace these steps into RUN_DIR/profile, for TensorBoard or xprof: 10:15."""
    debug_nans: bool = False
    """If a loss or gradient is no longer finite, name the first operation that made it so. Keeps
    two copies of the weights, as they were before the last steps, on one device (fsdp: on all)."""

    device: DeviceKind = "auto"
    """Kind of device to train on. auto: the fastest kind that is there."""
    num_devices: int | None = None
    """CPU devices to split this machine's cores into. None: one, which uses all of them."""
    strategy: StrategyKind = "pmap"
    """pmap: every device holds the whole model and its optimizer state (16 bytes a parameter).
    shard_map: the same, bit for bit, by JAX's newer interface. fsdp: each holds a share and gathers
    weights layer by layer: for models that one device cannot hold. The same numbers, the same
    checkpoints."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step: fits a large batch into little memory."""
    compute: ComputeConfig = ComputeConfig()
    distributed: DistributedConfig = DistributedConfig()

    dry_run: bool = False
    """Compile the training step, say what it needs of each device's memory and whether that is
    there, and exit. (Where only the text can tell the vocabulary, it is prepared.)"""
    topology: str | None = None
    """TPUs to compile for in a dry run, which need not be here: v5e-8, v4-32, v5p-128, v5e:2x4, ...
    (It takes jax[tpu].) It also says how fast they can be at most."""
    device_memory: float | None = None
    """Memory of one device, in GiB, for a dry run to compare with (of devices that are not here,
    say). None: what the device has; of a CPU what is free."""

    def problems(self) -> list[str]:
        out = self._check_ints(0, "sample_tokens")
        out += self._check_ints(1, "gradient_accumulation_steps", "log_interval", "eval_interval")
        out += self._check_ints(
            1, "eval_batches", "save_interval", "keep_checkpoints", "keep_every", "watch",
            "patience",
        )  # fmt: skip
        out += self._check_ints(1, "num_devices")
        if self.num_devices and self.num_devices > 1024:
            out.append(f"num_devices {self.num_devices} must be at most 1024")
        if self.run_dir == "":
            out.append("run_dir is empty; name a folder")
        if self.watch and not self.track:
            out.append("watch is for a tracker; add --track tensorboard, wandb or trackio")
        if self.topology is not None and not self.dry_run:
            out.append("topology is for a dry run; add --dry-run")
        if self.profile_steps is not None and not 0 < self.profiled()[0] <= self.profiled()[1]:
            out.append(
                f"profile_steps {self.profile_steps!r} must be the first and the last step to"
                " trace, such as 10:15"
            )
        if self.device_memory is not None and not self.device_memory > 0:
            out.append(f"device_memory {self.device_memory} must be a number above 0")
        return out

    def profiled(self) -> tuple[int, int]:
        """The first and the last step to trace; (0, 0): none."""
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.profile_steps or "")
        return (int(found[1]), int(found[2])) if found else (0, 0)

    def divide_batch(self, config: TrainConfig, num_devices: int) -> int:
        """Sequences of one device's micro-batch. Raises UserError, with the nearest sizes that
        divide, if the batch does not."""
        unit = num_devices * self.gradient_accumulation_steps
        if config.batch_size % unit:
            down = config.batch_size // unit * unit
            nearest = " or ".join(str(size) for size in (down, down + unit) if size)
            raise UserError(
                f"batch_size {config.batch_size} does not divide over {num_devices} device(s) x"
                f" {self.gradient_accumulation_steps} accumulation step(s);"
                f" use {nearest} or another multiple of {unit}"
            )
        return config.batch_size // unit

    def eval_windows(self, config: TrainConfig) -> int | None:
        """Validation windows per evaluation; None: all. Two losses are compared only if this is
        the same; it does not depend on how a batch is cut into micro-batches."""
        return None if self.eval_full_split else self.eval_batches * config.batch_size
