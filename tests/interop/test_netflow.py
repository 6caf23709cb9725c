# SPDX-License-Identifier: GPL-2.0-or-later
"""NetFlow v9 and v5 of a flow beyond what 32 bits count, which live traffic does not have: Collectors add it up.

What they read of live traffic is in test_matrix.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from columns import flows
from lab import needs
from lab.flows import Counts
from lab.judges import COLLECTORS
from lab.netns import namespaces

from flowexp.protocol.encoders import encoder_for

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

EXPORT_TIME_S = 1_790_000_001


def messages_of(protocol: str, counts: Counts) -> Iterator[bytes]:
    """Announcement and one TCP flow."""
    encoder = encoder_for(protocol, observation_domain_id=7, max_message_octets=1472)
    columns = dict(flows(1))
    columns["vlan_tagged"][:], columns["protocol"][:] = False, 6
    columns["packets"][:], columns["octets"][:] = counts.packets, counts.octets
    columns["start_ns"][:] = columns["end_ns"][:] = (EXPORT_TIME_S - 1) * 10**9
    for burst in encoder.announce(EXPORT_TIME_S):
        encoder.commit(burst)
        yield bytes(burst.octets)
    for burst in encoder.encode(encoder.as_records(columns), EXPORT_TIME_S):
        yield bytes(burst.octets)


@pytest.mark.parametrize("protocol", ["netflow9", "netflow5"])
@pytest.mark.parametrize("name", COLLECTORS)
def test_a_flow_beyond_32_bits_arrives_whole(name: str, protocol: str, tmp_path: Path) -> None:
    needs.need(needs.namespace_support(), needs.tools("nfcapd", "nfdump", "nfacctd"))
    sent = Counts(2**32 + 7, 3 * 2**32 + 1)
    with namespaces("collector") as (namespace,):
        told, objections = COLLECTORS[name](namespace, tmp_path, list(messages_of(protocol, sent)))
    assert objections == []
    counts = Counts(sum(each.counts.packets for each in told), sum(each.counts.octets for each in told))
    assert counts == sent
