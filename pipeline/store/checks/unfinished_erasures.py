"""Verifying a memory with an erasure that is committed but not complete.

Until an erasure is complete, some versions are redacted and others are not. They contradict each other, which is not
damage. So the plan of the erasure is applied to all versions before they are verified.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from pipeline.errors import DamagedFile, NotPermitted
from pipeline.store.checks.findings import CLEAN, RESTORE, Finding, damage, not_looked_at
from pipeline.store.checks.version_files import Chain
from pipeline.store.layout import ERASURES, nonce_of
from pipeline.store.log.documents import Commit
from pipeline.store.log.erasure_plan import ErasurePlan
from pipeline.store.log.state import State
from pipeline.store.storage.file_refs import check_places
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import live_leases, read_leases

FIRST = f"{CLEAN}, which finishes the erasure that was cut off, and verify again"


def read_plans(storage: Storage) -> dict[str, ErasurePlan | Finding]:
    """The plans of erasures by path, committed or not; a finding in the place of a plan that cannot be read."""
    found: dict[str, ErasurePlan | Finding] = {}
    for name in storage.list(ERASURES):
        path = f"{ERASURES}/{name}"
        try:
            plan = ErasurePlan.model_validate_json(storage.read(path))
            check_places(plan.new_files())
            if plan.path != path:
                raise ValueError(f"it is the plan of {plan.nonce}")
        except NotPermitted as error:
            found[path] = not_looked_at(error)
        except DamagedFile:  # it was finished just now
            continue
        except ValueError:
            found[path] = damage(path, "is not a whole plan of an erasure", "remove it, and erase again")
        else:
            found[path] = plan
    return found


def carry_out_in(chain: Chain, plans: Iterable[ErasurePlan]) -> Chain:
    """The versions, redacted by the plans of committed erasures; unchanged if a version is missing or damaged."""
    committed = set(chain.newest_state.erasures) if chain.newest_state else set()
    for plan in plans:
        if plan.nonce in committed and not chain.findings:
            chain = _without(chain, plan)
    return chain


def _without(chain: Chain, plan: ErasurePlan) -> Chain:
    checkpoints = {number: plan.state(state) for number, state in chain.checkpoints.items()}
    before = State() if chain.first == 1 else checkpoints[chain.first]
    commits: dict[int, Commit] = {}
    try:
        for number in chain.numbers:
            commit = chain.commits[number]
            if number == chain.first != 1:
                without, _ = plan.commit(commit, before)  # the version before it is unknown
                rows = {"rows_before": commit.rows_before, "rows_after": before.num_live}
                commits[number] = without.model_copy(update=rows)
            else:
                commits[number], before = plan.commit(commit, before)
    except (ValueError, LookupError):  # an action names something that does not exist
        return chain
    return replace(chain, commits=commits, checkpoints=checkpoints)


def unfinished_erasures(storage: Storage, chain: Chain, plans: dict[str, ErasurePlan | Finding]) -> Iterator[Finding]:
    """The findings to report first: committed erasures that no process is carrying out, and how to finish them."""
    committed = set(chain.newest_state.erasures) if chain.newest_state else set()
    try:
        working = list(live_leases(storage, read_leases(storage)))
    except NotPermitted:  # the census reports this
        working = []
    for path, plan in plans.items():
        if nonce_of(path) not in committed:
            continue  # the census reports it as garbage
        if isinstance(plan, Finding):
            yield plan
        elif not any(record.covers(path) for record in working):
            what = "an erasure was cut off after its commit"
            yield Finding("waste", path, what, f"{CLEAN}, which finishes it")


def advise(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The other findings, advised to finish the erasure first: a restored copy would bring back erased entries."""
    for finding in findings:
        restores = finding.severity == "damage" and RESTORE in finding.advice
        yield replace(finding, advice=finding.advice.replace(RESTORE, FIRST)) if restores else finding
