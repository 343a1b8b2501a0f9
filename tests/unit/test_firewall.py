"""The rules for a cluster's firewall."""

from dataclasses import replace
from pathlib import Path

import pytest

from app.plan.firewall import ruleset
from tests.machines.facts import drafted


def test_nodes_of_both_families_are_let_in_and_only_the_jobs_ports_are_closed(tmp_path: Path) -> None:
    plan = drafted("laptop", tmp_path).plan
    assert plan is not None
    nodes = replace(plan.nodes, addresses=("10.0.0.2", "fe80::1%eth0", "10.0.0.1"))
    lines = [line.strip() for line in ruleset(nodes, plan.network, (40000, 50000)).splitlines()]
    assert lines[:2] == ["table inet torchrun_compose {}", "delete table inet torchrun_compose"]
    assert lines[4:] == [
        "type filter hook input priority filter; policy accept;",
        'iifname "lo" accept',
        "ct state established,related accept",
        "ip saddr { 10.0.0.1, 10.0.0.2 } accept",
        "ip6 saddr { fe80::1 } accept",
        "tcp dport { 29400, 29401, 40000-50000 } drop",
        "}",
        "}",
    ]


def test_without_the_addresses_of_all_nodes_there_are_no_rules(tmp_path: Path) -> None:
    plan = drafted("laptop", tmp_path).plan
    assert plan is not None
    with pytest.raises(ValueError, match="addresses"):
        ruleset(replace(plan.nodes, addresses=("10.0.0.1", "")), plan.network, None)
