"""Where questions and answers come from: the settings of every kind of source, one class each."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.programs.settings import Settings, as_choice

DUMPS = (".7z", "Posts.xml", "Posts.xml.gz", "Posts.csv", "Posts.csv.gz")  # how the names of dumps end
FILES = "A file or folder of JSON lines, JSON lists or parquet (also gzipped), or the id of a data set on the Hugging Face hub."


class ShellSite(Settings):
    """The built-in question-and-answer site about shell commands, generated from the run's seed."""

    kind: Literal["shell-site"] = "shell-site"
    num_questions: int = Field(4200, ge=50, le=2_000_000, description="Questions to generate.")


class StackExchangeDump(Settings):
    """A Stack Exchange dump on this machine."""

    kind: Literal["stack-exchange"] = "stack-exchange"
    path: str = Field(
        min_length=1,
        description="The .7z of a site as published, its Posts.xml or Posts.csv, these also gzipped, or a folder of several sites'.",
    )
    site: str = Field("", description="Host name of the site, for links and attribution; empty: as the file or its folder is called.")


class HubSource(Settings):
    """Rows in files here or on the hub."""

    path: str = Field(min_length=1, description=FILES)
    revision: str | None = Field(None, description="Commit, branch or tag of the hub id; null for files here.")
    files: str = Field("", description="Which files of the hub's data set to fetch, as a pattern such as 'data/travel*'; empty: all.")


class StackExchangePreferences(HubSource):
    """HuggingFaceH4/stack-exchange-preferences: questions with scored answers."""

    kind: Literal["stack-exchange-preferences"] = "stack-exchange-preferences"
    path: str = Field("HuggingFaceH4/stack-exchange-preferences", min_length=1, description=FILES)


class StackExchangePaired(HubSource):
    """lvwerra/stack-exchange-paired: one comparison a row, as the StackLLaMA article used them."""

    kind: Literal["stack-exchange-paired"] = "stack-exchange-paired"
    path: str = Field("lvwerra/stack-exchange-paired", min_length=1, description=FILES)


class HhRlhf(HubSource):
    """Anthropic/hh-rlhf: two dialogues a row. Files whose path has the word 'test' in it are the evaluation split."""

    kind: Literal["hh-rlhf"] = "hh-rlhf"
    path: str = Field("Anthropic/hh-rlhf", min_length=1, description=FILES)
    turns: Literal["single", "all"] = Field("single", description="Dialogues of one question and one answer, as the DPO work took, or all.")


class OwnRows(HubSource):
    """Your own rows: {prompt, chosen, rejected}, {prompt, responses, scores} or {prompt, completion}, in any mixture."""

    kind: Literal["own"] = "own"
    path: str = Field(min_length=1, description=FILES)
    site: str = Field("own data", min_length=1, description="What reports call the source.")
    licence: str = Field("", description="Licence of the texts, for reports and model cards.")
    prompt: str = Field("prompt", min_length=1, description="Column of the prompt; a text, or messages {role, content}.")
    chosen: str = Field("chosen", min_length=1, description="Column of the better answer.")
    rejected: str = Field("rejected", min_length=1, description="Column of the worse answer.")
    responses: str = Field("responses", min_length=1, description="Column of a list of answers.")
    scores: str = Field("scores", min_length=1, description="Column of their scores; higher is better.")
    completion: str = Field("completion", min_length=1, description="Column of an answer to fine-tune on that is compared with none.")


Source = Annotated[
    ShellSite | StackExchangeDump | StackExchangePreferences | StackExchangePaired | HhRlhf | OwnRows,
    Field(discriminator="kind", json_schema_extra=as_choice),
]
