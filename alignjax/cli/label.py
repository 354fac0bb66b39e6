"""`alignjax label`: serves the page on which people rank responses; exports what they said."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignjax.cli import sampling

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from alignjax.web import Store

EXAMPLES = """\
examples:
  alignjax label --responses responses.jsonl
  alignjax label --prompts prompts.jsonl --responses responses.jsonl
  alignjax label --prompts prompts.jsonl --model runs/sft/model --num-responses 4
  alignjax label --responses responses.jsonl --annotators ann,bob --overlap 50 --host 0.0.0.0
  alignjax label --responses responses.jsonl --status
  alignjax label --responses responses.jsonl --export preferences.jsonl

A record of responses is {"prompt": ..., "responses": ["...", "...", ...]}, with two or more of
them; a prompt is a text or a list of messages {"role": ..., "content": ...}. With --prompts the
prompts have a file of their own, and the n-th record of one belongs to the n-th of the other.
Further keys are kept. Ranks, scores and the like that a record holds already are neither shown nor
exported.

With --model the responses are sampled first and written to the file that --responses names
(default: PROMPTS.responses.jsonl, beside the prompts); the same command goes on with them later.
Messages go through the model's chat template.

Rankings are kept in an SQLite file (default: RESPONSES.sqlite, beside the responses), each on disk
before the page says so. Stop and start as you like: everybody goes on where they stopped. The
export is what reward models and DPO train on: {"prompt", "responses", "ranks": [1, 2, 2],
"annotator", "time"}, with "comment" and "flagged": true where there are any; 1 is best, equal is a
tie.

Names are taken on trust: whoever may open the page may rank under any of them.

The page is for this machine only. To let others in, name the address to listen on (--host 0.0.0.0
for all): what is printed then holds a token. The connection is not encrypted; across networks that
you do not trust use a tunnel (ssh -L 8377:localhost:8377 HOST) or a proxy that speaks TLS.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    what = parser.add_argument_group("what is ranked")
    what.add_argument("--responses", metavar="FILE", help="records of responses, see below")
    what.add_argument("--prompts", metavar="FILE", help="records of prompts, if not in --responses")
    what.add_argument("--store", metavar="FILE", help="where rankings are kept (SQLite)")
    people = parser.add_argument_group("who ranks")
    people.add_argument(
        "--annotators", metavar="NAME,NAME", default="", help="nobody else (default: anybody)"
    )
    people.add_argument(
        "--overlap", type=int, default=0, metavar="N",
        help="how many prompts everybody ranks, to measure agreement; the rest is dealt out "
        "(default: 0)",
    )  # fmt: skip
    result = parser.add_argument_group("instead of serving the page")
    result.add_argument("--export", metavar="OUT.jsonl", help="write the rankings and stop")
    result.add_argument("--status", action="store_true", help="print who ranked how many and stop")
    page = parser.add_argument_group("the page")
    page.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    page.add_argument(
        "--port", type=int, default=8377, help="0 takes a free one (default: %(default)s)"
    )
    page.add_argument(
        "--token", help="secret of the address (default: made up where one is needed)"
    )
    page.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a further name by which browsers may call the page, such as a proxy's",
    )  # fmt: skip
    page.add_argument("--open", action="store_true", help="open it in a browser")
    model = parser.add_argument_group("responses sampled from a model")
    model.add_argument("--model", metavar="DIR", help="directory or id of the model")
    model.add_argument(
        "--num-responses", type=int, default=4, metavar="K", help="of each prompt (default: 4)"
    )
    model.add_argument("--chat", action="store_true", help="chat template for prompts of text, too")
    sampling.add_arguments(model)


