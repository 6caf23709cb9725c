# SPDX-License-Identifier: GPL-2.0-or-later
"""Sequence Numbers where Templates and Options are announced again, as they are each minute and at a reload.

nfcapd 1.7.1 counts a Data Set of Options as one record, or as none if it has no use for it, and not the records in it
(RFC 7011 section 3.1). So it reports a Sequence Error for the first Message behind such an announcement, unless it has
seen no Data Record of a flow yet; none of its figures is wrong for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from columns import flows
from lab import framing, needs
from lab.judges import nfcapd
from lab.netns import namespaces

from flowexp.protocol.decode import Decoder
from flowexp.protocol.encoders import encoder_for
from flowexp.protocol.options import Facts, InterfaceFacts

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

EXPORT_TIME_S = 1_790_000_001
FLOWS, ANNOUNCEMENTS = 50, 4


def session(protocol: str) -> Iterator[bytes]:
    """Flows after each announcement."""
    encoder = encoder_for(protocol, observation_domain_id=7, max_message_octets=1472)
    encoder.facts = Facts(active_timeout_s=60, idle_timeout_s=15, interfaces=(InterfaceFacts(1, "lo"),) * 3)
    for number in range(ANNOUNCEMENTS):
        columns = flows(FLOWS, first_port=1 + number * FLOWS)
        for made in (encoder.announce(EXPORT_TIME_S), None):
            for burst in encoder.encode(columns, EXPORT_TIME_S) if made is None else made:
                encoder.commit(burst)
                yield from (bytes(each.octets) for each in burst.split(1))


def test_no_decoder_that_counts_records_misses_any_behind_an_announcement() -> None:
    framed, expected, decoder, records = framing.Session(), 0, Decoder(), 0
    for message in session("ipfix"):
        read = framed.read(message)
        assert read.sequence_number == expected
        expected += read.data_records
        decoded = decoder.decode(message, "here")
        assert (decoded.problems, decoded.lost_records) == ([], 0)
        records += len(decoded.records)
    assert records == FLOWS * ANNOUNCEMENTS


@pytest.mark.parametrize(("protocol", "errors"), [("ipfix", ANNOUNCEMENTS - 1), ("netflow9", 0)])
def test_nfcapd_miscounts_options_of_ipfix_and_has_every_record(protocol: str, errors: int, tmp_path: Path) -> None:
    needs.need(needs.namespace_support(), needs.tools("nfcapd", "nfdump"))
    with namespaces("collector") as (namespace,):
        told, objections = nfcapd(namespace, tmp_path, list(session(protocol)))
    assert objections == ([f"nfcapd: Sequence Errors: {errors}"] if errors else [])
    assert sorted(each.key.src_port for each in told) == list(range(1, FLOWS * ANNOUNCEMENTS + 1))
