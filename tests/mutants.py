"""How good the tests are: change one thing in the core, and see whether a test notices.

    python tests/mutants.py [MODULE ...] [--limit N] [--seed S] [--jobs J] [--list]

MODULE: of those in TESTS below (all of them, if none is named). Each mutant is one change to a copy
of the project: an operator, a constant, a condition, an argument or a statement. The module's tests
of the default tier run against it and must fail, or take too long. Those that live are printed. The
exit code is 1 where fewer than nine of ten die. --limit: so many a module at most, drawn by --seed.
"""

import argparse
import ast
import concurrent.futures
import copy
import difflib
import functools
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {
    "model.py": "test_model.py test_decode_layout.py test_attention.py",
    "layers.py": "test_layers.py test_model.py",
    "attention.py": "test_attention.py test_model.py",
    "flash_attention.py": "test_flash_attention.py",
    "dropout_attention.py": "test_dropout_attention.py",
    "head.py": "test_head.py test_train_step.py",
    "head_rows.py": "test_head_rows.py test_model.py",
    "remat.py": "test_model.py test_progress.py",
    "sharding.py": "devices/test_strategy.py devices/test_roofline.py",
    "cache.py": "test_model.py test_decode_layout.py",
    "decode_layout.py": "test_decode_layout.py",
    "hashed_random.py": "test_hashed_random.py test_layers.py",
    "logit_threshold.py": "test_logit_threshold.py test_sampling.py",
    "optim.py": "test_optim.py",
    "muon.py": "test_muon.py test_optim.py",
    "train_step.py": "test_train_step.py devices/test_strategy.py",
    "sampling.py": "test_sampling.py",
    "generation.py": "test_generation.py test_run.py",
    "evaluation.py": "test_evaluation.py",
    "data/batches.py": "data/test_batches.py",
    "trainer.py": "test_trainer.py test_resume.py",
}
EQUIVALENT: dict[str, dict[str, str]] = {
    "optim.py": {"step <= warmup": "at `warmup` both are the peak rate"},
    "cache.py": {
        "(1, start, 0)": "JAX clamps it to where all fits",
        "(0, start, 1)": "JAX clamps it to where all fits",
    },
    "logit_threshold.py": {
        "axis=1": "the last of two axes",
        "logits.shape[1] - 1)": "the last of two axes",
    },
    "sampling.py": {
        "CHUNK = 63": "one number as good as another",
        "CHUNK = 65": "one number as good as another",
        "(-1, None)": "there is one axis",
        "cache, cached = (None, ": "not read while there is no cache",
    },
    "data/batches.py": {"(raw % (len(tokens) - block_size))": "numpy takes the number as uint64"},
    "model.py": {"nn.remat(Block)": "the same numbers; XLA may undo it"},
    "train_step.py": {
        "batch.rows[1]": "JAX clamps it to the last one",
        "batch.windows[1]": "JAX clamps it to the last one",
    },
}
"""{module: {a part of a changed line: why that is the same program}}."""

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What `node` may be replaced by."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        new.ops[0] = SWAPS[type(node.ops[0])]()
        yield new
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        new.op = SWAPS[type(node.op)]()
        yield new
    elif isinstance(node, ast.UnaryOp):
        yield new.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield from (ast.Constant(node.value + step) for step in (1, -1))
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        new.test = ast.UnaryOp(ast.Not(), new.test)
        yield new
    elif isinstance(node, ast.Call):
        for number, keyword in enumerate(node.keywords):
            if keyword.arg:
                less = copy.deepcopy(node)
                del less.keywords[number]
                yield less
        if node.args and not isinstance(node.args[0], ast.Starred):
            yield new.args[0]
    elif isinstance(node, ast.Expr | ast.AugAssign | ast.Raise):
        yield ast.Pass()
    elif isinstance(node, ast.Return) and not isinstance(node.value, ast.Constant | None):
        yield ast.Return()


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, index) of all code below `node`: no docstrings, annotations, messages."""
    for field, value in ast.iter_fields(node):
        if field in (
            "annotation",
            "returns",
            "decorator_list",
            "bases",
            "type_params",
            "exc",
            "msg",
        ):
            continue
        for number, child in enumerate(value if isinstance(value, list) else [value]):
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            skipped = ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom
            if isinstance(child, ast.AST) and not text and not isinstance(child, skipped):
                yield node, field, number if isinstance(value, list) else None
                yield from places(child)


def mutants(source: str) -> list[str]:
    """The module with one change each, as `ast.unparse` writes it."""
    tree, found = ast.parse(source), []
    for parent, field, number in places(tree):
        value = getattr(parent, field)
        for new in changes(value if number is None else value[number]):
            old = value if number is None else value[number]
            setattr(parent, field, new) if number is None else value.__setitem__(number, new)
            found.append(ast.unparse(ast.fix_missing_locations(tree)))
            setattr(parent, field, old) if number is None else value.__setitem__(number, old)
    return [mutant for mutant in dict.fromkeys(found) if mutant != ast.unparse(tree)]


def difference(module: str, original: str, mutant: str) -> list[str]:
    both = original.splitlines(), mutant.splitlines()
    return list(difflib.unified_diff(*both, module, module, n=1, lineterm=""))


class Tree:
    """A copy of the project in which tests run."""

    def __init__(self, scratch: Path, number: int):
        self.folder = scratch / str(number)
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("gptjax", "tests", "configs"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(path, self.folder)
        # Compiled programs are shared by all mutants.
        self.environment = os.environ | {
            "PYTHONDONTWRITEBYTECODE": "1", "JAX_COMPILATION_CACHE_DIR": str(scratch / "programs"),
        }  # fmt: skip

    def passes(self, module: str, source: str, seconds: int) -> bool:
        """Whether no test of `module` notices that it is `source`, in so much CPU time."""
        path = self.folder / "gptjax" / module
        original = path.read_text()
        path.write_text(source)
        tests = [f"tests/{name}" for name in TESTS[module].split()]
        argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(
                argv, cwd=self.folder, env=self.environment, timeout=1200,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds)),
            )  # fmt: skip
            return done.returncode == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            path.write_text(original)


def cpu_seconds() -> float:
    """That all child processes have taken so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def choose(module: str, limit: int, seed: int) -> tuple[str, list[str], int]:
    """(the module without a change, its mutants in a random order, how many are left out because
    they are the same program)."""
    source = ast.unparse(ast.parse((ROOT / "gptjax" / module).read_text()))
    chosen, same = [], 0
    for mutant in mutants(source):
        added = [line for line in difference(module, source, mutant)[3:] if line[0] == "+"]
        known = any(part in line for line in added for part in EQUIVALENT.get(module, {}))
        same, chosen = same + known, chosen + [mutant] * (not known)
    random.Random(seed).shuffle(chosen)
    return source, chosen[:limit], same


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modules", nargs="*", choices=[*TESTS, []])
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    given = parser.parse_args()
    killed = lived = equivalent = 0
    with tempfile.TemporaryDirectory() as scratch:
        trees: queue.Queue[Tree] = queue.Queue()
        for number in range(0 if given.list else given.jobs):
            trees.put(Tree(Path(scratch), number))

        def survives(module: str, seconds: int, mutant: str) -> bool:
            tree = trees.get()
            try:
                return tree.passes(module, mutant, seconds)
            finally:
                trees.put(tree)

        for module in given.modules or TESTS:
            source, chosen, same = choose(module, given.limit, given.seed)
            equivalent += same
            if given.list:
                print(
                    *("\n".join(difference(module, source, mutant)) for mutant in chosen), sep="\n"
                )
                continue
            before = cpu_seconds()
            if not survives(module, 3600, source):
                sys.exit(f"the tests of {module} fail without any change")
            one = functools.partial(survives, module, int(30 + 3 * (cpu_seconds() - before)))
            with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
                for mutant, alive in zip(chosen, pool.map(one, chosen), strict=True):
                    killed, lived = killed + (not alive), lived + alive
                    if alive:
                        print("\n".join(difference(module, source, mutant)), flush=True)
            print(f"{module}: so far {killed} killed, {lived} lived", flush=True)
    print(f"{killed} of {killed + lived} killed; {equivalent} are known to be equivalent")
    return int(killed < 9 * lived)


if __name__ == "__main__":
    sys.exit(main())
