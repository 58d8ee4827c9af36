"""Read the values of settings by their types.

A setting that takes a text gets what the user has typed, where YAML would read a date, a truth value or a
number (2024-01-01, yes, 010).
"""

from collections.abc import Iterable
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from tasks.config.pipeline import Pipeline
from tasks.config.sections.base import is_section, types_of_setting, union_members


class _Texts(yaml.SafeLoader):
    """A YAML reader that keeps unquoted values, other than null, as texts."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a name that is there twice; PyYAML would silently take the later value."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value} is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Return the lists, mappings and texts of a YAML document. Raises yaml.YAMLError."""
    loader = _Texts(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_argument(name: str, text: str) -> Any:
    """Return the value of ``--set name=text``. Raises yaml.YAMLError."""
    types = _types_at([Pipeline], name.split("."))
    takes_text = not types.isdisjoint((str, Literal))
    is_null = text == "null" or (not takes_text and text.lower() in ("~", "none"))
    if NoneType in types and is_null:
        return None
    has_parts = any(is_section(each) or get_origin(each) is tuple for each in types)
    if has_parts and text and (not takes_text or text.startswith("[")):
        return convert(types, read_yaml(text))
    return convert(types, text)


def convert_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a YAML profile, with numbers for the settings that take numbers."""
    converted: dict[str, Any] = convert({Pipeline}, settings)
    return converted


def convert(types: set[Any], value: Any) -> Any:
    """Return ``value`` with numbers for texts where the type takes numbers only; pydantic does the rest."""
    if isinstance(value, dict):
        return {name: convert(types_of_setting(types, str(name)), inner) for name, inner in value.items()}
    if isinstance(value, list):
        items = {
            leaf for each in types if get_origin(each) is tuple for leaf in union_members(get_args(each)[0])
        }
        return [convert(items, inner) for inner in value]
    if isinstance(value, str) and not types.isdisjoint((int, float)) and types.isdisjoint((str, Literal)):
        return _number(value)
    return value


def _number(text: str) -> int | float | str:
    """Return a decimal number; any other text unchanged, so that pydantic refuses it by its name."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _types_at(sections: Iterable[Any], names: list[str]) -> set[Any]:
    """Return the types that the setting of a dotted name can have in all kinds of its sections."""
    first, *rest = names
    types = types_of_setting(sections, first)
    return _types_at(types, rest) if rest else types
