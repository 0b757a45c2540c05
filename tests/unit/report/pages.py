"""A page as a parser sees it: elements, attributes and text, and whether all tags are closed."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr"}


@dataclass
class Seen:
    """What is in a page."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""
    open: list[str] = field(default_factory=list)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of each element of a kind."""
        return [attributes for found, attributes in self.tags if found == tag]


def parse_page(html: str) -> Seen:
    """Parse a page; a tag that is closed twice, or not at all, fails."""
    seen = Seen()

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.tags.append((tag, dict(attrs)))
            if tag not in VOID:
                seen.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert seen.open.pop() == tag

        def handle_data(self, data: str) -> None:
            if not seen.open or seen.open[-1] != "style":
                seen.text += data + "\n"

    parser = Parser()
    parser.feed(html)
    parser.close()
    assert seen.open == []
    return seen
