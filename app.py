"""Try it in a browser: forget names, see what images are taken for, restore names.

Everything stays on this machine: one address, no telemetry, nothing loaded from elsewhere.
"""

import html
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

import trainers  # noqa: F401  with targets of your own
from engine.cli import Parser, add_setting, run, whole
from engine.config import DatasetSettings, FeatureSettings
from evaluation.live.look import MEGABYTES, Live
from forgetting.context import ExactSettings
from forgetting.errors import ProblemError
from forgetting.io import need
from forgetting.targets import TARGETS, takes

HOST = "127.0.0.1"
TITLE = "Make CLIP forget a name"
# What a page may load, and where it may send: this address alone, whatever Gradio's own page wants.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
ABOUT = {  # of a target; one of your own is shown by its name
    "specific": "Remove what only this name means (recommended)",
    "opposite": "Remove the name's whole direction",
    "empty": "Replace it by the empty text (the paper's)",
    "orthogonal": "Move it to where no text is",
}
PREFIX = "clip-forget-app-"  # of temporary folders


def gradio() -> Any:
    """Gradio with everything off that would speak to somebody else; ProblemError without it."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return need("gradio")


def blocks(live: Live, folder: Path) -> Any:
    """The page; adapters to download are written into `folder`."""
    gr = gradio()
    bare = {"js_on_load": None, "apply_default_css": False, "padding": True}
    names = {"choices": live.names, "allow_custom_value": True, "multiselect": True, "value": []}
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"# {TITLE}\nThe model `{live.source.arch}` stops recognising what you name. No image "
            "is used for that, only the name; everything stays on this machine."
        )
        state = gr.State([])  # what is forgotten
        with gr.Row(elem_classes="halves"):
            with gr.Column(scale=2, min_width=300):
                about = "Pick names, or type any and press Enter."
                chosen = gr.Dropdown(**names, label="Names to forget", info=about)
                problem, forecast = gr.HTML(visible=False, **bare), gr.HTML(**bare)
                button = gr.Button("Forget", variant="primary")
                about = "Untick a name to restore it."
                forgotten = gr.CheckboxGroup([], label="Forgotten", info=about, visible=False)
                with gr.Column(elem_classes="last"):
                    about = "Names that must stay recognised."
                    protect = gr.Dropdown(**names, label="Protect", info=about)
                    with gr.Accordion("Advanced", open=False):
                        exact = ExactSettings
                        ways = [(ABOUT.get(kind, kind), kind) for kind in ABOUT | TARGETS]
                        target = gr.Radio(ways, value=exact.target, label="How a name is removed")
                        about = "Of the first two: above 0 more is removed, and others suffer more."
                        beta = gr.Slider(0, 1, exact.beta, step=0.05, label="Strength", info=about)
            with gr.Column(scale=3, min_width=300):
                result, about = gr.HTML(**bare), "Search the images by any text"
                query = gr.Textbox("", label=about, submit_btn="Search", visible=bool(live.items))
                found, about, kinds = gr.HTML(**bare), "Images of your own", ["image"]
                files = gr.File(label=about, file_count="multiple", file_types=kinds, height=140)
                adapter = gr.DownloadButton("Download the adapter (a file)", interactive=False)

        def alert(text: str) -> dict[Any, Any]:
            text = f'<div class="live"><p class="bad" role="alert">{html.escape(text)}</p></div>'
            return {problem: gr.HTML(text, visible=True)}

        def show(names: list[str], picked: list[str], *rest: Any) -> dict[Any, Any]:
            """The page while `names` are forgotten and others are picked."""
            kept, way, strength, *more = rest
            strength = strength if takes(way, "beta") else 0.0
            try:
                view = live.look(names, picked, kept, way, strength, *more)
                path = view.save(folder)
            except ProblemError as error:
                return alert(str(error))
            names = view.answer.names if view.answer else []
            shown = {
                problem: gr.HTML("", visible=False),
                forecast: view.html("forecast"),
                found: view.html("search"),
                result: view.html("result"),
                adapter: gr.DownloadButton(value=path, interactive=path is not None),
                state: names,
                forgotten: gr.CheckboxGroup(names, value=names, visible=bool(names)),
            }
            return shown if list(view.chosen) == picked else shown | {chosen: list(view.chosen)}

        def forget(names: list[str], picked: list[str], *rest: Any) -> dict[Any, Any]:
            if not picked:
                return alert("Pick or type a name first.")
            shown = show([*names, *picked], [], *rest)
            return shown | {chosen: []} if state in shown else shown

        def restore(ticked: list[str], names: list[str], *rest: Any) -> dict[Any, Any]:
            return show([name for name in names if name in ticked], *rest)

        inputs = [state, chosen, protect, target, beta, files, query]
        outputs = [problem, forecast, found, result, adapter, state, forgotten, chosen]
        how = {"outputs": outputs, "concurrency_id": "look"}
        how |= {"api_visibility": "private", "show_progress": "minimal"}
        # Names that are typed are no input to Gradio, but a change.
        changes = [chosen.change, protect.change, target.input, beta.input, files.change]
        gr.on([page.load, query.submit, *changes], show, inputs, trigger_mode="always_last", **how)
        for box in (chosen, protect):  # its list would cover what stands below it
            box.change(None, js="() => document.activeElement.blur()")
        button.click(forget, inputs, **how)
        forgotten.input(restore, [forgotten, *inputs], **how)
    return page


def start(live: Live, folder: Path, port: int | None = None) -> Any:
    """Serve the page on this machine alone, in the background; `local_url` says where."""
    gr = gradio()
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse

    async def guard(request: Any, respond: Any) -> Any:
        """Answer no page of elsewhere, and look up no address of elsewhere."""
        origin = request.headers.get("origin")
        is_foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
        if is_foreign or "://" in request.url.path:
            return PlainTextResponse("refused", status_code=403)
        response = await respond(request)
        response.headers["content-security-policy"] = POLICY
        response.headers["referrer-policy"] = "no-referrer"
        return response

    for key in ("NO_PROXY", "no_proxy"):  # Gradio asks its own address whether it is up
        os.environ[key] = ",".join(filter(None, [os.environ.get(key), HOST]))
    off = ("share", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server")
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    page = blocks(live, folder)
    page.launch(
        **dict.fromkeys(off, False),
        server_name=HOST,
        server_port=port,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        max_file_size=f"{MEGABYTES}mb",
        theme=theme,
        css_paths=Path(__file__).with_name("evaluation") / "live" / "style.css",
        app_kwargs={
            "middleware": [  # a page of elsewhere whose name comes to lead here is none of ours
                Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                Middleware(BaseHTTPMiddleware, dispatch=guard),
            ]
        },
    )
    return page


def remove_leftovers() -> None:
    """Remove the temporary folders of apps that were killed: nobody holds their lock."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(Timeout, OSError), FileLock(folder / "lock", timeout=0):
            shutil.rmtree(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Read a model, and serve the page until it is interrupted."""
    parser = Parser(prog="app.py", description=__doc__)
    about = "mini, one of OpenAI's, hf:DIR, open_clip:NAME/PRETRAINED, openai:FILE (default: mini)"
    parser.add_argument("--model", default="mini", help=about)
    add_setting(parser, "--images", DatasetSettings, "images")
    add_setting(parser, "--root", DatasetSettings, "root")
    add_setting(parser, "--cache", FeatureSettings, "cache")
    about = "of the address (default: from 7860 the first free)"
    parser.add_argument("--port", type=whole(1, 65535), help=about)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes then too
    with socket.socket() as probe:
        if args.port and probe.connect_ex((HOST, args.port)) == 0:
            raise ProblemError(f"port {args.port} of {HOST} is in use; give another --port")
    remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder, FileLock(f"{folder}/lock"):
        os.environ["GRADIO_TEMP_DIR"] = folder  # for uploads; Gradio reads it as it is imported
        gradio()
        live = Live(args.model, args.images, args.root, args.cache)
        page = start(live, Path(folder), args.port)
        print(f"open {page.local_url} in a browser; Ctrl-C ends it", flush=True)
        page.block_thread()


if __name__ == "__main__":
    sys.exit(run(main))
