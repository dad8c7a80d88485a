"""The package's structure, read from its syntax trees: imports, sizes and names. What tests/ holds is exempt."""

import ast
from collections.abc import Callable, Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "vlkit"
# A room imports from itself, from the rooms before it, and from the foundation.
ROOMS = ("data", "models", "evaluation", "training", "inference", "report")
FOUNDATION = {"config", "checkpoints", "console", "distributed", "errors", "fault_injection", "metrics"} | {
    *("remote", "run_status", "runs", "signals", "storage"),
}
# These use every room; nothing but `__main__` uses them.
TOP = {"__init__", "__main__", "cli", "quickstart"}

MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_MODULES = 80, 500, 13
# Participles, pronouns and prepositions say nothing of the value; see CONTRIBUTING.
FORBIDDEN = {"told", "found", "how", "some", "each", "made", "held", "said", "begun", "kept", "who"} | {
    *("of", "place", "places"),
}
# Names that users type, and of weights that were saved under them.
CONTRACTS = {
    ("vlkit.config.search", "of"): "--of",
    ("vlkit.inference.search.search", "of"): "vlkit.search(index, query, of=...)",
    ("vlkit.inference.serve.web_app", "of"): "GET /api/search?of=...",
    ("vlkit.models.captioner.fusion", "places"): "fusion.safetensors",
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    """Return a module's dotted name; of a room's `__init__` the room's."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: parse(path) for name, path in FILES.items()}


def room_of(module: str) -> str:
    """Return the part below vlkit that a module belongs to: vlkit.data.labels -> data; vlkit itself -> __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(module: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every import from vlkit, in functions and under TYPE_CHECKING too; name is "" or what."""
    is_package = FILES[module].name == "__init__.py"
    yield from ((source, "") for source in imports_by_call(TREES[module]) if source.split(".")[0] == "vlkit")
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vlkit")
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                source = ".".join([*parents, *([source] if source else [])])
            if source.split(".")[0] != "vlkit":
                continue
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield (submodule, "") if submodule in FILES else (source, alias.name)


def imports_by_call(tree: ast.AST) -> Iterator[str]:
    """Yield what is imported by import_module("..."), whatever it is called as; "" where that is no literal."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function not in ("import_module", "__import__"):
            continue
        words = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg in ("name", "package"))]
        name, package = (*(word.value if isinstance(word, ast.Constant) else None for word in words), None, None)[:2]
        is_known = isinstance(name, str) and (not name.startswith(".") or isinstance(package, str))
        yield resolve_name(name, package if name.startswith(".") else None) if is_known else ""


def for_every_module(check: Callable[[str], None]) -> Callable[[], None]:
    """Make one test of a check: a case for each module would take longer to report than to run."""

    def test() -> None:
        assert len(FILES) > 100
        for module in FILES:
            check(module)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


def test_the_rules_see_the_package():
    assert len(FILES) > 100 and {room_of(name) for name in FILES} == {*ROOMS, *FOUNDATION, *TOP}
    assert ("vlkit.console", "") in imports("vlkit.cli"), "from vlkit import console"
    assert ("vlkit.training.train_retrieval", "train_retrieval") in imports("vlkit.cli"), "inside a function"
    typed = [name for name in FILES if "TYPE_CHECKING:" in FILES[name].read_text(encoding="utf-8")]
    assert typed, "no module imports for the type checker alone"


def test_an_import_by_name_is_seen():
    source = """
import_module("vlkit.report.svg")
def chart(name):
    importlib.import_module(".report", package="vlkit.report")
    return __import__("vlkit.cli"), importlib.import_module(name), import_module(".svg", name), getattr(name, "cli")
"""
    assert set(imports_by_call(ast.parse(source))) == {"vlkit.report.svg", "vlkit.report.report", "vlkit.cli", ""}


def test_only_the_table_of_public_names_imports_by_another_name_than_a_literal():
    assert [module for module, tree in TREES.items() if "" in imports_by_call(tree)] == ["vlkit"]


@for_every_module
def test_a_module_imports_only_from_below(module):
    own = room_of(module)
    for source, name in imports(module):
        room = room_of(source)
        assert source in FILES, f"{module} imports {source}, which does not exist"
        if own in TOP:
            continue
        if room == "__init__":
            assert name == "__version__", f"{module} imports {name or source} from vlkit"
        elif own in FOUNDATION:
            assert room in FOUNDATION, f"{module} is of the foundation and imports {source}"
        else:
            below = ROOMS[: ROOMS.index(own) + 1]
            assert room in FOUNDATION or room in below, f"{module} imports upwards from {source}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {source for source, _ in imports(module) if source != module} for module in FILES}
    graph["vlkit"] = set()  # Its public names are looked up when they are asked for.
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for source in sorted(graph.get(module, ())):
                visit(source, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@for_every_module
def test_files_and_functions_stay_small(module):
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{module} has {lines} lines"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {length} lines"


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in FILES.values()}), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_folder_has_few_modules_and_says_what_it_is_for(folder):
    modules = [path.name for path in folder.glob("*.py") if not path.name.startswith("__")]
    assert len(modules) <= MAX_MODULES, modules
    docstring = ast.get_docstring(TREES[name_of(folder / "__init__.py")])
    assert docstring and len(docstring.split()) > 2, f"{folder}/__init__.py says nothing"


@for_every_module
def test_only_the_loop_computes_gradients_of_parameters(module):
    calls = [
        node.lineno
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
    ]
    assert not calls or module == "vlkit.training.loop", f"{module} calls .backward() in lines {calls}"


def declared_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the name and line of each function, class, parameter, variable, field, import and caught error."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.alias):
            yield node.asname or node.name, getattr(node, "lineno", 0)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name, node.lineno


@for_every_module
def test_names_are_nouns_and_verbs(module):
    names = [
        f"{name} (line {line})"
        for name, line in declared_names(TREES[module])
        if name.strip("_") in FORBIDDEN and (module, name) not in CONTRACTS
    ]
    assert not names, f"{module} declares {', '.join(names)}"


def test_every_exempt_name_is_still_declared():
    assert {key for key in CONTRACTS if key[1] in dict(declared_names(TREES[key[0]]))} == CONTRACTS.keys()


def test_the_rule_about_names_sees_all_of_them():
    lines = (
        "def kept(said, *some, how=1, **made):",
        "    for each in some: self.told = (found := each)",
        "class A:",
        "    who: int",
        "    of, (place, *places) = each",
    )
    source = "\n".join(lines)
    assert {name for name, _ in declared_names(ast.parse(source))} >= FORBIDDEN - {"held", "begun"}