def main(args: argparse.Namespace) -> None:
    from alignjax.core.errors import UserError
    from alignjax.web import open_store, read_tasks, write_rankings

    _check(args)
    annotators = _annotators(args.annotators)
    if args.model is not None:
        from alignjax.cli.label_sample import sample_responses

        responses = args.responses or str(Path(args.prompts).with_suffix("")) + ".responses.jsonl"
        sample_responses(args, Path(responses))
        tasks = read_tasks(responses)
    else:
        responses = args.responses
        tasks = None if responses is None else read_tasks(responses, args.prompts)
    path = Path(args.store or _default_store(responses))
    if (args.export or args.status) and not path.is_file():
        raise UserError(f"--store: no such file: {path}; nothing has been ranked yet")
    store = open_store(path, tasks)
    try:
        if args.export:
            num = write_rankings(store, Path(args.export))
            print(f"wrote {num} rankings to {args.export}")
        if args.export or args.status:
            print_status(store)
        else:
            _serve(store, args, annotators)
    finally:
        store.close()


def print_status(store: Store) -> None:
    """How many are ranked, by whom, and how far people agree."""
    from alignjax.web.summary import summary

    found = summary(store)
    print(f"{found['ranked']} of {found['tasks']} prompts ranked, {found['rankings']} rankings")
    for person in found["annotators"]:
        print(
            f"  {person['name']}: {person['ranked']} ranked, {person['skipped']} skipped, "
            f"{person['flagged']} flagged"
        )
    alpha, num_tasks, num_people = found["agreement"].values()
    if alpha is None:
        print("agreement: not known (nothing yet that two people ranked, and not all as ties)")
    else:
        print(
            f"agreement: alpha {alpha:.3f} (Krippendorff, ordinal; {num_tasks} prompts, "
            f"{num_people} people)"
        )


def _check(args: argparse.Namespace) -> None:
    from alignjax.core.errors import UserError

    if args.model is not None:
        if args.prompts is None:
            raise UserError("--model: expected --prompts FILE with it, whose responses it samples")
        if args.num_responses < 2:
            raise UserError(f"--num-responses {args.num_responses}: expected at least 2")
        sampling.check(args)
    elif args.responses is None and (args.store is None or args.prompts is not None):
        raise UserError("nothing to rank; give --responses FILE, or --prompts FILE and --model DIR")
    if args.overlap < 0:
        raise UserError(f"--overlap {args.overlap}: expected at least 0")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: expected 0 to 65535")


def _annotators(text: str) -> list[str]:
    from alignjax.core.errors import UserError
    from alignjax.web.names import check_name

    try:
        return [check_name(name) for name in text.split(",")] if text else []
    except UserError as error:
        raise UserError(f"--annotators: {error}") from error


def _default_store(responses: str) -> str:
    from alignjax.core.errors import UserError

    if not Path(responses).exists():
        raise UserError(f"--store: give a name; {responses} is no file that it could stand beside")
    return responses.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".parquet") + ".sqlite"


def _serve(store: Store, args: argparse.Namespace, annotators: Sequence[str]) -> None:
    from alignjax.core.errors import UserError

    try:
        import uvicorn

        from alignjax.web.app import make_app
    except ImportError as error:
        raise UserError(
            f"the page needs a package that is missing ({error.name}); pip install 'alignjax[web]'"
        ) from error
    from alignjax.web.access import load_key, make_access

    key = load_key(store.path.with_name(store.path.name + ".key"))
    access = make_access(args.host, key=key, token=args.token, names=args.allow_host)
    listening = _listen(args.host, args.port)
    app = make_app(store, access, annotators=annotators, overlap=args.overlap)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=3,
    )  # fmt: skip
    url = _url(args.host, listening.getsockname()[1], access.token)
    print(f"{store.count()} of {store.num_tasks} prompts ranked, in {store.path}")
    print(f"rank at {url}\nCtrl-C ends; the same command goes on", flush=True)
    if args.open:
        import webbrowser

        webbrowser.open(url)
    with contextlib.suppress(KeyboardInterrupt):  # Raised again when all requests are answered.
        uvicorn.Server(config).run(sockets=[listening])
    print(f"\nstopped; {store.count()} of {store.num_tasks} prompts ranked, in {store.path}")


def _listen(host: str, port: int) -> socket.socket:
    import socket

    from alignjax.core.errors import UserError

    try:
        found: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); "
            "another --port, or 0, takes a free one"
        ) from error


def _url(host: str, port: int, token: str | None) -> str:
    import socket

    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + ("" if token is None else f"?token={token}")
