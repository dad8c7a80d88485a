"""How a tree of the package reads, as numbers: names, docstrings, rooms, sizes.

Participles and verbs are counted by word lists, so single figures are off by a few per cent, in every column alike.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

FORBIDDEN = set(
    re.findall(
        r"\w+",
        """
    told found how some each made held said begun kept who
""",
    )
)
IRREGULAR = set(
    re.findall(
        r"\w+",
        """
    begun bought brought built caught chosen cut done drawn driven fallen fed found gone given grown heard held
    hidden kept known laid led left lent lost made meant met paid put read said seen sent set shown shut sought
    split spoken spread stood taken taught thrown told torn understood widened won worn woven written
""",
    )
)
# Nouns, adjectives and verbs that look like participles, or are both.
NOT_PARTICIPLES = set(
    re.findall(
        r"\w+",
        """
    seed speed feed need embed bed red shed read set put cut split spread based
""",
    )
)
OPENERS = set(
    re.findall(
        r"\w+",
        """
    what whether of the a an how where which who its their this these those one all each some every no not in for
    with as from on at between by is are if when same so only that those any two both few many more most without
""",
    )
)
ROOMS = ("config", "data", "models", "evaluation", "training", "inference", "report")


def parse(package: Path) -> dict[str, ast.Module]:
    """Return module name -> syntax tree."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def iter_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def is_participle(name: str) -> bool:
    """Return whether a function's name begins with a participle, as `opened` and `told_image` do."""
    words = [word for word in name.strip("_").split("_") if word]
    return bool(words) and words[0] not in NOT_PARTICIPLES and (words[0] in IRREGULAR or words[0].endswith("ed"))


def opens_with_noun(docstring: str) -> bool:
    """Return whether a docstring begins with an article, a pronoun or a preposition instead of a verb."""
    word = re.match(r"[`\w'-]+", docstring.strip())
    return word is None or word[0].lower() in OPENERS or word[0].startswith("`")


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function is a property, whose docstring may begin with a noun."""
    return any("property" in ast.unparse(d) for d in function.decorator_list)


def identifiers(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module binds: functions, classes, parameters, variables, fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def imports(module: str, tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Yield the modules of the package that a module imports, wherever the statement stands."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        for name in names:
            hit = next((m for m in (name, name.rsplit(".", 1)[0]) if m in modules), None)
            if hit and hit != module:
                yield hit


def doors_and_arrows(room: str, trees: dict[str, ast.Module]) -> tuple[int, int]:
    """Return how many files and sub-rooms a room shows, and how many imports run between them."""
    prefix, modules = f"vlkit.{room}.", set(trees)
    inside = {m for m in modules if m.startswith(prefix) and not m.endswith("__init__")}

    def door(module: str) -> str:
        return module.removeprefix(prefix).split(".")[0]

    arrows = {(door(a), door(b)) for a in inside for b in imports(a, trees[a], modules) if b in inside}
    return len({door(m) for m in inside}), sum(a != b for a, b in arrows)


def measure(checkout: Path) -> dict[str, str]:
    """Return the figures of one checkout, row -> text."""
    trees = parse(checkout / "vlkit")
    functions = [f for tree in trees.values() for f in iter_functions(tree)]
    named = [f for f in functions if not f.name.startswith("__") and not is_property(f)]
    documented = [f for f in named if ast.get_docstring(f)]
    participles = sum(is_participle(f.name) for f in named)
    nouns = sum(opens_with_noun(ast.get_docstring(f) or "") for f in documented)
    sizes = [len(path.read_text(encoding="utf-8").splitlines()) for path in (checkout / "vlkit").rglob("*.py")]
    sizes = [size for size in sizes if size > 5]
    bound = Counter(name for tree in trees.values() for name in identifiers(tree))
    anys = sum(len(re.findall(r"dict\[str, Any\]", ast.unparse(tree))) for tree in trees.values())
    rows = {
        "modules of more than 5 lines": f"{len(sizes)}",
        "lines": f"{sum(sizes):,}",
        "median / largest file": f"{median(sizes):.0f} / {max(sizes)}",
        "longest function": f"{max((f.end_lineno or 0) - f.lineno + 1 for f in functions)}",
        "functions named by a participle": f"{participles} of {len(named)}, {participles / len(named):.1%}",
        "docstrings that open without a verb": f"{nouns} of {len(documented)}, {nouns / len(documented):.1%}",
        f"bindings of {len(FORBIDDEN)} stray words (told, found, ...)": f"{sum(bound[word] for word in FORBIDDEN)}",
        "dict[str, Any]": f"{anys}",
        "lines of README": f"{len((checkout / 'README.md').read_text(encoding='utf-8').splitlines()):,}",
    }
    for room in ROOMS:
        doors, arrows = doors_and_arrows(room, trees)
        rows[f"{room}: doors, arrows"] = f"{doors}, {arrows}" if doors else "-"
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkouts", nargs="*", type=Path, default=[Path(__file__).parents[2]], help="a column for each"
    )
    columns = [measure(checkout) for checkout in parser.parse_args().checkouts]
    width = max(map(len, columns[0]))
    for row in columns[0]:
        print(row.ljust(width), *(column[row].rjust(22) for column in columns))


if __name__ == "__main__":
    main()
