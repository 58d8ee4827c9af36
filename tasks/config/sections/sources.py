"""Define the settings of every kind of source that questions and answers can come from, one class each."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tasks.config.sections.base import NotInKey, Settings, as_choice

DUMPS = (".7z", "Posts.xml", "Posts.xml.gz", "Posts.csv", "Posts.csv.gz")  # endings of the names of dumps
FILES = (
    "A file or folder of JSON lines, JSON lists (also gzipped), parquet or Arrow, "
    "or the id of a data set on the Hugging Face hub."
)

ORIGIN = NotInKey("the content is an input; where it was read or fetched from does not matter")
Place = Annotated[str, ORIGIN]


class ShellSite(Settings):
    """The built-in question-and-answer site about shell commands, generated from the run's seed."""

    kind: Literal["shell-site"] = "shell-site"
    num_questions: int = Field(4200, ge=50, le=2_000_000, description="Questions to generate.")


class StackExchangeDump(Settings):
    """A Stack Exchange dump on this machine."""

    kind: Literal["stack-exchange"] = "stack-exchange"
    path: Place = Field(
        min_length=1,
        description="The .7z of a site as published, its Posts.xml or Posts.csv, these also gzipped, or a "
        "folder of several sites'.",
    )
    site: str = Field(
        "",
        description="Host name of the site, for links and attribution; empty: taken from the file's or "
        "folder's name.",
    )


class HubSource(Settings):
    """Rows in files on this machine or on the Hugging Face hub."""

    path: Place = Field(min_length=1, description=FILES)
    revision: Annotated[str | None, ORIGIN] = Field(
        None, description="Commit, branch or tag of the hub id; null for files on this machine."
    )
    files: Annotated[str, ORIGIN] = Field(
        "",
        description="Which files of the hub's data set to fetch, as a pattern such as 'data/travel*'; empty: "
        "all.",
    )
    config: Annotated[str, ORIGIN] = Field(
        "", description="Config of the data set, as in load_dataset(path, name); empty: its default."
    )
    split: Annotated[tuple[str, ...], ORIGIN] = Field(
        (), description="Splits to read, such as train or [train, test]; empty: all of the config."
    )
    columns: Annotated[tuple[str, ...], ORIGIN] = Field(
        (), description="Columns to keep of the data set; empty: all."
    )
    take: Annotated[int | None, ORIGIN] = Field(
        None, ge=1, description="The first rows of each split to read, by streaming; null: all."
    )

    @property
    def is_part(self) -> bool:
        """Return whether a config, splits, columns or the first rows of a data set are chosen."""
        return bool(self.config or self.split or self.columns or self.take)

    @field_validator("split", "columns", mode="before")
    @classmethod
    def _accept_one_column_or_split(cls, value: Any) -> Any:
        """Accept a single name in place of a list: --set source.split=train."""
        return ((value,) if value else ()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if self.files and self.is_part:
            raise ValueError(
                "files chooses files by their names; leave it out, or config, split, columns and take"
            )
        return self


class StackExchangePreferences(HubSource):
    """HuggingFaceH4/stack-exchange-preferences: questions with scored answers."""

    kind: Literal["stack-exchange-preferences"] = "stack-exchange-preferences"
    path: Place = Field("HuggingFaceH4/stack-exchange-preferences", min_length=1, description=FILES)


class StackExchangePaired(HubSource):
    """lvwerra/stack-exchange-paired: one comparison in each row, as in the StackLLaMA article."""

    kind: Literal["stack-exchange-paired"] = "stack-exchange-paired"
    path: Place = Field("lvwerra/stack-exchange-paired", min_length=1, description=FILES)


class HhRlhf(HubSource):
    """Anthropic/hh-rlhf: two dialogues in each row. Files whose names say test are the evaluation split."""

    kind: Literal["hh-rlhf"] = "hh-rlhf"
    path: Place = Field("Anthropic/hh-rlhf", min_length=1, description=FILES)
    turns: Literal["single", "all"] = Field(
        "single", description="Dialogues of one question and one answer, as in the DPO paper, or all."
    )


class OwnRows(HubSource):
    """Rows of {prompt, chosen, rejected}, {prompt, responses, scores} or {prompt, completion}, also mixed.

    A column's name may be a path such as chosen.content. Files whose names say test are the
    evaluation split.
    """

    kind: Literal["own"] = "own"
    path: Place = Field(min_length=1, description=FILES)
    site: str = Field("own data", min_length=1, description="Name of the source in reports.")
    licence: str = Field("", description="Licence of the texts, for reports and model cards.")
    prompt: str = Field(
        "prompt",
        min_length=1,
        description="Column of the prompt; a text, or messages {role, content} or {from, value}.",
    )
    chosen: str = Field(
        "chosen",
        min_length=1,
        description="Column of the better answer, or of one side if source.label names the better.",
    )
    rejected: str = Field(
        "rejected", min_length=1, description="Column of the worse answer, or of the other side."
    )
    responses: str = Field(
        "responses", min_length=1, description="Column of a list of answers, or of one answer."
    )
    scores: str = Field(
        "scores", min_length=1, description="Column of their scores, or of one answer's; higher is better."
    )
    scores_are_ranks: bool | None = Field(
        None,
        description="Whether the lowest score is the best; null: no, but columns called rank are refused.",
    )
    completion: str = Field(
        "completion",
        min_length=1,
        description="Column of a single answer without a comparison, to fine-tune on.",
    )
    label: str = Field(
        "",
        description="Column that says which side of a comparison is better, or whether a completion is good; "
        "empty: label, of completions.",
    )
    negative_is_first: bool | None = Field(
        None,
        description="Whether a label below 0 prefers source.chosen, as in HelpSteer3; null: the label is no "
        "number with a sign.",
    )
    system: str = Field(
        "system", min_length=1, description="Column of a system message, which is put before the prompt."
    )
    context: tuple[str, ...] = Field(
        ("input", "context"), description="Columns of texts that are added after the prompt."
    )
    ignored: tuple[str, ...] = Field(
        (), description="Columns that are not read although their names say that they rate an answer."
    )

    @field_validator("context", "ignored", mode="before")
    @classmethod
    def _accept_one_name(cls, value: Any) -> Any:
        """Accept a single name in place of a list: --set source.ignored=labels."""
        return ((value,) if value else ()) if isinstance(value, str) else value


Source = Annotated[
    ShellSite | StackExchangeDump | StackExchangePreferences | StackExchangePaired | HhRlhf | OwnRows,
    Field(discriminator="kind", json_schema_extra=as_choice),
]
