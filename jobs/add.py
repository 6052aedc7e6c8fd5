"""`add MEMORY SOURCE`: remember every image of a source."""

import contextlib
from typing import TYPE_CHECKING, Annotated, cast

import typer

from jobs.terminal.arguments import ExcludeFiles, ImageExtension, Json, LabelsFrom, Memory, Source, command_line
from jobs.terminal.embedding_work import MaxRejected, show_rejects, show_stages
from jobs.terminal.labels import note_after, note_before, note_label_of_file, show_first, show_labels, show_passed_over
from jobs.terminal.options import INDEX_LIMITS, with_options
from jobs.terminal.output import counted, note, print_json, say
from jobs.terminal.progress import progress
from jobs.terminal.runners import check_runner, runner_option, start_runner

if TYPE_CHECKING:
    import datetime

    from pipeline.edits.add import AddPlan, AddReport, OnDuplicates
    from pipeline.embeddings.encoder_choice import DecodingChoice
    from pipeline.store.segments.reservations import Precision

# Images from which an add runs on Ray. Starting it and its actors took 12 s on two cores (docs/benchmarks.md), in which
# this process would have embedded 6,000 small images; with more cores the actors win sooner.
RAY_FROM = 10_000
VECTORS_RAY_FROM = 1_000_000  # of vectors, which nothing has to embed

_NEW_IMAGES = "put them into a folder of their own and add that (`reindex`, which finds them here, is yet to come)"


def add(
    memory: Memory,
    source: Source,
    labels: LabelsFrom = "folder",
    label: Annotated[
        str | None, typer.Option(help="The one label of all these images, in place of --labels.", metavar="NAME")
    ] = None,
    exclude: ExcludeFiles = None,
    image_extension: ImageExtension = None,
    dataset: Annotated[
        str | None, typer.Option(help="Name of these images.  \\[default: the folder's name]", metavar="NAME")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="timm model, for a new memory; of vectors, the one they are by, or a name for them.  "
            "\\[default: vit_small_patch14_dinov2.lvd142m; given for vectors]",
            metavar="NAME|given:NAME",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="File or URI with the model's weights.  \\[default: timm's hub]", metavar="URI")
    ] = None,
    weights_order: Annotated[
        str, typer.Option(help="Match weights to the model by name or by position.", metavar="name|positional")
    ] = "name",
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side the encoder sees.  \\[default: the model's]", metavar="N")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of Parquet files, of the JSON in tars, or of a file of labels, that stays with the entries. "
            "Repeatable.",
            metavar="COLUMN",
        ),
    ] = None,
    decoding: Annotated[
        str | None,
        typer.Option(
            help="For a new memory: decode large JPEG files whole, or faster at a fraction of their size.  "
            "\\[default: exact]",
            metavar="exact|scaled",
        ),
    ] = None,
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails", help="Keep small pictures, for pages that outlive the files.")
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            help="What the model computes in; bfloat16 only if it hardly moves vectors, and with auto only on GPUs.",
            metavar="auto|float32|bfloat16",
        ),
    ] = "auto",
    duplicates: Annotated[
        str,
        typer.Option(
            help="Images whose bytes the memory holds already: keep them as entries, or leave them out.",
            metavar="keep|skip",
        ),
    ] = "keep",
    max_rejected: MaxRejected = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="List SOURCE again although an add of it was begun and is not finished.")
    ] = False,
    runner: Annotated[str, runner_option("Embed")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    json: Json = False,
) -> None:
    """Remember every image of SOURCE. The first add fixes the encoder; killed and repeated, it goes on."""
    check_runner(runner)
    report = None
    with progress("opening the memory") as on_progress:
        from pipeline import VisualMemory

        target = VisualMemory(memory)
        with contextlib.nullcontext() if dry_run else target.announced_add(source) as record:
            from pipeline.edits.add import AddOptions
            from pipeline.embeddings.encoder_choice import EncoderChoice, WeightsOrder

            choice = EncoderChoice(
                encoder, weights, cast(WeightsOrder, weights_order), image_size, cast("DecodingChoice | None", decoding)
            )
            options = AddOptions(
                labels,
                dataset,
                choice,
                thumbnails,
                max_rejected,
                tuple(keep or ()),
                cast("Precision", precision),
                label,
                tuple(exclude or ()),
                image_extension,
                cast("OnDuplicates", duplicates),
                refresh,
            )
            plan = target.plan_add(source, options, record=record, on_progress=on_progress)
            if record is not None and record.begun is not None:
                note(f"went on with a listing begun at {record.begun:%Y-%m-%d %H:%M} UTC: `--refresh` lists again")
            if not dry_run:
                if plan.already is None:
                    note_before(plan)
                on_ray = runner == "ray" or (runner == "auto" and _is_for_ray(plan))
                where = start_runner(on_progress, on_ray=on_ray)
                report = target.carry_out(plan, runner=where, command=command_line(memory), on_progress=on_progress)
    if report is None:
        _show_plan(plan, json=json)
        return
    if json:
        print_json(report.to_json())
    else:
        _show(report, plan, source, target.uri)


def _is_for_ray(plan: "AddPlan") -> bool:
    """Large adds, and any within a job: whoever submits one to a cluster wants its nodes at work."""
    if plan.already is not None or plan.is_single:
        return False
    from jobs.ray_cluster.on_ray import is_a_job

    return plan.planned >= (RAY_FROM if plan.listing.holds_images else VECTORS_RAY_FROM) or is_a_job()


