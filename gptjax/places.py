"""Where a run lives: a folder on a disk, or gs://BUCKET/PATH; and who may write there.

In a bucket there is no appending, no renaming, no lock and no empty folder; a file appears whole.
"""

import fcntl
import importlib.util
import os
import socket
from pathlib import Path
from typing import IO

from etils import epath

from gptjax.errors import UserError


def place(name: str) -> Path:
    """A run directory by its name. For gs:// it is an epath.Path, which is used like a Path.

    Raises:
        UserError: gs:// without the package that it takes.
    """
    if not name.startswith("gs://"):
        return Path(name)
    if not importlib.util.find_spec("gcsfs"):
        raise UserError(f"{name}: a run directory on gs:// needs gcsfs; pip install gcsfs")
    import fsspec  # it comes with gcsfs

    # A listing is asked for again: others write there too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(name)


def is_remote(path: Path) -> bool:
    """Whether it is in a bucket."""
    return not isinstance(path, Path)


def replace_file(path: Path, text: str) -> None:
    """Write `text`, all at once: a kill leaves the old file or the new one.

    Raises:
        OSError: it cannot be written.
    """
    if is_remote(path):
        path.write_text(text)
        return
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


class RunLock:
    """The kernel's lock on RUN_DIR/lock: one training process per run. It ends with its process,
    however that ends, so none is ever stale. The file says who has it."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._file: IO[str] | None = None

    def holder(self) -> str:
        """What the file says; "" where there is none."""
        path = self._run_dir / "lock"
        return path.read_bytes().decode(errors="replace").strip() if path.exists() else ""

    def acquire(self) -> str | None:
        """None where the lock is ours now, or there are no locks there; else its holder.

        Raises:
            OSError: the file cannot be written.
        """
        if is_remote(self._run_dir):
            return None
        file = (self._run_dir / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.holder() or "another process"
        except OSError:
            pass  # a network file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file
        return None
