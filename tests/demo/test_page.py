"""The demo's page, served and used: by gradio's own client, and in a headless browser where there is one."""

import re
import shutil
import socket

import pytest
import torch

from stablevm.demo.config import DemoConfig
from stablevm.demo.studio import SAMPLERS, Studio
from stablevm.support.errors import UserError
from tests.helpers.checkpoints import save_checkpoint, tiny_card

pytest.importorskip("gradio", reason="needs pip install 'stablevm[demo]'")

from stablevm.demo.page import build, start


@pytest.fixture
def address(tmp_path):
    folder = save_checkpoint(tmp_path / "run", tiny_card(label_dropout=0.1))
    page = build(Studio(DemoConfig(ckpt=folder), torch.device("cpu")))
    yield start(page, free_port())
    page.close(verbose=False)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_taken_port_is_one_line(tmp_path):
    folder = save_checkpoint(tmp_path / "run", tiny_card(label_dropout=0.1))
    page = build(Studio(DemoConfig(ckpt=folder), torch.device("cpu")))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"^--port {port}: another program has it"):
            start(page, port)


def test_only_this_machine_is_served(address):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)


def test_in_a_browser(address, tmp_path):
    browsers = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        asked, faults = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        generate = page.get_by_role("button", name="Generate")
        generate.click()
        image = page.locator("img").first
        image.wait_for()
        first = image.get_attribute("src")
        assert "--num-steps 20" in page.locator(".cm-content").inner_text()
        page.get_by_label("number input for Guidance").first.fill("2.5")
        page.get_by_label("Sampler").click()
        page.get_by_role("option", name=list(SAMPLERS)[-1]).click()
        generate.click()
        page.wait_for_function("was => document.querySelector('img').src !== was", arg=first)
        page.screenshot(path=tmp_path / "page.png")
        command = page.locator(".cm-content").inner_text()
        assert "--cfg-scale 2.5" in command and "--mode stablevs" in command
        assert not faults and all(url.startswith((address, "data:", "blob:")) for url in asked)
        browser.close()
