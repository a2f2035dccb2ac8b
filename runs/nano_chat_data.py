"""Chat data of the bundled model: short bilingual dialogues of our own, and a selection from folders of others.

    python runs/nano_chat_data.py build/nano/chat.jsonl --sft ../shared/data/sft \
        --val ../shared/data/corpus/val-en.jsonl.zst ../shared/data/corpus/val-zh.jsonl.zst

A model of 15 million parameters knows little, so our rows teach it what it can hold: who it is, small talk, sums up
to 20, capitals, opposites, days, counting, word pairs, and to say plainly that it does not know. The words are ours
(runs/nano_chat_facts.py). With --sft, rows of the files in SOURCES are added: short ones only, none of an unsound
licence, and none whose answer stands in a file given as --val, so that held-out figures stay held out. Deterministic:
the same seed and inputs give the same file. Each row: {"messages": [...], "source": name}.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Pair = tuple[str, str]  # (question, answer)
Row = dict[str, Any]

# name: (rows at most, bytes of text at most, turns at most). Left out: files written by a machine whose makers' terms
# may forbid it, preference pairs, tool use, chatterbot_zh (a rough machine translation), and what asks a small model
# to recall telephone numbers or paragraphs of laws.
SOURCES: dict[str, tuple[int, int, int]] = {
    "chatterbot_en": (600, 300, 4),
    "self_instruct_seeds": (120, 240, 2),
    "taskmaster4_coffee": (200, 300, 8),
    "tatoeba_en_zh": (3000, 120, 2),
    "wiki_intro_en": (1500, 500, 2),
    "wiki_intro_zh": (1500, 420, 2),
    "poem_recall": (400, 200, 2),
    "xiehouyu": (500, 100, 2),
    "oasst1_zh": (350, 700, 8),
}

# Words of rows that speak of other assistants, or that a small model cannot use.
ELSEWHERE = ("openai", "chatgpt", "open assistant", "openassistant", "语言模型", "```", "http")


def load_facts() -> ModuleType:
    """The tables beside this script, as a module."""
    path = Path(__file__).with_name("nano_chat_facts.py")
    spec = importlib.util.spec_from_file_location("nano_chat_facts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cross(questions: Sequence[str], answers: Sequence[str]) -> list[Pair]:
    """Every wording of a question, with the answers in turn."""
    return [(q, answers[i % len(answers)]) for i, q in enumerate(questions)]


def talk(facts: ModuleType, lang: str, millions: int) -> list[Pair]:
    """Identity, small talk, limits, requests: written out by hand."""
    size = f"{millions} million" if lang == "en" else f"{millions * 100} 万"
    pairs: list[Pair] = []
    for block in facts.TALK[lang].strip().split("\n"):
        questions, answers = block.split(" => ")
        pairs += cross(questions.split(" | "), [a.replace("{size}", size) for a in answers.split(" | ")])
    return pairs


def sums(lang: str) -> list[Pair]:
    """Additions and subtractions up to 20, small products, comparisons."""
    en = lang == "en"
    pairs: list[Pair] = []
    for a, b in itertools.product(range(21), repeat=2):
        if a + b <= 20:
            pairs.append((f"What is {a} + {b}?" if en else f"{a} + {b} 等于几？", f"{a} + {b} = {a + b}."))
            words = f"How much is {a} plus {b}?" if en else f"{a} 加 {b} 等于多少？"
            pairs.append((words, f"{a} plus {b} is {a + b}." if en else f"{a} 加 {b} 等于 {a + b}。"))
            pairs.append((f"{a}+{b}=?", f"{a} + {b} = {a + b}."))
        if a >= b:
            pairs.append((f"What is {a} - {b}?" if en else f"{a} - {b} 等于几？", f"{a} - {b} = {a - b}."))
            words = f"How much is {a} minus {b}?" if en else f"{a} 减 {b} 等于多少？"
            pairs.append((words, f"{a} minus {b} is {a - b}." if en else f"{a} 减 {b} 等于 {a - b}。"))
        if 1 <= a <= 9 and 1 <= b <= 9:
            words = f"What is {a} times {b}?" if en else f"{a} 乘以 {b} 等于多少？"
            pairs.append((words, f"{a} times {b} is {a * b}." if en else f"{a} 乘以 {b} 等于 {a * b}。"))
        if a != b:
            more = max(a, b)
            words = f"Which is bigger, {a} or {b}?" if en else f"{a} 和 {b} 哪个大？"
            pairs.append((words, f"{more} is bigger." if en else f"{more} 更大。"))
    return pairs


def counting(lang: str) -> list[Pair]:
    """Counting up and down within 1..20."""
    pairs: list[Pair] = []
    for a, b in itertools.product(range(1, 21), repeat=2):
        if 2 <= abs(a - b) <= 9:
            step = 1 if a < b else -1
            run = (", " if lang == "en" else "、").join(str(n) for n in range(a, b + step, step))
            question = f"Count from {a} to {b}." if lang == "en" else f"从 {a} 数到 {b}。"
            pairs.append((question, run + ("." if lang == "en" else "。")))
    return pairs


def tables(facts: ModuleType, lang: str) -> dict[str, list[list[str]]]:
    """name -> list of [subject, value, ...] of one language."""
    rows = {name: [row.split("=") for row in text.split()] for name, text in facts.TABLES[lang].items()}
    known = {a for a, _ in rows["opposite"]}
    rows["opposite"] += [[b, a] for a, b in rows["opposite"] if b not in known]
    return rows


def said(answer: str, a: str, b: str) -> str:
    """The answer filled in; a sentence starts with a capital, a bare word stays as it is."""
    text = answer.format(a=a, b=b)
    return text[0].upper() + text[1:] if text.endswith(".") else text


def facts_pairs(facts: ModuleType, lang: str) -> list[Pair]:
    """Templates over the tables: capitals, opposites, colours, animals, days and months, word pairs, groups."""
    pairs: list[Pair] = []
    all_rows = tables(facts, lang)
    for name, templates in facts.TEMPLATES[lang].items():
        for cells in all_rows[name]:
            a, b = (cell.replace("_", " ") for cell in cells[:2])
            for question, answer in templates:
                pairs.append((question.format(a=a, b=b), said(answer, a, b)))
    for group, members in facts.GROUPS[lang].items():
        words = members.split()
        for i in range(len(words)):
            three = [words[(i + k) % len(words)] for k in (0, 2, 3)]
            if lang == "en":
                pairs.append((f"Name three {group}.", f"Three {group}: {three[0]}, {three[1]} and {three[2]}."))
            else:
                pairs.append((f"说出三种{group}。", f"三种{group}：{'、'.join(three)}。"))
    return pairs


def vary(rng: random.Random, question: str, lang: str) -> str:
    """A question as people type it: with a polite opening, or without capitals or the last mark."""
    roll = rng.random()
    if lang == "en":
        plain = question[0].lower() + question[1:]
        if roll < 0.10 and question.endswith("?") and not question.startswith("And "):
            return rng.choice(["Please tell me: ", "Can you tell me: ", "Hi, ", "Question: ", "One question: "]) + plain
        if roll < 0.25:
            return question.lower()
        return question.rstrip(".?") if roll < 0.45 else question
    if roll < 0.10 and question.endswith("？"):
        return rng.choice(["请问", "请告诉我，", "你好，", "问一下，", "我想知道"]) + question
    return question.rstrip("。？") if roll < 0.35 else question.replace("？", "?") if roll < 0.42 else question


def named(rng: random.Random, facts: ModuleType, lang: str) -> list[Pair]:
    """Turns in which the user gives a name and asks for it again: the answer stands in the dialogue."""
    name = rng.choice(facts.NAMES[lang].split())
    if lang == "en":
        first = rng.choice(["My name is {}.", "I am {}.", "Hi, I'm {}.", "Call me {}."])
        ask = rng.choice(["What is my name?", "Do you remember my name?", "Who am I?"])
        return [(first.format(name), f"Nice to meet you, {name}! How can I help you?"), (ask, f"Your name is {name}.")]
    first = rng.choice(["我叫{}。", "我是{}。", "你好，我叫{}。", "叫我{}吧。"])
    ask = rng.choice(["我叫什么名字？", "你还记得我的名字吗？", "我是谁？"])
    return [(first.format(name), f"很高兴认识你，{name}！有什么可以帮你的吗？"), (ask, f"你叫{name}。")]


def follow_up(rng: random.Random, facts: ModuleType, lang: str) -> list[Pair]:
    """One fact, and the same asked of another thing in half a sentence."""
    name = rng.choice([n for n in facts.TEMPLATES[lang] if n in facts.FOLLOW])
    question, answer = facts.TEMPLATES[lang][name][0]
    short = "And {a}?" if lang == "en" else "那{a}呢？"
    turns: list[Pair] = []
    for i, cells in enumerate(rng.sample(tables(facts, lang)[name], rng.choice([2, 2, 3]))):
        a, b = (cell.replace("_", " ") for cell in cells[:2])
        turns.append(((short if i else question).format(a=a, b=b), said(answer, a, b)))
    return turns


def dialogue(rng: random.Random, turns: Sequence[Pair], lang: str, system: str | None = None) -> Row:
    """A row from turns; the questions are varied, the answers kept."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": vary(rng, question, lang)})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "source": f"own_{lang}"}


