"""Test that a dump's site and users are found in each of the forms that a dump can have, with the same
tables.
"""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import py7zr
import pyarrow.parquet as pq
import pytest

from tasks.artifacts.artifact import user_artifact
from tasks.artifacts.corpus import find_corpus
from tasks.config.dump_files import UNKNOWN_SITE, find_sites, host_in_name
from tasks.config.jobs import DataJob
from tasks.config.pipeline import Pipeline
from tasks.config.sections.sources import StackExchangeDump
from tasks.programs.data import prepare
from tasks.programs.runtime.program import Run
from tasks.stages.data import data
from tasks.system.errors import InputError

HOST = "travel.stackexchange.com"
COLUMNS = "Id,PostTypeId,AcceptedAnswerId,ParentId,Score,Body,OwnerUserId,Title"


def rows() -> list[list[str]]:
    found = []
    for n in range(1, 181, 3):
        found.append(
            [
                str(n),
                "1",
                str(n + 1),
                "",
                "3",
                f"<p>How should one go to place number {n}?</p>",
                "7",
                f"Going to {n}",
            ]
        )
        found += [
            [str(n + k), "2", "", str(n), str(9 - 5 * k), f"<p>Answer {k} about {n}, by train.</p>", "8", ""]
            for k in (1, 2)
        ]
    return found


def posts_xml() -> bytes:
    escaped = [[value.replace("<", "&lt;") for value in row] for row in rows()]
    pairs = [zip(COLUMNS.split(","), row, strict=True) for row in escaped]
    lines = ["<row " + " ".join(f'{name}="{value}"' for name, value in row if value) + " />" for row in pairs]
    return ("<posts>\n" + "\n".join(lines) + "\n</posts>").encode()


POSTS_XML = posts_xml()
POSTS_CSV = "\n".join([COLUMNS, *(",".join(f'"{value}"' for value in row) for row in rows())]).encode()
USERS_XML = b'<users><row Id="7" DisplayName="Ada" /><row Id="8" DisplayName="Eve" /></users>'
USERS_CSV = b"Id,DisplayName\n7,Ada\n8,Eve\n"


def packed(**members: bytes) -> bytes:
    file = io.BytesIO()
    with py7zr.SevenZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writef(io.BytesIO(content), f"{name}.xml")
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def prepared(path: Path, folder: Path, **source: Any) -> dict[str, Any]:
    """Return the tables of a dump, its data card and its summary."""
    folder.mkdir(parents=True)
    job = {"seed": 0, "source": {"kind": "stack-exchange", "path": str(path), **source}, "data": {"alike": 1}}
    (folder / "job.json").write_text(
        json.dumps({"stage": "data", "job": job, "inputs": {"source": str(path)}})
    )
    run = Run(folder)
    prepare(DataJob.model_validate(run.record), run)
    tables = {
        table.name: pq.read_table(table).to_pylist() for table in sorted(run.artifact.glob("*.parquet"))
    }
    return tables | {"warnings": run.warnings}


