"""The OpenAPI document: FastAPI's, with the errors as they really are."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from qmpcommit.commit.phases import Phase
from qmpcommit.group.resume import STAGES
from qmpcommit.wire.commit import Problem

PROBLEM_TYPE = "application/problem+json"

TITLES = {
    400: "Malformed", 401: "Unauthorized", 403: "Forbidden", 404: "Not found",
    405: "Not possible", 408: "Too slow", 409: "Not now", 413: "Too large", 422: "Invalid",
    500: "Failed", 502: "QEMU refused", 503: "Not available",
    504: "QEMU does not answer", 507: "No space",
}  # fmt: skip
_DETAILS = {
    400: ("http:400", "There was an error parsing the body"),
    401: ("http:401", "give the daemon's token: Authorization: Bearer TOKEN"),
    403: ("http:403", "user 1001 may not use this daemon"),
    404: ("VMNotFound", "no VM is called 'web9'; GET /v1/vms lists those that are known"),
    408: ("http:408", "the request was not sent within 30 s"),
    409: ("NotReady", "job qmpcommit-vda-1f2e3d4c on vda of web1 is not READY"),
    413: ("http:413", "a request has at most 65536 bytes"),
    422: ("InvalidRequest", "body.disk: Field required"),
    500: ("http:500", "an error of the daemon's own; its log tells more"),
    502: ("CommandRefused", "QEMU refused block-commit: Need a root block node"),
    503: ("JournalFull", "the disk under the journal is full: no new commit can be promised"),
    504: ("DeadlineExceeded", "QEMU of web1 did not answer query-block within 30 s"),
    507: ("NoSpace", "the base needs 3 GiB more, and its file system has 1 GiB left"),
}
_MADE = {
    "Location": {"schema": {"type": "string"}, "description": "Where it is"},
    "Idempotent-Replay": {
        "schema": {"type": "string", "const": "true"},
        "description": "The Idempotency-Key was given before, and this was made then",
    },
}
_PAGED = {
    "Link": {
        "schema": {"type": "string"},
        "description": 'The next page, where there is one: </v1/...>; rel="next"',
    },
}
_VALUES: dict[tuple[str, str], tuple[str, ...]] = {
    ("CommitView", "phase"): ("", *(each.value for each in Phase if each is not Phase.QUEUED)),
    ("GroupView", "phase"): ("", "recovering", *STAGES),
}
"""All that a member can be, where its type does not say so."""

_BOUNDS = {
    "ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum",
}  # fmt: skip
_REFUSED = {
    401: {"WWW-Authenticate": "The scheme: Bearer"},
    503: {"Retry-After": "Seconds after which it may be asked again"},
}
_EVERYWHERE = (401, 403, 500, 503)
_WITH_BODY = (400, 408, 413)


def problems(*statuses: int, body: bool = False) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its ``responses``: these, and those of all routes."""
    found = sorted({*statuses, *_EVERYWHERE, *(_WITH_BODY if body else ())})
    return {status: {"model": Problem, "description": TITLES[status]} for status in found}


