"""Read a YAML mapping together with the line of each key. What it cannot be is refused with its line and the rule.

Words are read as YAML 1.2 reads them, which is as people mean them: `no`, `on` and `2024-01-31` are text, `010` is ten,
`1:30` is text. So are numbers: `5e-4` is one, and so are `1_000`, `0x10` and `.5`; where a key holds text, they are the
words that they are written as.
"""

import re
from collections.abc import Hashable, Iterator
from pathlib import Path as FilePath
from typing import Any, ClassVar

import yaml

from malora_dist.config.base import WrittenFloat, WrittenInt
from malora_dist.config.problems import Path, Problem, raise_all
from malora_dist.errors import ConfigError, brief, short

TAG = "tag:yaml.org,2002:"
DIGITS = "[0-9](?:_?[0-9])*"
# The kinds of a word that is not quoted: pattern, and the letters it may begin with.
KINDS: dict[str, tuple[str, list[str]]] = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (rf"[-+]?(?:{DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+)", [*"-+0123456789"]),
    "float": (
        rf"[-+]?(?:(?:{DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
        [*"-+0123456789."],
    ),
    "merge": ("<<", ["<"]),
}
# More than any recipe has; aliases of aliases grow without a bound.
MOST_VALUES, DEEPEST, MOST_DIGITS = 100_000, 100, 300
# What no file name, name of a task or template can have.
CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")

COMMENT = re.compile(r"(?<!\S)#")


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return the kinds of words, by the letter they begin with, as PyYAML looks them up."""
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, (pattern, letters) in KINDS.items():
        for letter in letters:
            found.setdefault(letter, []).append((f"{TAG}{kind}", re.compile(rf"(?:{pattern})\Z")))
    return found


def _number(loader: yaml.SafeLoader, node: yaml.Node) -> WrittenInt | WrittenFloat:
    text = _word(node)
    number = text.replace("_", "").lower()
    kind = int if node.tag == f"{TAG}int" else float
    if not re.fullmatch(KINDS[kind.__name__][0], text):
        raise _refused(f"{short(text)} is no {'whole ' if kind is int else ''}number", node.start_mark)
    if len(text) > MOST_DIGITS:
        raise _refused(f"{short(text)} is a number of more than {MOST_DIGITS} digits", node.start_mark)
    value: WrittenInt | WrittenFloat
    if kind is int:
        value = WrittenInt(int(number, 0) if number.lstrip("-+")[:2] in ("0x", "0o") else int(number))
    else:
        value = WrittenFloat(number.replace(".inf", "inf").replace(".nan", "nan"))
    value.word = text
    return value


def _text(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    # JSON writes one character beyond 16 bits as two escapes.
    text = _word(node).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    found = CONTROL.search(text)
    if found is not None:
        raise _refused(f"text must not hold the character {found[0]!a}", node.start_mark)
    return text


def _truth(loader: yaml.SafeLoader, node: yaml.Node) -> bool:
    text = _word(node)
    if not re.fullmatch(KINDS["bool"][0], text):
        raise _refused(f"{short(text)} must be true or false", node.start_mark)
    return text.lower() == "true"


def _null(loader: yaml.SafeLoader, node: yaml.Node) -> None:
    text = _word(node)
    if not re.fullmatch(KINDS["null"][0], text):
        raise _refused(f"{short(text)} is not null", node.start_mark)


def _unknown(loader: yaml.SafeLoader, node: yaml.Node) -> None:
    raise _refused(f"the tag {short(node.tag.replace(TAG, '!!'))} is not allowed in a recipe", node.start_mark)


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader for text, numbers, true and false, null, lists and mappings, and for nothing else."""

    yaml_implicit_resolvers = _resolvers()
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        f"{TAG}null": _null,
        f"{TAG}bool": _truth,
        f"{TAG}int": _number,
        f"{TAG}float": _number,
        f"{TAG}str": _text,
        f"{TAG}seq": yaml.SafeLoader.construct_yaml_seq,
        f"{TAG}map": yaml.SafeLoader.construct_yaml_map,
        None: _unknown,
    }

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping whose keys are the words as written, whatever they would be as values."""
        if not isinstance(node, yaml.MappingNode):
            raise _refused("!!map must stand before keys with their values", node.start_mark)
        self.flatten_mapping(node)
        return {_text(self, key): self.construct_object(value, deep=deep) for key, value in node.value}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > DEEPEST:
            raise _refused(f"is nested more than {DEEPEST} deep", self.peek_event().start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes all text that some reader of YAML, ours or another, would take for something else."""

    yaml_implicit_resolvers = {
        first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *ours]
        for first, ours in {
            **dict.fromkeys(yaml.SafeDumper.yaml_implicit_resolvers, ()),
            **RecipeLoader.yaml_implicit_resolvers,
        }.items()
    }


