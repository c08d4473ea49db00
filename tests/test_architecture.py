"""The layout of the product's code: which module may import which, and how long its functions may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from helpers import ROOT

SCRIPTS = {"train_batch_neg", "recall", "evaluate", "predict", "inference", "export_model", "export_to_serving"}
FLOORS = (  # a module may import its own package and all floors below, but nothing else of its own floor
    {"common"},
    {"data", "ann_util"},
    {"base_model"},
    {"modeling"},
    {"encoding"},
    {"retrieval"},
    {"mining", "reporting"},
    {"batch_negative", "serving"},
    {"data_check"},
    {*SCRIPTS, "deploy", "tools"},
)
FLOOR_OF = {package: number for number, packages in enumerate(FLOORS) for package in packages}
LONGEST_FUNCTION, LONGEST_MAIN, LONGEST_DATA = 80, 59, 449  # lines


class Import(NamedTuple):
    """An import of one module of the product by another."""

    source: str
    line: int
    target: str
    name: str | None  # the name that is taken from the target

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def read_sources() -> dict[str, str]:
    """Module -> source of the product's code; deploy's modules have names that nobody imports, except the clients."""
    files = {path.stem: path for path in ROOT.glob("*.py")}
    for package in sorted({path.parent.name for path in ROOT.glob("*/__init__.py")} & FLOOR_OF.keys()):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            files[module.removesuffix(".__init__")] = path
    for path in (ROOT / "deploy").rglob("*.py"):
        files[f"deploy.{path.parent.name}.{path.stem}"] = path
    files |= {f"tools.{path.stem}": path for path in (ROOT / "tools").glob("*.py")}
    return {module: path.read_text(encoding="utf-8") for module, path in files.items()}


class ImportFinder(ast.NodeVisitor):
    """Collects a module's imports of the modules in `sources`, also those in functions."""

    def __init__(self, module: str, sources: Mapping[str, str]) -> None:
        self.module, self.sources = module, sources
        self.found: list[Import] = []

    def add(self, line: int, target: str, name: str | None = None) -> None:
        self.found.append(Import(self.module, line, target, name))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name in self.sources:
                self.add(node.lineno, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert not node.level, f"{self.module}:{node.lineno} imports relatively"
        for alias in node.names:
            if f"{node.module}.{alias.name}" in self.sources:
                self.add(node.lineno, f"{node.module}.{alias.name}")
            elif node.module in self.sources:
                self.add(node.lineno, node.module, alias.name)


def imports_of(sources: Mapping[str, str]) -> list[Import]:
    """All imports of the modules among themselves."""
    found = []
    for module, source in sources.items():
        finder = ImportFinder(module, sources)
        finder.visit(ast.parse(source))
        found += finder.found
    return found


def package_of(module: str) -> str:
    return module.partition(".")[0]


def upward(imports: list[Import]) -> list[str]:
    """The imports that don't run downwards or stay in a package."""
    return [
        str(each)
        for each in imports
        if package_of(each.source) != package_of(each.target)
        and FLOOR_OF[package_of(each.source)] <= FLOOR_OF[package_of(each.target)]
    ]


def cycle(imports: list[Import]) -> list[str]:
    """Modules that import each other in a circle, if there are any, also for types alone."""
    targets: dict[str, set[str]] = {}
    for each in imports:
        targets.setdefault(each.source, set()).add(each.target)
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for target in sorted(targets.get(module, ())):
            if found := search(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(targets) if (found := search(module, []))), [])


