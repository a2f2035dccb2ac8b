"""`prepare` and `train_tokenizer`: every kind of source, shards, duplicates, interruption and continuation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from openglm.data import prepare as module
from openglm.data.prepare import prepare, train_tokenizer
from openglm.data.shards import TokenDataset
from openglm.data.sources import RowReader, expand_sources
from openglm.tokenizer import Tokenizer
from tests.data_helpers import contents, documents, texts_in, write_jsonl


@pytest.fixture(scope="session")
def tokenizer_folder(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(folder)
    return folder


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 2000)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_row_formats_give_the_same_documents(tokenizer_folder: Path, tmp_path: Path, name: str) -> None:
    texts = documents(50)
    if name.endswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.table({"id": list(range(50)), "text": texts}), tmp_path / name, row_group_size=8
        )
    else:
        write_jsonl(tmp_path / name, texts)
    data = prepare(tmp_path / name, tokenizer_folder, tmp_path / "out")
    assert texts_in(tmp_path / "out") == texts
    assert data.manifest["totals"] == {"rows": 50, "documents": 50, "duplicates": 0, "empty": 0, "malformed": 0}


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_file_is_one_document_kept_exactly(tokenizer_folder: Path, tmp_path: Path, name: str) -> None:
    text = "# Title\r\n\n  你好\t🎉\n\n\nend without newline"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())  # the byte order mark is dropped
    prepare([tmp_path / name], tokenizer_folder, tmp_path / "out")
    assert texts_in(tmp_path / "out") == [text]


def test_a_large_text_file_is_cut_at_blank_lines_and_loses_nothing(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openglm.data.sources.PIECE_BYTES", 1000)
    text = "\n".join(documents(100)) + "".join(documents(60, first=100))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepare(tmp_path / "a.txt", tokenizer_folder, tmp_path / "out")
    pieces = texts_in(tmp_path / "out")
    assert "".join(pieces) == text and len(pieces) >= 8
    assert pieces[0].endswith("\n\n") and max(len(p.encode()) for p in pieces) < 2200


def test_folders_globs_and_repeated_names(tokenizer_folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "b.jsonl", documents(3))
    write_jsonl(tmp_path / "in" / "sub" / "c.jsonl.gz", documents(3, first=3))
    (tmp_path / "in" / "notes.csv").write_text("not for us")
    prepare(tmp_path / "in", tokenizer_folder, tmp_path / "out1")
    prepare([tmp_path / "in" / "*.jsonl", tmp_path / "in"], tokenizer_folder, tmp_path / "out2")
    assert texts_in(tmp_path / "out1") == texts_in(tmp_path / "out2") == documents(6)
    assert len(TokenDataset(tmp_path / "out2").manifest["sources"]) == 2


def test_hub_data_set(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
            assert (name, config, split, streaming) == ("owner/name", "zh", "test", True)
            return [{"body": text} for text in documents(4)]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    prepare("hf:owner/name?split=test&config=zh", tokenizer_folder, tmp_path / "out", field="body")
    assert texts_in(tmp_path / "out") == documents(4)
    with pytest.raises(ValueError, match="unknown option 'spilt'"):
        prepare("hf:owner/name?spilt=test", tokenizer_folder, tmp_path / "out2")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"need the package datasets: `pip install openglm\[data\]`"):
        prepare("hf:owner/name", tokenizer_folder, tmp_path / "out3")


def test_exact_duplicates_are_left_out_across_files(tokenizer_folder: Path, tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [*documents(5), *documents(2), "", " \n"])
    b = write_jsonl(tmp_path / "b.jsonl", [*documents(4, first=3)])
    data = prepare([a, b], tokenizer_folder, tmp_path / "out")
    assert texts_in(tmp_path / "out") == documents(7)
    assert data.manifest["totals"] == {"rows": 13, "documents": 7, "duplicates": 4, "empty": 2, "malformed": 0}
    assert [s["duplicates"] for s in data.manifest["sources"]] == [2, 2]


@pytest.mark.usefixtures("small_batches")
def test_shards_views_and_manifest(tokenizer_folder: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = documents(200)
    write_jsonl(tmp_path / "a.jsonl", texts)
    data = prepare(tmp_path / "a.jsonl", tokenizer_folder, tmp_path / "out", shard_tokens=1000, workers=3)
    expected = tiny_tokenizer.encode_batch(texts)
    assert len(data.shards) >= 4 and data.n_documents == len(data) == 200
    assert data.n_tokens == sum(map(len, expected)) == sum(s.n_tokens for s in data.shards)
    assert data.lengths().dtype == np.int64 and data.lengths().tolist() == [len(ids) for ids in expected]
    for i, ids in enumerate(expected):
        assert data.document(i).tolist() == ids
    view = data.document(7)
    assert isinstance(view, np.memmap) and view.dtype == np.uint16 and not view.flags.writeable
    assert data.vocab_size == 600 and data.special_ids == tiny_tokenizer.special_ids
    assert data.tokenizer_fingerprint == tiny_tokenizer.fingerprint
    assert data.sentence_ends == tiny_tokenizer.sentence_end_ids()
    data.verify()
    with pytest.raises(IndexError):
        data.document(200)
    leftovers = {p.name.split("-")[0] for p in (tmp_path / "out").iterdir()}
    assert leftovers == {"tokens", "index", "manifest.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("workers", [1, 4])
def test_output_does_not_depend_on_the_number_of_workers(tokenizer_folder: Path, tmp_path: Path, workers: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(300))
    prepare(tmp_path / "a.jsonl", tokenizer_folder, tmp_path / "two", workers=2, shard_tokens=3000)
    prepare(tmp_path / "a.jsonl", tokenizer_folder, tmp_path / "out", workers=workers, shard_tokens=3000)
    assert contents(tmp_path / "two") == contents(tmp_path / "out")


SLOW_RUN = """
import sys, time
from openglm.data import prepare as module
module.BATCH_BYTES = 2000
take = module._Run._take
def slow_take(self, *args):
    time.sleep(0.0005)
    take(self, *args)
