"""Hook of mkdocs: pages of the site that are not in docs/, and links between them.

Links in the sources are relative to the source files, so that they work where the repository is read. Here they
become links of the site; other files of the repository that a page links to are copied into it.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "slurm/README.md": "slurm.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/RESULTS.md": "results.md",
    "benchmarks/gpu/README.md": "gpu.md",
    "benchmarks/quality/PROTOCOL.md": "quality_protocol.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
COPIES = "repository"
# Search puts pages that explain before those of printed tables, which hold most words.
SEARCH_BOOST = {"configuration.md": 3, "troubleshooting.md": 2, "plan.md": 0.2, "results.md": 0.2, "changelog.md": 0.2}
# The theme's own way to search pages that are opened from a disk, and what takes its place.
THEME_SEARCH, OWN_SEARCH = "https://unpkg.com/iframe-worker/shim", "file_search.js"
OTHER_HOST = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of `PAGES`, and a copy of every other file that a page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    linked = {target for file in files.documentation_pages() for target in _targets(file.src_uri, file.content_string)}
    for target in sorted(linked):
        uri = _site_uri(target)
        if uri.startswith(COPIES):
            files.append(File.generated(config, uri, content=(ROOT / target).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the page's links to files of the repository into links of the site."""

    def replaced(match: re.Match[str]) -> str:
        target = _repository_path(page.file.src_uri, match[1])
        return match[0] if target is None else f"]({_site_uri(target)}{match[2] or ''})"

    if page.file.src_uri in SEARCH_BOOST:
        page.meta["search"] = {"boost": SEARCH_BOOST[page.file.src_uri]}
    return LINK.sub(replaced, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Keep the page from asking another host for anything."""
    return _asking_no_host(output, page.file.src_uri)


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    """Do the same for pages that are no one's source, such as 404.html."""
    return _asking_no_host(output_content, template_name)


def _asking_no_host(output: str, name: str) -> str:
    """Return a page with its own search. Raises PluginError if it would ask another host for a file."""
    output = output.replace(THEME_SEARCH, OWN_SEARCH)
    asked = OTHER_HOST.search(output)
    if asked is not None:
        raise PluginError(f"{name} asks another host: {asked[0]}")
    return output


def _targets(page: str, markdown: str) -> Iterator[str]:
    for match in LINK.finditer(markdown):
        target = _repository_path(page, match[1])
        if target is not None:
            yield target


def _repository_path(page: str, link: str) -> str | None:
    """Return the path in the repository of a page's relative link, None if there is no such file."""
    folder = posixpath.dirname(SOURCES.get(page, f"docs/{page}"))
    path = posixpath.normpath(posixpath.join(folder, link))
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "README.md")
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _site_uri(path: str) -> str:
    """Return where a file of the repository is in the site. All pages are in its top folder."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"{COPIES}/{path}")
