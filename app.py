"""Try it in a browser: forget names, see what images are taken for, give names back.

python app.py [--model MODEL] [--images PATH] [--port PORT]

Everything stays on this machine: one address, no telemetry, nothing loaded from elsewhere.
"""

from __future__ import annotations

import html
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.cli import Parser, add_setting, run, whole
from engine.config import DatasetSettings, FeatureSettings, settings
from evaluation.live import Live
from evaluation.live.uploads import MEGABYTES
from forgetting.errors import ProblemError
from forgetting.targets import TARGETS

HOST = "127.0.0.1"
STYLE = Path(__file__).with_name("evaluation") / "live" / "style.css"
# What a page may load, and where it may send: this address alone, whatever Gradio's own page asks.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)


def gradio() -> Any:
    """Gradio with everything off that would speak to somebody else; ProblemError without it."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio as gr
    except ImportError as error:
        raise ProblemError(
            f"the app needs Gradio ({error.name} is missing): make app, or pip install gradio"
        ) from error
    return gr


def blocks(live: Live, folder: Path) -> Any:
    """The page; adapters to download are written into `folder`."""
    gr, node = gradio(), settings("ForgetExact").FORGET

    # `state`: each name that was forgotten at some time, and whether it is. It stays here, since
    # what a browser sends may be older than what it was just told.
    def show(state: dict[str, bool], asked: list[str], *rest: Any) -> tuple[Any, ...]:
        keep, target, beta, files = rest
        forgotten = [name for name, gone in state.items() if gone]
        try:
            view = live.look(forgotten, asked, keep, target, beta, files or ())
            path = view.save(folder)
        except ProblemError as error:
            line = html.escape(str(error))
            raise gr.Error(line, print_exception=False) from error
        adapter = gr.DownloadButton(value=path, interactive=path is not None)
        return view.html("forecast"), view.html("result"), adapter

    def press(state: dict[str, bool], asked: list[str], *rest: Any) -> tuple[Any, ...]:
        state = state | dict.fromkeys(live.spelled(asked), True)
        shown = show(state, [], *rest)  # refuses before anything has changed
        gone = [name for name, gone in state.items() if gone]
        return state, gr.CheckboxGroup(list(state), value=gone), [], *shown

    def tick(gone: list[str], state: dict[str, bool], *rest: Any) -> tuple[Any, ...]:
        state = {name: name in gone for name in state}
        return state, *show(state, *rest)

    title = "Class forgetting"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"# {title}\nMake the CLIP `{live.source.arch}` stop recognising what you name, from "
            "the name alone: no image is used, and only its text projection changes."
        )
        state = gr.State({})
        names = {
            "choices": live.names,
            "allow_custom_value": True,
            "multiselect": True,
            "value": [],
        }
        plain = {"js_on_load": None, "apply_default_css": False, "padding": True}
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_id="left"):
                with gr.Column():
                    asked = gr.Dropdown(**names, label="Forget", info="Pick names, or type any.")
                    forecast = gr.HTML(**plain)
                    button = gr.Button("Forget", variant="primary")
                    forgotten = gr.CheckboxGroup(
                        [], label="Forgotten", info="Untick a name to give it back."
                    )
                    adapter = gr.DownloadButton("Download the adapter", interactive=False)
                with gr.Column(elem_id="settings"):
                    keep = gr.Dropdown(**names, label="Keep", info="Names to hold still.")
                    target = gr.Radio(
                        list(TARGETS),
                        value=node.TARGET,
                        label="Target",
                        info="Where a text is sent.",
                    )
                    beta = gr.Slider(
                        *(0, 1, node.BETA),
                        step=0.05,
                        label="Beta",
                        info="How far beyond nothing, for the targets opposite and specific.",
                    )
                    files = gr.File(
                        label="Images of your own",
                        file_count="multiple",
                        file_types=["image"],
                        height=140,
                    )
            with gr.Column(scale=3, min_width=300):
                result = gr.HTML(**plain)
        moved, shown = [asked, keep, target, beta, files], [forecast, result, adapter]
        quiet = {"api_visibility": "private", "show_progress": "minimal"}
        # Names that are typed are no input to Gradio, but a change.
        changes = [part.input if part in (target, beta) else part.change for part in moved]
        gr.on(
            [page.load, *changes], show, [state, *moved], shown, trigger_mode="always_last", **quiet
        )
        button.click(press, [state, *moved], [state, forgotten, asked, *shown], **quiet)
        forgotten.input(
            tick, [forgotten, state, *moved], [state, *shown], trigger_mode="always_last", **quiet
        )
    return page


def start(live: Live, folder: Path, port: int | None = None) -> Any:
    """Serve the page on this machine alone, in the background; `local_url` says where."""
    gr = gradio()
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    async def closed(request: Any, follow: Any) -> Any:
        response = await follow(request)
        response.headers["content-security-policy"] = POLICY
        response.headers["referrer-policy"] = "no-referrer"
        return response

    for key in ("NO_PROXY", "no_proxy"):  # Gradio asks its own address whether it is up
        os.environ[key] = ",".join(filter(None, [os.environ.get(key), HOST]))
    page = blocks(live, folder)
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=f"{MEGABYTES}mb",
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
            block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
        ),
        css_paths=STYLE,
        app_kwargs={
            "middleware": [
                # A page of elsewhere whose name comes to lead here is none of ours.
                Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                Middleware(BaseHTTPMiddleware, dispatch=closed),
            ]
        },
    )
    return page


def _free(port: int) -> bool:
    """Whether nobody listens there; asked before a model is read."""
    with socket.socket() as one:
        return one.connect_ex((HOST, port)) != 0


def main(argv: Sequence[str] | None = None) -> None:
    """Read a model, and serve the page until it is interrupted."""
    parser = Parser(prog="app.py", description=__doc__)
    add = parser.add_argument
    add("--model", default="mini", help="mini, an architecture of OpenAI's, hf:DIR or a folder, "
        "open_clip:NAME/PRETRAINED or /FILE, openai:FILE (default: mini)")  # fmt: skip
    add_setting(parser, "--images", DatasetSettings, "images", metavar="PATH")
    add_setting(parser, "--root", DatasetSettings, "root")
    add_setting(parser, "--cache", FeatureSettings, "cache")
    add("--port", type=whole(1, 65535), help="of the address (default: from 7860 the first free)")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes then too
    if args.port and not _free(args.port):
        raise ProblemError(f"port {args.port} of {HOST} is in use; give another --port")
    with tempfile.TemporaryDirectory(prefix="forgetting-") as folder:  # uploads and adapters
        os.environ["GRADIO_TEMP_DIR"] = folder  # Gradio reads it as it is imported
        gradio()
        live = Live(args.model, args.images, args.root, args.cache)
        page = start(live, Path(folder), args.port)
        print(f"open {page.local_url} in a browser; Ctrl-C ends it", flush=True)
        page.block_thread()


if __name__ == "__main__":
    sys.exit(run(main))
