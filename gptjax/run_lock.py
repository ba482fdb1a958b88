"""One training process per run: the kernel's lock on RUN_DIR/lock."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from gptjax import files


class RunLock:
    """It ends with its process, however that ends, so none is ever stale. The file says who holds
    it. In a bucket there are no locks."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._file: IO[str] | None = None

    def holder(self) -> str:
        """What the file says; "" where there is none."""
        path = self._run_dir / "lock"
        return path.read_bytes().decode(errors="replace").strip() if path.exists() else ""

    def acquire(self) -> str | None:
        """None where the lock is ours now, or there are no locks; else its holder. Raises OSError
        if the file cannot be written."""
        if files.is_remote(self._run_dir):
            return None
        file = (self._run_dir / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.holder() or "another process"
        except OSError:
            pass  # a network file system without locks
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        self._file = file
        return None

    def close(self) -> None:
        """Release it, for another run in the same process."""
        if self._file:
            self._file.close()
