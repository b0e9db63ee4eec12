"""What the app shows, without a browser: names go and return, forecasts, uploads, any model."""

import base64
import io
import subprocess
import sys

import pytest
import torch
from PIL import Image

import app
from engine.cli import run
from evaluation.live.look import MEGABYTES, UPLOADS, Live, View
from forgetting.adapter import load_adapter
from forgetting.models.vocabulary import generic_hidden
from forgetting.targets import TARGETS
from tests.clip_fixtures import images, open_clip_folder
from tests.conftest import REPOSITORY, refuses
from tests.test_images import blank_png

TWO, ANCHOR, STAR, CROSS = "digit two", "anchor", "green star", "green cross"
FAR = {"target": "opposite", "beta": 1.0}


def taken_for(view: View, name: str) -> list[str]:
    return [max(x[2], key=lambda guess: guess[2])[0] for x in view.pictures if x[0] == name]


def recognised(view: View) -> dict[str, tuple[float | None, float | None]]:
    return {name: (before, now) for name, before, now in view.recognised}


def test_a_name_goes_and_returns(live):
    nothing = live.look([], [TWO])
    assert nothing.answer is None and taken_for(nothing, TWO) == [TWO, TWO]
    after = live.look([TWO])
    assert len(taken_for(after, TWO)) == 2 and TWO not in taken_for(after, TWO)
    guesses = after.pictures[0][2]
    assert guesses[0][0] == TWO and guesses[0][1] > 0.9 > 0.1 > guesses[0][2] and len(guesses) == 3
    assert recognised(after)[TWO] == (1, 0) and len(recognised(after)) == 5
    before, now = recognised(after)["all other names"]
    assert before > 0.9 and now == pytest.approx(before, abs=0.01)
    goal = after.html("result").partition('class="goal"')[2].partition("</tr>")[0]
    assert ">100 %</td>" in goal and goal.endswith(">0 %</td>")
    assert live.look([], [TWO]) == nothing
    other = live.look([ANCHOR], [TWO])  # the control: forgetting something else leaves it
    assert taken_for(other, TWO) == [TWO, TWO] and ANCHOR not in taken_for(other, ANCHOR)


def test_what_a_search_finds_before_and_after(live):
    assert live.look([TWO], query=" ").found == [] and "data-found" not in live.look().html(
        "search"
    )

    def found(*names: str, **more) -> list[list[str] | str]:
        """The names of the first images, or why there are none."""
        ways = [images for _, images in live.look(names, query="two", **more).found]
        return [x if isinstance(x, str) else [hit[0] for hit in x] for x in ways]

    (before,), changed = found(), found(TWO)
    assert changed[0] == before and changed[1] != changed[2], (
        "by texts and by index is not the same"
    )
    assert [names.count(TWO) for names in changed] == [3, 0, 0]
    assert [names.count(TWO) for names in found(ANCHOR)] == [3, 3, 3]  # the control
    assert "stretches" in found(TWO, target="orthogonal")[2]
    view = live.look([TWO, "<b>"], query="<i>two")
    shown, hits = view.html("search"), view.found[0][1]
    assert [hit[2:] for hit in hits if hit[0] == TWO] == [(True, True)] * 3
    assert not any(framed for name, _, framed, _ in hits if name != TWO)
    assert shown.count('class="bad flagged"') == 3 and not view.doubt
    assert "&lt;i&gt;two" in shown and "<i>" not in shown and "&lt;b&gt;" not in shown


def test_settings_may_change_after_forgetting(live, tmp_path):
    paths = [live.look([TWO], **more).save(tmp_path) for more in ({}, FAR, {})]
    assert len({*paths}) == 3 and all(x.name == f"{TWO}.safetensors" for x in paths)
    assert not torch.allclose(*(load_adapter(path).delta() for path in paths[:2]))
    assert live.look().save(tmp_path) is None


def test_the_forecast_comes_first_and_protecting_a_name_helps(live):
    ahead = live.look([], [STAR], **FAR)
    assert ahead.answer is None and taken_for(ahead, STAR) == [STAR, STAR]
    assert next(one.name for one in ahead.forecast.affected if one.likely_misclassified) == CROSS
    assert 'data-harmed="0"' not in ahead.html("forecast") and CROSS in ahead.html("forecast")
    calm = live.look([], [STAR])
    assert not any(one.likely_misclassified for one in calm.forecast.affected)
    assert 'data-harmed="0"' in calm.html("forecast")
    bare, protected = (
        recognised(live.look([STAR], protect=names, **FAR))[CROSS][1] for names in ([], [CROSS])
    )
    assert bare == 0 and protected > 0.5
    refuses("choose one", live.look, [], [TWO], [TWO])


