"""The documentation site: its examples run, every rule has a page, every heading of troubleshooting is in the code, and it builds without a warning."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import mmfast as mf

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
EXAMPLES = {page: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE) for page in PAGES}


@pytest.fixture
def pages(monkeypatch):
    """docs/rule_pages.py, which makes the pages of the rules."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    import rule_pages

    return rule_pages


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch.compile itself uses what torch calls deprecated
@pytest.mark.parametrize("page", [page for page, blocks in EXAMPLES.items() if blocks], ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    """A page's blocks one after the other, as a reader would paste them; one that needs a package which is not here is skipped with what follows it."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "example"}
    for block in EXAMPLES[page]:
        for needed in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
            pytest.importorskip(needed)
        exec(compile(block, str(page), "exec"), space)  # noqa: S102 the page is ours


def test_pages_with_examples_are_found():
    names = {page.name for page, blocks in EXAMPLES.items() if blocks}
    assert {"README.md", "start.md", "which_rule.md", "recipes.md", "migration.md"} <= names


def test_every_rule_has_an_entry(pages):
    pages.check()
    assert set(pages.FACTS) == set(mf.resolvers.__all__) - {"Resolver", "Rule", "resolver"}
    for name, facts in pages.FACTS.items():
        assert type(facts.make(4)).__name__ == name and facts.formula and facts.avoid and (ROOT / facts.tests).is_file()


def test_a_rule_without_an_entry_fails_the_build(pages, monkeypatch):
    monkeypatch.delitem(pages.FACTS, "PCGrad")
    with pytest.raises(KeyError, match="PCGrad"):
        pages.write()


def texts():
    """Every string of the package, with ... for what it puts in."""
    for path in Path(mf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_headings_of_troubleshooting_are_our_texts():
    headings = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    ours = list(texts())
    patterns = {heading: re.compile(".*".join(re.escape(part) for part in heading.split("...")), re.DOTALL) for heading in headings}
    assert len(headings) > 25
    assert [heading for heading, pattern in patterns.items() if not any(pattern.search(text) for text in ours)] == []


def test_all_public_names_are_in_the_reference(pages):
    named = set(re.findall(r"^\.\. auto\w+:: (\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    modules = {"collapse", "losses", "stats"}  # by all that they hold
    assert set(mf.__all__) - set(pages.FACTS) - modules == named


def test_claims_of_which_rule_are_rows_of_a_record():
    text, *records = ((DOCS / name).read_text() for name in ("which_rule.md", "imbalance.md", "collapse_runs.md"))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) >= 15 and [row for row in rows if not any(row in record for record in records)] == []
    includes = re.findall(r'\{include\} (.*)\n:start-after: "(.*)"\n:end-before: "(.*)"', text)
    assert {name for name, _, _ in includes} == {"table1.md", "multimodal.md"}
    for name, start, end in includes:
        included = (DOCS / name).read_text()
        assert 0 < included.find(start) < included.find(end)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, tag, attributes):
        if tag in ("a", "img"):
            self.found.add(dict(attributes).get("href" if tag == "a" else "src") or "")


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer sees nothing new here, and takes minutes")
def test_the_site_builds_without_a_warning_and_all_of_it_is_reached(tmp_path):
    for needed in ("sphinx", "furo", "myst_parser", "matplotlib"):
        pytest.importorskip(needed)
    build = f"{sys.executable} -m sphinx -q -W --keep-going -b html -d {tmp_path}/trees docs {tmp_path}/html"
    run = subprocess.run(
        build.split(),
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    links = {}
    for page in (tmp_path / "html").rglob("*.html"):
        parser = Links()
        parser.feed(page.read_text())
        links[page] = {(page.parent / link.split("#")[0]).resolve() for link in parser.found if link and "://" not in link}
        broken = [link for link in links[page] if not link.exists()]
        assert broken == [], page
    reached, front = set(), {tmp_path / "html" / "index.html"}
    while front:
        reached |= front
        front = {link for page in front for link in links[page] if link in links} - reached
    assert {page.name for page in set(links) - reached} == {"search.html"}  # which the search field calls
    rules = [page for page in reached if page.parent.name == "rules" and page.stem != "index"]
    assert len(rules) == len(mf.resolvers.__all__) - 3
    for page in rules:
        assert sum(link.suffix == ".svg" and link.stem.startswith(page.stem) for link in links[page]) == 2, page
