"""Names on the Hugging Face Hub, against a stand-in for it: what is fetched, from where, and each fault in one line."""

import contextlib

import pytest

from stablevm.support.errors import UserError
from stablevm.support.hub import HubName, fetched_file, fetched_folder, hub_name
from tests.helpers.hub import READS, Repository, stand_in, use

FILES = {
    "model.json": b"{}",
    "ema.safetensors": b"e" * 100_000,
    "model.safetensors": b"m",
    "code.py": b"raise SystemExit('executed')",
    "old.pt": b"p",
}
WANTED = ["model.json", "ema.safetensors"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with stand_in() as hub:
        use(monkeypatch, hub.address, tmp_path / "cache")
        hub.repositories["me/net"] = Repository()
        hub.repositories["me/net"].commit(FILES)
        yield hub


@contextlib.contextmanager
def silent(monkeypatch, tmp_path):
    """The hub at an address where nothing listens."""
    with stand_in() as gone:
        address = gone.address
    with monkeypatch.context() as patch:
        use(patch, address, tmp_path / "cache")
        yield


def test_names_are_taken_apart():
    assert hub_name("hf:me/net") == HubName("me/net")
    assert hub_name("hf:me/net@refs/pr/1") == HubName("me/net", None, "refs/pr/1")
    assert hub_name("hf:me/net/a/b.pt@v1") == HubName("me/net", "a/b.pt", "v1")
    assert str(hub_name("hf:me/net/a.pt@v1")) == "hf:me/net/a.pt@v1"
    for wrong in (
        "hf:net",
        "hf:/net",
        "hf:me/net@",
        "hf:me/../net",
        "hf:me/net@../../x",
        "hf:a b/c",
        "hf:",
        "hf:me/net/",
    ):
        with pytest.raises(UserError, match=r"expected hf:OWNER/NAME, or hf:OWNER/NAME@REVISION$"):
            hub_name(wrong)


def test_only_the_files_that_are_asked_for_are_fetched_and_once(hub, capfd):
    folder = fetched_folder("hf:me/net", WANTED)
    assert {path.name for path in folder.iterdir()} == set(WANTED)
    assert folder.name == hub.repositories["me/net"].refs["main"]
    assert (folder / "ema.safetensors").read_bytes() == FILES["ema.safetensors"]
    assert not hub.asked("code.py") and not hub.asked("old.pt")
    before = len(hub.asked("/resolve/"))
    assert fetched_folder("hf:me/net", WANTED) == folder and len(hub.asked("/resolve/")) == before
    assert capfd.readouterr() == ("", "")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    first = hub.repositories["me/net"].refs["main"]
    second = hub.repositories["me/net"].commit({**FILES, "model.json": b"[]"}, "better")
    assert fetched_folder("hf:me/net@better", WANTED).name == second
    assert fetched_folder(f"hf:me/net@{first}", WANTED).name == first
    asked = len(hub.log)
    assert fetched_folder(f"hf:me/net@{first}", WANTED).name == first
    assert len(hub.log) == asked, "a commit that is in the cache needs no question"


def test_without_the_hub_the_cache_is_used(hub, monkeypatch, tmp_path, capfd):
    folder = fetched_folder("hf:me/net", WANTED)
    with silent(monkeypatch, tmp_path):
        assert fetched_folder("hf:me/net", WANTED) == folder
        assert fetched_file("hf:me/net/model.json", [".json"]) == folder / "model.json"
        told = capfd.readouterr().err.splitlines()
        assert len(told) == 2 and told[0].startswith("warning: hf:me/net: the hub does not answer: ")
        for name in ("hf:me/net@better", "hf:me/other"):
            with pytest.raises(UserError, match=f"^{name}: the hub does not answer: .*this machine's cache does not"):
                fetched_folder(name, WANTED)
        with pytest.raises(UserError, match="does not have it; run the command again with a connection"):
            fetched_folder("hf:me/net", [*WANTED, "model.safetensors"])
        with pytest.raises(UserError, match=r"name it, hf:me/net/FILE$"):
            fetched_file("hf:me/net", [".pt"])
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched_folder("hf:me/net", WANTED) == folder and capfd.readouterr().err == ""
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and this machine's cache does not have it"):
        fetched_folder("hf:me/other", WANTED)


def test_every_refusal_is_one_line(hub, monkeypatch):
    hub.repositories["me/secret"] = Repository(private=True)
    hub.repositories["me/asks"] = Repository(gated=True)
    for name in ("secret", "asks"):
        hub.repositories[f"me/{name}"].commit(FILES)
    expected = {
        "hf:me/none": "shows no such repository; check the name, or, if it is private, log in",
        "hf:me/secret": "shows no such repository; .* if it is private, log in .hf auth login., or set HF_TOKEN",
        "hf:me/asks": "grants access on request; ask for it on its page, then log in",
        "hf:me/net@none": "has no revision none; give one of its branches, tags or commits",
        f"hf:me/net@{'0' * 40}": "has no revision 0000",
        "hf:me/net/model.json": "names a file",
    }
    for name, words in expected.items():
        with pytest.raises(UserError, match=words) as error:
            fetched_folder(name, WANTED)
        assert str(error.value).startswith(f"{name}: ") and "\n" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", READS)
    for name in ("secret", "asks"):
        assert fetched_folder(f"hf:me/{name}", WANTED).is_dir()


def test_a_download_that_breaks_off_is_one_line_and_resumes(hub, monkeypatch):
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    hub.cut = 1000
    with pytest.raises(UserError, match=r"^hf:me/net: .*; run the command again") as error:
        fetched_folder("hf:me/net", WANTED)
    assert "\n" not in str(error.value)
    hub.cut = 0
    assert (fetched_folder("hf:me/net", WANTED) / "ema.safetensors").read_bytes() == FILES["ema.safetensors"]


def test_a_file_is_found_if_it_is_the_only_one(hub):
    assert fetched_file("hf:me/net", [".pt"]).read_bytes() == b"p"
    assert fetched_file("hf:me/net/old.pt@main", [".pt"]).read_bytes() == b"p"
    with pytest.raises(UserError, match=r"holds ema.safetensors, model.safetensors; name one, hf:me/net/FILE$"):
        fetched_file("hf:me/net", [".safetensors"])
    with pytest.raises(UserError, match=r"holds no file that ends in .bin or .h5"):
        fetched_file("hf:me/net", [".bin", ".h5"])
    with pytest.raises(UserError, match=r"code.py: expected a file that ends in .pt"):
        fetched_file("hf:me/net/code.py", [".pt"])
    with pytest.raises(UserError, match="has no such file"):
        fetched_file("hf:me/net/none.pt", [".pt"])
