"""Commands, pictures and links of README.md and .github/results exist. Nothing is run: flags are
parsed, files looked up."""
import dataclasses
import re
import shlex
import sys

import pytest
import tyro

import common
from conftest import ROOT

README = ROOT / "README.md"
TEXT = README.read_text()
PAGES = [README, *sorted((ROOT / ".github/results").glob("*.md"))]


def commands():
    """Words after `python` of each command in a fenced block (also behind &&, ;, a prompt, or a
    variable's assignment) or in a sentence."""
    found = []
    blocks = re.findall(r"```[a-z]*\n(.*?)```", TEXT, re.S)
    for block in blocks + re.findall(r"`(python [^`\n]+)`", TEXT):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|\||(?<!\|)\|(?!\|)", line):
                words = shlex.split(part, comments=True)
                while words and (words[0] == "$" or re.fullmatch(r"\w+=.*", words[0])):
                    words = words[1:]
                if len(words) > 1 and re.fullmatch(r"(.*/)?python3?", words[0]):
                    found += [words[1:]] if words[1].endswith(".py") else []
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_parses(words, monkeypatch, capsys):
    script, rest = words[0], words[1:]
    assert (ROOT / script).is_file(), f"{script} does not exist"
    rest = [re.sub(r"\$\{?\w+\}?|\.\.\.|<\w+>", "1", word) for word in rest]      # placeholders
    monkeypatch.setattr(sys, "argv", [script, *rest])
    if script == "common.py":
        tyro.cli(common.COMMANDS, args=rest)
    elif script == "kernels.py":
        source = (ROOT / script).read_text()
        for word in rest:
            assert not word.startswith("--") or word.split("=")[0] in source, word
    else:
        method = __import__(script.removesuffix(".py"))
        seen = []
        common.cli(method.PRESETS, seen.append)        # exits with status 2 at an unknown flag
        assert dataclasses.is_dataclass(seen[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    names = [link.split("#")[0] for link in links
             if "://" not in link and not link.startswith(("#", "mailto:"))]
    assert names and not [name for name in names if not (page.parent / name).exists()]


def test_readme_is_short_and_leads_to_everything():
    assert README.stat().st_size <= 24_000
    assert any(words[0] == "soft_mining.py" for words in commands())
    assert all(f"(.github/results/{page.name})" in TEXT for page in PAGES[1:])
    shown = "".join(page.read_text() for page in PAGES)
    pictures = [path.name for path in (ROOT / ".github/images").iterdir()]
    assert not [name for name in pictures if f"images/{name})" not in shown]
