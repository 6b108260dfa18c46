"""Reads the imports of the package out of its sources, and knows which layer each module is in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "olive"

# Low to high. A module imports from its own part, and from parts that are further down, not beside it.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"_lazy", "_progress", "_cpu", "_cuda", "formats"}),
    frozenset({"config", "kernels"}),
    frozenset({"frameworks", "ops", "presets"}),
    frozenset({"nn"}),
    frozenset({"walk", "ptq"}),
    frozenset({"sequential"}),
    frozenset({"quantization"}),
    frozenset({"qat", "lift"}),
    frozenset({"doctor", "eval", "reports"}),
    frozenset({"hf"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
ROOT_PART = ""  # olive/__init__.py: public names, above everything
HIGHEST = len(LAYERS)


@dataclass(frozen=True)
class Import:
    """One import statement's target.

    Args:
        file: relative to the repository.
        line: number in it.
        source: part of the package that imports, "" is `olive/__init__.py`.
        target: full dotted name.
        lazy: inside a function, or only for type checkers.
    """

    file: str
    line: int
    source: str
    target: str
    lazy: bool

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}:{self.line} imports {self.target}"


def level(part: str) -> int:
    """Number of the layer that a part of the package is in."""
    if part == ROOT_PART:
        return HIGHEST
    found = [number for number, parts in enumerate(LAYERS) if part in parts]
    if not found:
        raise ValueError(f"olive.{part}: expected a part that LAYERS names, got an unknown one; add it there")
    return found[0]


def part_of(module: str) -> str:
    """olive.formats.ovp4 is in "formats"; olive itself in ""."""
    return [*module.split("."), ROOT_PART][1]


def module_of(file: Path, package: Path = PACKAGE) -> str:
    """Dotted name of a source file."""
    parts = (package.name, *file.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _targets(node: ast.AST, module: str, is_package: bool, package: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = module.split(".")[: len(module.split(".")) - node.level + is_package]
            base = ".".join([*above, *([base] if base else [])])
        for alias in node.names:
            # `from olive import ops` imports a module, `from olive.ops import cpu_backend` a name in one.
            inner = package.parent.joinpath(*base.split("."), alias.name)
            built = list(inner.parent.glob(f"{alias.name}.*.so")) or alias.name in ("_cpu", "_cuda")
            is_module = inner.is_dir() or inner.with_suffix(".py").exists() or built
            yield f"{base}.{alias.name}" if is_module and base.split(".")[0] == package.name else base


def _walk(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(child)
        deeper = lazy or inside
        yield child, deeper
        yield from _walk(child, deeper)


def imports_of(file: Path, package: Path = PACKAGE) -> list[Import]:
    """Every import of a source file, those inside functions too."""
    module = module_of(file, package)
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    name = str(file.relative_to(package.parent))
    return [
        Import(name, getattr(node, "lineno", 0), part_of(module), target, lazy)
        for node, lazy in _walk(tree, lazy=False)
        for target in _targets(node, module, file.name == "__init__.py", package)
    ]


def upward(found: Import) -> bool:
    """Whether an import breaks the rule."""
    if found.target.split(".")[0] != PACKAGE.name:
        return False
    target = part_of(found.target)
    if target == found.source:
        return False
    if target == ROOT_PART:  # `import olive`, for its version: by the highest layers, when they run
        return not (found.lazy and level(found.source) >= level("reports"))
    return level(target) >= level(found.source)
