# SPDX-License-Identifier: GPL-2.0-or-later
"""NAT events in each protocol that has words for them, and in the one that has none."""

from __future__ import annotations

import numpy as np
import pytest

from flowexp.protocol.decode import Decoder
from flowexp.protocol.encoders import encoder_for
from flowexp.protocol.natevents import event_columns

EXPORT_TIME_S, TIME_MS = 1_700_000_000, 1_700_000_000_123


def sessions(version: int, count: int) -> dict[str, np.ndarray]:
    octets = 4 if version == 4 else 16
    addresses = {f"{name}_addr": np.full((count, octets), number, np.uint8) for number, name in enumerate(
        ("src", "dst", "other_src", "other_dst"), 1
    )}  # fmt: skip
    ports = {f"{name}_port": np.full(count, 1000 * number, np.uint16) for number, name in enumerate(
        ("src", "dst", "other_src", "other_dst"), 1
    )}  # fmt: skip
    return {**addresses, **ports, "protocol": np.full(count, 6, np.uint8)}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["ipfix", "netflow9"])
def test_an_event_tells_of_a_session_before_and_after_translation(protocol: str, version: int) -> None:
    encoder = encoder_for(protocol, observation_domain_id=7, max_message_octets=1400, nat_events=True)
    columns = event_columns(sessions(version, 50), is_new=np.arange(50) % 2 == 0, time_ms=TIME_MS)
    bursts = [*encoder.announce(EXPORT_TIME_S)]
    for burst in bursts:
        encoder.commit(burst)
    bursts += encoder.encode_events(columns, EXPORT_TIME_S)
    decoder, records = Decoder(), []
    for burst in bursts:
        for first in range(0, len(burst.octets), burst.message_octets):
            decoded = decoder.decode(bytes(burst.octets[first : first + burst.message_octets]), None)
            assert decoded.problems == []
            records += decoded.records
    assert len(records) == 50
    created, deleted = {4: (4, 5), 6: (1, 2)}[version]
    assert [record["natEvent"] for record in records] == [created, deleted] * 25
    address = {4: lambda n: ".".join([str(n)] * 4), 6: lambda n: ":".join([f"{n}0{n}"] * 8)}[version]
    expected = {
        "protocolIdentifier": 6,
        f"sourceIPv{version}Address": address(1), f"destinationIPv{version}Address": address(2),
        f"postNATSourceIPv{version}Address": address(3), f"postNATDestinationIPv{version}Address": address(4),
        "sourceTransportPort": 1000, "destinationTransportPort": 2000,
        "postNAPTSourceTransportPort": 3000, "postNAPTDestinationTransportPort": 4000,
    }  # fmt: skip
    assert {name: records[0][name] for name in expected} == expected
    assert "observationTimeMilliseconds" in records[0]


def test_who_is_not_to_be_told_or_cannot_be_is_told_nothing() -> None:
    columns = event_columns(sessions(4, 5), is_new=np.ones(5, bool), time_ms=TIME_MS)
    for protocol, nat_events in (("ipfix", False), ("netflow5", True)):
        encoder = encoder_for(protocol, observation_domain_id=7, max_message_octets=1400, nat_events=nat_events)
        assert encoder.encode_events(columns, EXPORT_TIME_S) == []
