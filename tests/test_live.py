"""What the app shows, without a browser: labels go and return, forecasts, uploads, any model."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import app
from clip.source import ClipSource
from engine.cli import run
from evaluation.live import Live
from evaluation.live.look import View
from evaluation.live.uploads import MEGABYTES, read_upload
from forgetting import load_adapter
from forgetting.compose import main as compose
from forgetting.errors import ProblemError
from tests.clip_fixtures import one_line
from tests.test_models import images, open_clip_folder

TWO, ANCHOR, STAR, CROSS = "digit two", "anchor", "green star", "green cross"


def taken_for(view: View, name: str) -> list[str]:
    return [picture.now[0][0] for picture in view.pictures if picture.label == name]


def recognised(view: View) -> dict[str, tuple[float | None, float | None]]:
    return {name: (before, now) for name, before, now in view.recognised}


def test_a_name_goes_and_returns(live):
    nothing = live.look([], [TWO])
    assert nothing.found is None and taken_for(nothing, TWO) == [TWO, TWO]
    gone = live.look([TWO])
    assert len(taken_for(gone, TWO)) == 2 and TWO not in taken_for(gone, TWO)
    assert [x.before[0][0] for x in gone.pictures if x.label == TWO] == [TWO, TWO]
    assert recognised(gone)[TWO] == (1, 0)
    before, now = recognised(gone)["all others"]
    assert before > 0.9 and now == pytest.approx(before, abs=0.01)
    assert live.look([], [TWO]) == nothing
    other = live.look([ANCHOR], [TWO])  # the control: forgetting something else leaves it
    assert taken_for(other, TWO) == [TWO, TWO] and ANCHOR not in taken_for(other, ANCHOR)
    near = gone.neighbours[TWO]
    assert len(near) == 5 and all(cosine.now < cosine.before for cosine, _ in near)


def test_names_that_differ_in_case_alone_are_two(live, monkeypatch):
    monkeypatch.setattr(live, "names", ["Turkey", "turkey", "Anchor"])
    assert live.spelled(["Turkey", "turkey", "anchor"]) == ("Turkey", "turkey", "Anchor")


def test_a_model_that_is_none_is_told_all_that_could_be():
    with pytest.raises(ProblemError, match=r"mini; or open_clip:.*openai:FILE, or a folder"):
        ClipSource("nope")


def test_one_of_several_is_given_back_as_if_it_had_never_gone(live, tmp_path):
    fixed = {"target": "opposite", "beta": 0.2}  # which no margin moves
    both, first = (live.look(x, **fixed).save(tmp_path) for x in ([TWO, ANCHOR], [TWO]))
    assert live.look().save(tmp_path) is None
    rest = tmp_path / "rest.safetensors"
    compose([str(both), "--without", str(first), "--out", str(rest)])
    adapters = [*map(load_adapter, (rest, both)), live.look([ANCHOR], **fixed).found.adapter]
    composed, union, solved = (x.left @ x.right for x in adapters)
    close = 1e-5 * float(solved.abs().max())
    assert torch.allclose(composed, solved, rtol=0, atol=close)
    assert not torch.allclose(union, solved, rtol=0, atol=100 * close)


def test_the_forecast_comes_first_and_keeping_a_name_helps(live):
    far = {"target": "opposite", "beta": 1.0}
    ahead = live.look([], [STAR], **far)
    assert ahead.found is None and taken_for(ahead, STAR) == [STAR, STAR]
    assert next(one.name for one in ahead.forecast.affected if one.likely_misclassified) == CROSS
    assert "Likely to fall" in ahead.html("forecast") and CROSS in ahead.html("forecast")
    calm = live.look([], [STAR])
    assert not any(one.likely_misclassified for one in calm.forecast.affected)
    assert "No other name" in calm.html("forecast")
    left = [
        {images.name: images.now for _, images in live.look([STAR], **far, **keep).neighbours[STAR]}
        for keep in ({}, {"keep": [CROSS]})
    ]
    assert left[0][CROSS] == 0 and left[1][CROSS] > 0.5
    with pytest.raises(ProblemError, match="choose one"):
        live.look([], [TWO], [TWO])


def test_names_that_are_typed(live):
    view = live.look([], ["  Digit_Two ", "digit tw", "<b>cat</b>"])
    assert view.asked == (TWO, "digit tw", "<b>cat</b>") and view.typed["digit tw"][0] == TWO
    assert (
        set(view.typed) == {"digit tw", "<b>cat</b>"}
        and recognised(view)["digit tw"] == (None,) * 2
    )
    shown = view.html("forecast") + view.html("result")
    assert "&lt;b&gt;cat" in shown and "<b>cat" not in shown


def bomb(path: Path, side: int) -> Path:
    """A PNG of a few bytes whose header says that it has many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def test_uploads_are_looked_at_before_they_are_decoded(live, tmp_path):
    picture = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "good.jpg", exif=exif)
    assert read_upload(tmp_path / "good.jpg").size == (20, 40)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "torn.png").write_bytes(Path(live.items[0].impath).read_bytes()[:300])
    picture.save(tmp_path / "page.eps")
    (tmp_path / "picture.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(MEGABYTES * 10**6 + 1)
    bad = ["text.png", "page.eps", "picture.svg", "large.png", "torn.png", "none.png"]
    bad = [tmp_path / name for name in bad] + [
        bomb(tmp_path / f"{side}.png", side) for side in (8000, 60_000)
    ]
    view = live.look([], [], uploads=[tmp_path / "good.jpg", *bad])
    assert [x.label for x in view.pictures if x.own] == ["good.jpg"]
    assert [line.partition(":")[0] for line in view.refused] == [path.name for path in bad]
    reasons = ["no image"] * 3 + ["larger than", "", "no image", "million", "million"]
    for path, why in zip(bad, reasons, strict=True):
        with pytest.raises(ProblemError) as error:
            read_upload(path)
        one_line(error, path.name, why)
    many = live.look([], [], uploads=[tmp_path / "good.jpg"] * 20)
    assert len([x for x in many.pictures if x.own]) == 12 and "8 files" in many.refused[0]


@pytest.mark.parametrize("kind", ["ViT", "custom with bias"])
def test_a_model_and_images_of_ones_own(tmp_path, kind):
    folder = open_clip_folder(tmp_path / "m", kind)
    zoo = images(tmp_path / "zoo")
    live = Live(str(folder), str(zoo), tmp_path, tmp_path / "cache")
    live.generic = False  # thousands of names
    view = live.look(["crab"], ["a name that nobody listed"])
    assert live.names == ["crab", "owl", "sea horse"] and len(view.pictures) == 3
    text = live.source.encode_hidden(["crab"]) @ live.source.projection
    view.found.apply()
    changed = live.source.encoder.embeddings(["crab"])
    assert not torch.allclose(changed, text, atol=1e-3)
    assert float(view.neighbours["crab"][0][0].now) != float(view.neighbours["crab"][0][0].before)


def test_models_by_name(tmp_path):
    folder = open_clip_folder(tmp_path / "m", "ViT")
    file = folder / "open_clip_model.safetensors"
    for name in (str(folder), f"hf:{folder}", f"open_clip:ViT-B-32/{file}", "mini"):
        assert ClipSource(name).arch == name
    for text, why in {
        f"openai:{file}": "none of the files that OpenAI published",
        f"openai:{tmp_path / 'no.pt'}": "no such file",
        "open_clip:ViT-B-32/nobody": "pretrained tag of open_clip",
        "hf:nowhere": "cannot be fetched",
        "miny": "did you mean 'mini'",
    }.items():
        with pytest.raises(ProblemError) as error:
            ClipSource(text)
        one_line(error, why)


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run(app.main, [], (ProblemError,)) == 2
    assert capsys.readouterr().err == (
        "error: the app needs Gradio (gradio is missing): make app, or pip install gradio\n"
    )
