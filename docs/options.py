"""Write docs/options.md from the option dataclasses:  python docs/options.py"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stablevm.evaluation.config import EvaluateCheckpointConfig, EvaluateConfig, ExtractorConfig, ReferenceConfig
from stablevm.integrations.config import ImportConfig
from stablevm.preparation import config as preparation
from stablevm.profiling.config import BenchmarkConfig
from stablevm.quickstart.config import QuickstartConfig
from stablevm.sampling.config import GenerateConfig
from stablevm.study.config import VarianceConfig
from stablevm.support.options import Group, as_typed, groups_of, in_options
from stablevm.toy.config import ToyConfig
from stablevm.training.config import TrainConfig

PAGE = Path(__file__).with_name("options.md")
COMMANDS: dict[str, type] = {
    "stablevm quickstart": QuickstartConfig,
    "train.py": TrainConfig,
    "generate.py": GenerateConfig,
    "evaluate.py": EvaluateConfig,
    "evaluate.py --ckpt": EvaluateCheckpointConfig,
    "stablevm reference": ReferenceConfig,
    "gmm_exp.py": ToyConfig,
    "stablevm import": ImportConfig,
    "stablevm variance": VarianceConfig,
    "stablevm benchmark": BenchmarkConfig,
    "stablevm extractor": ExtractorConfig,
    "stablevm prepare convert": preparation.ConvertShardsConfig,
    "stablevm prepare encode": preparation.EncodeShardsConfig,
    "stablevm prepare pack": preparation.PackConfig,
    "preprocessing/dataset_tools.py convert": preparation.ConvertConfig,
    "preprocessing/dataset_tools.py encode": preparation.EncodeConfig,
    "stablevm data verify": preparation.VerifyConfig,
    "stablevm data info": preparation.InfoConfig,
}
HEAD = """# The options of each command

Made by `python docs/options.py` from the places where the options are declared; `--help` says the same. `train.py`,
`generate.py`, `evaluate.py` and `gmm_exp.py` are also `stablevm train`, `generate`, `evaluate` and `toy`. Dashes and
underscores are interchangeable, and `--no-` turns a switch off.
"""


def docstrings(config: type) -> dict[str, str]:
    """The text under each field of a dataclass and of those that it inherits from, as one line."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = in_options(" ".join(str(text.value.value).split()))
    return found


def default(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return ""
    return f"`{as_typed(field.name, field.default)}`" if isinstance(field.default, bool) else f"`{field.default}`"


KINDS: dict[Any, str] = {bool: "switch", int: "whole number", float: "number", str: "text", Path: "path"}


def values(hint: Any) -> str:
    """What an option takes: the words of a Literal, or a kind; either, where it takes both."""
    if hint in KINDS:
        return KINDS[hint]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(hint))
    parts = [part for part in get_args(hint) if part not in (type(None), ...)]
    return " or ".join(dict.fromkeys(values(part) for part in parts if part in KINDS or get_origin(part)))


def rows(group: Group) -> Iterator[str]:
    """A line for each option."""
    text, hints = docstrings(group.kind), get_type_hints(group.kind)
    for field in group.fields:
        positional = "Positional" in str(field.type)
        name = field.name.upper() if positional else f"--{field.name.replace('_', '-')}"
        cells = (f"`{name}`", values(hints[field.name]), default(field), text[field.name].replace("|", "\\|"))
        yield f"| {' | '.join(cells)} |"


def section(command: str, config: type) -> str:
    purpose = " ".join(inspect.cleandoc(config.__doc__ or "").split())
    groups = groups_of(config)
    lines = [f"## {command}", "", purpose, ""]
    for group in groups:
        if len(groups) > 1:
            lines += [f"**{group.title}**" + (f": {group.purpose}" if group.purpose else ""), ""]
        lines += ["| option | takes | default | |", "| --- | --- | --- | --- |", *rows(group), ""]
    return "\n".join(lines).strip()


def page() -> str:
    return "\n\n".join([HEAD.strip(), *(section(command, config) for command, config in COMMANDS.items())]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {len(COMMANDS)} commands", file=sys.stderr)
