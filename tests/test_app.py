"""The app in a real browser: names go and return, and no other machine is contacted."""

import socket
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from PIL import Image

import app
from engine.cli import run
from evaluation.live.look import MEGABYTES
from forgetting.adapter import load_adapter
from tests.conftest import needs_chromium
from tests.test_report_browser import PHONE

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="no gradio: make app")
TWO, STAR, CROSS, TRIANGLE = "digit two", "green star", "green cross", "green triangle"
SMALL = {"files": ("a.png", b"0")}
WAIT = 60_000  # milliseconds; a busy machine


@pytest.fixture(scope="module")
def address(live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("app")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # nobody is there: nothing goes that way
        for key in ("NO_PROXY", "no_proxy"):
            patch.setenv(key, "")
        page = app.start(live, folder)
        yield page.local_url
        page.close()


@pytest.fixture
def page(address, browser) -> Iterator:
    """The page, opened without its policy, so that what it would ask of another address is seen."""
    troubles = []

    def record(request) -> None:
        if not request.url.startswith((address, "data:", f"blob:{address}")):
            troubles.append(request.url)

    context = browser.new_context(bypass_csp=True)
    context.set_default_timeout(WAIT)
    page = context.new_page()
    page.on("request", record)
    page.on("console", lambda entry: entry.type == "error" and troubles.append(entry.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(address)
    page.locator("figure").first.wait_for()
    yield page
    assert troubles == []
    page.evaluate("fetch('http://localhost:1/').catch(() => 0)")  # the control
    context.close()
    assert "http://localhost:1/" in troubles


def pick(page, box: str, name: str) -> None:
    page.get_by_label(box, exact=True).fill(name)
    page.get_by_role("option", name=name, exact=True).click()


def forget(page) -> None:
    """A click where the button is: an open list above it would take the click."""
    page.get_by_role("button", name="Forget", exact=True).click()


def pictures(page, name: str, taken_for: str, other: bool = False):
    same = f'[data-now="{taken_for}"]'
    return page.locator(f'figure[data-label="{name}"]{f":not({same})" if other else same}')


@needs_chromium
def test_forget_see_it_go_and_restore_it(page, tmp_path):
    forget(page)
    page.get_by_text("Pick or type a name first.").wait_for()
    pick(page, "Names to forget", TWO)
    page.locator("[data-harmed='0']").wait_for()  # before anything is pressed
    page.get_by_role("option").first.wait_for(state="detached")  # the list does not stay open
    assert page.get_by_role("alert").count() == 0, "an error goes with the next success"
    pictures(page, TWO, TWO).first.wait_for()
    forget(page)
    pictures(page, TWO, TWO, other=True).nth(1).wait_for()
    assert pictures(page, TWO, TWO).count() == 0
    box = page.get_by_label("Names to forget", exact=True)
    box.fill("green tri")
    box.press("Enter")
    pictures(page, TRIANGLE, TRIANGLE).first.wait_for()  # the control: still itself
    forget(page)
    pictures(page, TRIANGLE, TRIANGLE, other=True).first.wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the adapter").click()
    download.value.save_as(tmp_path / "both.safetensors")
    assert load_adapter(tmp_path / "both.safetensors").classes == [TWO, TRIANGLE]
    page.get_by_label(TWO, exact=True).uncheck()
    page.locator(f"[data-name='{TWO}']").wait_for(state="detached")
    page.get_by_label(TWO, exact=True).wait_for(state="detached")
    assert pictures(page, TRIANGLE, TRIANGLE).count() == 0
    pick(page, "Names to forget", TWO)
    pictures(page, TWO, TWO).nth(1).wait_for()
    page.get_by_label("Search the images").fill("triangle")
    assert page.locator("[data-found]").count() == 0
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator(f"[data-found=before] img[alt='{TRIANGLE}']").first.wait_for()
    assert page.locator("[data-found='image index changed'] img").count() == 12
    assert page.locator(f"[data-found^='image'] img[alt='{TRIANGLE}']").count() == 0
    page.set_viewport_size(PHONE)
    button = page.get_by_role("button", name="Forget", exact=True).bounding_box()["y"]
    assert page.locator(".goal").first.bounding_box()["y"] - button < PHONE["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@needs_chromium
def test_settings_change_what_is_forgotten_and_uploads_are_shown(page, tmp_path):
    pick(page, "Names to forget", STAR)
    forget(page)
    pictures(page, STAR, STAR, other=True).first.wait_for()
    assert not page.get_by_label("number input for Strength").is_visible()
    page.get_by_role("button", name="Advanced").click()
    page.get_by_label("Remove the name's whole direction", exact=True).check()
    page.get_by_label("number input for Strength").fill("1")
    page.locator(f"[data-name='{CROSS}'] td", has_text="0 %").nth(1).wait_for()  # after forgetting
    page.get_by_label("Replace it by the empty text (the paper's)", exact=True).check()
    page.locator(f"[data-name='{CROSS}']:not(.bad)").wait_for()  # a strength it has not
    Image.new("RGB", (50, 50), "red").save(tmp_path / "mine.png")
    (tmp_path / "bad.png").write_text("<script>alert(1)</script>")
    files = [str(tmp_path / name) for name in ("mine.png", "bad.png")]
    page.locator("input[type=file]").set_input_files(files)
    page.locator("figure[data-label='mine.png (yours)']").wait_for()
    assert "bad.png: " in page.get_by_role("alert").inner_text()
    pick(page, "Protect", STAR)
    page.get_by_text("choose one").first.wait_for()


def test_other_names_for_this_address_and_other_pages_are_refused(address):
    import httpx

    host = address.removeprefix("http://").rstrip("/")
    assert httpx.get(address).headers["content-security-policy"] == app.POLICY
    assert httpx.get(address, headers={"host": "elsewhere.example"}).status_code == 400
    origins = [f"http://{host}", "http://elsewhere.example", "null", f"http://{host}0"]
    for origin in origins:  # the first is the control
        answer = httpx.post(f"{address}gradio_api/upload", files=SMALL, headers={"origin": origin})
        assert answer.status_code == (200 if origin == origins[0] else 403)
    large = {"files": ("a.png", b"0" * (MEGABYTES * 2**20 + 1))}
    assert httpx.post(f"{address}gradio_api/upload", files=large).status_code == 413
    assert httpx.get(f"{address}gradio_api/file=http://localhost:1/").text == "refused"


def test_a_port_in_use_is_one_line(capsys):
    with socket.socket() as taken:
        taken.bind((app.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(app.main, ["--port", str(port)]) == 2
    assert f"port {port} of {app.HOST} is in use" in capsys.readouterr().err
