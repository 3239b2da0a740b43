"""The texts of the manual and of the README."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from qmpcommit.cli.commands import COMMANDS, STATUSES
from qmpcommit.manual import TOPICS, page
from qmpcommit.manual.roff import man_pages

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"


def test_no_sentence_stands_twice() -> None:
    seen: dict[str, str] = {}
    twice = []
    for topic in (*TOPICS, "README"):
        text = page(topic) if topic != "README" else README.read_text()
        text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        for sentence in re.split(r"(?<=[.:])\s+|\n\n|\|", text):
            words = " ".join(sentence.split()).strip("* ")
            if words.count(" ") > 5 and seen.setdefault(words, topic) != topic:
                twice.append(f"{words} ({seen[words]}, {topic})")
    assert not twice


def test_topics_and_commands_that_are_named_are_there() -> None:
    for topic in TOPICS:
        for named in re.findall(r"`qmpcommit help (\w+)`", page(topic)):
            assert named in TOPICS
        for named in re.findall(r"`qmpcommit ([a-z]+)", page(topic)):
            assert named in COMMANDS


def test_the_readme_is_short_and_leads_to_what_is_there() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    for _, target in re.findall(r"\[([^]]+)\]\(([^)]+)\)", text):
        assert (ROOT / target).exists(), target
    for script in re.findall(r"^\./(\S+)", text, re.MULTILINE):
        assert (ROOT / script).exists(), script
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"Python {needs.removeprefix('>=')} or newer" in text


def test_the_manual_becomes_man_pages() -> None:
    pages = man_pages({name: line for name, (_, line) in COMMANDS.items()}, STATUSES)
    assert pages.keys() == {"qmpcommit.1", *(f"qmpcommit-{topic}.7" for topic in TOPICS)}
    for name, text in pages.items():
        assert text.splitlines()[1].startswith(f".TH {name[:-2].upper()} {name[-1]} ")
        body = re.sub(r"^\.nf$.*?^\.fi$", "", text, flags=re.DOTALL | re.MULTILINE)
        for mark in ("```", "**", "](", "<!--", "`"):
            assert mark not in body, name
        assert text.count("\n.TS\n") == text.count("\n.TE\n")
        assert text.count("\n.nf\n") == text.count("\n.fi\n")
        macros = set(re.findall(r"^\.(\w+)", text, re.MULTILINE))
        assert macros <= {"TH", "ad", "SH", "PP", "RS", "RE", "nf", "fi", "IP", "TP", "TS", "TE"}
