"""Settings from and to JSON, Python files and single values by name ("model.n_layer")."""

import dataclasses
import difflib
import json
import operator
import re
import runpy
import traceback
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gptjax import files, first_edition, other_names, program
from gptjax.config import TrainConfig
from gptjax.errors import ConfigError, UserError, quoted
from gptjax.runtime_config import RuntimeConfig
from gptjax.settings import expected, fits

C = TypeVar("C")

_HERE = Path(__file__).parent
SHIPPED = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
"""The configs that come with gptjax: inside the installed package, beside it in a checkout."""

MAX_PROBLEMS = 100
"""More than a message holds."""


def setting_types(cls: Any) -> dict[str, Any]:
    """{"model.n_layer": int, ...}: every setting's type by its name."""
    out: dict[str, Any] = {}
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, name = kinds[field.name], field.name
        inner = setting_types(kind) if dataclasses.is_dataclass(kind) else {}
        out |= {f"{name}.{key}": value for key, value in inner.items()} or {name: kind}
    return out


def flatten(config: Any) -> dict[str, Any]:
    """{"model.n_layer": 12, ...}: every setting's value by its name."""
    return {name: operator.attrgetter(name)(config) for name in setting_types(type(config))}


def to_dict(config: Any) -> dict[str, Any]:
    """For JSON: nested objects."""
    return dataclasses.asdict(config)


def from_dict(cls: type[C], fields: Any, where: str) -> C:
    """The inverse of `to_dict`; what `fields` leaves out has its default. `where` names the source
    in errors.

    Raises:
        UserError: unknown, ill-typed or out-of-range settings; it names all of them, and what an
            unknown name probably means.
    """
    return _from_dicts([(cls, fields)], where)[0]


def run_settings(saved: Any, where: str) -> tuple[TrainConfig, RuntimeConfig]:
    """As `from_dict`, of a run's {"experiment": ..., "runtime": ...}, or of what the first edition
    saved."""
    parts = {"experiment", "runtime"}
    if isinstance(saved, dict) and not saved.keys() & parts:
        experiment, runtime = first_edition.split_settings(saved)
        saved = {"experiment": experiment, "runtime": runtime}
    if not isinstance(saved, dict) or saved.keys() != parts:
        raise UserError(f"{where} is {quoted(saved)}; expected an object of experiment and runtime")
    experiment = first_edition.with_activation(saved["experiment"])
    both = [(TrainConfig, experiment), (RuntimeConfig, saved["runtime"])]
    config, runtime_config = _from_dicts(both, where)
    return config, runtime_config


def run_settings_json(config: TrainConfig, runtime: RuntimeConfig) -> str:
    """The inverse of `run_settings`, as text."""
    return json.dumps({"experiment": to_dict(config), "runtime": to_dict(runtime)}, indent=2)


def save_run_settings(path: Path, config: TrainConfig, runtime: RuntimeConfig) -> None:
    """Write RUN_DIR/config.json. Raises OSError."""
    files.write_atomic(path, run_settings_json(config, runtime) + "\n")


def load_config(name: str) -> tuple[TrainConfig, RuntimeConfig]:
    """What a Python file sets: `config = TrainConfig(...)` and perhaps `runtime =
    RuntimeConfig(...)`. `name`: its path, or the name of a config that comes with gptjax
    ("shakespeare_char_cpu"; configs/ before it and .py after it may be left out).

    Raises:
        UserError: no such file, an error in it, or no TrainConfig of that name.
    """
    path = files.path(name)
    if not path.is_file() and str(path.parent) in (".", "configs"):
        path = SHIPPED / f"{path.name.removesuffix('.py')}.py"
    if not path.is_file():
        raise UserError(
            f"no config file {name}; expected a path, or one of: {', '.join(shipped())}"
        )
    try:
        try:
            found = runpy.run_path(str(path))
        except (TypeError, ImportError, ConfigError):
            # Perhaps it is of the first edition. If not, it runs to its end where nothing is
            # checked, and below all that is wrong is named.
            found = first_edition.run_config_file(path)
    except (Exception, SystemExit) as error:  # the file is the user's code: it may raise anything
        raise UserError(f"{name}{_line(error, path)}: {_explain(error)}") from None
    config, runtime = found.get("config"), found.get("runtime", RuntimeConfig())
    if config is None and len(other_names.NANOGPT_TRAINS.keys() & found.keys()) > 1:
        raise UserError(f"{name} is a config file of nanoGPT; here it is: {_from_nanogpt(found)}")
    if type(config).__name__ != "TrainConfig":
        raise UserError(f"{name} must set `config = TrainConfig(...)` (from gptjax.config)")
    if type(runtime).__name__ != "RuntimeConfig":
        raise UserError(f"{name}: `runtime` must be a RuntimeConfig (from gptjax.runtime_config)")
    # Python checks no types of fields; the reader of JSON does.
    experiment, moved = first_edition.split_settings(_given(config))
    settings = run_settings({"experiment": experiment, "runtime": moved | _given(runtime)}, name)
    if not isinstance(config, TrainConfig):
        first_edition.notice(
            f"{name} is written for gptjax 0.1, which still works; for how it is written now see"
            f" {SHIPPED / 'quickstart.py'}"
        )
    return settings


