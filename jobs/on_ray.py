"""Ray for a verb: the cluster named by RAY_ADDRESS, or one of this machine alone, listening on loopback only."""

import logging
import os


def start_ray() -> None:
    """Connect this process to Ray, starting it where there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about it on every start
    import ray  # slow to import, and only large adds need it

    from pipeline.embeddings.parts import available_cpus

    if ray.is_initialized():
        return
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
        return
    ray.init(
        num_cpus=available_cpus(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
    )
