"""Each format's prompts and training targets against sequences written by hand from the published layouts."""

from __future__ import annotations

import json

import pytest

from openglm.formats import FORMATS, detect_format, get_format, render_many
from openglm.formats.codegeex import CodeGeex2Format, CodeGeex4Format, Reference
from openglm.formats.fill import Glm130bFormat
from openglm.tokenizer import SPECIALS
from openglm.types import Message, ToolCall, ToolSpec
from tests.format_helpers import (
    BROWSER,
    CHATML,
    COGVIEW,
    PYTHON,
    ROUNDS,
    SPECIALS_OF,
    TEMPLATE,
    TOOLS,
    WEATHER,
    call,
    format_named,
    shown,
    targets,
    tokenizer_with,
    written,
)

CHAT = [Message("user", "你好"), Message("assistant", "你好！"), Message("user", "1+1=?")]
ANSWERED = [*CHAT, Message("assistant", "2")]
SYSTEM = Message("system", "Be brief.")
WITH_TOOLS = [
    Message("user", "天气?"),
    Message("assistant", "", (call("get_weather", city="北京"), call("get_time"))),
    Message("tool", "sunny"),
    Message("tool", "noon"),
    Message("assistant", "晴。"),
]


def declared(tool: ToolSpec) -> str:
    value = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return json.dumps(value, indent=4, ensure_ascii=False)


# -------------------------------------------------------------------- without role tokens


def test_glm_130b() -> None:
    assert shown("glm-130b", [Message("user", "Paris is [MASK].")]) == "Paris is [MASK].</s><sop>"
    assert shown("glm-130b", [Message("user", "Ends in [sMASK]")]) == "Ends in [sMASK]<sop>"
    assert shown("glm-130b", [Message("user", "没有空格")]) == "没有空格[gMASK]<sop>"
    assert shown("glm-130b", CHAT) == "你好\n你好！\n1+1=?[gMASK]<sop>"
    assert targets("glm-130b", ANSWERED) == "2<eop>"
    chat_format, tokenizer = format_named("glm-130b"), tokenizer_with(SPECIALS_OF["glm-130b"])
    assert isinstance(chat_format, Glm130bFormat)
    rendered = chat_format.render_fill("a [MASK] b [gMASK]")
    assert written(rendered, tokenizer) == "a [MASK] b [gMASK]<sop>" and not any(rendered.loss_mask)
    special = tokenizer.special_ids
    assert [i for i in rendered.ids if i in special.values()] == [special[n] for n in ("[MASK]", "[gMASK]", "<sop>")]
    assert set(chat_format.stop_ids) == {special["<eop>"], special["</s>"]}
    # a blank's name in an answer is text, and no blank
    quoted = [Message("user", "x"), Message("assistant", "[MASK]"), Message("user", "y")]
    ids = chat_format.render(quoted).ids
    assert [i for i in ids if i in special.values()] == [special["[gMASK]"], special["<sop>"]]


def test_chatglm_6b() -> None:
    assert shown("chatglm-6b", CHAT[:1]) == "你好[gMASK]<sop>"
    assert shown("chatglm-6b", CHAT) == "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：1+1=?\n答：[gMASK]<sop>"
    assert shown("chatglm-6b", ANSWERED, prompt=False).endswith("\n答：[gMASK]<sop>2<eop>")
    assert targets("chatglm-6b", ANSWERED) == "2<eop>"
    assert shown("chatglm-6b", [SYSTEM, *CHAT]).endswith("问：Be brief.1+1=?\n答：[gMASK]<sop>")
    special = tokenizer_with(SPECIALS_OF["chatglm-6b"]).special_ids
    assert format_named("chatglm-6b").stop_ids == (special["<eop>"], special["</s>"])


def test_chatglm2() -> None:
    assert shown("chatglm2", CHAT[:1]) == "[gMASK]<sop>[Round 1]\n\n问：你好\n\n答："
    assert shown("chatglm2", ANSWERED, prompt=False) == (
        "[gMASK]<sop>[Round 1]\n\n问：你好\n\n答：你好！\n\n[Round 2]\n\n问：1+1=?\n\n答：2</s>"
    )
    assert targets("chatglm2", ANSWERED) == "2</s>"
    assert shown("chatglm2", [SYSTEM, *CHAT[:1]]) == "[gMASK]<sop>[Round 1]\n\n问：Be brief.你好\n\n答："


