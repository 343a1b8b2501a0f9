"""The ports of a job, next to each other from MASTER_PORT on."""

from dataclasses import dataclass

from app.config.settings import Settings
from app.config.values import Value
from app.host import Host
from app.plan.decisions import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    master: int
    control: int
    ras: int


def decide_ports(settings: Settings, host: Host, ledger: Ledger) -> Ports:
    """torchrun's store, the nodes' own connections, and NCCL's health service on this machine."""
    master = settings.master_port
    ledger.take("ports", master, "torchrun's store on node 0")
    control = settings.control_port
    if control is None:
        number = _near(master.value, 1)
        control = Value(name="CONTROL_PORT", text=str(number), source="derived", value=number)
        ledger.take("ports", control, "the nodes' own connections, next to MASTER_PORT")
    else:
        ledger.take("ports", control, "the nodes' own connections")
    if control.value == master.value:
        ledger.refuse("ports.clash", given=control)
    for port in (master, control):
        _warn_port(port, host, ledger)
    ras = next(found for step in (2, 3) if (found := _near(master.value, step)) != control.value)
    return Ports(master=master.value, control=control.value, ras=ras)


def _near(port: int, step: int) -> int:
    return port + step if port + step <= 65535 else port - step


def _warn_port(port: Value[int], host: Host, ledger: Ledger) -> None:
    if port.value < host.first_user_port and host.uid != 0:
        ledger.warn("ports.privileged", given=port, first=host.first_user_port)
    span = host.ephemeral_ports
    if span is not None and span[0] <= port.value <= span[1]:
        ledger.warn("ports.ephemeral", given=port, low=span[0], high=span[1])
