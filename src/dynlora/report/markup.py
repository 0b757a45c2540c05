"""HTML and SVG as trees, so that whatever a file holds is escaped by construction."""

from xml.etree import ElementTree as ET

Node = ET.Element
Content = Node | str


def node(tag: str, *content: Content, **attributes: object) -> Node:
    """Return an element.

    Args:
        tag: Name of the element.
        *content: Texts and elements in it.
        **attributes: Its attributes: `class_` is `class`, any other `_` a hyphen; lengths are
            written with one decimal at most.
    """
    element = ET.Element(tag, {_key(key): _value(value) for key, value in attributes.items()})
    for item in content:
        append(element, item)
    return element


def append(element: Node, item: Content) -> None:
    """Put a text or an element at the end of another's content."""
    if isinstance(item, str):
        if len(element):
            element[-1].tail = (element[-1].tail or "") + item
        else:
            element.text = (element.text or "") + item
    else:
        element.append(item)


def to_html(element: Node) -> str:
    """Return an element as HTML; what is inside an `svg` is XML too."""
    return ET.tostring(element, encoding="unicode", method="html")


def figure(title: str, description: str, width: float, height: float, key: str) -> Node:
    """Return an empty drawing that says in words what it shows.

    Args:
        title: What it is.
        description: What it says, for a reader who cannot see it.
        width: In CSS pixels.
        height: In CSS pixels.
        key: Unique in the page; the elements that name the drawing are called after it.
    """
    return node(
        "svg",
        node("title", title, id=f"{key}-title"),
        node("desc", description, id=f"{key}-desc"),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=round(width),
        height=round(height),
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )


def _key(key: str) -> str:
    return key.removesuffix("_").replace("_", "-")


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
