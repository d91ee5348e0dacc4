"""Saliency on the Hub: a file that is not there is told from a Hub that does not give it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from click.testing import Result
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

import commands
from commands import World, obim_saliency, refusal, says, succeed
from mergekit_obim import write_saliency
from mergekit_obim.errors import SaliencyNotFoundError
from mergekit_obim.saliency.file import PUBLISHED_NAME, saliency_file_name
from mergekit_obim.saliency.locate import locate
from mergekit_obim.saliency.publish import publish

MODEL = "org/model"
COMMIT = "0123456789abcdef" * 2 + "01234567"
OWN_NAME = saliency_file_name(MODEL)

Answer = tuple[int, dict[str, str], bytes]


class StandIn:
    """A Hub on this machine.

    Attributes:
        files: What its repository org/saliency holds; its others are empty.
        refusal: What it answers to everything, if that is not the files.
        refused: The words in a path that it refuses; by default all paths.
        asked: The paths that it was asked for.
        made: The repositories that were made, and what was asked of them.
        cut: How many bytes of each file's end it keeps back, as an interrupted transfer does.
        large: Whether it wants files uploaded by themselves, before the commit.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.refusal: Answer | None = None
        self.refused = ""
        self.asked: list[str] = []
        self.made: dict[str, dict[str, object]] = {"org/saliency": {}}
        self.proposed: dict[str, bytes] = {}
        self.message = ""
        self.cut = 0
        self.large = False
        self.uploaded: dict[str, bytes] = {}

    def answer(self, path: str) -> Answer:
        if "/resolve/" in path:  # and not what huggingface_hub asks for itself
            self.asked.append(path)
        if self.refusal and self.refused in path:
            return self.refusal
        if path == "/api/whoami-v2":
            return 200, {}, b'{"name": "me"}'
        repository, _, name = path.partition("/resolve/main/")
        content = self.files.get(name) if repository == "/org/saliency" else None
        headers = {"X-Repo-Commit": COMMIT}
        if content is None:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        return 200, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content

    def take(self, path: str, body: bytes, endpoint: str) -> Answer:
        """Answer a POST or a PUT."""
        self.asked.append(path)
        if self.refusal and self.refused in path:
            return self.refusal
        if path.startswith("/upload/"):
            self.uploaded[path.removeprefix("/upload/")] = body
            return 200, {}, b""
        answer: dict[str, object] = {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            answer = {"url": f"{endpoint}/{name}"}
            if name in self.made:
                return 409, {}, json.dumps(answer).encode()
            self.made[name] = asked
        elif "/preupload/" in path:
            mode = {True: "lfs", False: "regular"}
            answer["files"] = [
                {
                    "path": file["path"],
                    "uploadMode": mode[self.large and file["path"] != "README.md"],
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            answer = {
                "transfer": "basic",
                "objects": [
                    {**one, "actions": {"upload": {"href": f"{endpoint}/upload/{one['oid']}"}}}
                    for one in objects
                ],
            }
        elif "/commit/" in path:
            into = self.proposed if "create_pr=1" in path else self.files
            for line in body.decode().splitlines():
                part = json.loads(line)
                value = part["value"]
                if part["key"] == "header":
                    self.message = value["summary"]
                elif part["key"] == "lfsFile":
                    into[value["path"]] = self.uploaded[value["oid"]]
                else:
                    into[value["path"]] = base64.b64decode(value["content"])
            answer = {"commitUrl": f"{endpoint}/org/saliency/commit/{COMMIT}", "commitOid": COMMIT}
            if into is self.proposed:
                answer["pullRequestUrl"] = f"{endpoint}/org/saliency/discussions/7"
        else:
            assert path == "/api/validate-yaml"
            answer = {"errors": [], "warnings": []}
        return 200, {}, json.dumps(answer).encode()


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
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) - stand_in.cut])

        do_GET = do_HEAD  # noqa: N815

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            endpoint = f"http://{self.headers['Host']}"
            status, headers, content = stand_in.take(self.path, body, endpoint)
            if not status:  # it hangs up
                self.connection.close()
                return
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_PUT = do_POST  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # Between its attempts huggingface_hub waits for half a minute in all.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    # Another protocol, with servers of its own, takes over large files where it is installed.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
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


