"""The rules of the architecture that a machine can check. Each failure names the file, the line and the rule."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ray_dr"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports point down: a module may import its own package and those of a lower rank.
RANKS = {
    "cli": 10, "console": 10, "actors": 9, "train": 8, "drills": 7, "simulator": 6, "recovery": 5, "scheduling": 5,
    "planning": 5, "detection": 4, "backup": 4, "checkpoint": 4, "repository": 3, "telemetry": 2, "stores": 1,
    "model": 0, "errors": 0,
}  # fmt: skip
# The front door imports what it offers when it is asked for; config is read by cli and actors only.
CONFIG = ("config", "yaml_text")
MAY_IMPORT_CONFIG = ("cli", "actors", "__init__", *CONFIG)
CONFIG_MAY_IMPORT = ("model", "errors", "stores", *CONFIG)

HOMES = {"ray": ("actors",), "torch": ("train",), "boto3": ("stores",), "botocore": ("stores",)}
HEAVY = ("ray", "torch", "boto3", "botocore")

PURE_PACKAGES = ("model", "recovery", "scheduling", "planning", "detection")
PURE_FILES = (
    "checkpoint/save_plan.py", "checkpoint/restore_plan.py", "checkpoint/cadence.py", "telemetry/tiers.py",
    "checkpoint/pace.py", "checkpoint/failures.py", "checkpoint/duty.py", "checkpoint/mesh.py", "checkpoint/cut.py",
    "repository/retention.py", "telemetry/timeline.py", "telemetry/lineage.py",
    "telemetry/preemptions.py",
    "telemetry/phases.py",
)  # fmt: skip
IMPURE = (
    "time", "random", "secrets", "threading", "asyncio", "multiprocessing", "concurrent", "os", "io", "pathlib",
    "shutil", "tempfile", "socket", "subprocess", "signal", "logging", "uuid", "urllib", "http", "sqlite3", "mmap",
)  # fmt: skip
IMPURE_CALLS = ("open", "input", "print", "datetime.now", "datetime.utcnow", "date.today")

# Ray's own processes take their settings from the environment and from a cluster's YAML, and from nowhere else. A store's
# URL says which variable holds its key.
MAY_READ_ENVIRONMENT = ("config.py", "actors/local_cluster.py", "stores/keys.py")
MAY_READ_YAML = ("yaml_text.py", "config.py", "actors/local_cluster.py")
# An unpickler that calls nothing of what it reads, run in a process of its own.
MAY_UNPICKLE = ("checkpoint/foreign_pickle.py",)
BAD_FILE_NAMES = ("utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py", "base_impl.py")
BAD_CLASS_ENDINGS = ("Manager", "Helper", "Util", "Utils", "Base", "Impl")
MAX_LINES = 500


def part_of(path: Path) -> str:
    """The package, or the top-level module, a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def where(path: Path, node: ast.AST) -> str:
    line = getattr(node, "lineno", 1)
    return f"{path.relative_to(ROOT)}:{line}: {path.read_text().splitlines()[line - 1].strip()}"


def decisions(path: Path) -> Iterator[ast.AST]:
    """Every node of a file but those that run only when it is started as a program, e.g. to print a diagram."""
    for statement in tree(path).body:
        if not (isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test)):
            yield from ast.walk(statement)


def environment_reads(path: Path) -> Iterator[ast.AST]:
    """Uses of the environment other than setting variables in it, which some libraries demand."""
    module = tree(path)
    writes = {
        id(node.value)
        for node in ast.walk(module)
        if (isinstance(node, ast.Attribute) and node.attr == "update")
        or (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del))
    }
    names = ("os.environ", "os.getenv", "os.environb")
    yield from (
        node
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in names and id(node) not in writes
    )


