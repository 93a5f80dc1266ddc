"""What every command prints with `--json`, as JSON Schema (draft 2020-12): `zoo COMMAND --json-schema`.

Fields that are listed stay; others may come. What is not known is null, or absent where the schema does not require it. Sizes are bytes, times seconds,
counts numbers. A command that fails prints `{"error": "..."}` and ends with exit code 1.

The suite holds everything that a command prints in its tests to these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _map(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


def _object(_optional: dict[str, Schema] | None = None, /, **required: Schema) -> Schema:
    return {
        "type": "object",
        "properties": required | (_optional or {}),
        "required": list(required),
    }


def _one_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _constant(*values: Any) -> Schema:
    return {"enum": list(values)}


ERROR = _object(error=TEXT)
NUMBERS = _object(
    params_by_part=_map(COUNT),
    active_params_by_part=_map(COUNT),
    weight_bytes=_map(COUNT),
    context=COUNT,
    batch=COUNT,
    kv_dtype=TEXT,
    kv_cache_bytes=COUNT,
    state_bytes=COUNT,
    flops_per_token=COUNT,
)
_SETS = _list(_object({"quantisation": TEXT}, name=TEXT, files=COUNT, bytes=COUNT))
_RELEASE = _object(
    {
        "aliases": _list(TEXT), "released": {"type": "string", "pattern": r"^\d{4}-\d\d(-\d\d)?$"}, "licence": TEXT, "gated": FLAG,
        "dtype": TEXT, "quantization": TEXT, "context_length": COUNT, "params_total": COUNT, "params_active": COUNT,
        "params_convention": TEXT,
    },
    name=TEXT,
    family=TEXT,
    sources=_list(_object({"repo": TEXT, "revision": TEXT, "files": _list(TEXT), "package": TEXT}, kind=TEXT)),
    formats=_list(TEXT),
    vendor=_or_null(TEXT),
    proven=_constant("weights", "rules", None),
)  # fmt: skip
_FROM_SPEC = {
    "architecture": _map(TEXT),
    "params": _object(total=COUNT, active=COUNT),
    "kv_bytes_per_token": COUNT,
    "numbers": NUMBERS,
    "spec": _object(),
    "notes": _list(TEXT),
    "quantisation": TEXT,
    "sets": _SETS,
}
_SHOWN = _one_of(
    {**_RELEASE, "properties": _RELEASE["properties"] | _FROM_SPEC | {"links": _map(TEXT)}},
    _object(_FROM_SPEC, **{"name": TEXT, "from": TEXT}),
)
_INSPECTED = _object(
    {
        "format": TEXT, "model_type": _or_null(TEXT), "family": TEXT, "source": _map(ANY), "values": _or_null(TEXT),
        "layers_present": _or_null(_list(COUNT)), "quantisation": _or_null(TEXT), "quantised": _map(COUNT), "bytes_by_scheme": _map(COUNT), "extras": _map(COUNT),
        "carried": _list(TEXT), "verified": TEXT, "files": COUNT, "tensors": COUNT, "bytes": COUNT, "dtypes": _map(COUNT),
        "numbers": NUMBERS, "architecture": _map(TEXT), "sets": _SETS,
        "tensor_list": _list(_object(name=TEXT, dtype=TEXT, shape=_list(COUNT), file=TEXT, bytes=COUNT)),
    },
    path=TEXT,
    notes=_list(TEXT),
)  # fmt: skip
_PLANNED = _object(
    {
        "origin": _or_null(_map(ANY)), "fetch_bytes": COUNT, "cached_bytes": COUNT, "write_bytes": COUNT, "free_bytes": COUNT,
        "tensor_list": _list(_object(name=TEXT, dtype=TEXT, shape=_list(COUNT), sources=_list(TEXT), dequantised=_or_null(TEXT))),
    },
    family=TEXT,
    family_given=FLAG,
    naming=TEXT,
    format=TEXT,
    source=TEXT,
    rules=TEXT,
    digest=TEXT,
    dtype=_or_null(TEXT),
    bytes=COUNT,
    quant=_map(TEXT),
    layers=_or_null(_list(COUNT)),
    carried=_list(TEXT),
    notes=_list(TEXT),
    tensors=COUNT,
    extras=_map(TEXT),
)  # fmt: skip
_PART = _object(part={"type": "string", "pattern": r"^\d+/\d+$"}, appears_later=TEXT)
_EVENT = _one_of(
    _object(event=_constant("start"), total=COUNT),
    _object(event=_constant("phase"), name=TEXT),
    _object(event=_constant("progress"), done=COUNT, total=COUNT),
    _object(event=_constant("note", "error"), message=TEXT),
    _object({"path": TEXT, **_PART["properties"]}, event=_constant("done")),
)

COMMANDS: dict[str, Schema] = {
    "chat": _object(messages=_list(_object(role=TEXT, content=TEXT))),
    "check": _object(
        folder=TEXT, whole=FLAG, verdict=TEXT, against=_or_null(TEXT), files_hashed=COUNT, tensors=COUNT, family=_or_null(TEXT),
        problems=_list(TEXT), notes=_list(TEXT), remedy=_or_null(TEXT),
    ),
    "convert": _one_of(_INSPECTED, _PART),
    "export": _object(path=TEXT, files=_list(TEXT)),
    "gallery": _object(gallery=TEXT, releases=COUNT, drawn=COUNT),
    "generate": _object(prompt_tokens=_list(COUNT), tokens=_list(COUNT), text=_or_null(TEXT), seconds=NUMBER),
    "golden inputs": _object(output=TEXT, tokens=COUNT, batches=COUNT),
    "golden record": _object(output=TEXT, tokens=COUNT, by=TEXT),
    "inspect": _INSPECTED,
    "list": _list(_RELEASE),
    "lora": _object(
        path=TEXT, rank=COUNT, kept=_map(NUMBER), worst=_or_null(_object(module=TEXT, kept=NUMBER)), whole=_list(TEXT)
    ),
    "merge": _INSPECTED,
    "plan": _PLANNED,
    # A line each, as they happen; with --dry-run what `zoo plan` prints.
    "pull": _one_of(_EVENT, _PLANNED),
    "push": _object(
        repo=TEXT, files=_map(COUNT), bytes=COUNT, certificate=TEXT, url=_or_null(TEXT), notes=_list(TEXT)
    ),
    "report": _object(report=TEXT, verdict=TEXT),
    "show": _one_of(_SHOWN, _list(_SHOWN), _object(svg=TEXT, drawn=_list(TEXT))),
    "sign": _object(signature=TEXT),
    # The certificate has a schema of its own, for the file that stays; this is --check-certificate's.
    "verify": _object(holds=FLAG, problems=_list(TEXT), not_checked=_list(TEXT)),
}  # fmt: skip


def schema(command: str) -> Schema:
    """The schema of what `zoo COMMAND --json` prints. `command`: "show", "golden record", ..."""
    body = COMMANDS[command]
    if command == "verify":
        parity = Path(__file__).parents[1] / "verify" / "parity.schema.json"
        body = _one_of(json.loads(parity.read_text(encoding="utf-8")), body)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"zoo {command} --json",
        "anyOf": [body, ERROR],
    }