def _show_plan(plan: "AddPlan", *, json: bool) -> None:
    identity = plan.identity
    peeked = plan.peek() if plan.already is None else None
    document = {
        "planned": plan.planned,
        "archives": plan.listing.uncounted,
        "parts": plan.num_parts,
        "bytes": plan.listing.num_bytes,
        "skipped": plan.listing.skipped,
        "labels": len(plan.listing.labels),
        "passed_over": plan.listing.passed_over.to_json(),
        **(plan.listing.census + plan.listing.inside).to_json(),
        "first_images": peeked[1].to_json() | {"container": peeked[0]} if peeked else None,
        "dataset": plan.dataset,
        "kept": {column.name: column.type for column in plan.listing.kept},
        "encoder": identity.encoder,
        "dimension": identity.dimension,
        "embedding_bytes": plan.embedding_bytes,
        "already": plan.already.number if plan.already else None,
        "continues": plan.frozen.number if plan.frozen else None,
    }
    if json:
        print_json(document)
        return
    if plan.already:
        say(f"{plan.listing.uri} is in the memory already, as segment {plan.already.number}: there is nothing to add")
        return
    uncounted = plan.listing.uncounted
    archives = f" and what is in {counted(uncounted, 'archive')}" if uncounted else ""
    if plan.frozen is not None:
        say(f"would go on with unfinished segment {plan.frozen.number} and {_plan_of(plan.frozen.planned_at)}")
    say(
        f"would add {counted(plan.planned, 'image')}{archives} ({plan.listing.num_bytes / 1e6:,.1f} MB) "
        f"as dataset {plan.dataset}, in {counted(plan.num_parts, 'part')}"
    )
    show_labels(plan.listing.census + plan.listing.inside)
    show_first(plan, peeked)
    show_passed_over(plan.listing.passed_over)
    note_before(plan)
    if plan.is_labelled_by_folder:
        note_label_of_file(plan.listing.census)
    if plan.listing.kept:
        say(f"keeping {', '.join(f'{column.name} ({column.type})' for column in plan.listing.kept)}")
    say(f"encoder {identity}; embeddings {plan.embedding_bytes / 1e6:,.1f} MB; nothing was changed")


def _show(report: "AddReport", plan: "AddPlan", source: str, memory: str) -> None:
    from pipeline.decisions.small_classes import hint
    from pipeline.store.segments.part_marks import DUPLICATE

    if report.already is not None:
        say(
            f"{source} was added before as segment {report.already}, so there is nothing to add"
            + (f"; {counted(report.unplanned, 'new image')} in it: {_NEW_IMAGES}" if report.unplanned else "")
        )
        return
    if report.segment is None:
        say(f"{source} is in the memory already, by its bytes ({report.rejects[0].reason}): nothing was added")
        return
    before = f"; {report.resumed:,} were done before" if report.resumed else ""
    things = "images" if plan.listing.holds_images else "vectors"
    say(
        f"remembered {report.entries:,} of {report.planned:,} {things} in {report.seconds:.1f} s "
        f"({report.images_per_second:,.0f} {things}/s{before}) as segment {report.segment}; "
        f"the memory is at version {report.version}"
    )
    show_stages(report.stages, report.seconds)
    if report.numerics is not None:
        compiled = ", compiled" if report.numerics.compiled else ""
        say(f"embedded in {report.numerics.precision}{compiled}: {report.numerics.reason}")
    show_labels(report.census)
    note_after(report, plan)
    _show_duplicates(report, things)
    if report.small_classes:
        note(hint(report.small_classes))
    if report.unplanned:
        say(f"{counted(report.unplanned, 'image')} came after this add was begun, not in it: {_NEW_IMAGES}")
    if report.continued and report.unplanned is None:
        say(f"went on with {_plan_of(report.planned_at)}")
    if report.index_error:
        note(f"no index was built after the add: {with_options(report.index_error, INDEX_LIMITS)}")
    if report.index_due:
        note(report.index_due)
    show_passed_over(report.passed_over)
    failures = [reject for reject in report.rejects if reject.stage != DUPLICATE]
    show_rejects(report.rejected - report.left_out, failures, f"{memory}/segments/{report.segment or 0:08d}")


def _plan_of(planned_at: "datetime.datetime | None") -> str:
    """Which plan an add goes on with, and how to have the source listed again."""
    when = f" of {planned_at:%Y-%m-%d %H:%M} UTC" if planned_at is not None else ""
    return f"its plan{when}, without listing the source again: `--refresh` does"


def _show_duplicates(report: "AddReport", things: str) -> None:
    """How many images the memory held already, and how many came twice."""
    is_partial = report.compared < report.entries and not report.left_out
    of = f"the {report.compared:,} of this run" if is_partial else f"these {report.planned:,}"
    some = f"{report.duplicates or 0:,} of {of} {things} were" if report.planned > 1 else "it was"
    held = f"{some} in the memory already, by the bytes"
    if report.left_out:
        say(f"{held}, and left out")
    elif report.duplicates:
        note(f"{held}: `--duplicates skip` leaves such {things} out, which have two votes otherwise")
    elif report.duplicates is None:
        say(f"whether the memory held some of these {things} already was not looked for: `--duplicates skip` does")
    if report.duplicates_within:
        note(f"{report.duplicates_within:,} of these {things} come again in the source, byte for byte: each has a vote")