def shipped() -> list[str]:
    """The names of the configs that come with gptjax."""
    return sorted(file.stem for file in SHIPPED.glob("*.py"))


def near_miss(name: str, names: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _from_dicts(parts: Sequence[tuple[Any, Any]], where: str) -> list[Any]:
    """Of each (class, fields) an instance; the problems of all are raised together."""
    out: list[Any] = []
    problems: list[str] = []
    known = [name for cls, _ in parts for name in setting_types(cls)]
    for cls, fields in parts:
        kinds = setting_types(cls)
        sections = {name.split(".")[0] for name in kinds if "." in name}
        values = {}
        for name, value in _leaves(fields, sections):
            kind = kinds.get(name)
            if len(problems) >= MAX_PROBLEMS:
                break  # each takes time
            if not name or name in sections:
                problems.append(f"{name or 'it'} is {quoted(value)}; expected an object")
            elif kind is None:
                problems.append(f"unknown setting {name}{near_miss(name, known)}")
            elif fits(value, kind):
                values[name] = tuple(value) if isinstance(value, list) else value
            else:
                problems.append(f"{name} is {quoted(value)}; expected {expected(kind)}")
        try:
            out.append(cls().replace(values))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    return out


def _leaves(fields: Any, sections: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(fields, dict):
        for key, value in fields.items():
            inside = {f"{prefix}{key}"} & sections and isinstance(value, dict)
            yield from _leaves(value, set(), f"{key}.") if inside else [(f"{prefix}{key}", value)]
    else:
        yield prefix, fields


def _given(config: Any) -> dict[str, Any]:
    """As `to_dict`, of what was given explicitly."""
    names = [field.name for field in dataclasses.fields(config)]
    values = {name: getattr(config, name) for name in getattr(config, "given", names)}
    return {
        name: _given(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
        if value is not first_edition.UNSET
    }


def _line(error: BaseException, path: Path) -> str:
    """ ", line N", where it is known in which line of the file something was raised."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _from_nanogpt(found: Mapping[str, Any]) -> str:
    """The command that has the settings of a nanoGPT config file."""
    kinds = setting_types(TrainConfig) | setting_types(RuntimeConfig)
    values = other_names.from_nanogpt(other_names.NANOGPT_TRAINS | dict(found), kinds)
    values |= {"run_dir": found.get("out_dir", "out"), "model.activation": "gelu_erf"}
    values["device"] = {"cpu": "cpu", "cuda": "gpu"}.get(str(found.get("device", ""))[:4], "auto")
    dataset = str(found.get("dataset", "openwebtext"))
    if "shakespeare" in dataset:
        values["data.source"] = "shakespeare"
        values["data.tokenizer"] = "char" if dataset.endswith("_char") else "gpt2"
    else:
        values["data.dir"] = f"data/{dataset}"
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in values.items() if fits(v, kinds[n])]
    origin, more = str(found.get("init_from", "")), ""
    if origin.startswith("gpt2"):
        weights = program.command("convert", "import", origin, f"runs/{origin}")
        more = f" --init-from=runs/{origin}, without the flags of the model (first: {weights})"
    return program.command("train", *flags) + more


def _explain(error: BaseException) -> str:
    """The message, and the setting that an unknown keyword argument probably means."""
    text = str(error).split(". Did you mean")[0]  # Python's own guess, from 3.13 on
    unknown = re.search(r"unexpected keyword argument '(\w+)'$", text)
    names = [*setting_types(TrainConfig), *setting_types(RuntimeConfig)]
    hint = near_miss(unknown[1], [name.split(".")[-1] for name in names]) if unknown else ""
    return f"{type(error).__name__}: {text}{hint}"
