"""Hypothesis strategies: a valid file in; files like it that no program of ours has written out.

Bytes of any file are flipped, inserted, removed, repeated and cut off. Of files whose structure is
known, parts are also replaced by what a parser takes and a reader does not expect.
"""

import copy
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
DEEP = 100_000
"""Levels of nesting beyond what any parser's stack takes."""
LONG = 100_000
"""Characters of a text that no message can show."""

ODD_JSON = (
    "null", "true", "0", "-1", "1.5", "1e999", "-1e308", "NaN", "Infinity", str(2**63),
    str(-(2**63)), "9" * 400, "9" * 5000, '""', '"8"', f'"{"x" * LONG}"', r'"\ud800"', r'"\u0000"',
    r'"\u001b[31m[bold]{0}%s\n"', '"../../../etc/passwd"', "[]", "{}", "[null]", '[[["x"]]]',
    '{"": {"": {"": null}}}', "[" * DEEP + "]" * DEEP, "[" * 500 + "]" * 500, "[" * 60 + "]" * 60,
    '{"a":' * DEEP + "1" + "}" * DEEP, "{" + ",".join(f'"{n}": {n}' for n in range(200)) + "}",
    '{"((a|a)*)*!": 3, "(.*.*.*)*!": 3, "(": 3, "[[a]": 3}', "",
)  # fmt: skip
"""Values as they stand in a file; the last leaves a gap."""


def _bomb(first: str, repeat: str) -> str:
    """Return a list of 9 ** 9 items, written in a few hundred characters with YAML's aliases."""
    levels = [f"&b0 {first}"]
    levels += [f"&b{n} {repeat.format(*[f'*b{n - 1}'] * 9)}" for n in range(1, 10)]
    return f"[{', '.join(levels)}]"


ODD_YAML = (
    *ODD_JSON, "~", "no", "2001-99-99", "2001-01-01", "1:99:99", "0x" + "f" * 5000, "1_000", ".inf",
    ".nan", "'a: b'", "&it [*it]", "&it {a: *it}", "*missing", "{? [1]: 2}",
    "{1: 2, null: 3, true: 4}", "!!python/object/apply:os.system [exit]", "!!int x", "!!int ''",
    "!!float x", "!!bool maybe", "!!timestamp never", "!!binary '%'", "!!set [1]", "!!omap [1]",
    "!!null x", "!own x", "{<<: 1}",
    _bomb("[x, x]", "[{}, {}, {}, {}, {}, {}, {}, {}, {}]"),
    _bomb("{x: 1}", "{{a: {}, b: {}, c: {}, d: {}, e: {}, f: {}, g: {}, h: {}, i: {}}}"),
    _bomb("{x: 1}", "{{<<: [{}, {}, {}, {}, {}, {}, {}, {}, {}]}}"),
)  # fmt: skip
"""Values as they stand in YAML, whose flow style has all of JSON in it."""