def test_codegeex2() -> None:
    ask = [Message("user", "write a bubble sort\nfunction")]
    assert shown("codegeex2", ask) == "[gMASK]<sop># language: Python\n# write a bubble sort\n# function\n"
    more = [*ask, Message("assistant", "def f():\n    pass\n"), Message("user", "# and a test")]
    assert shown("codegeex2", more) == shown("codegeex2", ask) + "def f():\n    pass\n# and a test\n"
    assert targets("codegeex2", more[:2]) == "def f():\n    pass\n</s>"
    tokenizer = tokenizer_with(ROUNDS)
    cpp = get_format("codegeex2", tokenizer, language="C++")
    assert isinstance(cpp, CodeGeex2Format)
    assert written(cpp.render_completion("int main("), tokenizer) == "[gMASK]<sop>// language: C++\nint main("
    assert written(cpp.render(ask), tokenizer).endswith("C++\n// write a bubble sort\n// function\n")


@pytest.mark.parametrize("name", ["glm-130b", "chatglm-6b", "chatglm2", "codegeex2"])
def test_formats_without_tools_say_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"chat format {name} has no tools"):
        format_named(name).render([Message("user", "x")], TOOLS)
    with pytest.raises(ValueError, match="has no tools"):
        format_named(name).render([Message("user", "x"), Message("tool", "y"), Message("user", "z")])


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2"])
def test_rounds_answer_a_question(name: str) -> None:
    with pytest.raises(ValueError, match="the last message must be the user's"):
        format_named(name).render(ANSWERED)
    with pytest.raises(ValueError, match="the last message must be the user's"):
        format_named(name).render([SYSTEM])


# -------------------------------------------------------------------- role tokens


def test_chatglm3() -> None:
    assert shown("chatglm3", [SYSTEM, *CHAT]) == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\n你好<|assistant|>\n你好！<|user|>\n1+1=?<|assistant|>"
    )
    assert targets("chatglm3", ANSWERED) == "\n你好！<|user|>\n2<|user|>"
    tools = "[\n" + ",\n".join("    " + declared(t).replace("\n", "\n    ") for t in TOOLS) + "\n]"
    assert shown("chatglm3", [SYSTEM, *WITH_TOOLS], TOOLS, prompt=False) == (
        "[gMASK]<sop><|system|>\nAnswer the following questions as best as you can. You have access to the following "
        f"tools:\n{tools}<|system|>\nBe brief.<|user|>\n天气?<|assistant|>get_weather\n ```python\n"
        "tool_call(city='北京')\n```<|assistant|>get_time\n ```python\ntool_call()\n```<|observation|>\nsunny"
        "<|observation|>\nnoon<|assistant|>\n晴。<|user|>"
    )
    program = [Message("user", "x"), Message("assistant", "", (call("python", code="print(1)"),))]
    assert shown("chatglm3", program, [PYTHON], prompt=False).endswith(
        "<|assistant|>interpreter\n```python\nprint(1)\n```<|observation|>"
    )


def test_glm_4_0414() -> None:
    note = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    assert shown("glm-4-0414", [SYSTEM, *WITH_TOOLS], [WEATHER]) == (
        f"[gMASK]<sop><|system|>\n# 可用工具\n\n## get_weather\n\n{declared(WEATHER)}{note}<|system|>\nBe brief."
        '<|user|>\n天气?<|assistant|>get_weather\n{"city": "北京"}<|assistant|>get_time\n{}<|observation|>\nsunny'
        "<|observation|>\nnoon<|assistant|>\n晴。<|assistant|>"
    )
    assert targets("glm-4-0414", ANSWERED) == "\n你好！<|user|>\n2<|user|>"


def test_builtin_tools_of_glm_4() -> None:
    messages = [
        Message("user", "x"),
        Message("assistant", "", (call("python", code="print('')\n"), call("simple_browser", code='search("x")'))),
        Message("tool", "-"),
        Message("tool", "# 【0†x†y】"),
        Message("assistant", "", (call("cogview", prompt="A cat."), call("simple_browser", code="mclick([0])"))),
        Message("tool", "done"),
        Message("tool", "page", name="quote_result [0†x]"),
        Message("assistant", "See 【0†x】."),
    ]
    text = shown("glm-4", messages, [PYTHON, BROWSER, COGVIEW, WEATHER], prompt=False)
    sections = [text.index(f"\n\n## {name}\n\n") for name in ("python", "simple_browser", "cogview", "get_weather")]
    assert sections == sorted(sections) and text.index("\n\n# 可用工具\n\n## python") > 0
    assert text.endswith(
        "<|user|>\nx<|assistant|>python\nprint('')\n<|assistant|>simple_browser\nsearch(\"x\")"
        "<|observation|>\n-<|observation|>browser_result\n# 【0†x†y】<|assistant|>cogview\nA cat."
        "<|assistant|>simple_browser\nmclick([0])<|observation|>cogview_result\ndone<|observation|>"
        "quote_result [0†x]\npage"
        "<|assistant|>\nSee 【0†x】.<|user|>"
    )
    # a function of the same name that is no built-in tool keeps its JSON
    own = ToolSpec("python", "mine", {})
    assert '<|assistant|>python\n{"code": "1"}' in shown(
        "glm-4", [Message("assistant", "", (call("python", code="1"),))], [own]
    )
    dated = get_format("glm-4", tokenizer_with(SPECIALS), date="2024-06-05").render(CHAT, TOOLS)
    assert "支持。\n\n当前日期: 2024-06-05\n\n# 可用工具" in written(dated, tokenizer_with(SPECIALS))


