"""Bad input to data preparation: each mistake gives one line that names the file, and finished work is kept."""

from __future__ import annotations

import errno
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from openglm.data import prepare as module
from openglm.data.lines import MAX_LINE_BYTES
from openglm.data.prepare import prepare, train_tokenizer
from openglm.data.shards import ShardWriter, TokenDataset
from openglm.tokenizer import Tokenizer
from tests.data_helpers import contents, documents, texts_in, write_jsonl


@pytest.fixture(scope="module")
def tokenizer_folder(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(folder)
    return folder


def refuse(match: str, *args: Any, **options: Any) -> None:
    """prepare(...) gives a ValueError of one line that matches."""
    with pytest.raises(ValueError, match=match) as caught:
        prepare(*args, **options)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


def test_malformed_lines_are_counted_reported_and_skipped(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        b'{"text": "cut',
        b'{"text": "caf\xe9"}',
        b'["no", "object"]',
        b'{"body": "other field"}',
        b'{"text": 7}',
        b'{"text": "half \\ud83d of a pair"}',
        b"[" * 200_000,
        b'{"text": "the last one is good"}',
    ]
    source = write_jsonl(tmp_path / "a.jsonl", documents(30), extra=bad)
    data = prepare(source, tokenizer_folder, tmp_path / "out")
    assert texts_in(tmp_path / "out") == [*documents(30), "the last one is good"]
    [counts] = data.manifest["sources"]
    assert counts["malformed"] == data.manifest["totals"]["malformed"] == 7 and counts["rows"] == 38
    assert [line for line, _ in counts["listed"]] == [31, 32, 33, 34, 35, 36, 37]
    reasons = " | ".join(reason for _, reason in counts["listed"])
    for part in (
        "not JSON",
        "not UTF-8",
        "not a JSON object",
        "no field 'text' (has body)",
        "is int, not",
        "surrogate",
    ):
        assert part in reasons
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped ")]
    assert len(shown) == 5 and shown[0].startswith(f"skipped {source}, line 31: not JSON")


def test_many_malformed_lines_are_all_counted(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl.gz", documents(5), extra=[b"{"] * 100)
    [counts] = prepare(source, tokenizer_folder, tmp_path / "out").manifest["sources"]
    assert counts["malformed"] == 100 and len(counts["listed"]) == 20


def test_bad_lines_of_a_text_file(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\ncaf\xe9\nfour\n")
    data = prepare(tmp_path / "a.txt", tokenizer_folder, tmp_path / "out")
    assert texts_in(tmp_path / "out") == ["one\ntwo\nfour\n"]
    assert data.manifest["sources"][0]["listed"] == [[3, "not UTF-8"]]


def test_a_line_without_end_is_skipped(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lines", "sources"):
        monkeypatch.setattr(f"openglm.data.{name}.MAX_LINE_BYTES", 2000)
    assert MAX_LINE_BYTES > 1 << 20
    texts = [*documents(2), "long " * 3000, *documents(2, first=2)]
    data = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tokenizer_folder, tmp_path / "out")
    assert texts_in(tmp_path / "out") == documents(4)
    assert data.manifest["sources"][0]["listed"][0][0] == 3


def _unusable(kind: str, folder: Path) -> tuple[Path, str]:
    """A file that cannot be used, and what the error says."""
    path = folder / f"{kind}.jsonl"
    good = write_jsonl(folder / "good.jsonl", documents(2000)).read_bytes()
    if kind == "missing":
        return path, "no such file"
    if kind == "suffix":
        path = folder / "a.pdf"
        path.write_bytes(good)
        return path, "unknown kind of file"
    if kind == "gb18030":
        path = folder / "a.txt"
        path.write_text("北京是中华人民共和国的首都\n" * 20, encoding="gb18030")
        return path, "not UTF-8"
    if kind == "utf16":
        path = folder / "a.txt"
        path.write_text("plain words\n" * 20, encoding="utf-16")
        return path, "not UTF-8"
    if kind in ("gz", "zst"):
        path = folder / f"a.jsonl.{kind}"
        packed = gzip.compress(good) if kind == "gz" else zstandard.compress(good)
        path.write_bytes(packed[: len(packed) * 3 // 4])
        return path, "cut short"
    if kind == "flipped":
        path = folder / "a.jsonl.gz"
        packed = gzip.compress(good)
        path.write_bytes(packed[:-6] + bytes([packed[-6] ^ 255]) + packed[-5:])  # in its check sum
        return path, "damaged compressed file"
    if kind == "not-zst":
        path = folder / "a.jsonl.zst"
        path.write_bytes(good)
        return path, "damaged compressed file"
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        path = folder / "a.parquet"
        path.write_bytes(b"PAR1" + good)
        return path, "cannot be read"
    if kind == "chat":
        path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
        return path, "row 1: holds chat messages, not text.*openglm data check"
    rows = {"broken": '{"text": "x\n', "other": '{"body": "x"}\n', "blank": '{"text": " "}\n'}
    path.write_text(rows[kind] * 9)
    return path, "none of its 9 rows holds usable text"


@pytest.mark.parametrize(
    "kind",
    "missing suffix gb18030 utf16 gz zst flipped not-zst parquet chat broken other blank".split(),
)
def test_an_unusable_file_is_an_error_that_names_it(tokenizer_folder: Path, tmp_path: Path, kind: str) -> None:
    path, message = _unusable(kind, tmp_path)
    good = write_jsonl(tmp_path / "first.jsonl", documents(10))
    refuse(f"{path}.*{message}", [good, path], tokenizer_folder, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))
    if kind not in ("flipped", "gz", "zst", "broken", "other", "blank"):
        with pytest.raises(ValueError, match=message):
            train_tokenizer([path], 300, tmp_path / "t")


def test_empty_corpus(tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write_jsonl(tmp_path / "in" / "empty.jsonl", [])
    refuse("empty corpus", empty, tokenizer_folder, tmp_path / "out")
    refuse("no .txt, .md.* file in this folder", _folder(tmp_path / "none"), tokenizer_folder, tmp_path / "out2")
    refuse("no file matches this pattern", tmp_path / "*.md", tokenizer_folder, tmp_path / "out3")
    refuse("no sources", [], tokenizer_folder, tmp_path / "out4")
    with pytest.raises(ValueError, match="gives only 266 distinct tokens"):
        train_tokenizer(empty, 300, tmp_path / "t")
    # Beside other files an empty one is only worth a warning.
    good = write_jsonl(tmp_path / "in" / "good.jsonl", documents(3))
    assert prepare([good, empty], tokenizer_folder, tmp_path / "out5").n_documents == 3
    assert f"{empty} is empty" in capsys.readouterr().err


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_one_repeated_line(tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["the same line\n"] * 500)
    assert prepare(source, tokenizer_folder, tmp_path / "out").n_documents == 1
    assert "only one distinct document" in capsys.readouterr().err
    with pytest.raises(ValueError, match="gives only 27. distinct tokens, 4000 were asked for"):
        train_tokenizer(source, 4000, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_parquet_without_the_column_or_the_package(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"body": ["x"]}), path)
    refuse("no column 'text'; it has body", path, tokenizer_folder, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refuse(r"need the package pyarrow: `pip install openglm\[data\]`", path, tokenizer_folder, tmp_path / "out2")


def test_disk_full_keeps_finished_shards(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 2000)
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(200)), tmp_path / "out"
    prepare(source, tokenizer_folder, tmp_path / "whole", shard_tokens=1000)
    add = ShardWriter.add

    def fail(self: ShardWriter, *args: Any) -> None:
        if self._number == 2 and self.n_tokens:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", fail)
        refuse(f"disk full while writing to {out}: finished", source, tokenizer_folder, out, shard_tokens=1000)
    assert (out / "tokens-00001.bin").exists() and not list(out.glob("*.tmp"))
    prepare(source, tokenizer_folder, out, shard_tokens=1000)
    assert contents(out) == contents(tmp_path / "whole")


def test_out_that_cannot_be_written(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents(3))
    refuse("cannot write to", source, tokenizer_folder, source / "out")
    refuse("no tokenizer in", source, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="is not a folder"):
        train_tokenizer(source, 300, source)
    refuse("workers must be at least 1", source, tokenizer_folder, tmp_path / "out", workers=0)


def test_two_runs_cannot_write_one_folder(tokenizer_folder: Path, tmp_path: Path) -> None:
    from openglm.data.progress import locked

    with locked(tmp_path / "out"):
        refuse("another run is preparing", write_jsonl(tmp_path / "a.jsonl", ["x"]), tokenizer_folder, tmp_path / "out")


@pytest.mark.parametrize("damage", ["byte", "length", "index", "manifest", "missing", "version"])
def test_damaged_shards_are_noticed(tokenizer_folder: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    prepare(write_jsonl(tmp_path / "a.jsonl", documents(9)), tokenizer_folder, out)
    tokens = out / "tokens-00000.bin"
    content = bytearray(tokens.read_bytes())
    if damage == "byte":
        content[20] ^= 1
        tokens.write_bytes(content)
        with pytest.raises(ValueError, match="sha256 differs"):
            TokenDataset(out).verify()
        return
    if damage == "length":
        tokens.write_bytes(content[:-2])
    elif damage == "index":
        (out / "index-00000.npy").write_bytes(b"\x93NUMPY")
    elif damage == "manifest":
        (out / "manifest.json").write_bytes((out / "manifest.json").read_bytes()[:300])
    elif damage == "missing":
        tokens.unlink()
    else:
        manifest = json.loads((out / "manifest.json").read_text())
        (out / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ValueError, match=r"tokens-00000|index-00000|manifest.json|version 99") as caught:
        TokenDataset(out)
    assert "\n" not in str(caught.value)
