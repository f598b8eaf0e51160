"""JSON schemas: every text of the grammar is valid, and what cannot be promised is refused with its place."""

import json
from datetime import date, datetime, time
from email.headerregistry import Address
from ipaddress import IPv4Address
from uuid import UUID

import numpy as np
import pytest

from kvjax.grammar import json_schema
from kvjax.grammar.schema import FORMATS
from tests.tiny_model import bytes_tokenizer

TOKENIZER = bytes_tokenizer()
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


STRING = {"type": "string"}
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
