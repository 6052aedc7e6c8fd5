"""The service without Ray, for `serving.py`: `python -m tests.benchmarks.serving_bare MEMORY PORT GROUPS`."""

import sys

import uvicorn

from pipeline.serving.http.routes import make_app
from pipeline.serving.in_process import local_service


async def serve() -> None:
    memory, port, groups = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    app = make_app(local_service(memory, groups))
    await uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="warning", access_log=False)).serve()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve())