def own_rows(n_rows: int, seed: int, millions: int) -> list[Row]:
    """About n_rows of our rows, half of each language: single turns of every kind and dialogues of two to four."""
    facts, rows = load_facts(), []
    for lang in ("en", "zh"):
        rng = random.Random(f"{seed}-{lang}")
        kinds: list[tuple[float, list[Pair]]] = [  # share of the single turns
            (0.34, talk(facts, lang, millions)), (0.31, sums(lang)), (0.04, counting(lang)),
            (0.31, facts_pairs(facts, lang)),
        ]  # fmt: skip
        n_single = int(n_rows / 2 * 0.72)
        for share, pairs in kinds:
            want = int(n_single * share)
            # Every pair in turn before any comes twice: coverage first, then paraphrases.
            order = [p for _ in range(want // len(pairs) + 1) for p in rng.sample(pairs, len(pairs))][:want]
            for pair in order:
                system = rng.choice(facts.SYSTEM[lang]) if rng.random() < 0.03 else None
                rows.append(dialogue(rng, [pair], lang, system))
        for i in range(n_rows // 2 - n_single):
            pools = rng.choices([p for _, p in kinds], [s for s, _ in kinds], k=rng.choice([1, 2, 3]))
            mixed = [rng.choice(pool) for pool in pools]
            if i % 2:
                special = [rng.choice(kinds[0][1])]
            else:
                special = named(rng, facts, lang) if i % 4 else follow_up(rng, facts, lang)
            rows.append(dialogue(rng, special + mixed if rng.random() < 0.5 else mixed + special, lang))
    return rows


def read_jsonl(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl or .jsonl.zst file."""
    import zstandard

    with path.open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        yield from (json.loads(line) for line in io.TextIOWrapper(stream, encoding="utf-8") if line.strip())


def acceptable(name: str, row: Row, held_out: str) -> bool:
    """Short, plain, not about another assistant, and not part of the held-out text."""
    _, max_bytes, max_turns = SOURCES[name]
    messages = row["messages"]
    text = "\n".join(m["content"] for m in messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if len(text.encode()) > max_bytes or len(messages) > max_turns or not all(a.strip() for a in answers):
        return False
    if row.get("tools") or any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
        return False
    if name == "chatterbot_en" and (len(messages) > 2 or " you" in f" {text.lower()}" or len(answers[0]) < 3):
        return False  # its small talk claims to be other programs and to be immortal; its plain questions are good
    lowered = text.lower()
    if any(word in lowered for word in ELSEWHERE):
        return False
    return not any(len(a) >= 16 and a[:32] in held_out for a in answers)


def selected_rows(folder: Path, held_out: str, seed: int) -> Iterator[Row]:
    """Rows of every file of SOURCES under `folder`, at most as many as it says."""
    for name, (limit, _, _) in SOURCES.items():
        path = folder / f"{name}.jsonl.zst"
        if not path.is_file():
            raise ValueError(f"{path} is not there; give the folder that holds {name}.jsonl.zst, or leave --sft out")
        rows = [row for row in read_jsonl(path) if acceptable(name, row, held_out)]
        for row in random.Random(f"{seed}-{name}").sample(rows, min(limit, len(rows))):
            messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
            yield {"messages": messages, "source": name}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file and say on stderr what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sft", type=Path, help="folder of dialogue files (JSONL.zst)")
    parser.add_argument("--val", type=Path, nargs="*", default=[], help="held-out documents no answer may come from")
    parser.add_argument("--rows", type=int, default=10000, help="rows of our own, both languages together")
    parser.add_argument("--millions", type=int, default=15, help="parameters of the model, in millions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        held_out = "\n".join(row["text"] for path in args.val for row in read_jsonl(path))
        rows = own_rows(args.rows, args.seed, args.millions)
        if args.sft is not None:
            rows += selected_rows(args.sft, held_out, args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    random.Random(args.seed).shuffle(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(args.out.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, args.out)
    for name, count in sorted(Counter(row["source"] for row in rows).items()):
        print(f"{name:22} {count:6,}", file=sys.stderr)
    print(f"{'total':22} {len(rows):6,} rows, {args.out.stat().st_size / 1e6:.1f} MB -> {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
