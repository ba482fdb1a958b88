"""The documentation: its examples run, its command lines parse, and what it names is there."""

import dataclasses
import re
import shlex
import shutil
import tomllib

import pytest
from helpers import ROOT, TEXT

import gptjax
from gptjax import config_io, tricks
from gptjax.commands import flags, generate, main, serve
from gptjax.config import TrainConfig
from gptjax.errors import UserError
from gptjax.runtime_config import RuntimeConfig

PAGES = {
    str(p.relative_to(ROOT)): p.read_text()
    for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
}
COMMAND = re.compile(
    r"(?:^|\$ |&& |\| |: |srun |bin/|^[A-Z_]+=\S+ )"
    r"((?:gptjax|python -m gptjax|python train_jax\.py|python generate_jax\.py)(?: +[-a-z].*|$))"
)
PLACEHOLDER = re.compile(r"[A-Z_]{3,}$|\.\.\.$|\[")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    """Without fenced blocks."""
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def command_lines() -> list[list[str]]:
    """The words of every command line that a user may copy: in indented blocks and between
    backticks; those with placeholders are left out."""
    found = []
    for page in PAGES:
        code = re.findall(r"^ {4,}(.+)$", prose(page), re.MULTILINE)
        code += re.findall(r"`([^`\n]+)`", prose(page))
        for match in filter(None, map(COMMAND.search, code)):
            line = match[1].removesuffix('"') if match[1].count('"') % 2 else match[1]
            words = shlex.split(line.replace("python -m gptjax", "gptjax"), comments=True)
            for script in ("train", "generate"):
                if words[:2] == ["python", f"{script}_jax.py"]:
                    words[:2] = ["gptjax", script]
            ends = [n for n, word in enumerate(words) if word in ("|", "&&", ";")]
            words = words[: min(ends, default=len(words))]
            if words not in found and not any(PLACEHOLDER.match(word) for word in words):
                found.append(words)
    return found


class Parsed(Exception):
    """The command line was understood."""


def test_the_python_examples_run(tmp_path, monkeypatch, cache_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTJAX_CACHE_DIR", str(cache_dir))
    (tmp_path / "my.txt").write_text(TEXT)
    for page in sorted(PAGES, key=lambda page: page != "docs/api.md"):
        namespace: dict[str, object] = {}
        for number, block in enumerate(python_blocks(page), 1):
            exec(compile(block, f"{page}, block {number}", "exec"), namespace)
        if page == "docs/api.md":
            shutil.copytree("runs/mine", "runs/quickstart")


def test_command_lines_parse(tmp_path, monkeypatch, capsys):
    def apply(*args, **options):
        original(*args, **options)
        raise Parsed

    original = flags.apply
    monkeypatch.setattr(flags, "apply", apply)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_config.py").write_text("from gptjax.config import FINETUNE as config")
    lines = command_lines()
    assert len(lines) > 40
    for words in lines:
        for run in (word for word in words if word.startswith("runs/")):
            (tmp_path / run).mkdir(parents=True, exist_ok=True)
            settings = TrainConfig(), RuntimeConfig(run_dir=run)
            config_io.save_run_settings(tmp_path / run / "config.json", *settings)
            (tmp_path / run / "metrics.jsonl").touch()
        if len(words) == 2:  # a command's name, in the text
            assert words[1] in main.COMMANDS or words[1] == "--version", words
        elif len(words) > 2:
            try:
                main.dispatch(words[1:], "gptjax")
            except (Parsed, SystemExit) as stopped:
                assert isinstance(stopped, Parsed) or not stopped.code, words
            except UserError as error:
                pytest.fail(f"{shlex.join(words)}: {error}")


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), f"{page} links to {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
                slugs = [
                    re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles
                ]
                assert anchor in slugs, f"{page} links to {target}"


def test_tests_and_files_that_are_named_exist():
    tests = "".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    for page, text in PAGES.items():
        for name in re.findall(r"\b(test_\w+)\b(?!\.py)", text):
            assert f"def {name}(" in tests, f"{page} names {name}"
        for name in re.findall(r"`((?:tests|gptjax|configs|docs)/[\w/.]*\.\w+)`", text):
            assert (ROOT / name).is_file(), f"{page} names {name}"
    for page in ("docs/reading.md", "docs/dependencies.md"):
        for name in re.findall(r"`([\w/]+\.py)`", PAGES[page]):
            assert any((ROOT / at / name).is_file() for at in ("gptjax", ".")), f"{page}: {name}"


def test_the_readme_is_short_and_names_every_module():
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 180
    rooms = readme[readme.index("## The modules") :]
    named = set(re.findall(r"`(\w+)/?`", rooms))
    package = ROOT / "gptjax"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert (modules | folders) - named == set()


def test_the_modules_of_the_migration_table_exist():
    table = PAGES["docs/migrating.md"].partition("## Modules")[2]
    for row in re.findall(r"^\| .*? \| (.*) \|$", table, re.MULTILINE):
        for name in re.findall(r"`([\w.]+)`", row):
            path = ROOT / "gptjax" / name.replace(".", "/")
            assert path.with_suffix(".py").is_file(), name


def test_pages_leave_nothing_out():
    api = PAGES["docs/api.md"]
    assert [name for name in gptjax.__all__ if name not in api] == []
    assert [name for name in tricks.TRICKS if f"`{name}`" not in PAGES["docs/reading.md"]] == []
    configs = PAGES["docs/own-data.md"].partition("The configs that come with gptjax")[2]
    listed = set(re.findall(r"^\| `(\w+)` \| ", configs, re.MULTILINE))
    assert listed == {path.stem for path in config_io.SHIPPED.glob("*.py")}
    for page, known in (
        ("docs/sampling.md", generate.GenerateFlags),
        ("docs/playground.md", serve.ServeFlags),
    ):
        names = [field.name.replace("_", "-") for field in dataclasses.fields(known)]
        assert [name for name in names if f"`--{name}`" not in PAGES[page]] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for dependency in project["dependencies"]:
        name = re.match(r"[\w-]+", dependency)[0]
        assert f"| {name} " in PAGES["docs/dependencies.md"], name
    for extra in project["optional-dependencies"]:
        assert f"`{extra}`" in PAGES["docs/dependencies.md"], extra
