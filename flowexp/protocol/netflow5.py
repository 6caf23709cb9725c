# SPDX-License-Identifier: GPL-2.0-or-later
"""NetFlow v5: one layout that Collectors know, so no Templates; IPv4 alone, counters of 32 bits.

There is no standard; this is what Cisco's routers send and every Collector reads. What is not known stays zero:
AS numbers and address masks without the field group `routing`, padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from flowexp.protocol.elements import NETFLOW9, Columns, measured
from flowexp.protocol.encoder import Encoder, split_counters
from flowexp.protocol.framing import Framing, fields
from flowexp.protocol.template import Field, RecordLayout

if TYPE_CHECKING:
    from flowexp.protocol.datatypes import Array

_RECORD_OCTETS = 48
_RECORD = {  # offset: element, octets
    0: ("sourceIPv4Address", 4),
    4: ("destinationIPv4Address", 4),
    8: ("ipNextHopIPv4Address", 4),
    12: ("ingressInterface", 2),
    14: ("egressInterface", 2),
    16: ("packetDeltaCount", 4),
    20: ("octetDeltaCount", 4),
    24: ("flowStartMilliseconds", 4),
    28: ("flowEndMilliseconds", 4),
    32: ("sourceTransportPort", 2),
    34: ("destinationTransportPort", 2),
    37: ("tcpControlBits", 1),
    38: ("protocolIdentifier", 1),
    39: ("ipClassOfService", 1),
    40: ("bgpSourceAsNumber", 2),
    42: ("bgpDestinationAsNumber", 2),
    44: ("sourceIPv4PrefixLength", 1),
    45: ("destinationIPv4PrefixLength", 1),
}
_MAY_LACK = frozenset(("src_as", "dst_as", "src_prefix_length", "dst_prefix_length"))
_COUNTER_OCTETS = {"packets": 4, "octets": 4}
ENGINES = 1 << 16
"""So many can be told apart, by engine type and engine id."""
MAX_SAMPLING_INTERVAL = (1 << 14) - 1


class _Record(RecordLayout):
    """The one layout, for every flow alike."""

    def __init__(self) -> None:
        elements = [(NETFLOW9.get(name) or measured(name), octets) for name, octets in _RECORD.values()]
        layout = tuple(Field(element, octets) for element, octets in elements)
        dtype = np.dtype(
            {
                "names": [field.name for field in layout],
                "formats": [field.storage for field in layout],
                "offsets": list(_RECORD),
                "itemsize": _RECORD_OCTETS,
            }
        )
        super().__init__(layout, dtype)

    def all(self) -> tuple[RecordLayout]:
        return (self,)

    def partition(self, columns: Columns) -> Iterator[tuple[RecordLayout, Array]]:
        if len(columns["packets"]):
            yield self, np.arange(len(columns["packets"]))


ELEMENTS = frozenset(name for name, _ in _RECORD.values()) | frozenset(_Record().names)
"""What a record tells of; of times and ICMP also by the names that IPFIX has by default."""


class PacketEncoder(Encoder):
    """NetFlow v5 packets. The Sequence Number counts records.

    Engine type and engine id are the last 16 bits of the Observation Domain ID. The sampling interval has
    no mode in its upper two bits: Collectors ignore that, but goflow2, which takes all sixteen as the number. 1 is
    not sampled: what reads 0 as 1 reads this, too.
    """

    framing = Framing(
        version=5,
        header=fields(
            ">HHIIIIHH",
            "version count up_time_ms export_time_s nanoseconds sequence_number"
            " observation_domain_id sampling_interval",
        ),
        sequence_counts_records=True,
        set_header=(),
        max_records=30,
    )

    def __init__(self, *, observation_domain_id: int, max_message_octets: int, sequence_number: int = 0) -> None:
        super().__init__(
            observation_domain_id=observation_domain_id % ENGINES,
            max_message_octets=max_message_octets,
            layouts=_Record(),
            sequence_number=sequence_number,
        )

    def as_records(self, columns: Columns) -> Columns:
        """IPv4 flows, in as many rows each as 32-bit counters need; flows of IPv6 are counted and left out."""
        if columns["src_addr"].shape[1] == 4:
            unknown = dict.fromkeys(_MAY_LACK - columns.keys(), np.zeros(len(columns["packets"]), np.uint32))
            columns = {**columns, **unknown}
            return split_counters(columns, _COUNTER_OCTETS)
        self.flows_not_representable += len(columns["packets"])
        return {name: column[:0] for name, column in columns.items()}