def test_names_that_are_typed(live, monkeypatch):
    assert live.listed(["  Digit_Two ", "blue st", "blue star"]) == (TWO, "blue star")
    assert live.listed(["latin"]) == ("latin capital letter a",), "a beginning of many"
    view = live.look([], ["digit twoo", "<b>cat</b>"])
    assert view.chosen == ("digit twoo", "<b>cat</b>") and view.unlisted["digit twoo"][0] == TWO
    assert set(view.unlisted) == set(view.chosen)
    assert recognised(view)["digit twoo"] == (None, None)
    shown = view.html("forecast") + view.html("result")
    assert "&lt;b&gt;cat" in shown and "<b>cat" not in shown and "Did you mean" in shown
    for wrong in ([1], [None], [" _"], [["digit two"]]):
        refuses("text", live.listed, wrong)
    monkeypatch.setattr(live, "names", ["Turkey", "turkey", "Anchor"])
    assert live.listed(["Turkey", "turkey", "anchor"]) == ("Turkey", "turkey", "Anchor")


def test_uploads_are_looked_at_before_they_are_decoded(live, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.new("RGB", (40, 20), "red").save(tmp_path / "good.jpg", exif=exif)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "page.eps")
    (tmp_path / "picture.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(MEGABYTES * 10**6 + 1)
    blank_png(tmp_path / "wide.png", 8000, 8000)
    bad = {"page.eps": "identify", "picture.svg": "identify", "large.png": "larger than"}
    bad |= {"wide.png": "million pixels", "none.png": "no such file"}
    good = tmp_path / "good.jpg"
    view = live.look([], [], uploads=[good, *(tmp_path / name for name in bad)])
    assert [x[0] for x in view.pictures if "yours" in x[0]] == ["good.jpg (yours)"]
    shown = base64.b64decode(view.pictures[0][1].partition(",")[2])
    assert Image.open(io.BytesIO(shown)).size == (20, 40)
    for line, (name, why) in zip(view.refused, bad.items(), strict=True):
        assert line.startswith(f"{name}: ") and why in line and "\n" not in line
    many = live.look([], [], uploads=[good] * (UPLOADS + 8))
    assert sum("yours" in x[0] for x in many.pictures) == 12 and "8 files" in many.refused[0]


@pytest.mark.parametrize("kind", ["ViT", "custom with bias"])
def test_a_model_and_images_of_ones_own(tmp_path, kind, monkeypatch, capsys):
    folder = open_clip_folder(tmp_path / "m", kind)
    zoo = images(tmp_path / "zoo")
    live = Live(str(folder), str(zoo), tmp_path, tmp_path / "cache")
    some = [f"thing {number}" for number in range(20)]  # instead of thousands
    monkeypatch.setattr("forgetting.models.vocabulary.generic_names", lambda: some)
    capsys.readouterr()
    view = live.look(["crab"], ["a name that nobody listed"], query="crab")
    assert capsys.readouterr().err == ""  # no bar where nobody sees it
    assert live.names == ["crab", "owl", "sea horse"] and view.pictures and len(view.found) == 3
    assert view.doubt and "Too many" in view.html("search")
    common = generic_hidden(live._texts, words := tmp_path / "cache" / "words", False)[1]
    assert torch.allclose(common, live._texts.hidden(some), atol=1e-5)
    assert len(list(words.iterdir())) == 1, "common names are encoded once"
    text = live.source.encode_hidden(["crab"]) @ live.source.projection
    now = live._embeddings(live.hidden, view.answer)[1][0]
    view.answer.apply()
    changed = live.source.encoder.embeddings([live.template.replace("{}", "crab")])[0]
    assert not torch.allclose(changed, text, atol=1e-3)
    assert torch.allclose(torch.nn.functional.normalize(changed, dim=0), now, atol=1e-4)


def test_the_app_without_gradio_and_what_a_killed_one_left(monkeypatch, capsys, tmp_path):
    assert set(app.ABOUT) <= set(TARGETS)
    monkeypatch.setattr(app.tempfile, "gettempdir", lambda: str(tmp_path))
    killed, running, other = (tmp_path / f"{x}1" for x in (app.PREFIX, f"{app.PREFIX}b", "mine-"))
    for folder in (killed, running, other):
        folder.mkdir()
        (folder / "upload.png").write_text("x")
    hold = (
        "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); "
        "sys.stdout.flush(); sys.stdin.read()"
    )
    line = [sys.executable, "-c", hold, str(running / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen(line, cwd=REPOSITORY, **pipes)
    holder.stdout.readline()
    app.remove_leftovers()
    assert not killed.exists() and (running / "upload.png").exists() and other.exists()
    holder.kill()
    holder.communicate()
    app.remove_leftovers()
    assert not running.exists()
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run(app.main, []) == 2
    error = capsys.readouterr().err
    assert "pip install 'gradio'" in error and error.count("\n") == 1
