"""`index MEMORY`: build a FAISS index, chosen and tuned by autofaiss, with its recall measured."""

from typing import Annotated

import typer

from jobs.arguments import Json, Memory, command_line, size_in_bytes
from jobs.terminal import counted, print_json, progress, say


def index(
    memory: Memory,
    key: Annotated[
        str | None,
        typer.Option(help="FAISS index_factory key; Flat is exact.  \\[default: autofaiss chooses]", metavar="FACTORY"),
    ] = None,
    max_memory: Annotated[
        str, typer.Option(help="Room for the whole index, such as 500M or 16G.", metavar="SIZE")
    ] = "16G",
    max_latency_ms: Annotated[float, typer.Option(help="Time a query may take in a shard.", metavar="MS")] = 10.0,
    target_recall: Annotated[float, typer.Option(help="recall@10 every shard must reach.", metavar="R")] = 0.95,
    shard_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of a shard, cut at the borders of parts: one part at least.  \\[default: 1048576]", metavar="N"
        ),
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build anew over everything.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, and build nothing.")] = False,
    json: Json = False,
) -> None:
    """Build an index over MEMORY, or shards for what was added since the last one."""
    from pipeline import VisualMemory
    from pipeline.index.build import IndexOptions

    options = IndexOptions(
        key, size_in_bytes("--max-memory", max_memory), max_latency_ms, target_recall, shard_rows, rebuild
    )
    target = VisualMemory(memory)
    if dry_run:
        plan = target.plan_index(options)
        document = {"key": plan.key, "rows": plan.rows, "shards": len(plan.shards), "grows": plan.grows}
        if json:
            print_json(document)
        else:
            how = "add to the index" if plan.grows else "build"
            shards = counted(len(plan.shards), "shard")
            say(f"would {how} {shards} of {plan.rows:,} rows, key {plan.key}; nothing was changed")
        return
    before = target.state()
    with progress() as on_progress:
        state = target.index(options, command=command_line(memory), on_progress=on_progress)
    built = state.index
    assert built is not None  # noqa: S101  # index() either builds one or raises
    if json:
        print_json(
            {
                "version": state.version,
                "key": built.key,
                "parameters": built.parameters,
                "shards": len(built.shards),
                "rows": sum(shard.rows for shard in built.shards),
                "bytes": built.num_bytes,
                "recall_at_10": built.recall_at_10,
                "built": state.version != before.version,
            }
        )
        return
    if state.version == before.version:
        say(f"every entry is in the index already ({built.key}, {len(built.shards)} shards): --rebuild makes a new one")
        return
    say(
        f"built {built.key} with {built.parameters or 'no parameters'}: {counted(len(built.shards), 'shard')}, "
        f"{sum(shard.rows for shard in built.shards):,} rows, {built.num_bytes / 1e6:,.1f} MB, "
        f"recall@10 {built.recall_at_10:.3f}; the memory is at version {state.version}"
    )
