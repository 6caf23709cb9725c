# SPDX-License-Identifier: GPL-2.0-or-later
"""What Collectors scale by where sampling is told by PSAMP's elements, not by samplingInterval."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from columns import flows
from lab import needs
from lab.judges import COLLECTORS
from lab.netns import namespaces

from flowexp.protocol.encoders import encoder_for
from flowexp.protocol.options import Facts

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

EXPORT_TIME_S = 1_790_000_001
INTERVAL = 10


def session(*, is_random: bool) -> Iterator[bytes]:
    """One flow of a packet."""
    encoder = encoder_for("ipfix", observation_domain_id=7, max_message_octets=1472, psamp=True)
    encoder.facts = Facts(sampling_interval=INTERVAL, sampling_random=is_random)
    for burst in encoder.announce(EXPORT_TIME_S):
        encoder.commit(burst)
        yield bytes(burst.octets)
    for burst in encoder.encode(flows(1), EXPORT_TIME_S):
        yield bytes(burst.octets)


@pytest.mark.parametrize(
    ("name", "is_random", "packets"), [("nfacctd", False, INTERVAL), ("nfacctd", True, 1), ("nfcapd", False, 1)]
)
def test_nfacctd_scales_by_systematic_sampling_and_nobody_else_by_any_of_it(
    name: str, is_random: bool, packets: int, tmp_path: Path
) -> None:
    needs.need(needs.namespace_support(), needs.tools("nfcapd", "nfdump", "nfacctd"))
    with namespaces("collector") as (namespace,):
        told, objections = COLLECTORS[name](namespace, tmp_path, list(session(is_random=is_random)))
    assert objections == []
    assert [each.counts.packets for each in told] == [packets]
