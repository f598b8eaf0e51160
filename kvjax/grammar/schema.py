"""From a JSON schema to a regular expression of texts that all satisfy it.

`outlines-core` writes the expression. It passes over keywords that it does not know, drops properties of deep
references and joins `allOf`; so a schema is first rewritten to what it is exact in, and the rest refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from kvjax.grammar.automaton import MARK, Kept, inlined, over_bytes, without_anchors
from kvjax.grammar.grammar import Grammar, Vocabulary, over_tokens, vocabulary_of

REMARKS = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions"} | {
    "deprecated",
    "readOnly",
    "writeOnly",
}
"""Keywords that say nothing about which values are valid."""

KEYWORDS = {
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": set(),
    "integer": set(),
    "boolean": set(),
    "null": set(),
}
"""What each type may have."""

COUNTS = {"minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength"}

DEEP = 4
"""How many arrays and objects a value of any kind may have in each other."""

ANY = {"type": "string", "pattern": MARK[1:2].decode()}
"""Stands for a value of any kind."""

ESCAPED = [ord('"'), ord("\\"), *range(32)]
"""Bytes that a JSON string may not hold as they are."""


_DAY = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])"
_DATE = f"[0-9]{{4}}-(?:{_DAY})"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_NAME = "[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@(?:{_NAME}\.)+[A-Za-z]{{2,}}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
}
"""Expressions whose every text is of the format: days that each year has, times with an offset, as RFC 3339 asks."""


def json_schema(schema: Mapping[str, Any] | str, tokenizer: Vocabulary) -> Grammar:
    """JSON texts that satisfy a schema: properties in its order, and at most one space where JSON allows any.

    Every text of the grammar is valid; not every valid text is in it. An object with `properties` has no others, an
    array with `prefixItems` no further ones, a pattern is matched from end to end, and a value of any kind is at most
    four arrays or objects deep.

    Args:
        schema: as Python data, or as a JSON text.
        tokenizer: of the model that will write, as `kvjax.load` gives it.
    Raises:
        ImportError: without `outlines-core`, the extra `grammar`.
        ValueError: naming the place of a keyword that is not supported or not valid, for a schema that nothing
            satisfies, or for what `regex` refuses.
    """
    try:
        root = _parsed(schema)
        exact = json.dumps(_exact(root, root, "#", ()), ensure_ascii=False)
    except RecursionError as error:
        raise ValueError("json_schema: `schema` is nested too deeply") from error
    except (TypeError, OverflowError) as error:
        raise ValueError(
            f"json_schema: `schema` has a value of a kind that its keyword cannot have: {error}"
        ) from error
    pieces = vocabulary_of(tokenizer, "json_schema")
    return over_tokens(json.dumps(root), *_automaton(exact, DEEP), pieces)


def _automaton(exact: str, deep: int) -> Kept:
    """Over bytes; where it has values of any kind, those may be so deep."""
    try:
        from outlines_core import json_schema as outlines
    except ImportError as error:
        raise ImportError("a grammar needs outlines-core: pip install 'kvjax[grammar]'") from error
    try:
        pattern = outlines.build_regex_from_schema(exact)
    except ValueError as error:
        raise ValueError(f"json_schema: `schema` is not supported: {error}") from error
    made = over_bytes(pattern, alone=False)
    return inlined(*made, *_any(deep)) if ANY["pattern"] in pattern else made


@cache
def _any(deep: int) -> Kept:
    """Values of any kind."""
    kinds: list[dict] = [{"type": kind} for kind in ("string", "number", "boolean", "null")]
    if deep:
        kinds += [{"type": "array", "items": ANY}, {"type": "object", "additionalProperties": ANY}]
    return _automaton(json.dumps({"anyOf": kinds}), deep - 1)


def _parsed(schema: Any) -> Any:
    """The schema as plain JSON data."""
    try:
        data = json.loads(schema) if isinstance(schema, str) else schema
        return json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema: `schema` must be JSON, as data or text, got {schema!r:.80}: {error}") from error


def _exact(node: Any, root: Any, at: str, refs: tuple[str, ...]) -> Any:
    """A node that admits nothing more than the one given, in the keywords that `outlines-core` is exact in."""
    if node is True or node == {}:
        return ANY
    if not isinstance(node, dict):
        _refuse(at, "must be an object of keywords", node)
    rest = {key: value for key, value in node.items() if key not in REMARKS and not key.startswith("x-")}
    if not rest:
        return ANY
    for key in ("$ref", "anyOf", "oneOf", "allOf"):
        if key in rest:
            if len(rest) > 1:
                _refuse(at, f"may not have `{key}` beside other keywords", sorted(set(rest) - {key}))
            return _referred(rest[key], root, at, refs) if key == "$ref" else _joined(key, rest[key], root, at, refs)
    for key in ("enum", "const"):
        if key in rest:
            return _listed(rest, key, at)
    kinds = rest.get("type") or [kind for kind, keys in KEYWORDS.items() if keys & set(rest)]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not kinds or not all(kind in KEYWORDS for kind in kinds):
        if "type" in rest:
            _refuse(at, f"`type` must be one or more of {', '.join(KEYWORDS)}", rest["type"])
        _refuse(at, "has keywords that are not supported", sorted(rest))
    if unknown := sorted(set(rest) - {"type"} - set().union(*(KEYWORDS[kind] for kind in kinds))):
        _refuse(at, "has keywords that are not supported for its type", unknown)
    for key in COUNTS & set(rest):
        if not isinstance(rest[key], int) or isinstance(rest[key], bool) or rest[key] < 0:
            _refuse(at, f"`{key}` must be a whole number of at least 0", rest[key])
    one = {"object": _object, "array": _array, "string": _string}
    plain = [one[k](rest, root, at, refs) if k in one else {"type": k} for k in kinds]
    return plain[0] if len(plain) == 1 else {"anyOf": plain}


def _referred(ref: Any, root: Any, at: str, refs: tuple[str, ...]) -> Any:
    """What a reference within the schema names, put in its place."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        _refuse(at, "`$ref` must point into the schema itself, as in #/$defs/name", ref)
    if ref == "#" or ref in refs:
        _refuse(at, "`$ref` must not lead back to itself: no automaton counts how deep it is", ref)
    target = root
    for part in ref.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(target, dict) or part not in target:
            _refuse(at, "`$ref` must name a part of the schema", ref)
        target = target[part]
    return _exact(target, root, ref, (*refs, ref))