# files under a folder, and which of them is the path
FORMS: dict[str, tuple[dict[str, bytes], str]] = {
    "archive": ({f"{HOST}.7z": packed(Posts=POSTS_XML, Users=USERS_XML)}, f"{HOST}.7z"),
    "archive in a folder": ({f"in/{HOST}.7z": packed(Posts=POSTS_XML, Users=USERS_XML)}, "in"),
    "archive that was fetched again": (
        {f"{HOST} (1).7z": packed(Posts=POSTS_XML, Users=USERS_XML)},
        f"{HOST} (1).7z",
    ),
    "several archives": (
        {f"{HOST}-Posts.7z": packed(Posts=POSTS_XML), f"{HOST}-Users.7z": packed(Users=USERS_XML)},
        f"{HOST}-Posts.7z",
    ),
    "several archives in a folder": (
        {f"in/{HOST}-Posts.7z": packed(Posts=POSTS_XML), f"in/{HOST}-Users.7z": packed(Users=USERS_XML)},
        "in",
    ),
    "archive beside users": (
        {f"{HOST}-Posts.7z": packed(Posts=POSTS_XML), "Users.xml": USERS_XML},
        f"{HOST}-Posts.7z",
    ),
    "xml": ({f"{HOST}/Posts.xml": POSTS_XML, f"{HOST}/Users.xml": USERS_XML}, f"{HOST}/Posts.xml"),
    "xml in a folder": ({f"{HOST}/Posts.xml": POSTS_XML, f"{HOST}/Users.xml": USERS_XML}, HOST),
    "xml in a folder in a folder": (
        {f"in/{HOST}/Posts.xml": POSTS_XML, f"in/{HOST}/Users.xml": USERS_XML},
        "in",
    ),
    "gzipped": (
        {f"{HOST}/Posts.xml.gz": gzip.compress(POSTS_XML), f"{HOST}/Users.xml.gz": gzip.compress(USERS_XML)},
        f"{HOST}/Posts.xml.gz",
    ),
    "gzipped in a folder": (
        {f"{HOST}/Posts.xml.gz": gzip.compress(POSTS_XML), f"{HOST}/Users.xml.gz": gzip.compress(USERS_XML)},
        HOST,
    ),
    "named after the site": (
        {f"{HOST}-Posts.xml": POSTS_XML, f"{HOST}-Users.xml": USERS_XML},
        f"{HOST}-Posts.xml",
    ),
    "csv": ({f"{HOST}/Posts.csv": POSTS_CSV, f"{HOST}/Users.csv": USERS_CSV}, f"{HOST}/Posts.csv"),
    "csv in a folder": (
        {f"{HOST}/Posts.csv.gz": gzip.compress(POSTS_CSV), f"{HOST}/Users.csv.gz": gzip.compress(USERS_CSV)},
        HOST,
    ),
    "small letters": ({f"{HOST}/posts.xml": POSTS_XML, f"{HOST}/Users.xml": USERS_XML}, HOST),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("expected")
    write(folder, {"x.7z": packed(Posts=POSTS_XML, Users=USERS_XML)})
    found = prepared(folder / "x.7z", folder / "run", site=HOST)
    assert found["warnings"] == []
    assert {row["question_url"] for row in found["evaluation.parquet"]} <= {
        f"https://{HOST}/q/{n}" for n in range(1, 181, 3)
    }
    assert all(f'"{name}"' in json.dumps(found) for name in ("Ada", "Eve"))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_dump_gives_the_same_in_every_form(tmp_path: Path, form: str, expected: dict[str, Any]) -> None:
    files, path = FORMS[form]
    write(tmp_path, files)
    found = prepared(tmp_path / path, tmp_path / "run")
    assert found == expected
    source = StackExchangeDump(path=str(tmp_path / path))
    assert find_corpus(source) == tmp_path / path


@pytest.mark.parametrize("path", ["mydump", "mydump/Posts.xml"])
def test_the_site_that_was_set_wins_for_one_sites_dump(
    tmp_path: Path, path: str, expected: dict[str, Any]
) -> None:
    write(tmp_path, {"mydump/Posts.xml": POSTS_XML, "mydump/Users.xml": USERS_XML})
    assert prepared(tmp_path / path, tmp_path / "run", site=HOST) == expected
    write(
        tmp_path,
        {f"askubuntu.com/{path}/Posts.xml" if "." not in path else f"askubuntu.com/{path}": POSTS_XML},
    )
    assert set(find_sites(tmp_path / "askubuntu.com", HOST).values()) == {HOST}


@pytest.mark.parametrize(
    ("name", "host"),
    [
        *(
            (f"{host}.7z", host)
            for host in (
                "mathoverflow.net",
                "askubuntu.com",
                "meta.stackoverflow.com",
                "math.meta.stackexchange.com",
            )
        ),
        *(
            (f"{host}-Posts.7z", host)
            for host in ("stackoverflow.com", "ru.stackoverflow.com", "3dprinting.stackexchange.com")
        ),
        *(
            ("Stackoverflow.com-Posts.7z", "stackoverflow.com"),
            ("superuser.com/Posts.xml", "superuser.com"),
            ("serverfault.com.7z", "serverfault.com"),
        ),
        *(
            ("forum.example.org/Posts.csv.gz", "forum.example.org"),
            ("superuser.com/askubuntu.com.7z", "askubuntu.com"),
        ),
        *(
            (name, "")
            for name in (
                "Posts.xml",
                "mydump/Posts.xml",
                "dump.7z",
                "my.dump.7z",
                "v1.2/Posts.xml",
                "a.tar/Posts.xml",
                "com/Posts.xml",
            )
        ),
        *(
            (name, "")
            for name in (
                "QueryResults.csv",
                "co.uk/Posts.xml",
                "..com/Posts.xml",
                "a b.com/Posts.xml",
                "<x>.com/Posts.xml",
            )
        ),
    ],
)
def test_only_the_name_of_a_site_is_taken_for_one(name: str, host: str) -> None:
    assert host_in_name(Path("/data") / name) == host


def test_a_site_that_nobody_names_is_told(tmp_path: Path) -> None:
    write(tmp_path, {"mydump/Posts.xml": POSTS_XML})
    found = prepared(tmp_path / "mydump", tmp_path / "run")
    assert {row["site"] for row in found["evaluation.parquet"]} == {UNKNOWN_SITE}
    assert len(found["warnings"]) == 1
    assert "Set source.site" in found["warnings"][0]


@pytest.mark.parametrize(
    ("files", "site", "words"),
    [
        (
            ["askubuntu.com.7z", "superuser.com/Posts.xml"],
            "askubuntu.com",
            r"source\.site names one site, askubuntu\.com, but .* of 2 \(",
        ),
        (["a/Posts.xml", "b/Posts.xml"], "", "several dumps, and of .*a/Posts.xml no name says"),
        (["a/Posts.xml", "askubuntu.com/Posts.xml"], "", "several dumps, and of .*a/Posts.xml no name says"),
        (
            ["Users.xml", "askubuntu.com-Users.7z", "Badges.7z"],
            "",
            r"\.7z, Posts\.xml, Posts\.xml\.gz, Posts\.csv or Posts\.csv\.gz",
        ),
    ],
)
def test_sites_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, files: list[str], site: str, words: str
) -> None:
    write(tmp_path, dict.fromkeys(files, b"x"))
    with pytest.raises(InputError, match=words) as refused:
        find_corpus(StackExchangeDump(path=str(tmp_path), site=site))
    assert "\n" not in str(refused.value)


