"""Saliency on the Hub: a file that is not there is told from a Hub that does not give it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from commands import World, says
from mergekit_obim.errors import SaliencyNotFoundError
from mergekit_obim.saliency.file import PUBLISHED_NAME, saliency_file_name
from mergekit_obim.saliency.locate import locate

MODEL = "org/model"
COMMIT = "0123456789abcdef" * 2 + "01234567"
OWN_NAME = saliency_file_name(MODEL)

Answer = tuple[int, dict[str, str], bytes]


class StandIn:
    """A Hub on this machine.

    Attributes:
        files: What its repository org/saliency holds; its others are empty.
        refusal: What it answers to everything, if that is not the files.
        asked: The paths that it was asked for.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.refusal: Answer | None = None
        self.asked: list[str] = []

    def answer(self, path: str) -> Answer:
        if "/resolve/" in path:  # and not what huggingface_hub asks for itself
            self.asked.append(path)
        if self.refusal:
            return self.refusal
        repository, _, name = path.partition("/resolve/main/")
        content = self.files.get(name) if repository == "/org/saliency" else None
        headers = {"X-Repo-Commit": COMMIT}
        if content is None:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        return 200, {**headers, "ETag": f'"{len(content)}"'}, content


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status, headers, content = stand_in.answer(self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # Between its attempts huggingface_hub waits for half a minute in all.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    use(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
    yield stand_in
    server.shutdown()
    server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    huggingface_hub.close_session()


def refused(setting: str | None = "org/saliency", model: str = MODEL) -> str:
    with pytest.raises(SaliencyNotFoundError) as caught:
        locate(setting, model)
    message = caught.value.message
    says(message, f"no saliency for model {model}", "obim-saliency")
    return message


@pytest.mark.parametrize("name", [PUBLISHED_NAME, OWN_NAME])
def test_a_file_that_is_there(hub: StandIn, world: World, name: str) -> None:
    hub.files[name] = world.saliency_of(world.math).read_bytes()
    assert locate("org/saliency", MODEL).read_bytes() == hub.files[name]
    assert hub.asked[0].startswith(f"/org/saliency/resolve/main/{PUBLISHED_NAME}")


def test_a_file_that_is_not_there(hub: StandIn) -> None:
    says(refused(), "has no file for it", "nor does the Hub: org/saliency", PUBLISHED_NAME)
    says(refused(None), f"{MODEL} carries no {PUBLISHED_NAME}")
    assert {path.split("/resolve/")[0] for path in hub.asked} == {"/org/saliency", f"/{MODEL}"}


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, ["is gated", "/org/saliency", "hf auth login"]),
        (401, {"X-Error-Code": "RepoNotFound"}, ["has no org/saliency", "private", "mend"]),
        (404, {"X-Error-Code": "RepoNotFound"}, ["has no org/saliency", "private", "mend"]),
        (404, {"X-Error-Code": "RevisionNotFound"}, ["no revision v2", "after the @"]),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, ["refuses"]),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, ["refuses", "disabled"]),
        (500, {}, ["status 500", "later"]),
        (200, {}, ["cannot be had", "does not seem to be served by a Hugging Face Hub"]),
    ],
)
def test_a_hub_that_does_not_give_it(
    hub: StandIn, status: int, headers: dict[str, str], words: list[str]
) -> None:
    hub.refusal = status, headers, b""
    message = refused("org/saliency@v2")
    says(message, "`saliency: org/saliency@v2`: ", *words)
    assert "has no file for it" not in message


def test_a_hub_that_cannot_be_reached(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://127.0.0.1:9")
    says(refused(), "org/saliency cannot be had from the Hub at http://127.0.0.1:9", "try again")
    says(refused(None), f"sets no `saliency`, and {MODEL} cannot be had from the Hub")


def offline(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


def unreachable(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://127.0.0.1:9")


def down(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refusal = 503, {}, b""


@pytest.mark.parametrize("cut_off", [offline, unreachable, down])
def test_what_is_in_the_cache_needs_no_hub(
    hub: StandIn,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    cut_off: Callable[[StandIn, pytest.MonkeyPatch], None],
) -> None:
    hub.files[OWN_NAME] = world.saliency_of(world.math).read_bytes()
    locate("org/saliency", MODEL)
    says(refused("org/other"), "nor does the Hub")
    cut_off(hub, monkeypatch)
    assert locate("org/saliency", MODEL).read_bytes() == hub.files[OWN_NAME]
    # What the repository is known not to have is no question of the network.
    says(refused("org/other"), "nor does the Hub")


def test_offline(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(hub, monkeypatch)
    says(refused(), "org/saliency on the Hub was not asked", "HF_HUB_OFFLINE", "no copy is cached")
    assert hub.asked == []