def mutated_bytes(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy of contents that a broken disk, or an attacker, makes of a valid one."""

    @st.composite
    def mutate(draw: Draw) -> bytes:
        content = bytearray(valid)
        for _ in range(draw(st.integers(1, 4))):
            _edit_bytes(draw, content)
        return bytes(content)

    return mutate()


def mutated_json(valid: Any, odd: Sequence[str] = ODD_JSON) -> st.SearchStrategy[bytes]:
    """Return a strategy of JSON like a valid object's or list's: other values, keys, and bytes."""

    @st.composite
    def mutate(draw: Draw) -> bytes:
        value = copy.deepcopy(valid)
        for _ in range(draw(st.integers(1, 3))):
            places = [*_places(value)]
            if places:
                _edit_value(draw, *draw(st.sampled_from(places)), odd)
        return _written(value, odd)

    whole = mutate()
    return st.one_of(whole, whole.flatmap(mutated_bytes), mutated_bytes(_written(valid, odd)))


def mutated_lines(valid: Sequence[Mapping[str, Any]]) -> st.SearchStrategy[bytes]:
    """Return a strategy of JSON Lines like valid ones: other lines, fewer, repeated or moved."""
    texts = [_written(line, ODD_JSON) for line in valid]
    ends = st.sampled_from(
        [b"\n"] * 8 + [b"", b"\r\n", b"\n\n", b" \n", b"\x00\n", b"\x0c", b"}\n"]
    )

    @st.composite
    def mutate(draw: Draw) -> bytes:
        lines = list(texts)
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(lines) - 1)) if lines else 0
            edit = draw(st.sampled_from(["change", "change", "drop", "repeat", "move"]))
            if edit == "change":
                changed = draw(mutated_json(valid[place % len(valid)]))
                lines[place : place + 1] = [changed]
            elif edit == "drop":
                del lines[place : place + 1]
            else:
                line = lines[place : place + 1]
                if edit == "move":
                    del lines[place : place + 1]
                to = draw(st.integers(0, len(lines)))
                lines[to:to] = line
        return b"".join(line + draw(ends) for line in lines)

    return st.one_of(mutate(), mutated_bytes(b"".join(text + b"\n" for text in texts)))


def mutated_yaml(valid: Mapping[str, Any], text: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy of YAML like a valid mapping's, whose text in a file is given too."""
    return st.one_of(mutated_json(valid, ODD_YAML), mutated_bytes(text))


def mutated_safetensors(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy of safetensors files like a valid one: lies of lengths, types, places."""
    length = struct.unpack("<Q", valid[:8])[0]
    header, body = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    @st.composite
    def mutate(draw: Draw) -> bytes:
        described = copy.deepcopy(header)
        for _ in range(draw(st.integers(0, 2))):
            name = draw(st.sampled_from(names))
            if name in described:
                _edit_tensor(draw, described, name, header[name])
        text = _mostly(draw, _written(described, ODD_JSON), mutated_json(described))
        told = _mostly(draw, len(text), st.sampled_from(_lengths(len(text), len(valid))))
        rest = _mostly(draw, body, st.one_of(_floats(body), mutated_bytes(body)))
        return struct.pack("<Q", told) + text + rest

    return st.one_of(mutate(), mutated_bytes(valid))


def _edit_bytes(draw: Draw, content: bytearray) -> None:
    place = draw(st.integers(0, max(0, len(content) - 1)))
    match draw(st.sampled_from(["flip", "insert", "delete", "repeat", "cut", "overwrite"])):
        case "flip" if content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        case "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
        case "delete":
            del content[place : place + draw(st.integers(1, 16))]
        case "repeat":
            part = content[place : place + draw(st.integers(1, 64))]
            content[place:place] = part * draw(st.sampled_from([1, 1, 200]))
        case "cut":
            del content[place:]
        case "overwrite":
            numbers = [b"\x00" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\xff" * 8]
            number = draw(st.sampled_from(numbers))
            content[place : place + len(number)] = number


def _mostly(draw: Draw, usual: Any, others: st.SearchStrategy[Any]) -> Any:
    """Return what five in six files have, so that readers come to what follows, or another."""
    return draw(others) if draw(st.integers(0, 5)) == 5 else usual


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each value inside another as its container and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _edit_value(draw: Draw, inside: Any, key: Any, odd: Sequence[str]) -> None:
    edits = ["replace", "replace", "replace", "remove", "add", "wrap", "negate"]
    match draw(st.sampled_from(edits)):
        case "replace":
            inside[key] = draw(_mark(odd))
        case "remove":
            del inside[key]
        case "add" if isinstance(inside, dict):
            names = ["", "extra", "__class__", "r", "\ud800", "x" * LONG]
            inside[draw(st.sampled_from(names))] = draw(_mark(odd))
        case "add":
            inside.append(draw(_mark(odd)))
        case "wrap":
            value = inside[key]
            inside[key] = draw(st.sampled_from([[value], {"x": value}, [value] * 3]))
        case "negate" if isinstance(inside[key], int | float):
            change = draw(st.sampled_from([-1, 0, 1e-300, 2, 10**6, 10**12]))
            inside[key] = type(inside[key])(inside[key] * change)


def _mark(odd: Sequence[str]) -> st.SearchStrategy[str]:
    """Return a strategy of stand-ins for odd values, which are put in when all is written."""
    return st.sampled_from(range(len(odd))).map(lambda number: f"<odd {number}>")


def _written(value: Any, odd: Sequence[str]) -> bytes:
    text = json.dumps(value)
    for number, raw in enumerate(odd):
        text = text.replace(f'"<odd {number}>"', raw)
    return text.encode("utf-8")


def _lengths(true: int, whole: int) -> list[int]:
    """Return lies about the length of a header of `true` bytes."""
    lies = [0, 1, true - 1, true + 1, whole - 8, whole, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1]
    return [lie for lie in lies if lie >= 0]


DTYPES = (
    "F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "F6_E2M3", "F6_E3M2", "F4", "C64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL",
    "F128", "f32", "",
)  # fmt: skip
"""What safetensors files may say of a tensor's numbers, and some that none may."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
"""Bytes of a number."""


def _edit_tensor(draw: Draw, header: dict[str, Any], name: str, true: Mapping[str, Any]) -> None:
    tensor, shape, (begin, end) = header[name], true["shape"], true["data_offsets"]
    edits = ["retype", "reshape", "view", "view", "move", "rename", "forget"]
    match draw(st.sampled_from(edits)):
        case "retype":
            tensor["dtype"] = draw(st.sampled_from(DTYPES))
        case "reshape":
            shapes = (
                [], [0], [0, 2**62], [2**63, 2], [2**32, 2**32], [-1, 4], [1] * 70, [10**9, 10**9],
                shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)],
            )  # fmt: skip
            tensor["shape"] = draw(st.sampled_from(shapes))
        case "view":  # the same bytes as numbers of another type, in a shape that fits them
            dtype = draw(st.sampled_from(sorted(SIZES)))
            columns = (end - begin) // SIZES[dtype] // shape[0]
            header[name] |= {"dtype": dtype, "shape": [shape[0], columns]}
        case "move":
            places = (
                [begin, begin], [end, begin], [begin - 4, end - 4], [begin + 1, end + 1],
                [0, end - begin], [-4, end - begin - 4], [begin, 2**63],
                [2**63, 2**63 + end - begin], [2**64 - 4, 4], [begin], [begin, end, end],
                [0.5, 1.5], ["0", "4"],
            )  # fmt: skip
            tensor["data_offsets"] = list(draw(st.sampled_from(places)))
        case "rename":
            half = name.partition(".lora_")[2]
            ends = (f"x.lora_{half}", f".lora_{half}", f"{'x' * 9999}.lora_{half}", "",
                    f"\x00\x1b[31m[bold].lora_{half}", f"a.²3.lora_{half}", "x",
                    f"{'9' * 5000}.lora_{half}", f"{'9.' * 9}lora_{half}", f"\n.lora_{half}",
                    "x.lora_magnitude_vector")  # fmt: skip
            header[draw(st.sampled_from(ends))] = header.pop(name)
        case "forget":
            del header[name]


def _floats(body: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy of the numbers of a file with some, or all, at the edge of float32."""
    edges = [float("nan"), float("inf"), 3.4e38, -3.4e38, 1e-45, 0.0, -0.0, 1e20]
    patterns = [struct.pack("<f", edge) for edge in edges]
    patterns += [b"\xff\xff\xef\x7f", struct.pack("<d", 1e300)[4:]]

    @st.composite
    def mutate(draw: Draw) -> bytes:
        pattern = draw(st.sampled_from(patterns))
        if draw(st.booleans()):
            return pattern * (len(body) // 4)
        content = bytearray(body)
        for _ in range(draw(st.integers(1, 8))):
            place = 4 * draw(st.integers(0, len(body) // 4 - 1))
            content[place : place + 4] = pattern
        return bytes(content)

    return mutate()