def _joined(key: str, nodes: Any, root: Any, at: str, refs: tuple[str, ...]) -> Any:
    if not isinstance(nodes, list) or not nodes:
        _refuse(at, f"`{key}` must be a list of at least one schema", nodes)
    if key != "anyOf" and len(nodes) > 1:
        what = "that a value fits only one is not checked: use `anyOf`" if key == "oneOf" else "write them as one"
        _refuse(at, f"`{key}` of several schemas is not supported ({what}):", len(nodes))
    inner = [_exact(each, root, f"{at}/{key}/{i}", refs) for i, each in enumerate(nodes)]
    return inner[0] if len(inner) == 1 else {"anyOf": inner}


def _listed(rest: dict, key: str, at: str) -> Any:
    values = rest[key] if key == "enum" else [rest[key]]
    if more := sorted(set(rest) - {key, "type"}):
        _refuse(at, f"may not have `{key}` beside other keywords", more)
    if not isinstance(values, list):
        _refuse(at, "`enum` must be a list", values)
    kinds = rest.get("type", list(KEYWORDS))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    values = [value for value in values if any(_is(value, kind) for kind in kinds)]
    if not values:
        _refuse(at, f"`{key}` must leave a value of the node's type", rest[key])
    if any(isinstance(value, dict | list) for value in values):
        _refuse(at, f"`{key}` must be of texts, numbers, booleans and null", values)
    return {"enum": values}


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, in the words of JSON schema."""
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and not value.is_integer():
        return kind == "number"
    if isinstance(value, int | float):
        return kind in ("integer", "number")
    return {str: "string", list: "array", dict: "object", type(None): "null"}[type(value)] == kind


def _object(rest: dict, root: Any, at: str, refs: tuple[str, ...]) -> Any:
    inner, required = rest.get("properties", {}), rest.get("required", [])
    if not isinstance(inner, dict) or not isinstance(required, list):
        _refuse(at, "`properties` must be an object and `required` a list", [inner, required])
    if unknown := [name for name in required if not isinstance(name, str) or name not in inner]:
        _refuse(at, "`required` must be of names in `properties`", unknown)
    fewest, most = rest.get("minProperties", 0), rest.get("maxProperties")
    if not inner and rest.get("additionalProperties") is not False and "properties" not in rest:
        if fewest > 1 or (most is not None and most < fewest):
            _refuse(at, "`minProperties` must be at most 1 where names are free, and at most `maxProperties`", fewest)
        bounds = {key: rest[key] for key in ("minProperties", "maxProperties") if key in rest}
        more = _exact(rest.get("additionalProperties", True), root, f"{at}/additionalProperties", refs)
        return {"type": "object", "additionalProperties": more, **bounds}
    if fewest > len(required) or (most is not None and most < len(inner)):
        _refuse(at, "`minProperties` and `maxProperties` must follow from `required` and `properties`", [fewest, most])
    for name in inner:
        if json.dumps(name, ensure_ascii=False) != f'"{name}"':
            _refuse(at, "names of `properties` must need no escapes", name)
    nodes = {name: _exact(each, root, f"{at}/properties/{name}", refs) for name, each in inner.items()}
    return {"type": "object", "properties": nodes, "required": required}


def _array(rest: dict, root: Any, at: str, refs: tuple[str, ...]) -> Any:
    fewest, most = rest.get("minItems", 0), rest.get("maxItems")
    if most is not None and most < fewest:
        _refuse(at, f"`maxItems` must be at least `minItems`, {fewest}", most)
    if "prefixItems" in rest:
        nodes = rest["prefixItems"]
        if not isinstance(nodes, list) or not nodes or len(nodes) < fewest or (most is not None and len(nodes) > most):
            _refuse(at, "`prefixItems` must be a list of at least one schema, and as many as may be", nodes)
        return {
            "type": "array",
            "prefixItems": [_exact(each, root, f"{at}/prefixItems/{i}", refs) for i, each in enumerate(nodes)],
        }
    bounds = {key: rest[key] for key in ("minItems", "maxItems") if key in rest}
    return {"type": "array", "items": _exact(rest.get("items", True), root, f"{at}/items", refs), **bounds}


def _string(rest: dict, root: Any, at: str, refs: tuple[str, ...]) -> Any:
    kept = {key: rest[key] for key in ("minLength", "maxLength", "pattern", "format") if key in rest}
    if ("pattern" in kept) + ("format" in kept) + bool(COUNTS & set(kept)) > 1:
        _refuse(at, "may have lengths, `pattern` or `format`, and not two of them", sorted(kept))
    if kept.get("maxLength", kept.get("minLength", 0)) < kept.get("minLength", 0):
        _refuse(at, f"`maxLength` must be at least `minLength`, {kept['minLength']}", kept["maxLength"])
    if "pattern" in kept:
        if not isinstance(kept["pattern"], str):
            _refuse(at, "`pattern` must be a text", kept["pattern"])
        _check_plain(kept["pattern"], "pattern", at)
        kept["pattern"] = f"(?:{without_anchors(kept['pattern'])})"
    if "format" in kept:
        if not isinstance(kind := kept.pop("format"), str) or kind not in FORMATS:
            _refuse(at, f"`format` must be one of {', '.join(FORMATS)}", kind)
        kept["pattern"] = f"(?:{FORMATS[kind]})"
    return {"type": "string", **kept}


def _check_plain(pattern: str, key: str, at: str) -> None:
    """Raise ValueError if an expression inside a JSON string could match what JSON must escape."""
    try:
        table, _ = over_bytes(pattern)
    except ValueError as error:
        raise ValueError(f"json_schema: {at}: `{key}` is no expression that can be matched: {error}") from error
    if (table[:, ESCAPED] >= 0).any():
        _refuse(at, f'`{key}` must not match quotes, backslashes or control characters, as [^"\\\\] would not', pattern)


def _refuse(at: str, why: str, got: Any) -> None:
    raise ValueError(f"json_schema: {at}: {why}, got {got!r:.120}")
