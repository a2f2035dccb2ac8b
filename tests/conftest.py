"""Fixtures shared by all tests: shared data, a tiny tokenizer trained in the process, a browser with the page."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from openglm.tokenizer import Tokenizer
from openglm.tokenizer.train import train_bpe

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.page_helpers import Desk
    from tests.page_server import Page as MockState

REPOSITORY = Path(__file__).resolve().parent.parent

# A shell's background job ignores Ctrl-C, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_TEXT = (
    "The quick brown fox jumps over the lazy dog. What is the capital of France? It is Paris, of course!",
    "A language model reads text and fills the blanks: one word, one sentence, or everything that follows.",
    "In 1998 there were 1234567 people in the city, and 42 % of them couldn't swim; they've since learned.",
    "北京是中华人民共和国的首都，也是全国的政治中心和文化中心。你好，世界！今天天气怎么样？",
    "语言模型读入文本，然后填写空白：一个词、一句话，或者后面的全部内容。人工智能正在改变世界。",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder ../shared/data beside the repository; the test is skipped where it does not exist."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the corpus and golden sets in ../shared/data, which is not here")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A bilingual tokenizer of at most 600 ids, trained on a few sentences."""
    return train_bpe(TINY_TEXT, 600, at_most=True)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as training writes it: a tiny random GLM with a prefix mask, two axes and a chat format."""
    from openglm.config import GLMConfig, RopeConfig
    from openglm.model.checkpoint import CheckpointMeta, save_checkpoint
    from openglm.model.init import init_weights
    from openglm.model.transformer import Transformer

    config = GLMConfig(
        vocab_size=640, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, max_seq_len=128,
        rope=RopeConfig(axes=2), mask="prefix", tie_embeddings=True,
    )  # fmt: skip
    special = tiny_tokenizer.special_ids
    meta = CheckpointMeta(
        special_ids=special,
        stop_ids=tuple(special[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>")),
        chat_format="glm-4",
        tokenizer=tiny_tokenizer.kind,
        generation={"temperature": 0.9, "max_new_tokens": 24},
        description={"objective": "random weights"},
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = init_weights(Transformer(config), seed=3, std=0.3)
    save_checkpoint(folder, model, config, meta, tiny_tokenizer.files)
    return folder


@pytest.fixture(autouse=True)
def no_foreign_event_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Playwright leaves its event loop marked as running in this thread, for as long as its browser lives: hidden from
    tests without a browser, which may start a loop of their own."""
    if "browser" in request.fixturenames:
        yield
        return
    loop = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    yield
    asyncio._set_running_loop(loop)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests of the page."""
    pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
    from playwright.sync_api import sync_playwright

    from tests.page_helpers import launch

    with sync_playwright() as playwright:
        found = launch(playwright)
        yield found
        found.close()


@pytest.fixture
def mock_page() -> Iterator[tuple[MockState, str]]:
    """A mock server with scripted answers: its state and address."""
    from tests.page_server import start

    state, server, url = start()
    yield state, url
    server.shutdown()
    server.server_close()


@pytest.fixture
def desks(browser: Browser, mock_page: tuple[MockState, str]) -> Iterator[Callable[..., Desk]]:
    """Opens the page as often as asked, each time for a new user; in the end nothing that must not happen has."""
    from tests.page_helpers import Desk

    state, url = mock_page
    made: list[Desk] = []

    def make(**options: Any) -> Desk:
        made.append(Desk(browser, url, state, **options))
        return made[-1]

    yield make
    for desk in made:
        desk.context.close()
        assert not desk.trouble


@pytest.fixture
def desk(desks: Callable[..., Desk]) -> Desk:
    return desks()
