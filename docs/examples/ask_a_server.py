"""Ask a server, teach it an image, and have it forget that image. Needs the token that the server was started with.

VISUAL_MEMORY_TOKEN=… visual-memory serve my.memory
VISUAL_MEMORY_TOKEN=… python docs/examples/ask_a_server.py http://127.0.0.1:8000 new.jpg penguin
"""

import os
import sys

from visual_memory import Client


def main(url: str, image: str, label: str) -> None:
    with Client(url, token=os.environ["VISUAL_MEMORY_TOKEN"]) as client:
        [before] = client.classify([image], k=1)
        entry_id = client.add(image, label)
        [after] = client.classify([image], k=1)
        print(f"{before.label} before, {after.label} after")
        client.forget(ids=[entry_id])


if __name__ == "__main__":
    main(*sys.argv[1:])
