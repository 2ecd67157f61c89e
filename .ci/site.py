"""Hooks of MkDocs: what lies outside docs/ joins the site, and no page loads from elsewhere."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
JOINING = {  # as the pages name it: where it is in the site
    "../bench/results/cpu.png": "results/cpu.png",
    "../CHANGELOG.md": "changelog.md",
}


def on_files(files: Any, config: Any) -> Any:
    for link, place in JOINING.items():
        source = (ROOT / "docs" / link).resolve()
        files.append(File.generated(config, place, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    for link, place in JOINING.items():
        markdown = markdown.replace(f"]({link})", f"]({place})")
    return markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    elsewhere = re.findall(
        r"<(?:script|link|img|iframe)[^>]*(?:src|href)=.?https?://[^ >]*", output
    )
    if elsewhere:
        raise PluginError(f"{page.file.src_uri}: loads {elsewhere[0]}; the site works offline")
    return output