def document(app: FastAPI) -> dict[str, Any]:
    """The document of an app."""
    if app.openapi_schema is None:
        app.openapi_schema = _document(app)
    return app.openapi_schema


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        license_info=app.license_info,
        servers=app.servers,
        separate_input_output_schemas=app.separate_input_output_schemas,
    )
    schemas = found["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for schema in [*schemas.values(), *_inline(found["paths"])]:
        _for_generators(schema, schemas)
    for (name, member), values in _VALUES.items():
        schemas[name]["properties"][member]["enum"] = [*values]
    for path in found["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                _parameter(parameter)
            if any(each["name"] == "idempotency-key" for each in operation.get("parameters", ())):
                made = next(each for code, each in operation["responses"].items() if code < "3")
                made["headers"] = copy.deepcopy(_MADE)
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "fields":
                    names = _parts(operation["responses"]["200"], schemas)
                    one = "|".join(names)
                    parameter["schema"]["pattern"] = f"^({one})(,({one}))*$"
                    parameter["schema"]["examples"] = [",".join(names[:3])]
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    _problem(int(status), response)
    found["components"]["securitySchemes"] = {
        "token": {
            "type": "http",
            "scheme": "bearer",
            "description": "Over TCP. Over the Unix socket the peer's user and groups count.",
        }
    }
    found["security"] = [{}, {"token": []}]
    return found


def _parts(response: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """A list's items: all of each, or the members of it that were asked for; these are told."""
    schema = response["content"]["application/json"]["schema"]
    whole = schema["items"]
    name = whole["$ref"].rpartition("/")[2]
    part = f"{name}Part"
    given = {key: value for key, value in schemas[name].items() if key in ("type", "properties")}
    told = f"What `fields` names of a {name}."
    schemas[part] = {**copy.deepcopy(given), "title": part, "description": told}
    schema["items"] = {"anyOf": [whole, {"$ref": f"#/components/schemas/{part}"}]}
    response["headers"] = copy.deepcopy(_PAGED)
    return [*schemas[name]["properties"]]


def _for_generators(schema: Any, schemas: dict[str, Any]) -> None:
    """Say it in the words that generators of clients understand.

    A kind is required, for it is what tells one from another; a default that is an object is said
    in the description; and each choice between objects has its discriminator.
    """
    if isinstance(schema, list):
        for each in schema:
            _for_generators(each, schemas)
    if not isinstance(schema, dict):
        return
    for name, each in schema.items():
        if name not in ("example", "examples", "default"):
            _for_generators(each, schemas)
    for name in _BOUNDS.keys() & schema.keys():  # pydantic's own, of a value that may be null
        schema[_BOUNDS[name]] = schema.pop(name)
    kind = schema.get("properties", {}).get("kind", {})
    if "const" in kind and kind.pop("default", None) is not None:
        schema["required"] = ["kind", *schema.get("required", ())]
    if isinstance(schema.get("default"), dict) and "properties" not in schema:
        told = f"By default {json.dumps(schema.pop('default'))}."
        schema["description"] = f"{schema.get('description', '')} {told}".strip()
    names = [str(each.get("$ref", "")).rpartition("/")[2] for each in schema.get("anyOf", ())]
    kinds = [schemas.get(n, {}).get("properties", {}).get("kind", {}).get("const") for n in names]
    if kinds and all(kinds):
        schema["oneOf"] = schema.pop("anyOf")
        places = (each["$ref"] for each in schema["oneOf"])
        mapping = dict(zip(kinds, places, strict=True))
        schema["discriminator"] = {"propertyName": "kind", "mapping": mapping}


def _inline(paths: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas that stand in the operations themselves."""
    for path in paths.values():
        for operation in path.values():
            yield from (each["schema"] for each in operation.get("parameters", ()))
            for response in operation["responses"].values():
                yield from (each.get("schema", {}) for each in response.get("content", {}).values())


def _parameter(parameter: dict[str, Any]) -> None:
    """One that may be left out can't be null: a URL and a header have no such thing."""
    schema = parameter["schema"]
    some = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    if len(some) == 1:
        del schema["anyOf"]
        parameter["schema"] = {**some[0], **schema}


def _problem(status: int, response: dict[str, Any]) -> None:
    kind, detail = _DETAILS[status]
    example = {"type": f"urn:qmpcommit:{kind}", "title": TITLES[status], "status": status,
               "detail": detail}  # fmt: skip
    schema = {"$ref": "#/components/schemas/Problem"}
    response["description"] = TITLES[status]
    response["content"] = {PROBLEM_TYPE: {"schema": schema, "example": copy.copy(example)}}
    for name, told in _REFUSED.get(status, {}).items():
        kind = "integer" if name == "Retry-After" else "string"
        response.setdefault("headers", {})[name] = {"schema": {"type": kind}, "description": told}