@functools.cache
def imports(path: Path) -> Sequence[tuple[str, ast.AST]]:
    """Every imported module's dotted name; those for the type checker alone don't count."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    module = tree(path)
    unseen = {
        id(inner)
        for node in ast.walk(module)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(module):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path, node)}  <- write the absolute name"
            source = node.module or ""
            yield from ((f"ray_dr.{alias.name}", node) for alias in node.names if source == "ray_dr")
            yield source, node


def complain(rule: str, found: list[str]) -> None:
    assert not found, f"{rule}:\n  " + "\n  ".join(found)


def test_imports_point_down() -> None:
    found = []
    for path in FILES:
        importer = part_of(path)
        for name, node in imports(path):
            parts = name.split(".")
            if parts[0] != "ray_dr" or len(parts) == 1 or parts[1] == importer or importer == "__init__":
                continue
            if not allowed(importer, parts[1]):
                found.append(where(path, node))
    complain("a package may import only those below it", found)


def allowed(importer: str, imported: str) -> bool:
    if imported in CONFIG:
        return importer in MAY_IMPORT_CONFIG
    if importer in CONFIG:
        return imported in CONFIG_MAY_IMPORT
    if imported not in RANKS:
        return True  # a name of the front door: ray_dr.Context
    return RANKS[imported] < RANKS[importer] or (RANKS[imported] == RANKS[importer] == 0)


def test_every_package_has_a_rank() -> None:
    unknown = {part_of(path) for path in FILES} - set(RANKS) - set(CONFIG) - {"__init__", "__main__"}
    assert not unknown, f"give these a rank in {Path(__file__).name}: {sorted(unknown)}"


def test_heavy_imports_have_one_home_each() -> None:
    found = [
        where(path, node)
        for path in FILES
        for name, node in imports(path)
        if part_of(path) not in HOMES.get(name.split(".")[0], (part_of(path),))
    ]
    complain("ray only in actors, torch only in train, the store client only in stores", found)


def test_decisions_import_no_clock_no_dice_no_threads_no_io() -> None:
    found = []
    for path in FILES:
        if part_of(path) in PURE_PACKAGES or str(path.relative_to(PACKAGE)) in PURE_FILES:
            found += [where(path, node) for name, node in imports(path) if name.split(".")[0] in (*IMPURE, *HEAVY)]
            found += [
                where(path, node)
                for node in decisions(path)
                if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("datetime.") in IMPURE_CALLS
            ]
    complain("decisions are pure", found)


def test_decisions_are_made_of_decisions_and_values() -> None:
    found = []
    for path in FILES:
        if part_of(path) in PURE_PACKAGES:
            for name, node in imports(path):
                parts = name.split(".")
                inside = parts[0] == "ray_dr" and len(parts) > 1 and parts[1] not in (*PURE_PACKAGES, "errors")
                if inside and "/".join(parts[1:]) + ".py" not in PURE_FILES:
                    found.append(where(path, node))
    complain("what is pure imports only what is pure", found)


def test_only_config_reads_the_environment() -> None:
    found = [
        where(path, node)
        for path in FILES
        if str(path.relative_to(PACKAGE)) not in MAY_READ_ENVIRONMENT
        for node in environment_reads(path)
    ]
    complain("only config.py reads the environment", found)


def test_only_the_readers_of_settings_import_yaml() -> None:
    found = [
        where(path, node)
        for path in FILES
        if str(path.relative_to(PACKAGE)) not in MAY_READ_YAML
        for name, node in imports(path)
        if name.split(".")[0] == "yaml"
    ]
    complain("a job's YAML is read in one place", found)


def test_nothing_stored_is_ever_unpickled() -> None:
    found = [
        where(path, node)
        for path in FILES
        if part_of(path) not in ("actors",) and str(path.relative_to(PACKAGE)) not in MAY_UNPICKLE
        for name, node in imports(path)
        if name.split(".")[0] in ("pickle", "cloudpickle", "marshal", "shelve", "dill")
    ]
    complain("no pickle in what is stored or restored", found)


def test_no_file_is_long() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    complain(f"at most {MAX_LINES} lines", [f"{name}: {lines}" for name, lines in long.items() if lines > MAX_LINES])


def test_no_package_is_empty() -> None:
    packages = [path.parent for path in FILES if path.name == "__init__.py"]
    bare = [str(package.relative_to(ROOT)) for package in packages if len(list(package.glob("*.py"))) < 2]
    complain("a package has modules", bare)


def test_names_say_what_a_thing_does() -> None:
    found = [str(path.relative_to(ROOT)) for path in FILES if path.name in BAD_FILE_NAMES]
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and node.name.lstrip("_").endswith(BAD_CLASS_ENDINGS):
                found.append(where(path, node))
    complain("no utils, no managers", found)


@pytest.mark.parametrize("arguments", [["-c", "import ray_dr"], ["-m", "ray_dr.cli.main", "--help"]])
def test_importing_and_help_load_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "ray_dr" in loaded
    complain("ray_dr is light to import", sorted(name for name in loaded if name.split(".")[0] in HEAVY))