def test_several_files_of_one_site_are_one_site(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(["a/Posts.xml", "b/Posts.xml"], b"x"))
    assert set(find_sites(tmp_path, HOST).values()) == {HOST}
    assert set(find_sites(tmp_path / "a", "").values()) == {UNKNOWN_SITE}


def test_users_of_another_dump_are_not_taken(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            f"{HOST}.7z": packed(Posts=POSTS_XML),
            "askubuntu.com.7z": packed(Posts=POSTS_XML),
            "Users.xml": USERS_XML,
        },
    )
    found = prepared(tmp_path / f"{HOST}.7z", tmp_path / "run")
    assert "Ada" not in json.dumps(found)


def test_the_key_knows_the_site_of_the_name_and_the_users_beside(tmp_path: Path) -> None:
    def key(path: Path, **source: Any) -> str:
        config = Pipeline.model_validate({"source": {"kind": "stack-exchange", "path": str(path), **source}})
        return data.step(config, source=user_artifact(path)).recipe.key

    write(
        tmp_path,
        {
            f"{site}/Posts.xml": POSTS_XML
            for site in ("a/askubuntu.com", "b/askubuntu.com", "superuser.com", "x", "y")
        },
    )
    first = key(tmp_path / "a/askubuntu.com/Posts.xml")
    assert (
        first
        == key(tmp_path / "b/askubuntu.com/Posts.xml")
        == key(tmp_path / "x/Posts.xml", site="askubuntu.com")
    )
    assert first not in (key(tmp_path / "superuser.com/Posts.xml"), key(tmp_path / "x/Posts.xml"))
    assert key(tmp_path / "x/Posts.xml") == key(tmp_path / "y/Posts.xml")
    assert key(tmp_path / "a/askubuntu.com") != key(tmp_path / "superuser.com")
    write(tmp_path, {"x/Users.xml": USERS_XML})
    assert key(tmp_path / "x/Posts.xml") != key(tmp_path / "y/Posts.xml")


def test_what_macos_puts_beside_a_dump_is_none(tmp_path: Path) -> None:
    write(tmp_path / HOST, {"Posts.xml": POSTS_XML, "._Posts.xml": b"\0\5\26\7"})
    assert find_sites(tmp_path / HOST, "") == {tmp_path / HOST / "Posts.xml": HOST}
