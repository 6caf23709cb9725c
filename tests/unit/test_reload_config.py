# SPDX-License-Identifier: GPL-2.0-or-later
"""A configuration that is read again: what of it takes effect, and what it takes to refuse it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flowexp.collector_url import parse_collector_url
from flowexp.config import Collector, Config, Fields, Sampling, Template
from flowexp.config_check import check_together
from flowexp.errors import FlowexpError, UsageError
from flowexp.protocol.template import template_spec
from flowexp.reload import Reloads, merged, read_again
from flowexp.terms import terms_of

FIRST, SECOND = (Collector(parse_collector_url(f"udp://192.0.2.{n}:4739")) for n in (1, 2))
CONFIG = Config(collectors=(FIRST, SECOND))


def test_what_cannot_change_keeps_its_value_and_is_named() -> None:
    wanted = replace(
        CONFIG,
        hook="xdp",
        direction="both",
        interfaces=("eth7",),
        table=replace(CONFIG.table, max_flows=1000, pin_path="/sys/fs/bpf/x"),
        export=replace(CONFIG.export, mark=7, template_refresh=9),
    )
    got, need_restart = merged(CONFIG, wanted)
    assert need_restart == ["hook", "direction", "[table] max_flows", "[table] pin_path", "[export] mark"]
    assert (got.hook, got.direction, got.table, got.export.mark) == ("tc", "once", CONFIG.table, CONFIG.export.mark)
    assert (got.interfaces, got.export.template_refresh) == (("eth7",), 9)


def test_another_as_table_takes_effect_and_other_groups_wait() -> None:
    running = replace(CONFIG, fields=Fields(groups=("routing",)))
    wanted = replace(CONFIG, fields=Fields(groups=("nat", "routing"), as_table="/etc/as.tsv"))
    got, need_restart = merged(running, wanted)
    assert need_restart == ["[fields] groups"]
    assert got.fields == Fields(groups=("routing",), as_table="/etc/as.tsv")


def test_directions_that_the_same_programs_can_have_change() -> None:
    ingress = replace(CONFIG, direction="ingress")
    assert merged(ingress, replace(CONFIG, direction="both")) == (replace(CONFIG, direction="both"), [])


def test_a_template_that_waits_for_a_restart_is_refused() -> None:
    elements = template_spec("rtt", ["sourceIPv4Address", "tcpWindowSize"]).fields
    wanted = replace(
        CONFIG,
        fields=Fields(groups=("tcp",)),
        templates=(Template("rtt", elements),),
        export=replace(CONFIG.export, template="rtt"),
    )
    check_together(wanted)
    with pytest.raises(FlowexpError, match=r"takes a restart \(\[fields\] groups\)"):
        read_again(lambda: wanted, CONFIG)


def test_an_interval_that_a_new_collector_cannot_be_told_is_changed_first() -> None:
    """Flows that were metered under it go to the new Collector, too."""
    running = replace(CONFIG, sampling=Sampling(interval=20_000))
    netflow5 = Collector(parse_collector_url("udp://192.0.2.3:2055?protocol=netflow5"))
    wanted = replace(CONFIG, sampling=Sampling(interval=100))
    assert read_again(lambda: wanted, running) == (wanted, [])
    with pytest.raises(FlowexpError, match=r"20000 cannot be told .*; change \[sampling\] first"):
        read_again(lambda: replace(wanted, collectors=(netflow5,)), running)


def test_a_refusal_is_one_line_and_status_has_it() -> None:
    def load() -> Config:
        raise UsageError("flowexp.toml: what is wrong\n  with it\n   ^")

    with pytest.raises(FlowexpError) as error:
        read_again(load, CONFIG)
    reloads = Reloads(0)
    reloads.loaded(2 * 10**9, ["hook"])
    reloads.refused(5 * 10**9, str(error.value))
    assert reloads.status(6 * 10**9) == {
        "ageSeconds": 4.0,
        "reloads": 1,
        "needRestart": ["hook"],
        "refusal": "flowexp.toml: what is wrong with it ^",
        "refusalAgeSeconds": 1.0,
    }


def test_a_collector_has_the_same_key_wherever_it_stands() -> None:
    keys = {terms.way.collector.url: terms.key for terms in terms_of(CONFIG)}
    others = {terms.way.collector.url: terms.key for terms in terms_of(replace(CONFIG, collectors=(SECOND, FIRST)))}
    assert keys == others
    assert len(set(keys.values())) == 2


def test_what_is_told_makes_no_other_way_and_another_domain_makes_another_key() -> None:
    (before,) = terms_of(Config(collectors=(FIRST,)))
    (told,) = terms_of(Config(collectors=(replace(FIRST, filter="proto tcp", group="a"),)))
    assert (told.key, told.way, told.content) == (before.key, before.way, before.content)
    (moved,) = terms_of(Config(collectors=(replace(FIRST, dscp=8),)))
    assert moved.key == before.key and moved.way != before.way
    (other,) = terms_of(Config(collectors=(replace(FIRST, observation_domain_id=77),)))
    assert other.key != before.key


def test_the_same_collector_twice_has_two_keys() -> None:
    assert len({terms.key for terms in terms_of(Config(collectors=(FIRST, FIRST)))}) == 2
