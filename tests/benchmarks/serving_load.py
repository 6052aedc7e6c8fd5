"""Load for a server: so many connections, each with one request at a time, for some seconds.

    python -m tests.benchmarks.serving_load PORT PATH BODIES --clients 16 --seconds 8 [--rate 100]

BODIES is a file of request bodies, one a line. Without a rate every connection asks again as soon as it is answered (a
closed loop). With one, requests are due at fixed moments and a latency counts from the moment it was due, so that a
server that stalls is not spared the questions it did not get (coordinated omission). A connection that the server
closes is opened again. Prints one JSON object.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import uvloop


@dataclass
class Load:
    """What is asked, and what came of it; latencies are seconds."""

    port: int
    requests: list[bytes]
    until: float
    rate: float | None
    began: float
    asked: int = 0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    async def client(self) -> None:
        reader = writer = None
        while True:
            number = self.asked
            self.asked += 1
            due = time.perf_counter()
            if self.rate is not None:
                due = self.began + number / self.rate
                await asyncio.sleep(max(due - time.perf_counter(), 0))
            if max(due, time.perf_counter()) > self.until:
                break
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            assert reader is not None
            writer.write(self.requests[number % len(self.requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            status = int(lines[0].split()[1])
            fields = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
            await reader.readexactly(int(fields[b"content-length"]))
            self.latencies.append(time.perf_counter() - due)
            self.statuses[status] += 1
            if fields.get(b"connection") == b"close" or lines[0].startswith(b"http/1.0"):
                writer.close()
                writer = None
        if writer is not None:
            writer.close()


async def run(arguments: argparse.Namespace) -> dict:
    with open(arguments.bodies, "rb") as stream:
        bodies = [line.rstrip(b"\n") for line in stream]
    head = f"POST {arguments.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    requests = [head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body for body in bodies]
    began = time.perf_counter()
    load = Load(arguments.port, requests, began + arguments.seconds, arguments.rate, began)
    await asyncio.gather(*(load.client() for _ in range(arguments.clients)))
    took = time.perf_counter() - began
    latencies = np.array(load.latencies) * 1e3
    return {
        "clients": arguments.clients,
        "requests": len(latencies),
        "per_second": round(len(latencies) / took, 1),
        "p50_ms": round(float(np.percentile(latencies, 50)), 2),
        "p99_ms": round(float(np.percentile(latencies, 99)), 2),
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
        **({"rate": arguments.rate} if arguments.rate is not None else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("bodies")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rate", type=float)
    print(json.dumps(uvloop.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