def top_level_names(source: str) -> set[str]:
    """What a module defines or imports at its top level, also in `if` and `try`."""
    names: set[str] = set()
    nodes: list[ast.AST] = list(ast.parse(source).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            nodes.extend(ast.iter_child_nodes(node))
    return names


def unknown_names(sources: Mapping[str, str], imports: list[Import]) -> list[str]:
    """The imports of names that their module doesn't have: in a function, only its call would show that."""
    known = {module: top_level_names(source) for module, source in sources.items()}
    return [f"{each}: no {each.name}" for each in imports if each.name and each.name not in known[each.target]]


def long_functions(sources: Mapping[str, str]) -> list[str]:
    """The functions with more lines than allowed."""
    found = []
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > (LONGEST_MAIN if node.name == "main" else LONGEST_FUNCTION):
                    found.append(f"{module}.{node.name}: {lines} lines")
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Module -> source of the product's code."""
    return read_sources()


@pytest.fixture(scope="module")
def imports(sources: dict[str, str]) -> list[Import]:
    """The imports among the product's modules."""
    return imports_of(sources)


def test_every_module_has_a_floor(sources: dict[str, str]) -> None:
    assert {package_of(module) for module in sources} == FLOOR_OF.keys()
    assert len(sources) > 50


def test_the_root_has_ten_modules() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {*SCRIPTS, "data", "base_model", "ann_util"}


def test_no_module_imports_a_script(imports: list[Import]) -> None:
    assert [str(each) for each in imports if each.target in SCRIPTS] == []


def test_no_import_runs_upwards(imports: list[Import]) -> None:
    assert upward(imports) == []
    assert len(imports) > 100


def test_no_modules_import_each_other_in_a_circle(imports: list[Import]) -> None:
    assert cycle(imports) == []


def test_every_imported_name_exists(sources: dict[str, str]) -> None:
    """Also in the programs and tests around the product."""
    everything = {**sources, "helpers": (ROOT / "tests" / "helpers.py").read_text(encoding="utf-8")}
    for folder in ("benchmarks", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            everything[module] = path.read_text(encoding="utf-8")
    assert unknown_names(everything, imports_of(everything)) == []


def test_no_function_is_long(sources: dict[str, str]) -> None:
    assert long_functions(sources) == []


def test_data_is_not_long(sources: dict[str, str]) -> None:
    assert len(sources["data"].splitlines()) <= LONGEST_DATA


def test_the_checks_find_what_they_look_for() -> None:
    long_main = "def main():\n" + "    pass\n" * LONGEST_MAIN
    long_function = "    def train(self):\n" + "        pass\n" * LONGEST_FUNCTION
    sources = {
        "common.files": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from data import Corpus\n",
        "data": "import os\nfrom common.files import read_json\nfrom ann_util import search\nclass Corpus: ...\n",
        "ann_util": "def search():\n    import recall\n",
        "encoding.encoder": "def load():\n    import encoding.static_graph\n",
        "encoding.static_graph": "def load():\n    from encoding import encoder\n",
        "recall": long_main + f"class Recall:\n{long_function}",
        "serving.adapter": "import batch_negative.model\n",
        "batch_negative.model": "",
    }
    imports = imports_of(sources)
    assert upward(imports) == [
        "common.files:3 imports data",
        "data:3 imports ann_util",
        "ann_util:2 imports recall",
        "serving.adapter:1 imports batch_negative.model",
    ]
    assert [str(each) for each in imports if each.target in SCRIPTS] == ["ann_util:2 imports recall"]
    assert cycle(imports) == ["common.files", "data"]
    lazy = [each for each in imports if package_of(each.source) == "encoding"]
    assert cycle(lazy) == ["encoding.encoder", "encoding.static_graph"]
    assert unknown_names(sources, imports) == ["data:2 imports common.files: no read_json"]
    assert long_functions(sources) == ["recall.main: 60 lines", "recall.train: 81 lines"]


@pytest.mark.process
@pytest.mark.parametrize("package", ["Paddle", "PaddleNLP"])
def test_modules_that_promise_it_import_no_paddle(sources: dict[str, str], package: str) -> None:
    promise = rf"[Ii]mports no {package}\b"
    modules = [name for name, source in sources.items() if re.search(promise, ast.get_docstring(ast.parse(source)))]
    expected = {
        "Paddle": {"data", "ann_util", "evaluate", "batch_negative.batches", "modeling.weight_files"},
        "PaddleNLP": {"encoding.static_graph"},
    }
    assert expected[package] <= set(modules)
    prefix = package.lower()
    program = f"import sys, {', '.join(modules)}; print([name for name in sys.modules if name.startswith('{prefix}')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
