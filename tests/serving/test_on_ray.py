"""The application on Ray Serve as a user starts it: one command, one question, an answer as the library's, an end."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import Client, VisualMemory
from pipeline.errors import UsageError
from tests.serving.ray_server import ray_server

ROOT = Path(__file__).parents[2]


def noise(seed: int) -> bytes:
    """A PNG of half a megabyte."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (420, 420, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.timeout(240)
def test_one_command_and_one_question(digits_memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    image = sorted((digits / "ask" / "3").iterdir())[0]
    with ray_server(digits_memory.uri, tmp_path) as server:
        asked = ["curl", "-s", "-F", f"image=@{image}", f"{server.url}/v1/classify"]
        answer = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)
        expected = digits_memory.classify([image.read_bytes()])[0].to_json()
        assert answer == {**json.loads(json.dumps(expected)), "partial": False}
        with Client(server.url) as client:
            assert client.classify([image], k=5, balance="auto") == digits_memory.classify(
                [image.read_bytes()], k=5, balance="auto"
            )
            large = [noise(seed) for seed in range(12)]  # more in one call than gRPC takes by itself
            assert sum(map(len, large)) > 5 << 20
            assert client.classify(large, k=5) == digits_memory.classify(large, k=5)
            with pytest.raises(UsageError, match="only reads"):
                client.forget(labels=["3"])
        assert len(server.replicas("group-0")) == len(server.replicas("embedder")) == 1
    assert server.process.returncode == 0
    said = (tmp_path / "serve.log").read_text()
    assert "try: curl -F image=@photo.jpg" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("optimized", ["1", "0"])
def test_a_replica_stops_working_at_what_nobody_waits_for(tmp_path: Path, optimized: str) -> None:
    code = (
        "import sys; from jobs.ray_cluster import on_ray; on_ray.set_defaults();"
        "from tests.serving import cancelling_on_ray; cancelling_on_ray.main(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    env = os.environ | {"RAY_SERVE_THROUGHPUT_OPTIMIZED": optimized, "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    said = subprocess.run(command, capture_output=True, check=True, text=True, cwd=ROOT, env=env, timeout=100).stdout
    assert float(said.split("ended after")[1].split()[0]) < 2
