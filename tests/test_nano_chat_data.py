"""The chat data of the bundled model: deterministic, well formed, correct sums, and held-out text kept out."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from openglm.types import Message

SCRIPT = Path(__file__).parents[1] / "runs" / "nano_chat_data.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nano_chat_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_deterministic_and_well_formed(script: ModuleType) -> None:
    rows = script.own_rows(800, seed=1, millions=15)
    assert rows == script.own_rows(800, seed=1, millions=15)
    assert rows != script.own_rows(800, seed=2, millions=15)
    languages = [row["source"] for row in rows]
    assert abs(languages.count("own_en") - languages.count("own_zh")) <= 8
    for row in rows:
        messages = [Message.from_dict(m) for m in row["messages"]]
        roles = [m.role for m in messages if m.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(m.content.strip() and "{" not in m.content and "_" not in m.content for m in messages)


def test_sums_are_right(script: ModuleType) -> None:
    checked = 0
    for lang in ("en", "zh"):
        for _, answer in script.sums(lang):
            found = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)\.", answer)
            if found:
                a, sign, b, result = found.groups()
                assert (int(a) + int(b) if sign == "+" else int(a) - int(b)) == int(result)
                checked += 1
    assert checked > 1000


def test_no_question_has_two_answers_in_a_table(script: ModuleType) -> None:
    facts = script.load_facts()
    for lang in ("en", "zh"):
        for name, rows in script.tables(facts, lang).items():
            assert all(len(cells) == 2 for cells in rows), name
            subjects = [cells[0] for cells in rows]
            assert len(subjects) == len(set(subjects)), (name, sorted(s for s in subjects if subjects.count(s) > 1))


def test_selection_keeps_held_out_text_and_other_assistants_out(script: ModuleType) -> None:
    def row(question: str, answer: str) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    article = "Mount Example is a mountain in the north of Nowhere."
    assert script.acceptable("wiki_intro_en", row("Tell me about Mount Example.", article), held_out="")
    assert not script.acceptable(
        "wiki_intro_en", row("Tell me about Mount Example.", article), "x\n" + article + " More."
    )
    assert not script.acceptable("wiki_intro_en", row("Who are you?", "I am ChatGPT, of course, and nothing else."), "")
    assert not script.acceptable("xiehouyu", row("q" * 200, "a"), held_out="")