# --- addresses, and transfers that break off ------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("hf://org/saliency", f"main/{PUBLISHED_NAME}"),
        ("hf://models/org/saliency/", f"main/{PUBLISHED_NAME}"),
        ("hf://org/saliency/sub/own.safetensors", "main/sub/own.safetensors"),
        ("hf://org/saliency@v2", f"v2/{PUBLISHED_NAME}"),
        ("hf://org/saliency@v2/own.gguf", "v2/own.gguf"),
        ("hf://org/saliency@refs/pr/7/own.dat", "refs%2Fpr%2F7/own.dat"),
    ],
)
def test_addresses_as_huggingface_hub_has_them(hub: StandIn, address: str, asked: str) -> None:
    refused(address)
    assert hub.asked[0] == f"/org/saliency/resolve/{asked}"
    hub.files = dict.fromkeys((PUBLISHED_NAME, "sub/own.safetensors"), b"it")
    if asked.startswith("main/"):
        assert locate(address, MODEL).read_bytes() == b"it"


@pytest.mark.parametrize("address", ["hf://org", "hf://datasets/org/saliency", "hf://"])
def test_addresses_of_something_else(hub: StandIn, address: str) -> None:
    says(refused(address), "is no address of a repository of models", "hf://org/repo[@revision]")
    assert hub.asked == []


def test_an_address_is_never_a_folder_here(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:" / "org" / "saliency").mkdir(parents=True)
    says(refused("hf://org/saliency"), "nor does the Hub: org/saliency")


def test_a_download_that_breaks_off(hub: StandIn, world: World) -> None:
    content = world.saliency_of(world.math).read_bytes()
    hub.files[PUBLISHED_NAME] = content
    hub.cut = len(content) // 2
    says(refused(), "org/saliency cannot be had from the Hub", "try again")
    hub.cut = 0
    assert locate("org/saliency", MODEL).read_bytes() == content


# --- publishing -----------------------------------------------------------------------------------


def push(world: World, folder: Path, *options: object, models: int = 1) -> Result:
    """The pre-pass of the recipe, whose files are there already, with --push org/saliency."""
    recipe = commands.write_recipe(folder, world.recipe())
    only = [("--model", expert) for expert in world.experts[:models]]
    asked = [word for pair in only for word in pair]
    return obim_saliency(recipe, world.saliency, "--push", "org/saliency", *asked, *options)


def test_what_is_pushed_is_found_by_a_recipe(hub: StandIn, world: World, tmp_path: Path) -> None:
    told = succeed(push(world, tmp_path)).stdout
    says(told, f"org/saliency: {PUBLISHED_NAME} → ", f"/org/saliency/commit/{COMMIT}")
    content = world.saliency_of(world.math).read_bytes()
    assert hub.files.keys() == {PUBLISHED_NAME, "README.md"}
    assert hub.files[PUBLISHED_NAME] == content
    says(hub.message, "Saliency of", world.math)
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.tags == ["mergekit", "mergekit-obim", "saliency"]
    assert (card.data.datasets, card.data.base_model) == (None, None)  # files of this machine
    says(card.text, "merge_method: obim", "saliency: org/saliency", world.math)
    # As a recipe that names the repository as its model, and has no saliency of its own.
    assert locate(None, "org/saliency").read_bytes() == content
    succeed(push(world, tmp_path))
    assert ModelCard(hub.files["README.md"].decode()).data == card.data


def test_a_card_that_is_there_stays(hub: StandIn, world: World, tmp_path: Path) -> None:
    own = "---\nlicense: mit\ntags:\n- math\n- saliency\n---\n# Mine\n\nMy words.\n"
    hub.files["README.md"] = own.encode()
    succeed(push(world, tmp_path))
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.tags == ["math", "saliency", "mergekit", "mergekit-obim"]
    assert card.text.strip() == "# Mine\n\nMy words."


def test_metadata_of_models_and_data_on_the_hub(hub: StandIn, world: World, tmp_path: Path) -> None:
    tensors = load_file(world.saliency_of(world.math))
    sources = [{"data": "org/rows", "split": "train"}, {"data": "rows.jsonl"}]
    files = {}
    for name, model in (("a", "org/expert@v2"), ("b", "org/model+org/lora"), ("c", "./here")):
        files[f"{name}.safetensors"] = write_saliency(
            tmp_path / f"{name}.safetensors",
            tensors,
            model=model,
            calibration={"sources": sources, "tokens": 1234},
        )
    publish(files, "org/saliency")
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.datasets == ["org/rows"]
    assert card.data.base_model == ["org/expert", "org/lora"]
    says(card.text, "on 1,234 tokens of org/rows, rows.jsonl", "`./here`")


def test_several_experts_in_one_repository(hub: StandIn, world: World, tmp_path: Path) -> None:
    succeed(push(world, tmp_path, models=2))
    names = {saliency_file_name(str(expert)) for expert in world.experts}
    assert hub.files.keys() == {*names, "README.md"}
    merged = []
    for setting in ("org/saliency", str(world.saliency)):
        out = tmp_path / f"merged{len(merged)}"
        recipe = world.recipe(parameters={"saliency": setting})
        succeed(commands.mergekit_yaml(commands.write_recipe(tmp_path, recipe), out))
        merged.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[1])


