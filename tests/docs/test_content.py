"""What the documentation names exists: keys of recipes, recipes, imports, links, paths, messages."""

import ast
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from malora_dist.bench.quality.suite import load_suite
from malora_dist.config import load_config
from malora_dist.config.names import canonical_key, section_of
from malora_dist.config.schema import RunConfig
from tests.docs import generated
from tests.docs.pages import ALL_BLOCKS, PAGES, Block, anchors, inline_code, links, prose
from tests.multiprocess import ROOT

SECTIONS = [name for name in RunConfig.model_fields if section_of(RunConfig, name) is not None]
KEY = re.compile(rf"((?:{'|'.join(SECTIONS)})\.[a-z_0-9.]+)(?:[:=].*)?")
FILE_SUFFIXES = ("json", "jsonl", "log", "py", "safetensors", "sh", "yaml")
# The least that makes a part of a recipe one that loads.
LEAST: dict[str, Any] = {"model": {"name_or_path": "a/b"}, "data": {"tasks": [{"name": "t", "train": "t.jsonl"}]}}
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:py|md|sh|yaml|html)|(?:tests|docs|benchmarks|malora_dist)(?:/[\w.-]+)+")
PLACES = (ROOT, ROOT / "malora_dist", ROOT / "tests", ROOT / "docs", ROOT / "benchmarks")
OF_A_RUN = ("report/index.html", "site/index.html", "venv/", "bin/")
MESSAGES = ROOT / "docs" / "troubleshooting.md"
ROW = re.compile(r"^\| (`.*`) \| .* \|$", re.MULTILINE)
of_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def is_key(name: str) -> bool:
    """Whether a recipe has the key, those of a task under data.tasks or data.tasks.NAME."""
    section: Any = RunConfig
    parts = name.rstrip(".").split(".")
    for place, part in enumerate(parts):
        key = canonical_key(section, part)
        if key is None:
            return parts[:2] == ["data", "tasks"] and place == 2 and is_key(".".join(parts[:2] + parts[3:]))
        section = section_of(section, key)
        if section is None:
            return place == len(parts) - 1
    return True


@of_page
def test_keys_of_recipes_exist(page: Path) -> None:
    for code in inline_code(page):
        found = KEY.fullmatch(code)
        if found is not None and found[1].rpartition(".")[2] not in FILE_SUFFIXES and "layers" not in code:
            assert is_key(found[1]), f"{code} is no key of a recipe"


@pytest.mark.parametrize("block", [b for b in ALL_BLOCKS if b.language == "yaml" and b.mark is None], ids=str)
def test_recipes_and_suites_are_valid(block: Block, tmp_path: Path) -> None:
    if "methods:" in block.text.splitlines():
        (tmp_path / "suite.yaml").write_text(block.text, encoding="utf-8")
        load_suite(tmp_path / "suite.yaml")
        return
    recipe = LEAST | yaml.safe_load(block.text)
    assert set(recipe) <= set(RunConfig.model_fields)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    load_config(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("block", [b for b in ALL_BLOCKS if b.language == "python"], ids=str)
def test_imports_resolve(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert hasattr(import_module(str(node.module)), alias.name), f"{block}: {node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)


@of_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@of_page
def test_paths_exist(page: Path) -> None:
    for code in inline_code(page):
        for path in PATH.findall(code) if PATH.fullmatch(code) and "FOLDER" not in code else ():
            first = path.split("/")[0]
            if any((place / first).is_dir() for place in PLACES) and not path.startswith(OF_A_RUN):
                assert any((place / path).exists() for place in PLACES), path


def messages() -> list[str]:
    """Return the constant texts of the package, with a line feed for each value that is put into one."""
    found = []
    for path in (ROOT / "malora_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\n" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text.replace("`", "") for text in found]


def test_messages_of_the_troubleshooting_page_are_the_package_s() -> None:
    texts = "\0".join(messages())
    shown = [message for cell in ROW.findall(prose(MESSAGES)) for message in re.findall(r"`([^`]+)`", cell)]
    assert len(shown) > 30
    missing = [
        part for message in shown for part in message.split("...") if len(part) > 8 and part.strip() not in texts
    ]
    assert not missing


def test_generated_pages_are_current() -> None:
    told = "python -m tests.docs.generated --write"
    assert generated.CONFIGURATION.read_text(encoding="utf-8") == generated.configuration_page(), told
    assert generated.METHODS_PAGE.read_text(encoding="utf-8") == generated.methods_page(), told
