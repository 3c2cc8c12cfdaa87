"""What the documentation shows runs, what it links to is there, and no op goes without its page."""

import inspect
import re
from pathlib import Path
from unittest import mock

import pytest

import tetrad
from tetrad.kernels import patch

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/ops").glob("*.md"))
INDEX = ROOT / "docs/ops/README.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPS = [name for name in tetrad.__all__ if name != "__version__"]


def blocks(page: Path) -> list[tuple[int, str]]:
    """First line and text of each Python example of a page."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: x.start(1)].count("\n"), x[1]) for x in found]


def run(page: Path, names: dict) -> None:
    """Execute the examples of a page, in one namespace; an error names the page and its line."""
    for line, code in blocks(page):
        exec(compile("\n" * line + code, page, "exec"), names)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name)
def test_examples_run(page) -> None:
    names: dict = {}
    run(INDEX, names)  # the tensors of the examples
    run(page, names)


def test_the_example_of_patching_runs() -> None:
    """With stand-ins of the same signatures; the packages themselves are in tests/peers."""
    with mock.patch.multiple(
        patch, **{x: mock.create_autospec(getattr(patch, x)) for x in ("trl", "undo")}
    ):
        run(ROOT / "docs/patch.md", {})
        assert patch.trl.called and patch.undo.called


def heading(title: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", DOCUMENTS, ids=name)
def test_links_lead_somewhere(page) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(heading, titles), f"{name(page)} links to {link}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs/patch.md"], ids=name)
def test_files_that_are_named_are_there(page) -> None:
    for path in re.findall(r"\b(?:tests|kernels|bench|docs)/[\w/]+\.(?:py|md)\b", page.read_text()):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_page(op) -> None:
    """One page has it in a heading, the index names it beside that page, an example calls it."""
    (page,) = [p for p in PAGES if re.search(rf"^## .*`{op}`", p.read_text(), re.MULTILINE)]
    rows = re.sub(r"\n\| \|", "", INDEX.read_text()).splitlines()
    assert any(f"]({page.name})" in row and f"`{op}`" in row for row in rows)
    assert any(re.search(rf"\b{op}\(", code) for _, code in blocks(page))
    assert f"`{op}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("op", OPS)
def test_every_option_is_explained(op) -> None:
    """On the page of the op, or on one that it links to; `option`, or `option=value`."""
    (page,) = [p for p in PAGES if re.search(rf"^## .*`{op}`", p.read_text(), re.MULTILINE)]
    linked = re.findall(r"\]\((\w+\.md)\)", page.read_text())
    text = "".join((ROOT / "docs/ops" / x).read_text() for x in {page.name, *linked, INDEX.name})
    for option in inspect.signature(getattr(tetrad, op)).parameters.values():
        if option.kind is option.KEYWORD_ONLY:
            assert re.search(rf"`{option.name}\b[^`]*`", text), f"{name(page)}: {option.name}"