def test_a_new_repository_and_a_pull_request(hub: StandIn, world: World, tmp_path: Path) -> None:
    hub.made.clear()
    succeed(push(world, tmp_path, "--private"))
    assert hub.made["org/saliency"]["visibility"] == "private"
    hub.made.clear()
    hub.files.clear()
    told = succeed(push(world, tmp_path, "--create-pr")).stdout
    says(told, "/org/saliency/discussions/7")
    assert hub.made == hub.files == {}
    assert hub.proposed.keys() == {PUBLISHED_NAME, "README.md"}


def test_large_files_and_an_upload_that_breaks_off(
    hub: StandIn, world: World, tmp_path: Path
) -> None:
    hub.large = True
    hub.refusal, hub.refused = (0, {}, b""), "/upload/"
    message = refusal(push(world, tmp_path))
    says(message, "--push org/saliency: the Hub at http://127.0.0.1", "did not take it")
    says(message, "nothing is lost", world.saliency_of(world.math))
    assert hub.files == {}
    hub.refusal = None
    succeed(push(world, tmp_path))
    assert hub.files[PUBLISHED_NAME] == world.saliency_of(world.math).read_bytes()


@pytest.mark.parametrize(
    ("path", "status", "headers", "words"),
    [
        ("whoami", 401, {}, ["does not accept your token", "hf auth login"]),
        ("commit", 403, {}, ["you may not write to org/saliency", "--create-pr"]),
        ("preupload", 404, {"X-Error-Code": "RepoNotFound"}, ["has no org/saliency", "mend"]),
        ("commit", 413, {}, ["refused it with status 413"]),
        ("commit", 503, {}, ["failed with status 503", "later"]),
        ("README.md", 500, {}, ["its card cannot be read", "status 500"]),
    ],
)
def test_a_hub_that_does_not_take_it(
    hub: StandIn,
    world: World,
    tmp_path: Path,
    path: str,
    status: int,
    headers: dict[str, str],
    words: list[str],
) -> None:
    hub.refusal, hub.refused = (status, headers, b""), path
    message = refusal(push(world, tmp_path))
    says(message, "--push org/saliency: ", *words)
    assert hub.files == {}


def test_without_a_login_or_a_hub_nothing_is_measured(
    hub: StandIn, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = commands.write_recipe(tmp_path, world.recipe())
    pushing = (recipe, tmp_path / "out", "--push", "org/saliency")
    use(monkeypatch, "http://127.0.0.1:9")
    says(refusal(obim_saliency(*pushing)), "the Hub at http://127.0.0.1:9 did not take it")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    says(refusal(obim_saliency(*pushing)), "you are not logged in", "hf auth login")
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    offline(hub, monkeypatch)
    says(refusal(obim_saliency(*pushing)), "was not asked, as HF_HUB_OFFLINE is set")
    assert not (tmp_path / "out").exists()


def test_usage_of_push(world: World, tmp_path: Path) -> None:
    recipe = commands.write_recipe(tmp_path, world.recipe())
    for wrong in (
        ("--create-pr",),
        ("--private",),
        ("--push", "saliency"),
        ("--push", "./org/saliency"),
        ("--push", "org/saliency", "--dense"),
        ("--push", "org/saliency", "--check"),
    ):
        assert obim_saliency(recipe, tmp_path / "out", *wrong).exit_code == 2
