"""Docstrings on the site: prose, in which `name: what it is` stands out where the name is a parameter's."""

import re

import griffe


class NamedParameters(griffe.Extension):
    """An item of a list for each parameter that a docstring describes."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        names = "|".join(re.escape(parameter.name) for parameter in getattr(obj, "parameters", ()))
        if obj.docstring and names:
            described = rf"(?:^|(?<=[.;)] ))((?:{names})(?:, (?:{names}))*): "
            obj.docstring.value = re.sub(described, r"\n\n- `\1`: ", obj.docstring.value, flags=re.MULTILINE)
