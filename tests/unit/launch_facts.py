"""Small hosts and settings for the tests of single decisions."""

from app.config.settings import Settings, read_settings
from app.host import Host
from app.host.addresses import canonical
from app.host.nics import Address, Nic
from app.plan import Draft, Plan, draft


def card(name: str, *addresses: str, kind: str = "ethernet", speed: int | None = None, up: bool = True) -> Nic:
    """An interface with addresses like `10.0.0.1/24`."""
    read = [each.partition("/") for each in addresses]
    found = tuple(Address(text=canonical(text), prefix=int(prefix or 24)) for text, _, prefix in read)
    return Nic(name=name, addresses=found, kind=kind, speed=speed, up=up, operstate="up" if up else "down", mtu=1500)


LOOPBACK = card("lo", "127.0.0.1/8", "::1/128", kind="loopback")
DOCKER = card("docker0", "172.17.0.1/16", kind="container")


def machine(*nics: Nic, **facts: object) -> Host:
    return Host(nics=(LOOPBACK, *nics), python="3.12.3", **facts)  # type: ignore[arg-type]  # facts name Host's fields


def given(**environ: str) -> Settings:
    return read_settings(environ, None)


def decide(host: Host, **environ: str) -> Draft:
    return draft(given(**environ), host)


def planned(host: Host, **environ: str) -> Plan:
    found = decide(host, **environ)
    assert found.plan is not None, found.problems
    return found.plan


def refused(host: Host, **environ: str) -> str:
    """The message of the one problem."""
    problems = decide(host, **environ).problems
    assert len(problems) == 1, problems
    return problems[0].message


def warned(host: Host, **environ: str) -> str:
    return "\n".join(each.message for each in decide(host, **environ).warnings)


def warning_ids(host: Host, **environ: str) -> list[str]:
    return [each.id for each in decide(host, **environ).warnings]


def problem_ids(host: Host, **environ: str) -> list[str]:
    return [each.id for each in decide(host, **environ).problems]


def reason(found: Draft, name: str) -> str:
    return next(each.reason for each in found.decisions if each.name == name)
