"""Define the base class of all settings.

Settings are frozen, refuse unknown names, accept old names with a warning, say which of them are not in an
artifact's key, and have readable titles in Prefect's forms.
"""

import warnings
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

ACRONYMS = {
    "dpo": "DPO",
    "eos": "EOS",
    "gae": "GAE",
    "gpu": "GPU",
    "cpu": "CPU",
    "kl": "KL",
    "lora": "LoRA",
    "nll": "NLL",
    "ppo": "PPO",
    "rl": "RL",
    "sft": "SFT",
}


class RenamedSetting(FutureWarning):
    """A setting was given under its old name."""


class NotInKey(NamedTuple):
    """Mark a setting that is no part of an artifact's key: ``path: Annotated[str, NotInKey("...")]``.

    On a section of settings, ``parts`` names those of its settings that are meant; empty: the whole section.
    """

    why: str
    parts: tuple[str, ...] = ()


def _title(name: str, _: object) -> str:
    """Return a setting's name as forms show it."""
    first, *rest = (ACRONYMS.get(word, word) for word in name.split("_"))
    return " ".join([first[:1].upper() + first[1:], *rest])


def _section_title(model: type[Any]) -> str:
    """Return a section's name as forms show it: its kind if there are several kinds, else its class."""
    kind = model.model_fields.get("kind")
    return str(kind.default) if kind else model.__name__


class Settings(BaseModel):
    """A section of settings."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        field_title_generator=_title,
        model_title_generator=_section_title,
    )
    old_names: ClassVar[dict[str, str]] = {}  # current name by old name

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        return cls.replace_old_names(settings, cls.__name__.lower())

    @classmethod
    def replace_old_names(cls, settings: dict[str, Any], place: str) -> dict[str, Any]:
        """Return one section's settings under their current names.

        Warns of each old name with RenamedSetting; ``place`` is the section's dotted name, for the warning.
        Raises ValueError if a setting is given under both names.
        """
        replaced = {old: new for old, new in cls.old_names.items() if old in settings}
        for old, new in replaced.items():
            if new in settings:
                raise ValueError(f"{old} is the old name of {new}; give {new} alone")
            warning = f"{place}.{old} is now called {place}.{new}"
            warning += "; the old name will stop working in a later version"
            warnings.warn(warning, RenamedSetting, stacklevel=2)
        return {replaced.get(name, name): value for name, value in settings.items()}

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """Return the description of each setting by its name, in the order of the settings."""
        return {name: field.description or "" for name, field in cls.model_fields.items()}

    def key_settings(self) -> dict[str, Any]:
        """Return the settings that a key depends on, as JSON values: all but those marked with NotInKey."""
        settings = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            marks = [mark for mark in field.metadata if isinstance(mark, NotInKey)]
            section = getattr(self, name)
            if any(not mark.parts for mark in marks):
                del settings[name]
            elif isinstance(section, Settings):
                settings[name] = section.key_settings()
                for part in (part for mark in marks for part in mark.parts):
                    settings[name].pop(part, None)  # of several kinds of a section not all have it
            elif isinstance(section, tuple) and any(isinstance(one, Settings) for one in section):
                settings[name] = [one.key_settings() for one in section]
        return settings


def replace_old_names(sections: Iterable[Any], settings: Any, place: str = "") -> Any:
    """Return nested settings under their current names.

    ``sections`` are the types that ``settings`` may have. Warns of each old name with RenamedSetting. Raises
    ValueError if a setting is given under both names.
    """
    if not isinstance(settings, dict):
        return settings
    models = [section for section in sections if is_section(section)]
    for model in models:
        try:
            settings = model.replace_old_names(settings, place)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return {
        name: replace_old_names(types_of_setting(models, name), value, f"{place}.{name}" if place else name)
        for name, value in settings.items()
    }


def types_of_setting(sections: Iterable[Any], name: str) -> set[Any]:
    """Return the types that a setting, named by its current or its old name, has in any of the sections."""
    models = [section for section in sections if is_section(section)]
    fields = [model.model_fields.get(model.old_names.get(name, name)) for model in models]
    return {leaf for field in fields if field for leaf in union_members(field.annotation)}


def union_members(annotation: Any) -> set[Any]:
    """Return the members of a union without their annotations; ``Literal`` for a literal of texts."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return union_members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {leaf for member in get_args(annotation) for leaf in union_members(member)}
    return {Literal} if origin is Literal else {annotation}


def is_section(value: Any) -> TypeGuard[type[Settings]]:
    """Return whether a type is a section of settings."""
    return isinstance(value, type) and issubclass(value, Settings)


def as_choice(schema: dict[str, Any]) -> None:
    """Replace oneOf by anyOf in a union's schema: Prefect's forms show oneOf as JSON, anyOf as a choice."""
    if "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")
        schema.pop("discriminator", None)
