"""What is published: links of the README that lead somewhere from a package index, one version, whole metadata."""

import importlib.util
import re
from pathlib import Path

import hatchling.builders.sdist
import pytest

import bnp_optax as bnp

ROOT = Path(__file__).parent.parent
URL = "https://example.org/owner/bnp_optax"


def metadata():
    """Returns the metadata that a build writes."""
    return hatchling.builders.sdist.SdistBuilder(str(ROOT)).metadata.core


@pytest.fixture
def published(monkeypatch):
    monkeypatch.setenv("PROJECT_URL", URL + "/")
    return metadata()


def test_every_link_of_the_readme_leads_to_a_file_of_the_version(published):
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", published.readme)
    inside = [(image, link.removeprefix(URL)) for image, link in links if link.startswith(URL)]
    outside = [link for _, link in links if not link.startswith(URL)]
    assert len(inside) > 20
    assert all(link.startswith("https://") for link in outside)
    for image, link in inside:
        kind, version, path = link.removeprefix("/").split("/", 2)
        assert (kind, version) == ("raw" if image else "blob", f"v{bnp.__version__}")
        assert (ROOT / path.split("#")[0]).is_file(), path


def test_nothing_but_links_is_changed(published, monkeypatch):
    monkeypatch.delenv("PROJECT_URL")
    original = (ROOT / "README.md").read_text()
    assert metadata().readme == original
    prefix = rf"{re.escape(URL)}/(raw|blob)/v{re.escape(bnp.__version__)}/"
    assert re.sub(prefix, "", published.readme) == original


def test_addresses_are_those_of_the_repository(published, monkeypatch):
    assert published.urls["Repository"] == URL
    assert published.urls["Changelog"].startswith(URL)
    monkeypatch.delenv("PROJECT_URL")
    assert set(metadata().urls) == {"Paper"}  # none is made up


def test_one_version_everywhere(published):
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE).group(1)
    changes = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert published.name == "bnp-optax"
    assert bnp.__version__ == cited == changes[0]
    assert importlib.metadata.version("bnp_optax") == bnp.__version__
