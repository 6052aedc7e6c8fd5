"""`index MEMORY`: build a FAISS index, chosen, tuned and proved by measuring."""

from typing import TYPE_CHECKING, Annotated, cast

import typer

from jobs.terminal.arguments import Json, Memory, command_line, count, size_in_bytes
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress
from jobs.terminal.runners import check_runner, is_for_ray, runner_option, start_runner

if TYPE_CHECKING:
    from pipeline.index.build.key_choice import Table
    from pipeline.index.build.plan import IndexPlan
    from pipeline.store.log.records import Refine


def index(
    memory: Memory,
    key: Annotated[
        str | None,
        typer.Option(
            help="FAISS index_factory key; Flat is exact.  \\[default: chosen by measuring]", metavar="FACTORY"
        ),
    ] = None,
    max_memory: Annotated[
        str, typer.Option(help="Memory the index may take, such as 500M or 16G.", metavar="SIZE")
    ] = "16G",
    max_latency_ms: Annotated[float, typer.Option(help="Time a query may take in a shard.", metavar="MS")] = 10.0,
    target_recall: Annotated[float, typer.Option(help="recall@10 to reach over all rows.", metavar="R")] = 0.95,
    shard_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of a shard, such as 2M, cut at the borders of parts: one part at least.  \\[default: 1048576]",
            metavar="N",
            parser=count,
        ),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            help="Score candidates again from float16 vectors on disk (2 bytes a dimension each), or do not."
            "  \\[default: float16]",
            metavar="float16|none",
        ),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            help="Images that MEMORY does not hold, up to 4,096, to measure recall with."
            "  \\[default: stored rows, and a margin]",
            metavar="SOURCE",
        ),
    ] = None,
    runner: Annotated[str, runner_option("Build")] = "auto",
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build anew over everything.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure what would be built, and build nothing.")] = False,
    json: Json = False,
) -> None:
    """Build an index over MEMORY, or shards for what was added since the last one."""
    max_bytes = size_in_bytes("--max-memory", max_memory)
    check_runner(runner)
    with progress("reading the entries") as on_progress:
        from pipeline import VisualMemory
        from pipeline.index.build.plan import IndexOptions

        options = IndexOptions(
            key,
            max_bytes,
            max_latency_ms,
            target_recall,
            shard_rows,
            rebuild,
            None if refine is None else cast("Refine", refine),
        )
        target = VisualMemory(memory)
        before = target.state()
        if dry_run:
            plan = target.plan_index(options, on_progress=on_progress)
        else:
            state = target.index(
                options,
                runner=start_runner(on_progress, on_ray=is_for_ray(runner, before.num_entries)),
                command=command_line(memory),
                on_progress=on_progress,
                queries=queries,
            )
    if dry_run:
        _show_plan(plan, before.identity.dimension if before.identity else 0, json=json)
        return
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
                "bytes_in_memory": built.bytes_in_memory,
                "refine": built.refine,
                "recall_at_10": built.recall_at_10,
                "recall_of": "queries" if queries is not None else "stored rows",
                "built": state.version != before.version,
            }
        )
        return
    if state.version == before.version:
        say(f"every entry is in the index already ({built.key}, {len(built.shards)} shards): --rebuild makes a new one")
        return
    of = "of the queries" if queries is not None else "of stored rows (--queries SOURCE measures that of new images)"
    vectors = "with vectors" if built.refine == "float16" else "without vectors"
    say(
        f"built {built.key} with {built.parameters or 'no parameters'}: {counted(len(built.shards), 'shard')}, "
        f"{sum(shard.rows for shard in built.shards):,} rows, recall@10 {built.recall_at_10:.3f} {of}; "
        f"{built.bytes_in_memory / 1e6:,.1f} MB in memory, {built.num_bytes / 1e6:,.1f} MB {vectors}; "
        f"the memory is at version {state.version}"
    )


def _show_plan(plan: "IndexPlan", dimension: int, *, json: bool) -> None:
    refine_bytes = 2 * dimension * plan.rows if plan.refine == "float16" else 0
    document = {
        "key": plan.key,
        "rows": plan.rows,
        "shards": len(plan.shards),
        "grows": plan.grows,
        "refine": plan.refine,
        "refine_bytes": refine_bytes,
    }
    if json:
        print_json(document | {"candidates": plan.table.to_json() if plan.table else None})
        return
    if plan.table:
        show_candidates(plan.table)
    how = "add to the index" if plan.grows else "build"
    shards = counted(len(plan.shards), "shard")
    say(
        f"would {how} {shards} of {plan.rows:,} rows, key {plan.key}, with {refine_bytes / 1e6:,.1f} MB of vectors "
        f"on disk (--refine {plan.refine}); nothing was changed"
    )


def show_candidates(table: "Table") -> None:
    """What was measured of each key on a sample, the chosen one first."""
    say(
        f"{counted(len(table.candidates), 'candidate')} on a sample of {table.sample_rows:,} rows, for "
        f"{table.rows:,} rows, recall@10 {table.target_recall:g}, {table.max_memory_bytes / 1e6:,.0f} MB and "
        f"{table.max_latency_ms:g} ms:"
    )
    width = max(len(candidate.key) for candidate in table.candidates)
    say(f"  {'key':{width}}  {'MB':>9}  {'recall@10':>9}  {'ms':>8}  {'queries/s':>9}  by")
    for candidate in table.candidates:
        size = f"{candidate.bytes_in_memory / 1e6:9,.1f}"
        found = candidate.quality
        measured = " " * 30
        if found is not None:
            rate = 1 / max(found.seconds_in_batch, 1e-9)
            measured = f"{found.recall_at_10:9.3f}  {found.seconds_alone * 1e3:8.3f}  {rate:9,.0f}"
        say(f"  {candidate.key:{width}}  {size}  {measured}  {candidate.proposed_by}: {candidate.verdict}")
