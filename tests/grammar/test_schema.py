"""JSON schemas: every text of the grammar is valid, and what cannot be promised is refused with its place."""

import json
from datetime import date, datetime, time
from email.headerregistry import Address
from ipaddress import IPv4Address
from uuid import UUID

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvjax.grammar import json_schema
from kvjax.grammar.schema import DEEP, FORMATS
from tests.tiny_model import bytes_tokenizer

TOKENIZER = bytes_tokenizer()
STRING = {"type": "string"}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "description": "in years"},
        "tags": {"type": "array", "items": {"enum": ["a.b", 'c"d', "é"]}, "maxItems": 2},
        "zip": {"$ref": "#/$defs/zip"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"zip": {"type": ["string", "null"], "pattern": "^[0-9]{2}|x$"}},
}


def accepts(grammar, text: str) -> bool:
    try:
        return bool(grammar.accepts[grammar.state(text.encode())])
    except ValueError:
        return False


def test_valid_and_invalid_texts():
    grammar = json_schema(PERSON, TOKENIZER)
    assert grammar == json_schema(json.dumps(PERSON), TOKENIZER)
    for text in ('{"name":"é","age":-3}', '{ "name" : "", "age":0, "tags":["a.b", "c\\"d"], "zip":null}'):
        assert accepts(grammar, text), text
    for tail in ('"12"', '"x"', "null"):
        assert accepts(grammar, f'{{"name":"","age":0,"zip":{tail}}}')
    for text in ("{}", '{"name":"a"}', '{"name":"a","age":1.5}', '{"name":"toolong","age":1}', '{"name":"","age":01}'):
        assert not accepts(grammar, text), text
    assert not accepts(grammar, '{"name":"","age":0,"zip":"1x"}')


def random_text(grammar, rng) -> str:
    state, made = 0, []
    while not grammar.accepts[state] or ((grammar.next[state] >= 0).any() and rng.random() < 0.7):
        to = grammar.next[state, grammar.classes]
        ids = np.flatnonzero(to >= 0)
        if len(made) > 60:  # home by the shortest way
            ids = ids[grammar.least[to[ids]] == grammar.least[to[ids]].min()]
        made.append(int(rng.choice(ids)))
        state = int(to[made[-1]])
    return bytes(made).decode()


def test_every_text_is_valid():
    grammar, rng = json_schema(PERSON, TOKENIZER), np.random.default_rng(0)
    for _ in range(200):
        value = json.loads(random_text(grammar, rng))
        assert {"name", "age"} <= set(value) <= set(PERSON["properties"])
        assert isinstance(value["name"], str) and len(value["name"]) <= 6 and type(value["age"]) is int
        assert all(tag in ("a.b", 'c"d', "é") for tag in value.get("tags", [])) and len(value.get("tags", [])) <= 2


def depth(value) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


BOTH = {"a": True, "b": {"anyOf": [STRING, {}]}}
ANY_KIND = [
    json_schema(schema, TOKENIZER)
    for schema in ({}, {"type": "array"}, {"type": "object", "properties": BOTH}, {"type": "object"})
]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text("abc é€", max_size=4)
VALUES = st.recursive(PLAIN | WORDS, lambda x: st.lists(x, max_size=3) | st.dictionaries(WORDS, x, max_size=3))


@given(VALUES)
@example([[{"": [1]}]])
@example([[[[[]]]]])
@example({"a": [{"b": {"c": [2]}}]})
def test_a_value_of_any_kind_is_in_the_grammar_unless_it_is_too_deep(value):
    text, good = json.dumps(value, ensure_ascii=False), depth(value) <= DEEP
    assert accepts(ANY_KIND[0], text) == accepts(ANY_KIND[1], f"[0, {text}]") == good
    assert accepts(ANY_KIND[2], f'{{"a": {text},"b":{text}}}') == accepts(ANY_KIND[3], f'{{"c": {text}}}') == good
    assert not any(accepts(grammar, f'{{"a": {text}') for grammar in ANY_KIND)


