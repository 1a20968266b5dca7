"""The JSON schema (draft 2020-12) of the report, made from its types.

`data/report.schema.json` is what this module makes; a test holds the two together:

    python -m reshard.evaluate.schema > src/reshard/evaluate/data/report.schema.json
    python -m reshard.evaluate.schema tables        # the tables of docs/try.md
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from reshard.core.findings import Finding, Severity
from reshard.evaluate.report import Json, TryReport

Schema = dict[str, Any]
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}

# `Finding.to_json()`, which is every command's: what a code means is not stored in a finding.
_FINDING: dict[str, tuple[Any, str]] = {
    "code": (str, "What was found, as a fixed word; docs/findings.md lists them all."),
    "severity": (Severity, "An error makes the run fail; a warning and an info do not."),
    "subject": (str, "The tensor or file concerned; empty where it is the whole."),
    "message": (str, "The finding in a sentence."),
    "fix": (str, "What to do about it; empty where there is nothing to do."),
    "evidence": (Mapping[str, Json], "The names and numbers it rests on."),
}


def report_schema() -> Schema:
    """The schema of `TryReport.to_json()`; every other type of the report is one of its `$defs`."""
    definitions: dict[str, Schema] = {}
    root = _object(TryReport, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Report of reshard try",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def _object(struct: type, definitions: dict[str, Schema]) -> Schema:
    properties = {
        name: {"description": description, **_schema(kind, definitions)}
        for name, (kind, description) in _fields(struct).items()
    }
    return {
        "description": (struct.__doc__ or "").split("\n\n")[0],
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _fields(struct: type) -> dict[str, tuple[Any, str]]:
    """The type and the description of each field."""
    if struct is Finding:
        return _FINDING
    hints = get_type_hints(struct, include_extras=True)
    return {field.name: get_args(hints[field.name]) for field in dataclasses.fields(struct)}


def _schema(kind: Any, definitions: dict[str, Schema]) -> Schema:
    if kind == Json:
        return {}
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if kind is Finding or (dataclasses.is_dataclass(kind) and isinstance(kind, type)):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}
            definitions[kind.__name__] = _object(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _schema(arguments[0], definitions)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if origin in (tuple, list):
        return _array(arguments, definitions)
    raise TypeError(f"the report's schema has no form for {kind}")


def _array(arguments: tuple[Any, ...], definitions: dict[str, Schema]) -> Schema:
    items = [_schema(argument, definitions) for argument in arguments if argument is not Ellipsis]
    schema: Schema = {"type": "array", "items": items[0]}
    if Ellipsis not in arguments and len(items) > 1:
        schema |= {"minItems": len(items), "maxItems": len(items)}
    return schema


def tables() -> str:
    """The schema as Markdown: a table of fields for each type."""
    schema = report_schema()
    sections: list[str] = []
    for name, record in {"Report": schema, **schema["$defs"]}.items():
        rows = [f"| `{n}` | {f['description']} |" for n, f in record["properties"].items()]
        head = [f"### {name}", "", record["description"].strip(), "", "| field | |", "|---|---|"]
        sections.append("\n".join([*head, *rows]))
    return "\n\n".join(sections)


if __name__ == "__main__":
    print(tables() if sys.argv[1:] == ["tables"] else json.dumps(report_schema(), indent=2))
