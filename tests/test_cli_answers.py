"""--stop, --json-schema and --regex of `openglm generate` and `openglm chat`.

python -m pytest -q tests/test_cli_answers.py
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

import openglm
from openglm.cli import main

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22]}, "yes": {"type": "boolean"}},
          "required": ["n", "yes"], "additionalProperties": False}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def generate(model: Path) -> list[object]:
    return ["generate", model, "--prompt", "The quick", "--device", "cpu", "--max-new-tokens", 60, "--seed", 5]


def test_stop_ends_the_text_in_front_of_it(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path) -> None:
    base = generate(tiny_checkpoint)
    whole = openglm.load(tiny_checkpoint, device="cpu").generate("The quick", max_new_tokens=60, seed=5)
    stop = whole[3:5]
    code, out, _ = run(capsys, *base, "--stop", "not in there", "--stop", stop)
    assert code == 0 and out == whole[: whole.index(stop)] + "\n"
    value = json.loads(run(capsys, *base, "--stop", stop, "--json")[1])
    assert value["text"] == whole[: whole.index(stop)] and value["finish_reason"] == "stop"


def test_answers_are_held_to_a_grammar(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xgrammar")
    base = generate(tiny_checkpoint)
    code, out, err = run(capsys, *base, "--regex", "[a-z]{3}-(1|2)[0-9]")
    assert code == 0 and re.fullmatch("[a-z]{3}-(1|2)[0-9]\n", out), err
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    for schema in (path, json.dumps(SCHEMA)):
        code, out, err = run(capsys, *base, "--temperature", 1.5, "--json-schema", schema, "--json")
        assert code == 0, err
        value = json.loads(json.loads(out)["text"])
        assert set(value) == {"n", "yes"} and value["n"] in (1, 22) and isinstance(value["yes"], bool)


def test_chat_answers_are_held_to_both(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xgrammar")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\nAnd now?\n"))
    code, out, err = run(capsys, "chat", tiny_checkpoint, "--device", "cpu", "--regex", "[a-d]{4};[e-h]{4}",
                         "--stop", ";", "--max-new-tokens", 40)  # fmt: skip
    assert code == 0 and re.fullmatch("([a-d]{4}\n){2}", out), err


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--json-schema", "{"], "the JSON schema is not JSON"),
        (["--json-schema", "no.json"], "no.json: No such file"),
        (["--json-schema", '{"type": "object", "dependentRequired": {"a": ["b"]}}'], "dependentRequired"),
        (["--regex", "(a"], "regular expression"),
        (["--regex", ""], "grammar.text of kind regex"),
        (["--regex", "a", "--json-schema", "{}"], "not allowed with"),
        (["--stop", ""], "stop_strings must be texts that are not empty"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], verb: str, argv: list[str], words: str
) -> None:
    prompt = ["--prompt", "x"] if verb == "generate" else []
    code, out, err = run(capsys, verb, "no/folder", *prompt, *argv)
    assert code == 2 and words in err and out == "" and err.count("\n") == 1, err


def test_without_the_extra_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    code, _, err = run(capsys, "generate", "no/folder", "--prompt", "x", "--regex", "a+")
    assert code == 2 and "pip install 'openglm[grammar]'" in err and err.count("\n") == 1


def test_a_model_without_a_tokenizer_takes_neither(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["generate", "random:glm-nano?n_layers=1", "--tokens", "1,2", "--device", "cpu"]
    assert "no tokenizer" in run(capsys, *base, "--stop", "x")[2]
    pytest.importorskip("xgrammar")
    code, _, err = run(capsys, *base, "--regex", "a")
    assert code == 2 and "needs a tokenizer" in err
