"""What all settings have in common: frozen, checked to the last name, and shown in forms under readable titles."""

from typing import Any

from pydantic import BaseModel, ConfigDict

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


def _title(name: str, _: object) -> str:
    """A setting's name as forms show it."""
    first, *rest = (ACRONYMS.get(word, word) for word in name.split("_"))
    return " ".join([first[:1].upper() + first[1:], *rest])


def _name(model: type[Any]) -> str:
    """A section as forms call it: a kind of something by its kind."""
    kind = model.model_fields.get("kind")
    return str(kind.default) if kind else model.__name__


class Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        field_title_generator=_title,
        model_title_generator=_name,
    )

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """Return the description of each setting by its name, in the order of the settings."""
        return {name: field.description or "" for name, field in cls.model_fields.items()}


def as_choice(schema: dict[str, Any]) -> None:
    """Write a union of kinds in the way that Prefect's forms offer as a choice: anyOf. What pydantic writes they show as a text of JSON."""
    if "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")
        schema.pop("discriminator", None)
