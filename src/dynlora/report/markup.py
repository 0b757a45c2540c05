"""Build HTML and SVG as element trees, which escape all text from files."""

from xml.etree import ElementTree as ET

Node = ET.Element
Content = Node | str


def node(tag: str, *content: Content, **attributes: object) -> Node:
    """Return an element.

    Args:
        tag: Name of the element.
        *content: Child texts and elements.
        **attributes: Attributes; `class_` becomes `class`, other `_` become hyphens, floats have at
            most two decimals.
    """
    element = ET.Element(tag, {_key(key): _value(value) for key, value in attributes.items()})
    for item in content:
        append(element, item)
    return element


def append(element: Node, item: Content) -> None:
    """Append a text or an element to an element's content."""
    if isinstance(item, str):
        if len(element):
            element[-1].tail = (element[-1].tail or "") + item
        else:
            element.text = (element.text or "") + item
    else:
        element.append(item)


def to_html(element: Node) -> str:
    """Return an element as HTML; content of an `svg` is also valid XML."""
    return ET.tostring(element, encoding="unicode", method="html")


def figure(title: str, description: str, width: float, height: float, key: str) -> Node:
    """Return an empty drawing with a title and a description for screen readers.

    Args:
        title: Short name of the drawing.
        description: Content of the drawing in words.
        width: In CSS pixels.
        height: In CSS pixels.
        key: Prefix of the element ids, unique in the page.
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
