"""Makes the README's links absolute in what is published, as a package index shows the README alone."""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)")


def absolute_links(text: str, url: str, version: str) -> str:
    """Returns Markdown whose links to files lead to a version of a repository.

    Args:
      text: Markdown, with links relative to the root of the repository.
      url: the repository's address, as ``https://github.com/owner/name``.
      version: what is published; the repository has a tag ``v`` and this.
    """

    def absolute(link: re.Match[str]) -> str:
        image, label, path = link.groups()
        return f"{image}[{label}]({url}/{'raw' if image else 'blob'}/v{version}/{path})"

    return RELATIVE_LINK.sub(absolute, text)


class PublishedMetadata(MetadataHookInterface):
    """Takes the project's address from the environment's ``PROJECT_URL``: a clone does not know where it will lie."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README and the project's addresses."""
        readme, url = (Path(self.root) / "README.md").read_text(), os.environ.get("PROJECT_URL", "").rstrip("/")
        metadata["urls"] = {"Paper": "https://arxiv.org/abs/2108.01110"}
        if url:
            readme = absolute_links(readme, url, metadata["version"])
            metadata["urls"] |= {"Repository": url, "Changelog": f"{url}/blob/main/CHANGELOG.md"}
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
