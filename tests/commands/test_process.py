"""How a command's process begins and ends."""

import os
import resource
import signal
import subprocess
import sys
import time

import helpers
import pytest

from gptjax.commands import process
from gptjax.errors import RunError, UserError


def raising(error):
    def command(argv, prog):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("bad"), 2, "error: bad"),
        (RunError("broke\nhere"), 1, r"error: broke\nhere"),
        (MemoryError(), 1, "error: out of memory; lower batch_size"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GB"), 1, "error: out of memory; lower batch_size"),
        (RuntimeError("INTERNAL: Out of memory"), 1, "error: out of memory; lower batch_size"),
        (OSError(28, "No space left on device", "a/b"), 1, "error: a/b: No space left on device"),
        (KeyboardInterrupt(), 130, "stopped; nothing is left half done"),
        (process.Stopped(15), 143, "stopped; nothing is left half done"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(capsys, monkeypatch, error, code, line):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert process.run(raising(error), "gptjax") == code
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("too"), OSError("from JAX")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(type(error)):
        process.run(raising(error), "gptjax")


def test_a_reader_that_goes_away_ends_the_command_quietly(command, cache_dir, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [sys.executable, "-m", "gptjax", "--help"], stdout=writing, stderr=subprocess.PIPE,
        env=helpers.command_environment(cache_dir), cwd=tmp_path,
    )  # fmt: skip
    os.close(writing)
    assert (process.communicate()[1], process.returncode) == (b"", 141)


def test_a_full_disk_under_the_output_is_named(command, cache_dir, tmp_path):
    for arguments in (["--help"], ["train", "--help"], ["train", "--print-config"]):
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [sys.executable, "-m", "gptjax", *arguments], stdout=full, stderr=subprocess.PIPE,
                env=helpers.command_environment(cache_dir), cwd=tmp_path, text=True,
            )  # fmt: skip
        said = "standard output: No space left on device"
        helpers.assert_one_clear_line(result, said, code=1)


def test_a_wrong_variable_of_jax_is_one_clear_line(command):
    for variable in ({"JAX_NUM_CPU_DEVICES": "x"}, {"JAX_ENABLE_COMPILATION_CACHE": "maybe"}):
        result = command("-m", "gptjax", "train", "--data.dir", "nowhere", **variable)
        helpers.assert_one_clear_line(result, "an environment variable of JAX is wrong", "nvalid")


def test_a_long_name_is_shortened_in_a_message(command):
    result = command("-m", "gptjax", "report", "x" * 5000)
    helpers.assert_one_clear_line(result, "xxx ... xxx", code=result.returncode)
    assert result.returncode in (1, 2) and len(result.stderr) < 3100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "code"),
    [((20, 20), 2), ((20, 4096), 0), ((process.OPEN_FILES, process.OPEN_FILES), 0)],
)
def test_few_open_files_are_enough_or_refused(tmp_path, cache_dir, text_file, limit, code):
    flags = [*helpers.TINY, "--max-steps", "20", "--run-dir", "run"]
    result = subprocess.run(
        [sys.executable, helpers.TRAIN, *flags], cwd=tmp_path, capture_output=True, text=True,
        env=helpers.command_environment(cache_dir),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
    )  # fmt: skip
    if code:
        helpers.assert_one_clear_line(result, "may open 20 files at once", "ulimit -n")
    assert result.returncode == code and not (code == 0 and result.stderr), result.stderr
    assert (tmp_path / "run").exists() == (code == 0)


def test_xlas_alarms_are_shown_only_to_who_asks(command):
    script = (
        "import os; from gptjax.commands import process;"
        "process.run(lambda *_: print(os.environ['TF_CPP_MIN_LOG_LEVEL']), '')"
    )
    assert command("-c", script).stdout == "3\n"
    assert command("-c", script, TF_CPP_MIN_LOG_LEVEL="0").stdout == "0\n"


@pytest.mark.slow
def test_a_stop_at_any_moment_is_heard_and_no_error(tmp_path, text_file):
    endless = ["--max-steps", "1000000", "--lr-decay-steps", "9", "--eval-interval", "200"]
    for moment in range(10):
        number = (signal.SIGINT, signal.SIGTERM)[moment % 2]
        run_dir = tmp_path / str(moment)
        flags = [*helpers.TINY, *endless, "--run-dir", run_dir]
        # With nothing compiled before, so that XLA is often at work.
        command = helpers.start(tmp_path, tmp_path / f"cache {moment}", *map(str, flags))
        # From the imports to the first steps; before that Python itself has not started.
        time.sleep(0.15 + moment * 0.3)
        command.send_signal(number)
        result = helpers.finish(command, timeout=60)
        assert result.returncode in (128 + number, -number), result.stderr
        assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


@pytest.mark.slow
def test_closed_streams_are_no_failure(command, tmp_path, cache_dir):
    shell = f"{sys.executable} -m gptjax --version >&- 2>&- <&-"
    result = subprocess.run(shell, shell=True, env=helpers.command_environment(cache_dir))
    assert result.returncode == 0


@pytest.mark.slow
def test_a_locale_without_utf8_changes_no_text_and_no_path(command, tmp_path):
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "zü.txt").write_text("Zürich ☃ an der Limmat\n" * 200, encoding="utf-8")
    flags = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --max-steps 4"
    more = "--eval-batches 2 --sample-tokens 3 --data.source zü.txt --run-dir rü"
    trained = command(helpers.TRAIN, *flags.split(), *more.split(), **ascii_only)
    assert trained.returncode == 0 and not trained.stderr, trained.stderr
    printed = trained.stdout.splitlines()[-1]
    assert printed.endswith(r"--run-dir $'r\xc3\xbc' --num-samples 3")
    argv = [helpers.GENERATE, "rü", "--prompt", "Zür", "--max-new-tokens", "9", "--stop", "☃"]
    there, here = command(*argv, **ascii_only), command(*argv)
    assert here.returncode == there.returncode == 0, there.stderr
    assert here.stdout.startswith("Zür")
    shown = here.stdout.encode("ascii", "backslashreplace").decode()
    assert there.stdout == shown  # the same text, as that terminal can show it