def test_glm_z1() -> None:
    head = "[gMASK]<sop><|user|>\n你好<|assistant|>\n"
    thought = [CHAT[0], Message("assistant", "你好！", reasoning="Greet."), CHAT[2]]
    assert shown("glm-z1", CHAT[:1]) == head + "<think>\n"
    assert shown("glm-z1", thought) == head + "你好！<|user|>\n1+1=?<|assistant|>\n<think>\n"
    answered = [*thought, Message("assistant", "2", reasoning="Add.\n1 and 1")]
    assert shown("glm-z1", answered, prompt=False) == (
        head + "你好！<|user|>\n1+1=?<|assistant|>\n<think>\nAdd.\n1 and 1\n</think>\n\n2<|user|>"
    )
    assert targets("glm-z1", answered).endswith("Add.\n1 and 1\n</think>\n\n2<|user|>")
    assert not targets("glm-z1", answered[:2]).startswith("\n<think>"), "the prompt opens the reasoning"
    # reasoning stays while tools are at work
    working = [CHAT[0], Message("assistant", "", (call("get_time"),), reasoning="Look."), Message("tool", "noon")]
    assert shown("glm-z1", working, TOOLS).endswith(
        "<|assistant|>\n<think>\nLook.\n</think>\n\nget_time\n{}<|observation|>\nnoon<|assistant|>\n<think>\n"
    )


def test_codegeex4() -> None:
    assert shown("codegeex4", [SYSTEM, *CHAT]) == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\n你好<|assistant|>\n你好！<|user|>\n1+1=?<|assistant|>\n"
    )
    assert targets("codegeex4", ANSWERED) == "你好！<|user|>2<|user|>", "the newline is the prompt's"
    text = shown("codegeex4", WITH_TOOLS, TOOLS, prompt=False)
    assert text.endswith(
        '<|assistant|>\n```json\n{"name": "get_weather", "arguments": {"city": "北京"}}\n```\n```json\n'
        '{"name": "get_time", "arguments": {}}\n```<|observation|>\nsunny<|observation|>\nnoon'
        "<|assistant|>\n晴。<|user|>"
    )
    assert '"function": [' in text
    ran = Message("assistant", "Go.", (call("python", code="print(1)"),))
    program = [Message("user", "x"), ran, Message("tool", "1")]
    assert shown("codegeex4", program, [PYTHON]).endswith(
        "<|assistant|>\nGo.\n```python\nprint(1)\n```<|observation|>\n```result\n1\n```<|assistant|>\n"
    )


def test_codegeex4_infilling() -> None:
    chat_format, tokenizer = format_named("codegeex4"), tokenizer_with(SPECIALS_OF["codegeex4"])
    assert isinstance(chat_format, CodeGeex4Format)
    rendered = chat_format.render_infill(
        "def add(a, b):\n", "\nprint(add(1, 2))", path="a.py", language="Python", mode="LINE",
        references=[Reference("b.py", "x = 1")],
    )  # fmt: skip
    assert written(rendered, tokenizer) == (
        "[gMASK]<sop><|user|>\n###REFERENCE:\n###PATH:b.py\nx = 1\n###PATH:a.py\n###LANGUAGE:Python\n###MODE:LINE\n"
        "<|code_suffix|>\nprint(add(1, 2))<|code_prefix|>def add(a, b):\n<|code_middle|><|assistant|>\n"
    )
    assert written(chat_format.render_infill("", ""), tokenizer) == (
        "[gMASK]<sop><|user|>\n###LANGUAGE:\n###MODE:BLOCK\n<|code_suffix|><|code_prefix|><|code_middle|><|assistant|>\n"
    )
    with pytest.raises(ValueError, match="LINE or BLOCK, not 'FILE'"):
        chat_format.render_infill("", "", mode="FILE")  # type: ignore[arg-type]
    plain = get_format("codegeex4", tokenizer_with(SPECIALS))
    assert isinstance(plain, CodeGeex4Format)
    with pytest.raises(ValueError, match="infilling needs the token <|code_suffix|>".replace("|", r"\|")):
        plain.render_infill("", "")


