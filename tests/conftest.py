"""Eight CPU devices, a small cache, and small models for all tests."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import pytest

# Times vary by half on a busy machine: no test may fail for being slow.
hypothesis.settings.register_profile("gptjax", deadline=None)
hypothesis.settings.load_profile("gptjax")
jax.config.update("jax_num_cpu_devices", 8)
# A shell ignores Ctrl-C for what it starts in the background, nohup SIGHUP; what the tests start
# would inherit that, and respect it.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often the soak test kills its run")
    parser.addoption("--soak-seed", type=int, default=0, help="of the moments when it does")


ROOT = Path(__file__).parent.parent
SHAKESPEARE = Path(os.environ.get("GPTJAX_CACHE_DIR", "")) / "tinyshakespeare.txt"

WORDS = """now is the winter of our discontent made glorious summer by this sun and all clouds
that loured upon house in deep bosom ocean buried brows bound with victorious wreaths bruised arms
hung up for monuments stern alarums changed to merry meetings dreadful marches delightful""".split()
_draw = random.Random(0)
TEXT = "".join(
    f"{_draw.choice(['RICHARD', 'CLARENCE', 'HASTINGS'])}:\n"
    f"{' '.join(_draw.choices(WORDS, k=_draw.randint(4, 12))).capitalize()}.\n\n"
    for _ in range(400)
)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """XLA's CPU programs hold many memory maps each, and a process may have only so many."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """One compilation cache for every command the tests start."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(cache_dir, tmp_path):
    """Run one of the project's commands as a user would: a real process, in a folder of its own."""

    def run(*arguments: object, stdin: str = "", **environment: str):
        return subprocess.run(
            [sys.executable, *(a if isinstance(a, bytes) else str(a) for a in arguments)],
            cwd=tmp_path,
            env=command_environment(cache_dir, **environment),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def command_environment(cache_dir: Path, **more: str) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    ours = {"GPTJAX_CACHE_DIR": str(cache_dir), "PYTHONPATH": str(ROOT)}
    return keep | ours | {"JAX_PLATFORMS": "cpu"} | more


def assert_one_clear_line(result, *words: str, code: int = 2) -> None:
    """What every user error looks like."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, cache_dir):
    """A finished run of `runs.TINY`, and the result of its command; the text beside it."""
    from runs import TINY, finish, start

    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "text.txt").write_text(TEXT)
    result = finish(start(folder, cache_dir, *TINY, "--run-dir", "run"))
    assert result.returncode == 0, result.stderr
    return folder / "run", result


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path