module._Run._take = slow_take
module.prepare(sys.argv[3:], sys.argv[1], sys.argv[2], shard_tokens=2000, workers=2)
"""


@pytest.mark.usefixtures("small_batches")
def test_killed_and_continued_gives_the_same_bytes(tokenizer_folder: Path, tmp_path: Path) -> None:
    """SIGKILL at three points, each after more shards than before, then run to the end."""
    bad = [b"{broken", b'{"text": "caf\xe9"}']
    a = write_jsonl(tmp_path / "a.jsonl.zst", [*documents(500), *documents(40)], extra=bad)
    (tmp_path / "b.txt").write_text("\n".join(documents(300, first=900)), encoding="utf-8")
    c = write_jsonl(tmp_path / "c.jsonl.gz", [*documents(300, first=400), *documents(100)])
    sources = [str(a), str(tmp_path / "b.txt"), str(c)]
    prepare(sources, tokenizer_folder, tmp_path / "whole", shard_tokens=2000, workers=2)
    out = tmp_path / "out"
    n_shards = len(TokenDataset(tmp_path / "whole").shards)
    assert n_shards >= 8
    for wanted in (1, n_shards // 2, n_shards - 2):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_RUN, str(tokenizer_folder), str(out), *sources], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while len(list(out.glob("tokens-*.bin"))) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        with pytest.raises(ValueError, match="no finished token shards"):
            TokenDataset(out)
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("tokens-*.bin")}
    recorded = [s["tokens"] for s in json.loads((out / "progress.json").read_text())["shards"]]
    prepare(sources, tokenizer_folder, out, shard_tokens=2000, workers=2)
    assert contents(out) == contents(tmp_path / "whole")
    assert recorded and all((out / name).stat().st_mtime_ns == kept[name] for name in recorded), "written again"


@pytest.mark.usefixtures("small_batches")
def test_interrupted_anywhere_and_continued_gives_the_same_bytes(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception at every call that makes something durable, which is where the state could be torn."""
    source = write_jsonl(tmp_path / "a.jsonl", [*documents(70), *documents(30)], extra=[b"{"])
    prepare(source, tokenizer_folder, tmp_path / "whole", shard_tokens=1500)
    assert len(TokenDataset(tmp_path / "whole").shards) == 2
    n_calls = 0
    while True:
        out, n_calls, calls = tmp_path / f"out{n_calls}", n_calls + 1, 0

        def stop_at(real, *args, limit=n_calls):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == limit:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda f, real=os.fsync: stop_at(real, f))
            patch.setattr(os, "replace", lambda a, b, real=os.replace: stop_at(real, a, b))
            try:
                prepare(source, tokenizer_folder, out, shard_tokens=1500, workers=1)
            except KeyboardInterrupt:
                pass
            else:
                break
        prepare(source, tokenizer_folder, out, shard_tokens=1500, workers=1)
        assert contents(out) == contents(tmp_path / "whole"), f"torn at call {n_calls}"
    assert n_calls > 20


def test_preparing_again_does_nothing_and_other_inputs_are_refused(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(20)), tmp_path / "out"
    other = write_jsonl(tmp_path / "b.jsonl", documents(21))
    prepare(source, tokenizer_folder, out)
    before = contents(out)
    prepare(source, tokenizer_folder, out)
    assert "already prepared" in capsys.readouterr().err
    with pytest.raises(ValueError, match="prepared from other sources"):
        prepare(other, tokenizer_folder, out)
    with pytest.raises(ValueError, match="prepared with --field text"):
        prepare(source, tokenizer_folder, out, field="body")
    train_tokenizer(source, 280, tmp_path / "t2")
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        prepare(source, tmp_path / "t2", out)
    assert contents(out) == before
    with pytest.raises(ValueError, match="holds other files"):
        prepare(source, tokenizer_folder, tmp_path)


def test_train_tokenizer_from_files(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl.zst", documents(400))
    b = write_jsonl(tmp_path / "b.jsonl", ["zzyzx " * 500] * 3, extra=[b"{"])
    whole = train_tokenizer([a, b], 320, tmp_path / "t")
    assert whole.vocab_size == 320 and Tokenizer.load(tmp_path / "t").fingerprint == whole.fingerprint
    assert len(whole.encode("zzyzx")) < 5
    sampled = train_tokenizer([a, b], 280, tmp_path / "t2", sample_bytes=1)  # one document of each
    same = train_tokenizer([write_jsonl(tmp_path / "c.jsonl", [documents(1)[0], "zzyzx " * 500])], 280, tmp_path / "t3")
    assert sampled.fingerprint == same.fingerprint


def test_shared_corpus(shared_data: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """The first rows of a real file, read by us and by plain zstandard and json."""
    import io

    import zstandard

    with open(shared_data / "corpus" / "val-zh.jsonl.zst", "rb") as f:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(f), "utf-8")
        expected = [json.loads(line)["text"] for line, _ in zip(lines, range(20), strict=False)]
    [source] = expand_sources(shared_data / "corpus" / "val-zh.jsonl.zst")
    rows = list(RowReader(source))
    assert len(rows) == 400 and [row.text for row in rows[:20]] == expected
    prepare(write_jsonl(tmp_path / "a.jsonl.zst", expected), tokenizer_folder, tmp_path / "out")
    assert texts_in(tmp_path / "out") == expected
