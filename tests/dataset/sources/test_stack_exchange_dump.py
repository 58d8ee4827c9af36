"""Test reading dumps: damaged files are refused in one line, odd rows inside one are counted."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from tasks.dataset.readers import blocks, dump_xml
from tasks.dataset.readers.csv_columns import USERS
from tasks.dataset.readers.dump_tables import iter_blocks
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.readers.user_names import read_user_names
from tasks.dataset.sources.stack_exchange_dump import Post
from tasks.system.errors import InputError
from tests.support.dumps import iter_posts
from tests.support.questions.question_rows import author_url

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
    "entity bomb": (
        f'{BOMB}<posts><row Id="1" Body="&j;&j;&j;&j;&j;&j;&j;&j;&j;&j;" /></posts>'.encode(),
        "damaged, truncated",
    ),
    "truncated gzip": (
        gzip.compress((HEAD + '1,1,,1,"<p>x</p>",\n' * 2000).encode())[:-20],
        "damaged or truncated gzip",
    ),
    "gzip with a wrong checksum": (
        gzip.compress((HEAD + "1,1,,1,x,\n").encode())[:-8] + b"12345678",
        "damaged or truncated gzip",
    ),
    "damaged gzip": (b"\x1f\x8b\x08\x00" + b"\x01" * 50, "damaged or truncated gzip"),
    "truncated CSV": (f'{HEAD}1,1,,1,"<p>x'.encode(), "damaged or truncated CSV"),
    "Latin-1 CSV": (f"Caf\xe9,{HEAD}x,1,1,,1,x,\n".replace("Body", "Text").encode("latin-1"), "CSV in UTF-8"),
    "UTF-16 CSV": (f"{HEAD}1,1,,1,x,\n".encode("utf-16"), "CSV in UTF-8"),
    "no encoding": (
        f'<?xml version="1.0" encoding="hex"?><posts>{ROW}</posts>'.encode(),
        "convert it to UTF-8",
    ),
    "a column twice": (
        b"Id,PostTypeId,ParentId,Score,Body,Score\n1,1,,1,x,5\n",
        r"column Score twice \(columns 4 and 6\)",
    ),
    "a column twice but for case": (
        b"Id,PostTypeId,ParentId,Score,score ,Body\n1,1,,1,5,x\n",
        r"column Score and score twice \(columns 4 and 5\)",
    ),
    "another table first": (
        b"Id,CreationDate,Id,PostTypeId,ParentId,Score,Body\n9,,1,1,,5,x\n",
        r"column Id twice \(columns 1 and 3\)",
    ),
    "a column of another table between": (
        b"Id,PostTypeId,ParentId,Score,Body,CreationDate,Reputation,CreationDate\n1,1,,1,x,2009,7,2015\n",
        r"column CreationDate twice \(columns 6 and 8\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / "posts"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as refusal:
        list(iter_posts(path))
    assert "\n" not in str(refusal.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        list(iter_posts(tmp_path / "none.xml"))
    with pytest.raises(InputError, match="is not a file"):
        list(iter_posts(tmp_path))


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
        posts = list(iter_posts(path, dropped, bad))
    assert [(p.id, p.parent, p.votes, p.author_id) for p in posts] == [(62, 0, 3, "9"), (63, 62, -2, "")]
    assert dropped == {"post types other than question and answer": 1}
    assert bad.rows == 8
    written = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["file"], line["row"], line["reason"]) for line in written] == [
        ("Posts.csv", 3, "rows without ParentId"),
        ("Posts.csv", 4, "rows whose Id is out of range"),
        ("Posts.csv", 5, "rows whose Score is no whole number"),
        ("Posts.csv", 6, "rows with more or fewer fields than the header"),
        ("Posts.csv", 8, "rows without PostTypeId"),
    ]


def read(path: Path, content: bytes | str) -> tuple[list[Post], Counter[str]]:
    """Return the posts of a file with this content, and why how many rows cannot be read."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    bad = Quarantine()
    return list(iter_posts(path, Counter(), bad)), bad.reasons


@pytest.mark.parametrize(
    "header",
    [
        "{},Id,Reputation,CreationDate,DisplayName",
        "\ufeff{},id,Reputation,creationdate,DisplayName",
        " {} ,ID,a,b,c",
    ],
)
def test_of_a_joined_table_the_posts_own_columns_are_read(tmp_path: Path, header: str) -> None:
    """As Data Explorer writes `select * from Posts join Users`."""
    own = "Id,PostTypeId,ParentId,CreationDate,Score,Body,OwnerUserId"
    text = (
        header.format(own)
        + "\n1,1,,2015,3,question,5,5,100,2009,me\n2,2,1,2016,9,answer,49,49,101,2010,you\n"
    )
    posts, reasons = read(tmp_path / "QueryResults.csv", text)
    assert [(p.id, p.parent, p.created, p.author_id) for p in posts] == [
        (1, 0, "2015", "5"),
        (2, 1, "2016", "49"),
    ]
    assert reasons == {}


