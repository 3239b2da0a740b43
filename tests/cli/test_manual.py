"""The samples of the manual and the README are run, and ``qmpcommit help`` reads the manual."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from qmpcommit.manual import TOPICS, page, title
from tests.cli.command import ROOT, on_a_terminal, qmpcommit
from tests.cli.samples import Pictures, Sample, complaint, complaints_of
from tests.ground.places import STRIDE

MANUAL = ROOT / "qmpcommit" / "manual"
README = ROOT / "README.md"

PART = 3
"""Where not every step is tried, as in CI, each third sample is run, from another one each time."""


async def test_the_readmes_samples_are_what_happens(folder: Path) -> None:
    (folder / "r").mkdir()
    wrong = await complaints_of(README.read_text(), folder / "r", Pictures(folder))
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.timeout(85)
async def test_the_manuals_samples_are_what_happens(folder: Path) -> None:
    pictures = Pictures(folder)
    wrong = []
    each = min(STRIDE, PART)
    for topic in TOPICS:
        place = folder / topic
        place.mkdir()
        first = random.randrange(each)
        said = await complaints_of(page(topic), place, pictures, each=each, first=first)
        wrong += [f"{topic}.md, {one}" for one in said]
    assert not wrong, "\n\n".join(wrong)


async def test_a_sample_that_is_not_what_happens_is_seen(folder: Path) -> None:
    pictures = Pictures(folder)
    for number, (language, text, said) in enumerate(
        (
            ("console", "$ echo one\none\n", ""),
            ("console", "$ echo one\ntwo\n", "is printed:\n$ echo one\none\n"),
            ("console", "$ echo one\n", "is printed:\n$ echo one\none\n"),
            ("console", "$ qmpcommit help nothing\n", "has no topic"),
            ("sh", "false  # status 1\n", ""),
            ("sh", "qmpcommit chain --frobnicate\n", "ended with status 2"),
            ("python", "assert qc.Pivot().kind == 'pivot'\n", ""),
            ("python", "qc.Pivot().wait()\n", "AttributeError"),
            ("toml", "commits = 16\n", "commits"),
        )
    ):
        place = folder / str(number)
        place.mkdir()
        sample = Sample(language, frozenset({"bare"}), text, 1)
        found = await complaint(place, pictures, sample)
        assert said in found, text
        assert bool(said) == bool(found), text


def test_help_lists_the_topics_and_reads_them() -> None:
    said = qmpcommit("help")
    assert (said.status, said.err) == (0, "")
    assert {file.stem for file in MANUAL.glob("*.md")} == set(TOPICS)
    for topic in TOPICS:
        assert re.search(rf"^  {topic} +{re.escape(title(topic))}$", said.out, re.MULTILINE)
    assert qmpcommit("help", "--json").json["topics"].keys() == set(TOPICS)
    said = qmpcommit("help", "virsh")
    assert (said.status, said.out, said.err) == (0, page("virsh"), "")
    assert qmpcommit("help", "virsh", "--json").json["text"] == page("virsh").rstrip("\n")


def test_help_of_what_is_no_topic() -> None:
    assert qmpcommit("help", "jobs").out == qmpcommit("jobs", "--help").out
    said = qmpcommit("help", "comit")
    assert (said.status, said.out) == (2, "")
    assert "Did you mean commit" in said.err


async def test_a_terminal_gets_it_page_by_page() -> None:
    said = await on_a_terminal("help", "status", PAGER="sed s/^/PAGED:/")
    assert said.status == 0
    assert all(line.startswith("PAGED:") for line in said.out.splitlines())
