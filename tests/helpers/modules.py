"""The modules of the package, and what each imports."""

import ast
from pathlib import Path

import stablevm

PACKAGE = Path(stablevm.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def dotted(module):
    return ".".join(module.with_suffix("").parts).removesuffix(".__init__")


def imports(module):
    """Full names that a module imports, inside functions too."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("stablevm.").replace(".", "/")
                is_module = (PACKAGE / f"{inner}.py").exists() or (PACKAGE / inner).is_dir()
                yield f"{node.module}.{alias.name}" if node.module.startswith("stablevm") and is_module else node.module
