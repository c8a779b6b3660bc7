"""Hub ids, through huggingface_hub itself: its cache while offline, and a hub of a few lines on this machine."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from same import adapter_of, assert_same, mlp

import peftfn as pf
from peftfn.checkpoints import keys
from peftfn.core import files

OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture
def cached(tmp_path: Path) -> dict[str, pf.Adapter]:
    """A cache as huggingface_hub lays it out: two commits of org/name, the newer one with a sub-folder."""
    repository = tmp_path / "models--org--name"
    adapters = {at: adapter_of(mlp(), r=r) for r, at in enumerate((OLD, NEW, f"{NEW}/deep/other"), start=1)}
    for at, adapter in adapters.items():
        pf.save(adapter, repository / "snapshots" / at)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    (repository / "refs" / "v1").write_text(OLD)
    return adapters


def test_a_hub_id_is_read_from_the_cache_while_offline(cached: dict[str, pf.Adapter], tmp_path: Path) -> None:
    load = functools.partial(pf.load, "org/name", cache_dir=tmp_path)
    assert_same(load(), cached[NEW])
    assert_same(load(revision="v1"), cached[OLD])
    assert_same(load(revision=OLD), cached[OLD])
    assert_same(load(subfolder="deep/other"), cached[f"{NEW}/deep/other"])
    assert_same(load(subfolder="deep", adapter_name="other"), cached[f"{NEW}/deep/other"])
    assert pf.PeftConfig.from_pretrained("org/name", revision="v1", cache_dir=tmp_path) == cached[OLD].config


def test_a_bin_file_is_read_from_the_cache_while_offline(cached: dict[str, pf.Adapter], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / NEW
    (snapshot / files.WEIGHTS).unlink()
    torch.save(keys.to_keys(cached[NEW]), snapshot / files.PICKLE)
    assert_same(pf.load("org/name", cache_dir=tmp_path), cached[NEW])


def test_both_files_are_of_one_commit(
    cached: dict[str, pf.Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def then_the_branch_moves(path: Path) -> bytes:
        (tmp_path / "models--org--name" / "refs" / "main").write_text(OLD)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", then_the_branch_moves)
    assert_same(pf.load("org/name", cache_dir=tmp_path), cached[NEW])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("org/absent", {}, "could not be fetched from the hub .offline, or no connection. and is not in its cache"),
        ("org/name", {"revision": "v9"}, "is not in its cache"),
        ("org/name", {"subfolder": "shallow"}, "is not in its cache"),
        ("not a hub id!", {}, "neither a folder that exists nor a valid hub id"),
        ("/absent/folder", {}, "neither a folder that exists nor a valid hub id"),
    ],
)
def test_what_is_not_in_the_cache_is_an_error_that_says_where_it_was_looked_for(
    name: str, options: dict[str, Any], said: str, cached: dict[str, pf.Adapter], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=said):
        pf.load(name, cache_dir=tmp_path, **options)


def test_a_repository_without_weights_is_an_error_that_names_the_files(
    cached: dict[str, pf.Adapter], tmp_path: Path
) -> None:
    (tmp_path / "models--org--name" / "snapshots" / NEW / files.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors or adapter_model.bin in the hub repos"):
        pf.load("org/name", cache_dir=tmp_path)


class Hub(BaseHTTPRequestHandler):
    """The few calls of the hub's API that an upload and a download make; `branches` holds {branch: {path: bytes}}."""

    branches: dict[str, dict[str, bytes]]
    tokens: set[str | None]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.tokens.add(self.headers["Authorization"])
        branch = self.path.rpartition("/")[2]
        address = f"http://{self.headers['Host']}/me/adapter"
        answer: dict[str, Any] = {"url": address, "warnings": [], "errors": []}
        if "/branch/" in self.path:
            self.branches[branch] = {}
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        if "/commit/" in self.path:
            values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            self.branches[branch] |= {value["path"]: base64.b64decode(value["content"]) for value in values}
            answer = {"commitUrl": f"{address}/commit/{NEW}", "commitOid": NEW}
        self.answer(200, json.dumps(answer).encode())

    def do_GET(self) -> None:
        if self.path.endswith("?expand=xetEnabled"):  # older clients ask how a repository is stored
            self.answer(200, json.dumps({"id": "me/adapter", "xetEnabled": False}).encode())
            return
        *_, branch, path = self.path.split("/")
        files_there = self.branches.get("v2" if branch == NEW else branch, {})
        if "/resolve/" not in self.path or path not in files_there:
            self.answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
            return
        content = files_there[path]
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', **{"X-Repo-Commit": NEW})

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """The address of a hub that is empty, and its handler."""
    handler = type("Handler", (Hub,), {"branches": {"main": {}}, "tokens": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


PUSH = """
import sys
import peftfn as pf

adapter = pf.load(sys.argv[1])
print(pf.push_to_hub(adapter, "me/adapter", token="hf_x", revision="v2"))
print(adapter.config.push_to_hub("me/adapter", token="hf_x"))
pf.save(pf.load("me/adapter", revision="v2", token="hf_x"), sys.argv[2])
"""


def test_push_to_hub_uploads_what_save_writes_and_load_downloads_it(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    address, handler = hub
    adapter = adapter_of(mlp())
    pf.save(adapter, tmp_path / "here")
    # In its own process: huggingface_hub reads the address of the hub, and whether there is one, when it is imported.
    settings = {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", PUSH, str(tmp_path / "here"), str(tmp_path / "back")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{address}/me/adapter/commit/{NEW}"] * 2
    assert sorted(handler.branches["v2"]) == [files.CARD, files.CONFIG, files.WEIGHTS]
    assert sorted(handler.branches["main"]) == [files.CONFIG]
    assert handler.branches["main"][files.CONFIG].decode() == adapter.config.to_json()
    assert handler.tokens == {"Bearer hf_x"}
    assert_same(pf.load(tmp_path / "back"), adapter)
