"""Every command and picture that README.md names exists. Nothing is run: flags are parsed, files looked up."""
import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

README = ROOT / "README.md"
TEXT = README.read_text() if README.is_file() else ""
pytestmark = pytest.mark.skipif(not TEXT, reason="there is no README.md")


def commands():
    """Words after `python` of each command in a fenced block: also behind &&, ;, a prompt, or a variable's assignment."""
    found = []
    for block in re.findall(r"```[a-z]*\n(.*?)```", TEXT, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|\||(?<!\|)\|(?!\|)", line):
                words = shlex.split(part, comments=True)
                while words and (words[0] == "$" or re.fullmatch(r"\w+=.*", words[0])):
                    words = words[1:]
                if len(words) > 1 and re.fullmatch(r"(.*/)?python3?", words[0]) and words[1].endswith(".py"):
                    found.append(words[1:])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_parses(words, monkeypatch, capsys):
    script, rest = words[0], words[1:]
    assert (ROOT / script).is_file(), f"{script} does not exist"
    rest = [re.sub(r"\$\{?\w+\}?|\.\.\.|<\w+>", "1", word) for word in rest]                       # placeholders
    monkeypatch.setattr(sys, "argv", [script, *rest])
    if script == "common.py":
        tyro.cli(common.COMMANDS, args=rest)
    elif script == "kernels.py":
        source = (ROOT / script).read_text()
        for word in rest:
            assert not word.startswith("--") or word.split("=")[0] in source, f"kernels.py has no {word}"
    else:
        method = __import__(script.removesuffix(".py"))
        seen = []
        common.cli(method.PRESETS, seen.append)                        # exits with status 2 where a flag does not exist
        assert dataclasses.is_dataclass(seen[0])


def test_there_are_commands():
    assert any(words[0] == "soft_mining.py" for words in commands())


def test_pictures_exist():
    names = re.findall(r"\.github/images/[\w./-]+\.\w+", TEXT)
    assert all((ROOT / name).is_file() for name in names), [name for name in names if not (ROOT / name).is_file()]


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    names = [link.split("#")[0] for link in links if "://" not in link and not link.startswith(("#", "mailto:"))]
    assert all((ROOT / name).exists() for name in names), [name for name in names if not (ROOT / name).exists()]