def test_columns_are_known_whatever_the_case_of_their_names(tmp_path: Path) -> None:
    posts, _ = read(tmp_path / "Posts.csv", "\ufeff\ufeffid, posttypeid ,PARENTID,Score,body\n7,1,,3,x\n")
    assert [(p.id, p.votes, p.body) for p in posts] == [(7, 3, "x")]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_spreadsheets_and_bigquery_spell_columns_otherwise(tmp_path: Path, mark: str) -> None:
    header = mark.join(("id", "body", "creation_date", "owner_user_id", "parent_id", "post_type_id", "score"))
    row = mark.join(("7", '"x, y; z\t1"', "2020", "3", "", "1", "5"))
    posts, reasons = read(tmp_path / "Posts.csv", f"{header}\n{row}\n")
    assert [(p.id, p.votes, p.body, p.author_id) for p in posts] == [(7, 5, "x, y; z\t1", "3")]
    assert reasons == {}


@pytest.mark.parametrize(
    "nothing", ["NULL", "null", "NA", "N/A", r"\N", "nan", "NaN", "None", "<NA>", " NULL ", ""]
)
def test_nothing_is_spelled_in_many_ways(tmp_path: Path, nothing: str) -> None:
    columns = (
        "Id,PostTypeId,AcceptedAnswerId,ParentId,CreationDate,Score,Body,OwnerUserId,OwnerDisplayName,Title"
    )
    rows = [
        "1,1,0,0,0,3,<p>q</p>,0,0,0",
        "2,2,0,1,2015,9,<p>a</p>,0,me,0",
        "3,2,0,0,0,1,x,0,0,0",
        "4,2,0,1,0,0,0,7,0,0",
        "5,1,0,0,0,0,x,0,0,0",
    ]
    text = (
        columns
        + "\n"
        + "\n".join(",".join(nothing if value == "0" else value for value in row.split(",")) for row in rows)
    )
    posts, reasons = read(tmp_path / "Posts.csv", text)
    assert [post._replace(licence="") for post in posts] == [
        Post(1, 0, 0, 3, "", "", "<p>q</p>", "", "", ""),
        Post(2, 1, 0, 9, "2015", "", "<p>a</p>", "", "me", ""),
    ]
    assert reasons == {"rows without ParentId": 1, "rows without Score": 2}
    assert author_url(posts[0], "a.example") == ""


def test_words_that_only_begin_like_nothing_stay(tmp_path: Path) -> None:
    posts, _ = read(
        tmp_path / "Posts.csv",
        "Id,PostTypeId,ParentId,Score,Body,Title,OwnerDisplayName\n1,1,,3,NULL?,NA na,Nan B\n",
    )
    assert [(p.title, p.body, p.author_name) for p in posts] == [("NA na", "NULL?", "Nan B")]


def test_an_author_without_a_number_has_no_page(tmp_path: Path) -> None:
    rows = "".join(
        f"{n},1,,3,x,{author}\n" for n, author in enumerate(["NA", "me", "5.0", "-1", "?", "1;2"], 1)
    )
    posts, _ = read(tmp_path / "Posts.csv", HEAD + rows)
    assert [author_url(post, "a.example").removeprefix("https://a.example/users/") for post in posts] == [
        "",
        "",
        "5",
        "-1",
        "",
        "",
    ]


