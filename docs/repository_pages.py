"""MkDocs hook: the README as home page, and a page for every file outside docs/ that a page links to.

So the same relative links work on a forge and in the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Pages of the site that are files outside docs/.
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
_FOLDER = "repository"
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page, the changelog and the linked files to the site."""
    root = _root(config)
    for source, name in _PAGES.items():
        files.append(File.generated(config, name, content=(root / source).read_text(encoding="utf-8")))
    for page in [file for file in files if file.is_documentation_page()]:
        for target in _LINK.findall(page.content_string):
            path = _repository_path(page.src_uri, target)
            name = _site_path(path)
            if files.get_file_from_path(name) is None and (root / path).is_file():
                files.append(File.generated(config, name, content=_shown(root, path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with links to where the files are in the site."""
    name = page.file.src_uri
    if name.startswith(f"{_FOLDER}/"):
        return markdown
    return _LINK.sub(lambda match: _site_path(_repository_path(name, match[1])), markdown)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def _repository_path(page: str, target: str) -> str:
    """Return the path in the repository of what `page` links to as `target`."""
    return posixpath.normpath(target if page in _PAGES.values() else f"docs/{target}")


def _site_path(path: str) -> str:
    """Return the path in the site of a file of the repository."""
    if path in _PAGES:
        return _PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{_FOLDER}/{path}.md"


def _shown(root: Path, path: str) -> str:
    """Return a page that shows a file."""
    text = (root / path).read_text(encoding="utf-8").rstrip()
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nhide: [toc]\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n````{language}\n{text}\n````\n"
