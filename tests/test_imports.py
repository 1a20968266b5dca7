"""The import graph: rooms stand in an order and import only from rooms above them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy
import pytest

from reshard.formats.info import OWN

SOURCE = Path(__file__).parents[1] / "src" / "reshard"

# Rooms of one line do not import each other. A room is a folder of `reshard`, or one of the modules
# beside the folders; each format is a room of its own. `docs/design.md` draws the same list.
ORDER = (
    ("errors", "_version", "progress"),
    ("core",),
    ("storage",),
    ("containers",),
    ("naming",),
    ("formats",),
    (
        "formats.dcp",
        "formats.deepspeed",
        "formats.huggingface",
        "formats.megatron",
        "formats.meta",
        "formats.rank_files",
        "formats.torch_state_dict",
    ),
    ("transfer",),
    ("checkpoint",),
    ("conversion",),
    ("inspection",),
    ("comparison",),
    ("diagnosis",),
    ("pages",),
    ("watching",),
    ("reshard",),
    ("evaluate",),
    ("cli",),
    ("__main__",),
    ("testing",),
)
# What stands beside the rooms in the order, and is none.
OUTSIDE = {"reshard", "__main__"}
OWN_NAMES = {info.name for info in OWN}
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

# Packages that take long to import, and the rooms that may name them outside a function.
HEAVY: dict[str, set[str]] = {
    "torch": {"evaluate"},
    "transformers": {"evaluate"},
    "accelerate": {"evaluate"},
    "safetensors": {"evaluate"},
    "PIL": {"evaluate"},
    "jinja2": {"evaluate"},
    "rich": {"evaluate"},
    "ray": set(),
    "obstore": set(),
    "pytest": {"testing"},
    "hypothesis": {"testing"},
}
# Packages that no room needs: they are the tests' oracles.
ORACLES = {"deepspeed", "peft", "gguf"}


@dataclass(frozen=True)
class Import:
    """One import statement: which module imports what, and whether inside a function."""

    module: str
    imported: str
    lazy: bool


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = ("reshard", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports() -> Iterator[Import]:
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, lazy in statements(tree, lazy=False):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                assert node.level == 0, f"{module} imports relatively"
                assert node.module
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [part if part in MODULES else node.module for part in parts]
            yield from (Import(module, name, lazy) for name in dict.fromkeys(names))


def statements(node: ast.AST, *, lazy: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements below a node, but for those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, lazy=lazy or inside)


IMPORTS = list(imports())


def room(module: str) -> str:
    """The room that a module of reshard stands in.

    >>> room("reshard.containers.dcp.metadata"), room("reshard.formats"), room("reshard")
    ('formats.dcp', 'formats', 'reshard')
    """
    parts = module.split(".")[1:]
    if not parts:
        return "reshard"
    name = ".".join(parts[:2])
    return name if name in LEVEL else parts[0]


def within() -> Iterator[tuple[Import, str, str]]:
    """Imports of reshard by reshard, with both rooms."""
    for found in IMPORTS:
        if found.imported.split(".")[0] == "reshard":
            yield found, room(found.module), room(found.imported)


def test_every_room_has_its_place() -> None:
    rooms = {room(module) for module in MODULES}
    assert rooms - LEVEL.keys() == set(), "say in ORDER where the new room stands"
    assert LEVEL.keys() - rooms == set(), "these rooms are gone"


def test_the_design_draws_the_same_list() -> None:
    page = (SOURCE.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    lines = page.split("## The rooms\n")[1].split("```")[1].strip().splitlines()
    drawn = [name for line in lines for name in re.split(r"\s{3,}", line)[0].split()]
    assert [name.removesuffix("/") for name in drawn] == [
        name for rooms in ORDER for name in rooms if "." not in name and name not in OUTSIDE
    ]


def test_each_room_says_what_its_modules_do() -> None:
    for room in sorted(path.parent for path in SOURCE.glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse((room / "__init__.py").read_text("utf-8"))) or ""
        words = set(re.findall(r"\w+", text))
        inside = {path.stem for path in room.glob("*.py")}
        inside |= {path.parent.name for path in room.glob("*/__init__.py")}
        assert inside - {"__init__"} <= words, room.name


def test_rooms_import_only_from_rooms_above() -> None:
    wrong = [
        f"{found.module} imports {found.imported}"
        for found, mine, theirs in within()
        if mine != theirs and LEVEL[theirs] >= LEVEL[mine]
    ]
    assert wrong == []


def test_no_format_imports_another() -> None:
    wrong = [
        f"{found.module} imports {found.imported}"
        for found, mine, theirs in within()
        if mine.startswith("formats.") and theirs.startswith("formats.") and mine != theirs
    ]
    assert wrong == []


def test_nobody_asks_for_a_format_by_its_name() -> None:
    names = {*OWN_NAMES, *(info.to for info in OWN)}
    asked = []
    for module, path in MODULES.items():
        # A pickle may name the module torch.
        if room(module).startswith("formats") or module.startswith("reshard.containers.torch"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            sides: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                for side in (node.left, *node.comparators):
                    sides += (
                        side.elts if isinstance(side, (ast.Tuple, ast.List, ast.Set)) else [side]
                    )
            elif isinstance(node, ast.MatchValue):
                sides = [node.value]
            constants = [side for side in sides if isinstance(side, ast.Constant)]
            asked += [
                f"{module}:{one.lineno}" for one in constants if one.value and one.value in names
            ]
    assert asked == [], "ask its FormatInfo"


def test_modules_do_not_import_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for found, _, _ in within():
        # A package that imports from its own modules is how it offers their names.
        if not found.lazy and found.imported != found.module:
            graph.setdefault(found.module, set()).add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    wrong = []
    for found in IMPORTS:
        package = found.imported.split(".")[0]
        if package in HEAVY and not found.lazy and room(found.module) not in HEAVY[package]:
            wrong.append(f"{found.module} imports {package}")
        if package in ORACLES:
            wrong.append(f"{found.module} imports {package}, a package of the tests")
    assert wrong == []


def test_the_conformance_suites_need_pytest_beside_what_reshard_needs() -> None:
    packages = {
        found.imported.split(".")[0]
        for found in IMPORTS
        if room(found.module) == "testing" and found.module != "reshard.testing.strategies"
    }
    assert packages - set(sys.stdlib_module_names) == {
        "reshard", "numpy", "ml_dtypes", "msgspec", "pytest",
    }  # fmt: skip


ALL_HEAVY = ("numpy", "ml_dtypes", "xxhash", "rich", "torch", "transformers", "pytest")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import reshard", ALL_HEAVY),
        ("import reshard.cli.app", ALL_HEAVY),
        ("from reshard.cli.app import reshard, run; run(reshard, ['--help'])", ALL_HEAVY),
        ("import reshard; reshard.open, reshard.convert, reshard.verify", ALL_HEAVY[3:]),
        ("import reshard.cli.commands, reshard.cli.lightrft.ds2hf", ALL_HEAVY[3:]),
        ("import reshard.cli.try_, reshard.cli.lightrft.test_model", ALL_HEAVY[3:]),
        ("import reshard.formats as f; [f.load(name) for name in f.every()]", ALL_HEAVY[3:]),
        ("import reshard.testing", ("torch", "transformers", "hypothesis")),
    ],
)
def test_what_an_import_brings_along(code: str, unwanted: tuple[str, ...]) -> None:
    check_imports(code, unwanted)


#: What a conversion of a model on this machine imports nothing of: packages, and what only other
#: inputs need. numpy before 2 imports hashlib itself.
SPARED = (
    *ALL_HEAVY[3:], "safetensors", "jinja2", "ray", "obstore",
    *(["hashlib"] if numpy.__version__ >= "2" else []), "configparser", "html", "tempfile",
    "reshard.storage.remote", "reshard.formats.deepspeed.reading",
    "reshard.formats.megatron.reading", "reshard.formats.rank_files.reading",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--version"], ALL_HEAVY),
        (["inspect", "model", "--json"], SPARED),
        (["convert", "model", "out", "--to", "dcp", "-q"], SPARED),
    ],
    ids=["version", "inspect", "convert"],
)
def test_what_a_command_brings_along(
    tmp_path: Path, arguments: list[str], unwanted: tuple[str, ...]
) -> None:
    (tmp_path / "model").mkdir()
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    weights = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    code = f"from reshard.cli.app import reshard, run; assert run(reshard, {arguments!r}) == 0"
    check_imports(code, unwanted, tmp_path)


def check_imports(code: str, unwanted: tuple[str, ...], folder: Path | None = None) -> None:
    """Run some code in a process of its own, which must import none of these."""
    code += f"\nimport sys\nprint([name for name in {unwanted!r} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
