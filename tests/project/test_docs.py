"""Documents that cannot rot: links resolve, folders explain themselves, nothing points into one machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fptq_export.errors import ExitCode

ROOT = Path(__file__).parents[2]
SOURCES = ("fptq_export", "calib", "plugins", "tests", "samples")
TOP_FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml")
TEXT_SUFFIXES = {".md", ".py", ".toml", ".txt", ".sh", ".cu", ".cpp", ".h", ".cmake", ".json"}

# Written in pieces, so that this file does not find itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.])/(?:" + "work|root|home" + r")/"),
    "an unfinished note": re.compile("TO" + "DO|FIX" + "ME|XX" + "X"),
    "an unfinished merge": re.compile("^(?:" + "<" * 7 + "|" + ">" * 7 + ") ", re.MULTILINE),
}

_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def markdown_files() -> list[Path]:
    """Every Markdown file of the repository."""
    nested = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.md")]
    return sorted([*ROOT.glob("*.md"), *nested])


def text_files() -> list[Path]:
    """Every text file of the repository, this one included."""
    nested = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in TEXT_SUFFIXES]
    return sorted([*(ROOT / name for name in TOP_FILES), ROOT / ".ci" / "run", *nested])


def anchor_from_heading(heading: str) -> str:
    """`## Exit codes` is reached as `#exit-codes`."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")


def anchors_of(document: Path) -> set[str]:
    """The anchors of all headings of a Markdown document."""
    return {anchor_from_heading(heading) for heading in _HEADING.findall(document.read_text(encoding="utf-8"))}


def broken_links(document: Path) -> list[str]:
    """The relative links of a Markdown document that lead nowhere."""
    broken = []
    for target in _LINK.findall(_CODE.sub("", document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name) if name else document
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("folder", SOURCES)
def test_folder_explains_itself(folder: str) -> None:
    """Each top folder has a README that says what may not live there."""
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {folder}\n")
    assert "What may not live here" in text


@pytest.mark.parametrize("document", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_resolves(document: Path) -> None:
    """No link leads to a file or a heading that is not there."""
    assert broken_links(document) == []


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](missing.md)", ["missing.md"]),
        ("[a](#nowhere)", ["#nowhere"]),
        ("[a](other.md#nowhere)", ["other.md#nowhere"]),
        ("[a](other.md) [b](other.md#two-words) [c](https://example.org/x) `[d](code.md)`", []),
    ],
)
def test_link_check_refuses_only_broken_links(tmp_path: Path, text: str, broken: list[str]) -> None:
    """Missing files and headings are found; web links, code and good links are left alone."""
    (tmp_path / "other.md").write_text("# Other\n\n## Two words\n", encoding="utf-8")
    document = tmp_path / "document.md"
    document.write_text(text, encoding="utf-8")
    assert broken_links(document) == broken


@pytest.mark.parametrize("path", text_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_text_holds_nothing_of_one_machine_and_nothing_unfinished(path: Path) -> None:
    """No path of the author's machine, no note of work to be done."""
    text = path.read_text(encoding="utf-8")
    found = [f"{what}: {match.group()}" for what, pattern in FORBIDDEN.items() for match in pattern.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    "text", ["see /wo" + "rk/main", "'/ro" + "ot/x'", "# TO" + "DO: later", "a\n" + ">" * 7 + " main"]
)
def test_forbidden_text_is_found(text: str) -> None:
    """The patterns above can fail."""
    assert any(pattern.search(text) for pattern in FORBIDDEN.values())


@pytest.mark.parametrize("text", ["https://example.org/home/x", "tests/work/x", "a network/root/cause"])
def test_harmless_text_is_left_alone(text: str) -> None:
    """Words inside longer paths and addresses are not paths of a machine."""
    assert not any(pattern.search(text) for pattern in FORBIDDEN.values())


def test_readme_lists_every_exit_code() -> None:
    """The table of exit codes and the enumeration agree."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)} == {
        int(code) for code in ExitCode
    }


def test_every_lint_exception_has_its_reason() -> None:
    """Each ignored ruff rule is followed by a comment on the same line."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = re.findall(r'^ *(?:"[^"]+" = \[)?"[A-Z]+\d+".*$', text, re.MULTILINE)
    assert len(lines) >= 5
    assert [line for line in lines if "  # " not in line] == []
