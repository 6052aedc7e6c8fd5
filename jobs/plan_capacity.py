"""`plan-capacity MEMORY --rows N`: what an index of so many entries would take, from rates measured on this memory."""

from typing import Annotated

import typer

from jobs.terminal.arguments import Json, Memory, count, size_in_bytes
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress


def plan_capacity(
    memory: Memory,
    rows: Annotated[int, typer.Option(help="Entries to plan for, such as 50000 or 200M.", metavar="N", parser=count)],
    memory_per_node: Annotated[
        str, typer.Option(help="Memory of a node that serves, such as 64G.", metavar="SIZE")
    ] = "64G",
    target_recall: Annotated[float, typer.Option(help="recall@10 to reach.", metavar="R")] = 0.95,
    qps: Annotated[float, typer.Option(help="Queries a second to answer.", metavar="Q")] = 100.0,
    max_latency_ms: Annotated[float, typer.Option(help="Time a query may take in a shard.", metavar="MS")] = 10.0,
    json: Json = False,
) -> None:
    """Size a cluster before paying for it: shards, nodes, memory, disk and build time for N entries like MEMORY's."""
    with progress("reading the entries") as on_progress:
        from pipeline import VisualMemory

        plan = VisualMemory(memory).plan_capacity(
            rows,
            memory_per_node=size_in_bytes("--memory-per-node", memory_per_node),
            target_recall=target_recall,
            queries_per_second=qps,
            max_latency_ms=max_latency_ms,
            on_progress=on_progress,
        )
    if json:
        print_json(plan.to_json())
        return
    total = sum(plan.build_seconds.values())
    stages = ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in plan.build_seconds.items())
    rates = plan.rates
    say(f"{plan.rows:,} entries of {rates.dimension} dimensions as {plan.key}: {counted(plan.shards, 'shard')}")
    say(
        f"serving   {counted(plan.nodes, 'node')}: {plan.groups} for all shards, times {plan.replicas} for {qps:g} "
        f"queries/s; nodes like this machine, of {counted(plan.shards_a_node, 'shard')} each, answer "
        f"{plan.queries_per_second_a_node:,.{0 if plan.queries_per_second_a_node >= 10 else 1}f} a second in batches"
    )
    say(
        f"          a query alone takes a node {plan.seconds_alone * 1e3:,.1f} ms, and an ingress "
        f"{plan.merge_seconds * 1e3:,.1f} ms of a core to merge what the {counted(plan.groups, 'group')} found"
    )
    say(
        f"memory    {plan.bytes_in_memory / 1e9:,.2f} GB of indexes in all, and {plan.bytes_aside / 1e9:,.2f} GB of "
        "ids, label codes and masks"
    )
    say(f"disk      {plan.bytes_on_disk / 1e9:,.2f} GB of shards, their vectors included")
    say(f"building  {total:,.0f} s on a machine like this one, {plan.build_peak_bytes / 1e9:,.2f} GB at the peak:")
    say(f"          {stages}; {', '.join(plan.spread_stages)} are spread over all machines of a cluster")
    say(
        f"measured  on {rates.rows:,} rows: {1 / rates.read_row:,.0f} rows/s read, "
        f"{1 / (rates.add_row + 1024 * rates.add_row_list):,.0f} rows/s added to 1,024 lists, "
        f"{1 / max(rates.judge_row, 1e-12):,.0f} rows/s searched exactly for 1,000 queries"
    )
    if rates.search is not None:
        times = rates.search.in_batch
        say(
            f"          a query in a batch: {times.coarse * 1e6:,.0f} us to find {rates.search.num_probed} of "
            f"{rates.search.lists:,} lists, once a node; in each shard {times.list * 1e6:.2f} us a list and "
            f"{times.row * 1e9:.1f} ns a row in it, {times.candidate * 1e6:.2f} us a candidate scored again"
        )
