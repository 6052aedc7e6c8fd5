"""`serve MEMORY`: answer questions over HTTP, on Ray Serve."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from jobs.ray_cluster.modes import others_who_read
from jobs.terminal.arguments import Memory, size_in_bytes
from jobs.terminal.output import note, say, tell
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.open_storage import open_storage

SECONDS_OF_SILENCE = 0.8  # before a server that starts says what it does


def serve(
    memory: Memory,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.", metavar="HOST")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", metavar="PORT", min=1, max=65_535)] = 8000,
    groups: Annotated[int, typer.Option(help="Groups that the shards are spread over.", metavar="N", min=1)] = 1,
    replicas: Annotated[int, typer.Option(help="Processes of each group.", metavar="N", min=1)] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(help="As many under load, by Serve's autoscaling.", metavar="N", min=1)
    ] = None,
    ingresses: Annotated[int, typer.Option(help="Processes that take requests.", metavar="N", min=1)] = 1,
    embedders: Annotated[int, typer.Option(help="Processes that embed images.", metavar="N", min=1)] = 1,
    embedder_gpus: Annotated[float, typer.Option(help="GPUs of each of them.", metavar="N", min=0)] = 0.0,
    token_file: Annotated[
        str | None,
        typer.Option(
            help="File with the token by which the memory may be changed; or set VISUAL_MEMORY_TOKEN. "
            "Without one the server only reads.",
            metavar="FILE",
        ),
    ] = None,
    thumbnails: Annotated[
        bool,
        typer.Option(
            "--thumbnails/--no-thumbnails",
            help="Keep a small picture, about 3 KB, of each image added over HTTP: its bytes have no file to go "
            "back to.",
        ),
    ] = True,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            help="Let pages of this origin ask, such as http://localhost:3000; repeatable. * lets in every one.",
            metavar="ORIGIN",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer to this name too, such as photos.example.org or *.example.org; repeatable. Addresses, names "
            "without a dot and this machine's own are answered to anyway; * is every name.",
            metavar="NAME",
        ),
    ] = None,
    pictures: Annotated[
        list[str] | None,
        typer.Option(
            help="Show images below this folder, or prefix of a store, of entries that name one there; repeatable. "
            "Without it pictures are made only of files that an `add` has read.",
            metavar="ROOT",
        ),
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="Tell of each request in a line on stderr.")
    ] = True,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Folder for local copies of a memory on S3.  \\[default: ~/.cache/visual-memory]", metavar="DIR"
        ),
    ] = None,
    cache_size: Annotated[str, typer.Option(help="How much it may hold.", metavar="SIZE")] = "100G",
    timeout: Annotated[
        float, typer.Option(help="Seconds within which a request is answered.", metavar="S", min=0.001, max=600)
    ] = 10.0,
    poll: Annotated[
        float, typer.Option(help="Seconds between looks for a newer version.", metavar="S", min=0.01, max=3_600)
    ] = 1.0,
) -> None:
    """Answer questions over HTTP until interrupted; a newer version of the memory is followed."""
    with _told_if_slow(tell, f"opening {memory}"):
        from jobs.ray_cluster.on_ray import check_free, is_on_cluster, share_of_cpus
        from jobs.ray_cluster.serving_on_ray import serve_until_interrupted
        from pipeline.images.entry_pictures import roots_of
        from pipeline.serving.http.sites import check_hosts
        from pipeline.serving.options import CACHE, ServingOptions, check_origins, token_of

        cpus = share_of_cpus(groups * replicas + ingresses + embedders + 1)
        options = ServingOptions(
            memory=memory,
            host=host,
            port=None if is_on_cluster() else port,
            groups=groups,
            replicas=replicas,
            max_replicas=max_replicas,
            ingresses=ingresses,
            embedders=embedders,
            embedder_gpus=embedder_gpus,
            group_cpus=cpus,
            ingress_cpus=cpus,
            embedder_cpus=cpus,
            editor_cpus=cpus,
            token_file=token_file,
            thumbnails=thumbnails,
            cors=tuple(dict.fromkeys(cors or ())),
            hosts=tuple(dict.fromkeys(allow_host or ())),
            pictures=tuple(dict.fromkeys(pictures or ())),
            log_requests=access_log,
            cache=cache or CACHE,
            cache_bytes=size_in_bytes("--cache-size", cache_size),
            timeout_seconds=timeout,
            poll_seconds=poll,
        )
        has_token = token_of(options) is not None  # all that can be wrong is told before Ray starts
        check_origins(options.cors)
        if token_file is not None and (readers := others_who_read(token_file)):
            note(f"{readers} can read the token in {token_file}: take the right from them (chmod 600 {token_file})")
        if cache is not None and (readers := others_who_read(cache)):
            note(f"{readers} can look into {cache}, where copies of the memory lie: chmod 700 {cache} keeps them out")
        check_hosts(options.hosts)
        roots_of(options.pictures)
        VersionLog(open_storage(memory)).latest()
        if not is_on_cluster():
            check_free(host, port)
    if has_token and token_file is None and is_on_cluster():
        note(
            "on a cluster the token is read where the ingress runs: set VISUAL_MEMORY_TOKEN there, or give --token-file"
        )
    if not has_token:
        note("without a token (--token-file, VISUAL_MEMORY_TOKEN) the memory can be asked and not changed")

    def announce() -> None:
        address = f"http://{host}:{port}"
        say(f"serving {memory} at {address}")
        say(f"  try: curl -F image=@photo.jpg {address}/v1/classify")
        say(f"  documentation: {address}/docs; Ctrl-C stops")

    # On a cluster the nodes take requests, each by a proxy of Serve.
    proxies = {"host": host, "port": port} if is_on_cluster() else None
    with shown_requests() if access_log and proxies is None else contextlib.nullcontext() as pipe:

        def application() -> Any:
            from pipeline.serving.application import build  # with Ray, once it runs

            return build(options.model_copy(update={"access_log": pipe}))

        serve_until_interrupted(application, announce, proxies, tell)


@contextlib.contextmanager
def _told_if_slow(tell: Callable[[str], None], text: str) -> Iterator[None]:
    """Tell what is being done where it takes a while, so that a mistake that is found at once is one line."""
    timer = threading.Timer(SECONDS_OF_SILENCE, tell, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def shown_requests() -> Iterator[str]:
    """The path of a pipe; what processes of this machine write into it, a line a request, is shown on stderr."""
    with tempfile.TemporaryDirectory(prefix="visual-memory-") as folder:
        path = os.path.join(folder, "requests")
        os.mkfifo(path, 0o600)
        pipe = os.open(path, os.O_RDWR)  # also for writing, so that it does not end with the last process that writes
        shown = os.dup(2)  # what else is said is held back while Ray stops
        showing = threading.Thread(target=_show, args=(pipe, shown), daemon=True)
        showing.start()
        try:
            yield path
        finally:
            os.write(pipe, _END)
            showing.join(1)
            os.close(pipe)
            os.close(shown)


_END = b"\0"


def _show(pipe: int, shown: int) -> None:
    while data := os.read(pipe, 1 << 16):
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(shown, data.rstrip(_END))
        if data.endswith(_END):
            return
