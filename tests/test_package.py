"""What `pip install .` installs."""

import shutil
import subprocess
import sys
import tomllib

import helpers
import pytest

PROJECT = tomllib.loads((helpers.ROOT / "pyproject.toml").read_text())


def test_every_folder_of_the_package_is_installed():
    found = {"gptjax"}
    for path in (helpers.ROOT / "gptjax").rglob("*.py"):
        found.add(".".join(path.parent.relative_to(helpers.ROOT).parts))
    assert {*PROJECT["tool"]["setuptools"]["packages"]} == found | {"gptjax.configs"}


def test_requirements_are_the_packages_dependencies():
    lines = (helpers.ROOT / "requirements.txt").read_text().splitlines()
    required = {line for line in lines if line and not line.startswith("#")}
    viz = {*PROJECT["project"]["optional-dependencies"]["viz"]}
    tests = {line for line in required if line.startswith(("pytest", "hypothesis"))}
    assert required == {*PROJECT["project"]["dependencies"]} | viz | tests


@pytest.mark.slow
def test_an_installed_copy_works_from_any_directory(tmp_path, cache_dir):
    pytest.importorskip("setuptools", reason="building the package needs setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("gptjax", "configs", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (helpers.ROOT / name).is_dir() else shutil.copy
        copy(helpers.ROOT / name, source / name)
    pip = "-m pip install -q --no-deps --no-build-isolation --disable-pip-version-check --target"
    subprocess.run([sys.executable, *pip.split(), tmp_path / "site", source], check=True)
    environment = helpers.command_environment(cache_dir, PYTHONPATH=str(tmp_path / "site"))

    def run(*argv):
        program = tmp_path / "site" / "bin" / "gptjax"
        return subprocess.run(
            [sys.executable, program, *argv], cwd=tmp_path, env=environment, text=True,
            capture_output=True,
        )  # fmt: skip

    assert run("--version").stdout.startswith("gptjax 0.")
    assert '"n_embd": 128' in run("train", "shakespeare_char_cpu", "--print-config").stdout
    assert "usage: gptjax evaluate" in run("evaluate", "--help").stdout
    helpers.assert_one_clear_line(run("bench"), "run this command in a checkout")
    (tmp_path / "text.txt").write_text(helpers.TEXT)
    shutil.rmtree(source)
    result = run("train", *helpers.TINY, "--max-steps", "2", "--run-dir", "run")
    assert result.returncode == 0, result.stderr
    more = result.stdout.splitlines()[-1].removeprefix("more samples: ").split()
    assert more[:2] == ["gptjax", "generate"] and run(*more[1:]).returncode == 0
