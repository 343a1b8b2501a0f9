"""A node's answers in doctor, where its own disk is in the way."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from app.doctor.cluster_checks.transport import CollectiveCheck
from app.doctor.collect.live import CheckpointDisk
from app.doctor.facts import Facts
from app.doctor.participant import DoctorAnswers
from app.doctor.protocol import read_findings
from app.gang.connection import Message
from app.plan import Plan
from tests.unit.test_doctor_checks import facts_of


def node(facts: Facts, folder: Path) -> DoctorAnswers:
    """A node whose checkpoints go below `folder`."""
    facts = replace(facts, live=replace(facts.live, disk=CheckpointDisk(folder=str(folder))))
    assert facts.plan is not None
    plan = replace(facts.plan, script=replace(facts.plan.script, checkpoint_dir=folder / "checkpoints"))
    return DoctorAnswers(facts=facts, plan=plan, findings=(), reduce=full_disk)


def answer(one: DoctorAnswers, kind: str, **fields: object) -> Mapping[str, object]:
    message: Message = {"kind": kind, **fields}
    return asyncio.run(one.answer(kind, message))


async def full_disk(_facts: Facts, _plan: Plan, _run_id: str, _place: int, _nnodes: int) -> CollectiveCheck:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_folder_that_went_away_is_not_looked_at_and_ends_nothing(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path)
    gone, here = node(facts, tmp_path / "gone"), node(facts, tmp_path)
    assert answer(gone, "leave", nonce="abc") == {"wrote": 0}
    assert answer(gone, "look", nonce="abc", upto=1) == {"looked": 0, "seen": []}
    assert answer(here, "look", nonce="abc", upto=1) == {"looked": 1, "seen": []}


def test_an_all_reduce_that_cannot_start_for_want_of_disk_is_its_failure_and_nobody_elses(tmp_path: Path) -> None:
    told = answer(node(facts_of("laptop", tmp_path), tmp_path), "all-reduce", run_id="a", place=0, nnodes=1)
    (finding,) = read_findings({"kind": "all-reduce-done", **told})
    assert (finding.id, finding.values["reason"]) == (
        "all-reduce-failed",
        "this node could not start it: No space left on device.",
    )
