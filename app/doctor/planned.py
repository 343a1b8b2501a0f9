"""What the plan itself says is wrong with this node, each sentence at its check."""

import re
from dataclasses import dataclass

from app.doctor.findings import Finding, Severity, told
from app.plan import Draft

PROBLEMS = {
    **dict.fromkeys(("NODES", "NODE_RANK", "NNODES", "MASTER_ADDR"), "rank"),
    **dict.fromkeys(("HARDWARE", "BACKEND", "NPROC_PER_NODE"), "gpus"),
    **dict.fromkeys(("MASTER_PORT", "CONTROL_PORT"), "ports"),
    "memlock": "rdma",
}
"""Which check a problem belongs to, by its setting; all others are `settings`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """Which check a warning of the plan belongs to."""

    check: str
    pattern: str
    severity: Severity = Severity.YELLOW
    fix: str = ""


PLACINGS = (
    Placing(check="network", pattern=r"no interface here|matches no interface|Gloo knows no \^", severity=Severity.RED),
    Placing(check="network", pattern=r"would be sent to \S+ in vain", severity=Severity.RED),
    Placing(check="network", pattern=r"nodes would be sent to"),
    Placing(check="network", pattern=r"its link is", severity=Severity.RED),
    Placing(
        check="rdma", pattern=r"cannot use it, because|no port is usable|matches no RDMA device", severity=Severity.RED
    ),
    Placing(check="rdma", pattern=r"nvidia_peermem", fix="sudo modprobe nvidia-peermem"),
    Placing(check="rdma", pattern=r"^NCCL_IB_|of RDMA on this machine|has no RoCE v2 address"),
    Placing(check="limits", pattern=r"^Shared memory", fix="SHM_SIZE=8gb in .env"),
    Placing(check="limits", pattern=r"files and connections may be open|memory limit is|processes share \d"),
    Placing(
        check="network",
        pattern=r"MTU \d|is a tunnel|answers for the other's address|has several addresses|Gb/s\) carries",
    ),
    Placing(check="gpus", pattern=r"NVIDIA GPU|built without CUDA|^NCCL_(P2P|NVLS|CUMEM)_"),
    Placing(check="names", pattern=r"a line in /etc/hosts"),
    Placing(check="ports", pattern=r"^(MASTER|CONTROL)_PORT="),
    Placing(check="rank", pattern=r"cannot be checked: none of NODES|although it is node 0"),
)


def problems(draft: Draft) -> tuple[Finding, ...]:
    """What keeps the plan from being made."""
    return tuple(
        told(problem.setting, PROBLEMS.get(problem.setting, "settings"), Severity.RED, problem.message)
        for problem in draft.problems
    )


def warnings(draft: Draft) -> tuple[Finding, ...]:
    """The plan's warnings, each at its check."""
    return tuple(_placed(text) for text in draft.warnings)


def _placed(text: str) -> Finding:
    for each in PLACINGS:
        if re.search(each.pattern, text):
            return told("plan", each.check, each.severity, text, each.fix)
    return told("plan", "settings", Severity.YELLOW, text)
