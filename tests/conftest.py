"""Eight CPU devices, and what tests get from pytest. All else that they share is in `helpers`."""

import functools
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import hypothesis
import jax
import pytest
import tiny_runs

import gptjax
from gptjax.devices import chips, cpu

# No run of the tests may depend on luck, and times vary by half on a busy machine.
hypothesis.settings.register_profile("gptjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gptjax")
chips.prepare_tpu_library()
jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of the tests' time, and their networks are tiny. What XLA makes of them with its
# optimisations is tested by the commands that tests start.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__[:2] == (0, 10):  # XLA does not start with a flag that it does not know
    cpu.add_xla_flag("--xla_cpu_use_fusion_emitters=false")  # which take half of that time
# A shell ignores Ctrl-C for what it starts in the background, nohup SIGHUP; what the tests start
# would inherit that, and respect it.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often the soak test kills its run")
    parser.addoption("--command-lines", type=int, default=40, help="how many odd ones are tried")
    parser.addoption("--soak-seed", type=int, default=0, help="of the moments when it does")
    parser.addoption("--until", type=float, help="skip what would begin after this (date +%%s)")


def pytest_collection_modifyitems(config, items):
    """Where there is no time for all of them, others are skipped each time."""
    if until := config.getoption("--until"):
        modules = [*dict.fromkeys(item.module.__name__ for item in items)]
        random.Random(until).shuffle(modules)
        items.sort(key=lambda item: modules.index(item.module.__name__))


def pytest_runtest_setup(item):
    until = item.config.getoption("--until")
    if until and time.time() > until:
        pytest.skip("no time is left (--until)")


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory):
    """A program that two tests make is compiled for the first one (or for an earlier run of the
    tests, with JAX_COMPILATION_CACHE_DIR)."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
            env=helpers.command_environment(cache_dir, **environment),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, cache_dir):
    """A finished run of `helpers.TINY`, and the result of its command; the text beside it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "text.txt").write_text(helpers.TEXT)
    flags = (*helpers.TINY, "--run-dir", "run")
    result = helpers.finish(helpers.start(folder, cache_dir, *flags))
    assert result.returncode == 0, result.stderr
    return folder / "run", result


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(helpers.TEXT)
    return path


@pytest.fixture(scope="session")
def train_tiny(cache_dir):
    """`tiny_runs.train`: (config, run_dir, recorder=None, **runtime settings) -> recorder."""
    return functools.partial(tiny_runs.train, cache_dir)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, train_tiny) -> tiny_runs.TinyRun:
    """A finished run of twelve steps in this process, for tests that only read it."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_runs.make_config(folder)
    recorder = train_tiny(config, folder / "run")
    return tiny_runs.TinyRun(folder / "run", config, recorder, gptjax.load(folder / "run"))