def read_yaml(path: str | FilePath) -> tuple[dict[str, Any], dict[Path, int]]:
    """Read a file that holds a mapping; return it, and the line (from 1) of each key by its path.

    Raises ConfigError when the file is missing, is no valid YAML, is no mapping, or holds a key twice.
    """
    try:
        text = FilePath(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}: line {line}: is not text in UTF-8 (byte {error.object[error.start]:#x})") from error
    except ValueError as error:
        raise ConfigError(f"cannot read the recipe {path!r}: {error}") from error
    data, lines, twice = _read(text, f"{path}: ")
    raise_all(twice, str(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold sections (model:, adapter:, data:, ...), not a {type(data).__name__}")
    return data, lines


def parse_value(text: str, key: str) -> Any:
    """Parse the value of the command-line override of a key, as YAML reads it.

    Raises ConfigError if it is no value, or if a part of it would be left out as a comment.
    """
    where = f"--{brief(key)}={short(text)}"
    value, comment = read_yaml_text(text, where), COMMENT.search(text)
    if comment is not None and _is_left_out(text, comment.start(), value):
        raise ConfigError(
            f"{where}: {short(text[comment.start() :])} is a comment in YAML; write the value in quotes of its own "
            "within those of the shell"
        )
    return value


def _is_left_out(text: str, start: int, value: Any) -> bool:
    try:
        return bool(read_yaml_text(text[:start], "") == value)
    except ConfigError:
        return False


def read_yaml_text(text: str, where: str) -> Any:
    """Return the value of a YAML text, None if it is empty. Raises ConfigError, which names `where`, as `read_yaml`."""
    data, _, twice = _read(text, f"{where}: ")
    raise_all(twice, where)
    return data


def _read(text: str, where: str) -> tuple[Any, dict[Path, int], list[Problem]]:
    """Return the value of a YAML text, None if it is empty, the lines of its keys, and those that are given twice.

    Raises ConfigError, one line that begins with `where`, for what is no YAML and for what no recipe may hold.
    """
    try:
        loader = RecipeLoader(text)
        try:
            node = loader.get_single_node()
            lines, twice = _lines_and_duplicates(node)
            return None if node is None else loader.construct_document(node), lines, twice
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}{_in_words(error, text)}") from error


def _in_words(error: Exception, text: str) -> str:
    """Describe what YAML refuses, in one line, with the line of the file."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position if isinstance(error.position, int) else 0) + 1
        return f"line {line}: is not valid YAML: the character {chr(error.character)!a} must not be there"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    if isinstance(error, _Refused):
        return f"{where}{error.problem}"
    said = " ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None)))) or str(error)
    return f"{where}is not valid YAML: {' '.join(said.split())}"


class _Refused(yaml.MarkedYAMLError):
    """What is YAML, and nothing that a recipe may hold."""


def _refused(problem: str, mark: yaml.Mark | None) -> _Refused:
    return _Refused(problem=problem, problem_mark=mark)


def _word(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _refused(f"{node.tag.replace(TAG, '!!')} must stand before a single word", node.start_mark)
    return str(node.value)


def _lines_and_duplicates(root: yaml.Node | None) -> tuple[dict[Path, int], list[Problem]]:
    lines: dict[Path, int] = {}
    twice: list[Problem] = []
    for path, node in _walk(root, ()) if root is not None else ():
        lines.setdefault(path, node.start_mark.line + 1)
        if len(lines) > MOST_VALUES:
            raise _refused(f"holds more than {MOST_VALUES:,} values, counting those of aliases", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            twice += _duplicates(node, path)
    return {path: line for path, line in lines.items() if path}, twice


def _walk(node: yaml.Node, path: Path) -> Iterator[tuple[Path, yaml.Node]]:
    """Yield every node with its path; a mapping's key comes before its value, whose line is then that of the key."""
    if len(path) > DEEPEST:
        raise _refused("contains itself through an alias", node.start_mark)
    yield path, node
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*path, index))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, _name(key)), key
            yield from _walk(value, (*path, _name(key)))


def _name(key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise _refused("a key must be a single word", key.start_mark)
    return str(key.value)


def _duplicates(node: yaml.MappingNode, path: Path) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        name, line = _name(key), key.start_mark.line + 1
        if name in seen and name != "<<":
            yield Problem((*path, name), f"is set twice, first on line {seen[name]}", line=line)
        seen.setdefault(name, line)