@pytest.mark.parametrize("schema", [{}, {"type": "object"}, {"anyOf": [{"type": "integer"}, {}]}], ids=str)
def test_every_text_of_any_kind_is_valid(schema):
    grammar, rng = json_schema(schema, TOKENIZER), np.random.default_rng(0)
    for _ in range(100):
        value = json.loads(random_text(grammar, rng), strict=False)
        assert depth(value) <= DEEP + (schema == {"type": "object"})


REFUSED = {
    "no JSON": ("{", "must be JSON"),
    "no schema": ([], "must be an object of keywords"),
    "nothing": (False, "must be an object of keywords"),
    "bounds of numbers": ({"type": "integer", "minimum": 3}, r"#: has keywords that are not supported .*'minimum'"),
    "unknown type": ({"type": "text"}, "`type` must be one or more of"),
    "not": ({"not": {}}, "not supported"),
    "oneOf": ({"oneOf": [STRING, STRING]}, "use `anyOf`"),
    "allOf": ({"allOf": [STRING, STRING]}, "write them as one"),
    "empty enum": ({"enum": []}, "must leave a value"),
    "enum of another type": ({"type": "string", "enum": [1]}, "must leave a value"),
    "recursion": (
        {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
        "back to itself",
    ),
    "reference to nothing": ({"$ref": "#/$defs/a"}, "must name a part of the schema"),
    "lengths": ({"type": "string", "minLength": 3, "maxLength": 2}, "`maxLength` must be at least `minLength`, 3"),
    "items": ({"type": "array", "minItems": 3, "maxItems": 2}, "`maxItems` must be at least `minItems`, 3"),
    "required of no property": (
        {"type": "object", "properties": {"a": {"type": "object", "properties": {}, "required": ["b"]}}},
        r"#/properties/a: `required` must be of names in `properties`, got \['b'\]",
    ),
    "pattern with quotes": ({"type": "string", "pattern": ".*"}, "must not match quotes"),
    "bad pattern": ({"type": "string", "pattern": "("}, "`pattern` is no expression"),
    "unknown format": ({"type": "string", "format": "uri"}, "`format` must be one of date, time, .*got 'uri'"),
    "unique items": ({"type": "array", "items": STRING, "uniqueItems": True}, "uniqueItems"),
    "a name to escape": ({"type": "object", "properties": {'a"': STRING}}, "must need no escapes"),
    "a count that is none": ({"type": "string", "minLength": -1}, "whole number of at least 0"),
    "types in types": ({"type": [["string"]]}, "a value of a kind that its keyword cannot have"),
    "names in names": (
        {"type": "object", "properties": {"a": STRING}, "required": [["a"]]},
        r"`required` must be of names in `properties`, got \[\['a'\]\]",
    ),
    "a list of formats": ({"type": "string", "format": ["date"]}, r"`format` must be one of date, .*got \['date'\]"),
    "no number": ('{"const": NaN}', "must be JSON"),
    "too large a number": ('{"const": 1e999}', "must be JSON"),
}


@pytest.mark.parametrize(("schema", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_promised_is_refused(schema, words, unchecked):
    with pytest.raises(ValueError, match=f"json_schema: .*{words}"):
        json_schema(schema, TOKENIZER)


READERS = {
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "date-time": datetime.fromisoformat,
    "uuid": UUID,
    "email": lambda text: Address(addr_spec=text),
    "ipv4": IPv4Address,
}


@pytest.mark.parametrize(("kind", "read"), READERS.items(), ids=READERS)
def test_texts_of_a_format(kind, read):
    assert set(READERS) == set(FORMATS)
    grammar, rng = json_schema({"type": "string", "format": kind}, TOKENIZER), np.random.default_rng(1)
    for _ in range(40):
        text = json.loads(random_text(grammar, rng))
        if not text.startswith("0000"):  # Python's years begin with 1
            read(text)
