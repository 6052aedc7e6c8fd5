"""How many requests a listing of S3 takes, and how long, with one request at a time and with several.

    python -m tests.benchmarks.listing_requests [--keys 300000] [--latency-ms 50]

The pages are those of a store in memory that answers each request after a latency, so that the figures are those of the
listing and not of a server on the same cores. Prints one JSON document; fails if the plans differ.
"""

import argparse
import bisect
import datetime
import json
import threading
import time
from typing import Any
from unittest import mock

from pipeline.images.labels.labels import Labels
from pipeline.images.sources import stores
from pipeline.images.sources.listing import list_source

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
PAGE = 1_000


class Store:
    """What `stores` asks of s3fs, over keys in memory in the order of S3."""

    protocol = ("s3",)

    def __init__(self, names: list[str], latency: float) -> None:
        self.num_requests = 0
        self._names, self._latency = sorted(names), latency
        self._lock = threading.Lock()

    def call_s3(
        self,
        _method: str,
        Bucket: str,
        Prefix: str,
        Delimiter: str | None = None,
        ContinuationToken: str | None = None,
    ) -> dict[str, Any]:
        time.sleep(self._latency)
        with self._lock:
            self.num_requests += 1
        at = int(ContinuationToken) if ContinuationToken else bisect.bisect_left(self._names, Prefix)
        keys, folders = [], []
        while at < len(self._names) and self._names[at].startswith(Prefix) and len(keys) + len(folders) < PAGE:
            step, slash, _ = self._names[at][len(Prefix) :].partition("/")
            if Delimiter and slash:
                folders.append({"Prefix": f"{Prefix}{step}/"})
                at = bisect.bisect_left(self._names, f"{Prefix}{step}0")  # "0" follows "/"
            else:
                keys.append({"Key": self._names[at], "Size": 1, "LastModified": NOW})
                at += 1
        cut = at < len(self._names) and self._names[at].startswith(Prefix)
        return {"Contents": keys, "CommonPrefixes": folders, "IsTruncated": cut, "NextContinuationToken": str(at)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=300_000)
    parser.add_argument("--latency-ms", type=float, default=50)
    arguments = parser.parse_args()
    result = []
    for each in (3_000, 300, 2, arguments.keys):
        names = [f"p/{number // each:06d}/{number % each:08d}.jpg" for number in range(arguments.keys)]
        plans = []
        for at_once in (1, 16):
            store = Store(names, arguments.latency_ms / 1e3)
            began = time.perf_counter()
            with (
                mock.patch.object(stores, "file_system", lambda uri, there=store: (there, uri.removeprefix("s3://"))),
                mock.patch.object(stores._S3Pages, "requests_at_once", at_once),
            ):
                plans.append(list_source("s3://b/p", Labels("parent")).images)
            seconds = round(time.perf_counter() - began, 1)
            result.append(
                {"keys_a_folder": each, "at_once": at_once, "requests": store.num_requests, "seconds": seconds}
            )
        assert plans[0].equals(plans[1])
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
