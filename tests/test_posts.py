"""Reading dumps: what is damaged or no dump is refused in one line, what is odd inside one is counted."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from tasks.rlhf import blocks
from tasks.rlhf.posts import read_posts
from tasks.rlhf.quarantine import Quarantine
from tasks.rlhf.refusal import InputError

ROW = '<row Id="1" PostTypeId="1" Score="1" Body="&lt;p&gt;x&lt;/p&gt;" Title="t" />'
HEAD = "Id,PostTypeId,ParentId,Score,Body,OwnerUserId\n"
BOMB = (
    '<!DOCTYPE posts [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True))
    + "]>"
)
BAD = {
    "empty": (b"", "is empty"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04", "damaged, encrypted or unknown kind of 7z archive"),
    "zip": (b"PK\x03\x04\x14\x00", "zip archive: unpack"),
    "binary": (bytes(range(128, 256)) * 20, "neither XML nor a CSV in UTF-8"),
    "text": (b"hello\nworld\n", "neither a Posts.xml nor a Posts.csv"),
    "blank": (b" \n\n", "neither a Posts.xml nor a Posts.csv"),
    "other table": (b'<?xml version="1.0"?><users><row Id="1" /></users>', "not a Posts.xml"),
    "no rows": (b"<html></html>", "not a Posts.xml"),
    "rows elsewhere": (f"<posts><a>{ROW}</a></posts>".encode(), "not a Posts.xml"),
    "truncated XML": (f"<posts>{ROW}\n{ROW[:30]}".encode(), "damaged, truncated"),
    "XML without end": (f"<posts>{ROW}\n".encode(), "damaged, truncated"),
    "entity bomb": (f'{BOMB}<posts><row Id="1" Body="&j;&j;&j;&j;&j;&j;&j;&j;&j;&j;" /></posts>'.encode(), "damaged, truncated"),
    "truncated gzip": (gzip.compress((HEAD + '1,1,,1,"<p>x</p>",\n' * 2000).encode())[:-20], "damaged or truncated gzip"),
    "gzip with a wrong checksum": (gzip.compress((HEAD + "1,1,,1,x,\n").encode())[:-8] + b"12345678", "damaged or truncated gzip"),
    "damaged gzip": (b"\x1f\x8b\x08\x00" + b"\x01" * 50, "damaged or truncated gzip"),
    "truncated CSV": (f'{HEAD}1,1,,1,"<p>x'.encode(), "damaged or truncated CSV"),
    "Latin-1 CSV": (f"{HEAD}1,1,,1,caf\xe9,\n".encode("latin-1"), "CSV in UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / "posts"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as refusal:
        list(read_posts(path, Counter(), Quarantine()))
    assert "\n" not in str(refusal.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        list(read_posts(tmp_path / "none.xml", Counter(), Quarantine()))
    with pytest.raises(InputError, match="is not a file"):
        list(read_posts(tmp_path, Counter(), Quarantine()))


def test_bad_rows_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "Posts.csv"
    rows = [
        '62.0,1.0,,3,"<p>a\n\nb</p>",9.0',
        "63,2,62.0,-2,x,",
        "64,2,,1,no parent,",
        "-1,1,,1,x,",
        "65,1,,1e99,x,",
        "66,1,,1,too few",
        "67,5,,0,wiki,",
        "68,,,0,x,",
    ]
    path.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8-sig", newline="\r\n")
    dropped: Counter[str] = Counter()
    with Quarantine(tmp_path / "quarantine.jsonl") as bad:
        posts = list(read_posts(path, dropped, bad))
    assert [(p.id, p.parent, p.votes, p.author_id) for p in posts] == [(62, 0, 3, "9"), (63, 62, -2, "")]
    assert dropped == {"post types other than question and answer": 1}
    assert bad.reasons == {"unreadable rows": 5}
    assert bad.rows == 8
    written = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["file"], line["row"], line["reason"]) for line in written] == [("Posts.csv", row, "unreadable rows") for row in (3, 4, 5, 6, 8)]


def test_a_post_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "Posts.csv"
    path.write_text(f"{HEAD}1,1,,0,{'x' * 300_000},\n")
    assert [len(post.body) for post in read_posts(path, Counter(), Quarantine())] == [300_000]


def test_progress_is_in_bytes_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "Posts.xml"
    path.write_bytes(b"\xef\xbb\xbf<?xml version='1.0' encoding='utf-8'?>\r\n<posts>\r\n" + f"{ROW}\r\n".encode() * 5000 + b"</posts>")
    monkeypatch.setattr(blocks, "SIZE", path.stat().st_size // 3)
    seen: list[tuple[int, int]] = []
    assert len(list(read_posts(path, Counter(), Quarantine(), lambda *where: seen.append(where)))) == 5000
    size = path.stat().st_size
    assert len(seen) > 1
    assert sorted(seen) == seen
    assert 0 < seen[0][0] <= seen[-1][0] == size
    assert {total for _, total in seen} == {size}
