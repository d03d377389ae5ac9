"""What MkDocs does not do by itself: pages from the root of the repository, links to it, MathML.

It also puts folders into the navigation, and checks that no page loads anything from another host.
It is a hook of `mkdocs.yml`. It never runs the library, and it writes nothing into the repository.
"""

import html
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

# Files of the repository that are pages of the site, with their places on it.
PAGES = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
}
# What whoever searches wants first: the remedy of a message, then an answer, then a guide.
BOOSTS = {"reference/errors": 4, "faq": 2, "howto": 2, "gallery": 0.5, "examples": 0.2}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
# A function after a factor, one whose argument has no parentheses, and a minus that is a sign.
FACTOR = re.compile(r"(&#x00029;</mo>|</m[in]>|</msub>|</mfrac>)(?=<mi>(?:log|exp|max|min)</mi>)")
APPLIED = re.compile(r"(<mi>(?:log|exp|max|min)</mi>)(?=<m(?:i|sub|frac|row|o>&#x02212;))")
SIGN = re.compile(r"(<mo[^>]*>(?:\[|&#x00028;|&#x0005B;|&#x0003D;)</mo>)<mo>(&#x02212;)</mo>")
BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.S)
# What a browser loads by itself, unlike the targets of links.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*rel=["']?(?:stylesheet|icon|preconnect|preload))"""
    r"""[^>]*\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
)


def on_startup(**_) -> None:
    """Fixes the time of the build, so that two builds of one commit are the same bytes."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of a folder into the navigation in place of a pattern, such as `howto/*`."""
    config.nav = expanded(config.nav or [], Path(config.docs_dir))
    return config


def expanded(nav: list[Any], docs: Path) -> list[Any]:
    """The navigation with the pages that its patterns match, an index first; no empty sections."""
    entries = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, inner),) = entry.items()
            inner = expanded(inner, docs) if isinstance(inner, list) else inner
            entries += [{title: inner}] if inner else []
        elif "*" in entry:
            pages = (path.relative_to(docs).as_posix() for path in docs.glob(entry))
            entries += sorted(pages, key=lambda page: (not page.endswith("index.md"), page))
        else:
            entries.append(entry)
    return entries


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from the root, and each file of the repository that a page links to."""
    for source, place in PAGES.items():
        if (ROOT / source).exists():
            add(files, config, place, source)
    for page in files.documentation_pages():
        for target in linked(source_of(page.src_uri), page.content_string):
            place = place_of(target)
            if files.get_file_from_path(place) is None:
                add(files, config, place, target)
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Turns links as they stand in the repository into links as they stand on the site."""
    place = page.file.src_uri
    source = source_of(place)
    for folder, boost in BOOSTS.items():
        if place.startswith(folder):
            page.meta["search"] = {"boost": boost}

    def moved(match: re.Match[str]) -> str:
        target = resolved(source, match[2])
        if target is None:
            return match[0]
        path = posixpath.relpath(place_of(target), posixpath.dirname(place) or ".")
        return f"{match[1]}{path}{match[3] or ''}{match[4]}"

    return LINK.sub(moved, markdown)


def on_page_content(content: str, page: Page, **_) -> str:
    """Writes all mathematics of a page as MathML."""

    def written(display: str):
        return lambda match: mathml(html.unescape(match[1]), display, page.file.src_uri)

    return BLOCK.sub(written("block"), INLINE.sub(written("inline"), content))


def on_post_page(output: str, page: Page, **_) -> str:
    """Raises `PluginError` if the page loads a script, a style or an image from another host."""
    loaded = LOADED.search(output)
    if loaded is not None:
        raise PluginError(f"{page.file.src_uri} loads from another host: {loaded[0]}")
    return output


def mathml(tex: str, display: str, place: str) -> str:
    """The MathML of some LaTeX. Raises `PluginError` if it has a command that is not known."""
    written = convert(tex, display=display)
    if "\\" in written:
        raise PluginError(f"{place}: no MathML for the LaTeX {tex!r}.")
    for before in (FACTOR, APPLIED):
        written = before.sub(r'\1<mspace width="0.167em"/>', written)
    written = SIGN.sub(r'\1<mo form="prefix">\2</mo>', written)
    kind = "div" if display == "block" else "span"
    return f'<{kind} class="math">{written}</{kind}>'


def add(files: Files, config: MkDocsConfig, place: str, source: str) -> None:
    """Adds a file of the repository to the site: pages and images as they are, code as a page."""
    path = ROOT / source
    if place == source + ".md":
        text = path.read_text(encoding="utf-8")
        fence = "~" * 10
        content = f"# `{source}`\n\n{fence}{path.suffix.lstrip('.')}\n{text}\n{fence}\n"
        hidden = InclusionLevel.NOT_IN_NAV  # only links lead to it
        files.append(File.generated(config, place, content=content, inclusion=hidden))
    else:
        files.append(File.generated(config, place, abs_src_path=str(path)))


def linked(source: str, markdown: str) -> list[str]:
    """The files of the repository, outside of `docs/`, that a page links to."""
    targets = (resolved(source, match[2]) for match in LINK.finditer(markdown))
    return sorted({t for t in targets if t and not t.startswith("docs/") and t not in PAGES})


def resolved(source: str, link: str) -> str | None:
    """The path in the repository that a link of the file `source` leads to, if it is a file."""
    if "://" in link or link.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def source_of(place: str) -> str:
    """The path in the repository of a page of the site."""
    return {there: here for here, there in PAGES.items()}.get(place, f"docs/{place}")


def place_of(path: str) -> str:
    """The place on the site of a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    is_image = path.endswith((".png", ".svg"))
    return path if is_image or path.endswith(".md") else path + ".md"
