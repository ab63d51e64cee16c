"""Print the oldest versions that pyproject.toml allows, as a file of constraints for pip.

python .github/oldest.py > oldest.txt
pip install -e '.[dev]' -c oldest.txt
"""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def constraints() -> list[str]:
    """`name==version` for each requirement, whose lower bound it is; those without one are errors."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    lines = set()
    for requirement in {each for group in groups for each in group if not each.startswith(PROJECT["name"])}:
        bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)(?:,<[\w.]+)?", requirement)
        if not bound:
            raise SystemExit(f"{requirement}: expected NAME>=VERSION")
        lines.add(f"{bound[1]}=={bound[2]}")
    return sorted(lines)


if __name__ == "__main__":
    print("\n".join(constraints()))
