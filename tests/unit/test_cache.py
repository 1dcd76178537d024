"""A node's copy of a remote corpus: copied once, checked, continued, evicted."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.manifest import read_manifest
from pretrain.cache import local_corpus
from tests.support import make_corpus


class Quiet(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.requests.append(self.path)
        super().do_GET()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "corpus", samples=600, val=20)
    return tmp_path / "corpus"


@pytest.fixture
def server(corpus: Path) -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Quiet,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(corpus))) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}", handler.requests
        web.shutdown()
        thread.join()


def same_files(one: Path, other: Path) -> bool:
    names = ["manifest.json", *(f"{s.split}/{s.name}" for s in read_manifest(one).shards)]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_local_directory_is_read_in_place(corpus: Path) -> None:
    assert local_corpus(str(corpus), None, 1) == corpus


def test_a_url_needs_a_cache() -> None:
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        local_corpus("s3://bucket/corpus", None, 1)


def test_copied_over_http_once(server: tuple[str, list[str]], corpus: Path, tmp_path: Path) -> None:
    url, requests = server
    copy = local_corpus(url, str(tmp_path / "cache"), 1)
    assert same_files(copy, corpus)
    requests.clear()
    assert local_corpus(url, str(tmp_path / "cache"), 1) == copy
    assert requests == ["/manifest.json"]


def test_an_interrupted_copy_goes_on(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    copy = local_corpus(str(corpus), str(cache), 1)
    shard = read_manifest(corpus).shards[0]
    whole = copy / shard.split / shard.name
    half = whole.read_bytes()[: shard.bytes // 2]
    whole.unlink()
    whole.with_suffix(".part").write_bytes(half)
    (copy / "manifest.json").unlink()
    assert same_files(local_corpus(str(corpus), str(cache), 1), corpus)


def test_a_shard_that_changed_is_refused(corpus: Path, tmp_path: Path) -> None:
    shard = read_manifest(corpus).shards[0]
    path = corpus / shard.split / shard.name
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        local_corpus(str(corpus), str(tmp_path / "cache"), 1)
    copies = [folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]
    assert copies
    assert not any((folder / "manifest.json").exists() for folder in copies)


def test_the_cache_is_bounded(corpus: Path, tmp_path: Path) -> None:
    size = sum(shard.bytes for shard in read_manifest(corpus).shards) / 2**30
    with pytest.raises(UserError, match="cache_gib"):
        local_corpus(str(corpus), str(tmp_path / "cache"), size / 2)


def test_missing_source_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        local_corpus(str(tmp_path / "nowhere"), str(tmp_path / "cache"), 1)
    assert "\n" not in str(caught.value)