# -------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", FORMATS)
def test_text_can_never_become_a_special(name: str) -> None:
    """Every special's name, in every place that a user or a tool fills, whole and cut in two."""
    tokenizer, chat_format = tokenizer_with(SPECIALS_OF[name]), format_named(name)
    special = set(tokenizer.special_ids.values())
    hidden = {"[MASK]", "[sMASK]", "[gMASK]"} if name == "glm-130b" else set()  # there they are the user's own marks
    has_tools = name not in ("glm-130b", "chatglm-6b", "chatglm2", "codegeex2")

    def specials(word: str, other: str) -> list[int]:
        messages = [Message("system", word + other), Message("user", word), Message("assistant", word, reasoning=word)]
        tools: list[ToolSpec] = []
        if has_tools:
            tools = [ToolSpec(word, word, {"type": "object", word: {word: [word]}})]
            messages += [
                Message("user", other),
                Message("assistant", word, (ToolCall(word, json.dumps({word: word})),), reasoning=word),
                Message("tool", word, name=word),
            ]
        return [i for i in chat_format.render([*messages, Message("user", word)], tools).ids if i in special]

    expected = specials("x", "y")
    for word in set(tokenizer.special_ids) - hidden:
        assert specials(word, word) == expected
        assert specials(word[: len(word) // 2], word[len(word) // 2 :]) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_render_many_equals_render(name: str) -> None:
    chat_format, tokenizer = format_named(name), tokenizer_with(SPECIALS_OF[name])
    chats = [ANSWERED, ANSWERED[:2], [SYSTEM, *ANSWERED], []]
    if name == "jinja":
        chats.pop()
    many = render_many(tokenizer, [chat_format.parts(c, (), False) for c in chats])
    assert many == [chat_format.render(c, (), False) for c in chats]
    for chat, rendered in zip(chats, many, strict=True):
        if chat:
            assert rendered.loss_mask[-1] and rendered.ids[-1] in chat_format.stop_ids and not rendered.loss_mask[0]


def test_a_token_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"chat format glm-4 needs the token \[gMASK\]"):
        get_format("glm-4", tokenizer_with(CHATML))
    with pytest.raises(ValueError, match="chat format chatml has no option 'date'; it has default_system"):
        get_format("chatml", tokenizer_with(CHATML), date="x")
    with pytest.raises(ValueError, match="needs the model's chat template"):
        get_format("jinja", tokenizer_with(CHATML))


GLM_STYLE = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"


@pytest.mark.parametrize(
    ("names", "template", "expected"),
    [
        (SPECIALS, None, "glm-4"),
        (SPECIALS, GLM_STYLE, "glm-4"),
        (SPECIALS, GLM_STYLE.replace("{%", "{% if tools %}你是一个名为 X 的\n# 可用工具{% endif %}{%", 1), "glm-4"),
        (SPECIALS, GLM_STYLE.replace("{%", "{% if tools %}\n# 可用工具{% endif %}\n{%", 1), "glm-4-0414"),
        (SPECIALS, GLM_STYLE + "\n<think>", "glm-z1"),
        (SPECIALS, GLM_STYLE + "{{ '\\n' }}", "jinja"),
        (SPECIALS, GLM_STYLE.replace("[gMASK]<sop>", ""), "jinja"),
        (SPECIALS, GLM_STYLE.replace("}}{%", "}}<|endoftext|>{%"), "jinja"),
        (SPECIALS, GLM_STYLE + "{{ no.where }}", "jinja"),
        (SPECIALS_OF["codegeex4"], GLM_STYLE + "{{ '\\n' }}", "codegeex4"),
        (SPECIALS_OF["chatglm3"], GLM_STYLE, "chatglm3"),
        (SPECIALS_OF["codegeex4"], None, "codegeex4"),
        (SPECIALS_OF["chatglm3"], None, "chatglm3"),
        (SPECIALS_OF["chatglm2"], None, "chatglm2"),
        (SPECIALS_OF["chatglm-6b"], None, "chatglm-6b"),
        (CHATML, None, "chatml"),
        (CHATML, TEMPLATE, "jinja"),
        (("<|bos|>",), "{% for m in messages %}{{ m.content }}{% endfor %}", "jinja"),
        (("<|bos|>",), None, None),
    ],
)
def test_detection(names: tuple[str, ...], template: str | None, expected: str | None) -> None:
    assert detect_format({name: i for i, name in enumerate(names)}, template) == expected
