"""The All Tools suite itself: its counts and languages, its answers computed anew, its checkers, its functions."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from openglm.agent.browser.site import SITE
from openglm.eval.all_tools.check import final_number, judge, says, says_number
from openglm.eval.all_tools.functions import ALIASES, FUNCTIONS
from openglm.eval.all_tools.suite import BROWSER, GROUPS, AllToolsTask, ExpectedCall, family, load_suite, suite_version
from openglm.eval.all_tools.toolset import SuiteTools

SUITE = load_suite()
BY_ID = {task.id: task for task in SUITE}
COUNTS = {"maths-words": 20, "maths-large": 20, "search": 30, "functions": 20, "mixed": 15, "none": 15}


@pytest.fixture(scope="module")
def suite() -> SuiteTools:
    return SuiteTools()


def test_counts_and_languages() -> None:
    assert len(SUITE) == 120 == len(BY_ID) and len({task.question for task in SUITE}) == 120
    assert Counter(task.group for task in SUITE) == COUNTS and tuple(COUNTS) == GROUPS
    for group, n in COUNTS.items():
        english = sum(task.lang == "en" for task in SUITE if task.group == group)
        assert abs(2 * english - n) <= 1, group
    for task in SUITE:
        chinese = any("\u4e00" <= c <= "\u9fff" for c in task.question)
        assert chinese == (task.lang == "zh") and task.id.startswith(f"{task.group}-{task.lang}-")
    assert len(suite_version()) == 12


def test_a_part_of_the_suite_holds_all_kinds() -> None:
    part = load_suite(12)
    assert Counter((task.group, task.lang) for task in part) == {(g, lang): 1 for g in GROUPS for lang in ("en", "zh")}
    assert load_suite(500) == load_suite(120) and {task.id for task in load_suite(120)} == set(BY_ID)
    with pytest.raises(ValueError, match="--limit must be at least 1"):
        load_suite(0)


def test_each_task_asks_for_what_its_group_is_about(suite: SuiteTools) -> None:
    known = {family(tool.spec.name) for tool in suite.tools}
    assert len({tool.spec.name for tool in suite.tools}) == len(suite.tools) and BROWSER in known
    for task in SUITE:
        assert {*task.tools, *task.tools_ok} <= known, task.id
        match task.group:
            case "maths-words":
                assert task.tools == () and task.tools_ok == ("python",) and "GSM8K" in task.origin
            case "maths-large":
                assert task.tools == ("python",) and abs(int(task.number or 0)) > 500 and task.program
            case "search":
                assert task.tools == (BROWSER,) and task.sources
            case "functions":
                assert len(task.calls) == 1 and task.tools == (task.calls[0].name,)
            case "mixed":
                assert len(task.tools) == 2
            case "none":
                assert not task.tools and not task.calls


@pytest.mark.parametrize("task", [task for task in SUITE if task.program], ids=lambda task: task.id)
def test_numbers_are_what_their_program_gives(task: AllToolsTask) -> None:
    assert task.number is not None and says_number(str(eval(task.program or "")), task.number)


def test_all_numbers_have_a_program() -> None:
    assert all((task.number is None) == (task.program is None) for task in SUITE)


def test_expected_calls_are_served_and_their_answers_are_right(suite: SuiteTools) -> None:
    """The reference answer, made of what the functions give, satisfies the checker."""
    functions = {f.__name__: f for f in FUNCTIONS}
    from openglm.agent.schema import schema_error

    specs = {tool.spec.name: tool.spec for tool in suite.tools}
    for task in SUITE:
        said = []
        for call in task.calls:
            arguments = {key: "x" if value is None else value for key, value in call.arguments.items()}
            assert schema_error(specs[call.name], arguments) is None, task.id
            said.append(json.dumps(functions[call.name](**arguments), ensure_ascii=False))
        if task.group == "functions":
            made = [(c.name, json.dumps({k: "x" if v is None else v for k, v in c.arguments.items()}))
                    for c in task.calls]  # fmt: skip
            assert judge(task, reference(task), made).correct, task.id
            assert not judge(task, reference(task), []).correct, "the call was not made"
            stands = says("".join(said), task.contains)
            assert stands or "reminder" in said[0], f"{task.id}: {said} does not hold {task.contains}"


def reference(task: AllToolsTask) -> str:
    if task.number is not None:
        return f"It is {task.number}."
    return " ".join(entry[0] for entry in task.contains)


@pytest.mark.parametrize("task", SUITE, ids=lambda task: task.id)
def test_checkers_accept_the_reference_and_refuse_others(task: AllToolsTask) -> None:
    made = [(c.name, json.dumps({k: "x" if v is None else v for k, v in c.arguments.items()})) for c in task.calls]
    cited = list(task.sources)
    assert judge(task, reference(task), made, cited).correct and judge(task, reference(task), None).correct
    assert not judge(task, "", made, cited).correct and not judge(task, "I do not know; 99999.", made, cited).correct
    if task.sources:
        assert not judge(task, reference(task), made, ["en/index.html"]).correct, "another page is cited"
    if task.group == "none":
        assert not judge(task, reference(task), [("get_weather", '{"city": "Oslo"}')]).correct, "no call is needed"


def test_answers_stand_in_the_pages_they_are_to_be_cited_from() -> None:
    from openglm.agent.browser.fetch import Reply
    from openglm.agent.browser.page import read_page

    for task in SUITE:
        for path in task.sources:
            file = SITE / path
            kind = "application/pdf" if path.endswith(".pdf") else "text/html"
            reply = Reply(f"http://site/{path}", 200, file.read_bytes(), {"content-type": kind})
            assert says(read_page(reply).text, task.contains), task.id


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("So it is 1,234 in all.\nAnswer: **1,234**", "1234"),
        ("答案：９，４４９，７７２", "9449772"),
        ("12 + 30 = 42", "42"),
        ("Answer: 6 x 7 = 42 apples in 3 bags", "42"),
        ("\\boxed{1{,}234{,}567} is it, not 7", "1234567"),
        ("The answer is $10,800", "10800"),
        ("about 1.5e3 metres", "1.5e3"),
        ("1 234 567", "1234567"),
        ("it fell by −3", "-3"),
        ("from 3, 4 and 5", "5"),
        ("none", None),
    ],
)
def test_final_number(answer: str, number: str | None) -> None:
    assert final_number(answer) == number


def test_numbers_are_exact_or_rounded_as_the_reference() -> None:
    assert says_number("9449772114007", "9449772114007") and not says_number("9449772114008", "9449772114007")
    assert says_number("18.0", "18") and says_number("15.1613", "15.16") and not says_number("15.17", "15.16")


def test_digits_do_not_stand_inside_others() -> None:
    assert says("It is 7°C.", [["7"]]) and not says("It is 17 or 7.5 or 70.", [["7"]])
    assert says("ＩＮ Transit", [["in transit"]]) and says("2,500 yuan", [["2500"]])


def test_calls_are_compared_by_value() -> None:
    task = BY_ID["functions-en-08"]
    right = dict(task.calls[0].arguments)

    def called(**change: object) -> bool | None:
        call = task.calls[0].name, json.dumps({**right, **change})
        return judge(task, reference(task), [call]).called

    assert called() and called(restaurant="The  Blue Lantern") and called(people=4.0)
    assert not called(people=5) and not called(restaurant="Bamboo Garden") and not called(room="quiet")
    twice = [(task.calls[0].name, json.dumps({**right, "people": n})) for n in (5, 4)]
    assert not judge(task, reference(task), twice).called, "a wrong table stays booked"
    lookup = BY_ID["functions-en-01"]
    twice = [("get_weather", '{"city": "Oslo, Norway"}'), ("get_weather", '{"city": "OSLO"}')]
    assert judge(lookup, "7", twice).called, "a wrong question does no harm"


def test_functions_refuse_what_they_do_not_know() -> None:
    by_name = {f.__name__: f for f in FUNCTIONS}
    cases: list[tuple[str, dict[str, object], str]] = [
        ("get_weather", {"city": "Atlantis"}, "no city 'Atlantis'; known are Beijing"),
        ("find_contact", {"name": "Nobody"}, "no contact"),
        ("get_order", {"order_id": "Z1"}, "no order 'Z1'"),
        ("list_events", {"date": "9 March"}, "YYYY-MM-DD"),
        ("book_table", {"restaurant": "x", "date": "2026-01-01", "time": "25:00", "people": 2}, "HH:MM"),
        ("book_table", {"restaurant": "x", "date": "2026-01-01", "time": "12:00", "people": 0}, "1 to 20 people"),
        ("convert_units", {"value": 1, "from_unit": "kg", "to_unit": "km"}, "do not convert"),
    ]
    for name, arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            by_name[name](**arguments)
    assert by_name["find_trains"](origin="Oslo", destination="Lisbon")["trains"] == []
    assert by_name["get_weather"](city="北京") == by_name["get_weather"](city="beijing")
    assert not set(ALIASES) & set(ALIASES.values()), "an alias leads to a stored name in one step"


def test_broken_tasks_are_noticed() -> None:
    with pytest.raises(AssertionError, match="needs a number or words"):
        AllToolsTask.from_dict({"id": "x", "group": "none", "lang": "en", "question": "?"})
    assert ExpectedCall("f", {}).arguments == {}