XML_ROW = '<row Id="{}" PostTypeId="1" Score="1" Body="{}" />'
# what one row holds -> its text as read, or the reason why it is not
ODD_TEXTS: dict[bytes, str] = {
    b"a&#x0E;b": "ab",
    b"a&#0;b&#x1F;": "ab",
    b"a&#00014;b": "ab",
    b"a&#xD800;b": "ab",
    b"a&#xFFFE;&#xFFFF;&#x110000;b": "ab",
    b"a&#xD83D;&#xDE00;b&#xDE00;": "a\N{GRINNING FACE}b",
    b"a\x0e\0\x1bb": "ab",
    b"a\xef\xbf\xbfb": "ab",
    b"a&#x9;&#xA;&#13;&lt;&amp;#x0E;b&#x0E;": "a\t\n\r<&#x0E;b",
    b"a\xff\xfeb": "rows with bytes that are not UTF-8",
    b"caf\xe9": "rows with bytes that are not UTF-8",
    b"a & b": "rows that are not well-formed XML",
    b"a&nbsp;b": "rows that are not well-formed XML",
    b"a < b": "rows that are not well-formed XML",
    b'a" b="': "ab",
    b'a" Id="3': "rows that are not well-formed XML",
    b"a&#99999999999999999999;b": "rows that are not well-formed XML",
}


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize(
    "begin",
    [b"<posts>", b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-16"?>\n<!-- <a> -->\n<posts xmlns="u">\n'],
)
def test_one_odd_row_of_xml_costs_no_more_than_itself(tmp_path: Path, text: bytes, begin: bytes) -> None:
    rows = b"\n".join(
        XML_ROW.encode().replace(b"{}", b"%d", 1).replace(b"{}", b"%b") % (n, text if n == 2 else b"x")
        for n in (1, 2, 3)
    )
    posts, reasons = read(tmp_path / "Posts.xml", begin + rows + b"\n</posts>")
    expected = ODD_TEXTS[text]
    if expected.startswith("rows"):
        assert [post.id for post in posts] == [1, 3]
        assert reasons == {expected: 1}
    else:
        assert [post.body for post in posts] == ["x", expected if b'"' not in text else "a", "x"]
        assert reasons == {}


def test_a_row_that_is_cut_in_the_middle_of_a_dump_costs_itself_and_a_cut_dump_is_refused(
    tmp_path: Path,
) -> None:
    rows = [XML_ROW.format(n, "x") for n in (1, 2, 3)]
    posts, reasons = read(tmp_path / "Posts.xml", f"<posts>{rows[0]}{rows[1][:30]}\n{rows[2]}</posts>")
    assert ([post.id for post in posts], reasons) == ([1, 3], {"rows that are not well-formed XML": 1})
    for text in (
        f"<posts>{rows[0]}&#x0E;{rows[1][:30]}",
        f"<posts>{rows[0]}<row Id='2' Body='&#x0E;' />",
        f"<posts>{rows[0]}</pos",
    ):
        with pytest.raises(InputError, match="damaged, truncated"):
            read(tmp_path / "Posts.xml", text)


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [
        *(
            ("utf-16", "utf-16"),
            ("utf-16-le", "utf-16"),
            ("utf-16-be", "UTF-16"),
            ("iso-8859-1", "ISO-8859-1"),
        ),
        *(("windows-1252", "windows-1252"), ("us-ascii", "us-ascii")),
    ],
)
def test_other_encodings_of_xml_are_read_with_their_odd_rows(
    tmp_path: Path, encoding: str, declared: str
) -> None:
    letter = "&#233;" if encoding == "us-ascii" else "é"
    rows = "\n".join(XML_ROW.format(n, f"x{letter}&#x0E;") for n in range(1, 4))
    text = f'<?xml version="1.0" encoding="{declared}"?>\n<posts>{rows}</posts>'
    posts, _ = read(tmp_path / "Posts.xml", text.encode(encoding))
    assert [post.body for post in posts] == ["xé"] * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"a\x0e\0\x1bb", "ab"), (b"caf\xc3\xa9", "café"), (b"caf\xe9", ""), (b"\xed\xa0\xbd", "")],
)
def test_one_odd_row_of_a_csv_costs_no_more_than_itself(tmp_path: Path, text: bytes, expected: str) -> None:
    posts, reasons = read(
        tmp_path / "Posts.csv", HEAD.encode() + b"1,1,,1,x,\n2,1,,1,%b,\n\n3,1,,1,x,\n" % text
    )
    assert [post.body for post in posts] == ["x", expected, "x"] if expected else ["x", "x"]
    assert reasons == ({} if expected else {"rows with bytes that are not UTF-8": 1})


def test_odd_rows_do_not_depend_on_how_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text.decode("latin-1") for text in ODD_TEXTS] * 20
    content = (
        "<posts>" + "\n".join(XML_ROW.format(n, text) for n, text in enumerate(texts, 1)) + "</posts>"
    ).encode("latin-1")
    whole = read(tmp_path / "Posts.xml", content)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(dump_xml, "HEAD", 200)
    assert read(tmp_path / "Posts.xml", content) == whole


def test_a_user_whose_row_is_odd_costs_no_more_than_that_name(tmp_path: Path) -> None:
    row = '<row Id="{}" DisplayName="{}" />'
    (tmp_path / "Users.xml").write_text(
        "<users>"
        + "".join(row.format(n, name) for n, name in enumerate(["A&#x0E;da", "B & C", "Eve"], 1))
        + "</users>"
    )
    assert [read_user_names(block) for block in iter_blocks(tmp_path / "Users.xml", USERS)] == [
        [(1, "Ada"), (3, "Eve")]
    ]
    (tmp_path / "Users.csv").write_bytes(
        b"Id,DisplayName,Reputation\n1.0,Ada,1\n2,NULL,1\n3,E\x01ve,1\n4,caf\xe9,1\n"
    )
    assert [read_user_names(block) for block in iter_blocks(tmp_path / "Users.csv", USERS)] == [
        [(1, "Ada"), (3, "Eve")]
    ]


def test_a_post_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "Posts.csv"
    path.write_text(f"{HEAD}1,1,,0,{'x' * 300_000},\n")
    assert [len(post.body) for post in iter_posts(path)] == [300_000]


def test_progress_is_in_bytes_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "Posts.xml"
    path.write_bytes(
        b"\xef\xbb\xbf<?xml version='1.0' encoding='utf-8'?>\r\n<posts>\r\n"
        + f"{ROW}\r\n".encode() * 5000
        + b"</posts>"
    )
    monkeypatch.setattr(blocks, "BLOCK_BYTES", path.stat().st_size // 3)
    size = path.stat().st_size
    done = [block.bytes_read for block in iter_blocks(path)]
    assert len(done) > 1
    assert sorted(done) == done
    assert 0 < done[0] <= done[-1] == size
