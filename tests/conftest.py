"""Fixtures that several test modules share."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import settings

from cloze.log import set_verbosity
from tests.support import Trainer, make_corpus

settings.register_profile("patient", deadline=None)  # a loaded machine is no fault of the product
settings.load_profile("patient")
os.environ["OMP_NUM_THREADS"] = "1"  # as the ranks have it: two threads add up in another order

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job: what we start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def speech() -> None:
    """Each test hears what it would hear alone, whatever `--quiet` the one before was given."""
    set_verbosity()


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


@pytest.fixture(scope="session")  # fsspec keeps its clients
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An S3 server in a process of its own, found through the variables that AWS's own tools read."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    code = (
        "from moto.server import ThreadedMotoServer as Server; server = Server('127.0.0.1', 0, False); server.start(); "
        "print(server.get_host_and_port()[1], flush=True); input()"
    )
    with (
        (tmp_path_factory.mktemp("s3") / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert server.stdout
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{int(server.stdout.readline())}")
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        found = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
        found.mkdir("bucket")
        yield found
        server.communicate("\n", timeout=30)
