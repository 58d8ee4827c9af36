"""Parse a page into its tags and its text."""

from html.parser import HTMLParser

VOID = {"meta", "wbr"}  # elements that have no end tag


class Tags(HTMLParser):
    """Every opened tag with its attributes, the tags that are still open, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""  # with a space for every tag
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append((tag, dict(attrs)))
        self.text += "" if tag == "wbr" else " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    @property
    def words(self) -> str:
        """Return the text with single spaces."""
        return " ".join(self.text.split()).replace(" ,", ",")
