"""The directive `options`: the fields of a dataclass as a table, so that the site and the code say the same.

```{options} unsc_hf.config.UNSCConfig
```

shows the fields that the class itself declares: name, default and help. With `:inherited:` also those of its bases
inside this package.
"""

from __future__ import annotations

import dataclasses
import inspect
from importlib import import_module
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive, directives


def fields_of(name: str, inherited: bool) -> list[tuple[str, str, str]]:
    """Name, default and help of each field of the dataclass with this full name."""
    module, _, attribute = name.rpartition(".")
    cls = getattr(import_module(module), attribute)
    bases = [base for base in reversed(cls.__mro__) if base.__module__.startswith("unsc_hf")]
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    rows = {}
    for declared in (name for base in (bases if inherited else [cls]) for name in inspect.get_annotations(base)):
        if declared in fields:
            default = fields[declared].default
            shown = "" if default in (None, dataclasses.MISSING) else str(default)
            rows[declared] = (declared, shown, str(fields[declared].metadata.get("help", "")))
    return list(rows.values())


class Options(Directive):
    """A table of `fields_of` the class that the argument names."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"inherited": directives.flag}

    def run(self) -> list[nodes.Node]:
        definitions = nodes.definition_list(classes=["options"])
        for name, default, text in fields_of(self.arguments[0], "inherited" in self.options):
            term = nodes.term("", "", nodes.literal("", f"--{name}"))
            if default:
                term += [nodes.Text(" "), nodes.inline(default, default, classes=["default"])]
            definition = nodes.definition("", nodes.paragraph("", text))
            definitions += nodes.definition_list_item("", term, definition)
        return [definitions]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("options", Options)
    return {"parallel_read_safe": True}
