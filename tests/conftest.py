"""Fixtures that several test modules share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Trainer, make_corpus

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job: what we start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 samples in one pass, 37 held out, the first draw baked in. Read only."""
    path = tmp_path_factory.mktemp("corpus") / "corpus"
    path.mkdir()
    make_corpus(path)
    return path


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    result = Trainer(tmp_path_factory.mktemp("trainer"))
    yield result
    result.close()
