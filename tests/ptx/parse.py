"""Reads PTX as nvcc writes it: functions, their parameters and statements, variables of the module."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

STATEMENT = re.compile(
    r"\s*(?:(?P<brace>[{}])|\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*|(?P<label>[$\w]+):(?!:)|(?P<text>[^{};:\s][^;]*);)",
)
DECLARATION = re.compile(r"\.(?:[busf])(?P<bits>\d+)\s+(?P<name>[\w$.]+)\s*(?P<array>\[(?P<count>\d*)\])?\s*$")


@dataclass
class Variable:
    """A parameter, or an array in some memory; `size` is 0 where the launch decides."""

    name: str
    size: int
    align: int


@dataclass
class Statement:
    """One instruction or directive, a label ("name:"), or a brace; and the line of the source that it came from."""

    text: str
    place: tuple[str, int]


@dataclass
class Function:
    """What a kernel or a function of the device says."""

    name: str
    is_kernel: bool
    results: list[Variable]
    parameters: list[Variable]
    statements: list[Statement]


@dataclass
class Module:
    """One file."""

    functions: list[Function] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)  # outside of functions
    constants: list[tuple[Variable, str]] = field(default_factory=list)  # with the bytes that they hold, as written


def split(text: str) -> list[str]:
    """The parts between commas that no bracket holds."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def variable(text: str) -> Variable:
    """Of a declaration such as `.param .align 8 .b8 name[16]`."""
    found = DECLARATION.search(text)
    if not found:
        raise ValueError(f"not a declaration: {text}")
    width = int(found["bits"]) // 8
    align = re.search(r"\.align (\d+)", text)
    count = int(found["count"] or 0) if found["array"] else 1
    return Variable(found["name"], width * count, int(align[1]) if align else width)


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    pair = {"(": ")", "{": "}"}[text[start]]
    depth = 0
    for found in re.compile(f"[{re.escape(text[start] + pair)}]").finditer(text, start):
        depth += 1 if found[0] == text[start] else -1
        if not depth:
            return found.start()
    raise ValueError("a bracket is not closed")


def bracketed(text: str, start: int) -> tuple[str, int]:
    """What stands in the brackets that open at `start`, and where they end."""
    end = closing(text, start)
    return text[start + 1 : end], end + 1


def statements(body: str, files: dict[str, str]) -> Iterator[Statement]:
    """Of the body of a function, in order."""
    at, place = 0, ("", 0)
    while found := STATEMENT.match(body, at):
        at = found.end()
        if found["file"]:
            place = (files.get(found["file"], ""), int(found["line"]))
        elif found["label"]:
            yield Statement(found["label"] + ":", place)
        elif found["brace"] or not found["text"].startswith(".pragma"):
            yield Statement(found["brace"] or re.sub(r"\s+", " ", found["text"]), place)
    if body[at:].strip():
        raise ValueError(f"not PTX as nvcc writes it: {body[at : at + 80]!r}")


def function(text: str, start: int, files: dict[str, str]) -> tuple[Function | None, int]:
    """The function whose `.func` or `.entry` stands at `start`, None where it is only declared, and where it ends."""
    is_kernel = text.startswith(".entry", start)
    at = start + len(".entry" if is_kernel else ".func")
    at = re.compile(r"\s*").match(text, at).end()
    results: list[Variable] = []
    if text[at] == "(":
        inside, at = bracketed(text, at)
        results = [variable(part) for part in split(inside)]
    name = re.compile(r"\s*([\w$]+)\s*").match(text, at)
    at, parameters = name.end(), []
    if text[at] == "(":
        inside, at = bracketed(text, at)
        parameters = [variable(part) for part in split(inside)]
    brace, semicolon = text.find("{", at), text.find(";", at)
    if 0 <= semicolon < brace or brace < 0:
        return None, semicolon + 1
    body, at = bracketed(text, brace)
    return Function(name[1], is_kernel, results, parameters, list(statements(body, files))), at


def parse(text: str) -> Module:
    """All of a file."""
    files = {number: path.rsplit("/", 1)[-1] for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.MULTILINE)}
    text = re.sub(
        r"//[^\n]*|/\*.*?\*/|^\s*\.(?:version|target|address_size|file)\b[^\n]*", "", text, flags=re.DOTALL | re.MULTILINE
    ).rstrip()
    module, at = Module(), 0
    while at < len(text):
        at = re.compile(r"\s*(?:\.(?:visible|weak|extern|common)\s+)*").match(text, at).end()
        if text.startswith((".func", ".entry"), at):
            found, at = function(text, at, files)
            if found:
                module.functions.append(found)
        elif text.startswith(".section", at):
            at = closing(text, text.index("{", at)) + 1
        else:
            end = text.index(";", at)
            declaration, _, value = text[at:end].partition("=")
            if ".shared" in declaration:
                module.shared.append(variable(declaration))
            else:
                module.constants.append((variable(declaration.strip()), value.strip(" {}\n")))
            at = end + 1
    return module
