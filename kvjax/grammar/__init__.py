"""What a text may be, as an automaton over tokens: from a regular expression or a JSON schema."""

from kvjax.grammar.grammar import Grammar, regex
from kvjax.grammar.schema import json_schema

__all__ = ["Grammar", "json_schema", "regex"]
