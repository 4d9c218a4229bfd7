"""The pages of the documentation, and the blocks of code, inline code and links in them.

A block of commands carries a comment on the line before it: `<!-- run -->`, or `<!-- not run: REASON -->`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.multiprocess import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md", "benchmarks/README.md")]
PAGES += [
    ROOT / "benchmarks/RESULTS.md",
    ROOT / "benchmarks/gpu/README.md",
    ROOT / "benchmarks/quality/PROTOCOL.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^ *```(\w*)$")
MARK = re.compile(r"<!-- (run|not run: .+) -->")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]*)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its mark if it has one, its language, its text."""

    page: Path
    line: int
    mark: str | None
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> Iterator[str]:
        """Return its command lines, continued ones joined; of a console those behind a prompt."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if self.language == "bash" and line.strip():
                yield line
            elif self.language == "console" and line.startswith("$ "):
                yield line.removeprefix("$ ")


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        number += 1
        if fence is not None:
            start = number
            while not FENCE.match(lines[number]):
                number += 1
            mark = MARK.fullmatch(lines[start - 2].strip()) if start > 1 else None
            yield Block(page, start, mark and mark[1], fence[1], "\n".join(lines[start:number]) + "\n")
            number += 1


def prose(page: Path) -> str:
    """Return a page without its blocks."""
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = FENCE.match(line) is not None
        kept.append("" if inside or fence else line)
        inside = inside != fence
    return "\n".join(kept)


def inline_code(page: Path) -> list[str]:
    return INLINE.findall(prose(page))


def links(page: Path) -> list[str]:
    """Return the targets of links that lead to no other host."""
    return LINK.findall(INLINE.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    return {_slug(heading) for heading in HEADING.findall(prose(page))}


def _slug(heading: str) -> str:
    plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower().strip())
    return re.sub(r" +", "-", plain)


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
