"""Read the text of a setting by its field's type: a text stays what was typed, whatever YAML would make of it (dates, yes, null, 010)."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from tasks.config.pipeline import Pipeline


class _Texts(yaml.SafeLoader):
    """YAML whose unquoted values stay texts, but for null: what a text means is said by the setting that takes it."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a name that is there twice: YAML would silently take the later."""
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
    has_parts = any(_is_model(each) or get_origin(each) is tuple for each in types)
    if has_parts and text and (not takes_text or text.startswith("[")):
        return convert(types, read_yaml(text))
    return convert(types, text)


def convert_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a YAML profile, with numbers where its fields take numbers."""
    converted: dict[str, Any] = convert({Pipeline}, settings)
    return converted


def convert(types: set[Any], value: Any) -> Any:
    """Turn the texts in ``value`` into numbers where only a number can be meant; pydantic sees to everything else."""
    if isinstance(value, dict):
        models = [each for each in types if _is_model(each)]
        return {name: convert(_types_of_field(models, str(name)), inner) for name, inner in value.items()}
    if isinstance(value, list):
        items = {leaf for each in types if get_origin(each) is tuple for leaf in _leaves(get_args(each)[0])}
        return [convert(items, inner) for inner in value]
    if isinstance(value, str) and not types.isdisjoint((int, float)) and types.isdisjoint((str, Literal)):
        return _number(value)
    return value


def _number(text: str) -> int | float | str:
    """Return a decimal number; another text as it is, to be refused with the setting's name."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _types_at(sections: list[Any], names: list[str]) -> set[Any]:
    """Return the types that a dotted name may have, over all kinds of each section on its way; none for a name that there is not."""
    first, *rest = names
    types = _types_of_field(sections, first)
    return _types_at([each for each in types if _is_model(each)], rest) if rest else types


def _types_of_field(models: list[Any], name: str) -> set[Any]:
    fields = [model.model_fields[name] for model in models if name in model.model_fields]
    return {leaf for field in fields for leaf in _leaves(field.annotation)}


def _leaves(annotation: Any) -> set[Any]:
    """Return the members of a union, without what annotates them; ``Literal`` for one of texts."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _leaves(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {leaf for member in get_args(annotation) for leaf in _leaves(member)}
    return {Literal} if origin is Literal else {annotation}


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
