# SPDX-License-Identifier: GPL-2.0-or-later
"""NAT events: Data Records of the sessions that network address translation begins and ends (RFC 8158).

They are no flows, and have Templates of their own, one for each address family.
"""

from __future__ import annotations

import numpy as np

from flowexp.protocol.elements import MEASURED, Columns, Measured
from flowexp.protocol.registry import BY_NAME
from flowexp.protocol.template import Dialect, Field, TemplateIds, Templates

# natEvent. RFC 8158 has numbers for IPv4 to IPv4; of IPv6 to IPv6 there are but those that it names historic.
CREATED, DELETED = {4: 4, 6: 1}, {4: 5, 6: 2}
"""A session's beginning and its end, by IP version."""


def _of_event(name: str, column: str) -> Measured:
    element = BY_NAME[name]
    return Measured(element, (column,), lambda values: values, element.type.octets, element.description)


_EVENT = (_of_event("observationTimeMilliseconds", "time_ms"), _of_event("natEvent", "nat_event"))
_SESSION = (
    "protocolIdentifier",
    "sourceIPv4Address", "postNATSourceIPv4Address", "sourceTransportPort", "postNAPTSourceTransportPort",
    "destinationIPv4Address", "postNATDestinationIPv4Address",
    "destinationTransportPort", "postNAPTDestinationTransportPort",
)  # fmt: skip


def event_templates(dialect: Dialect, ids: TemplateIds) -> Templates:
    """The Templates of NAT events in a protocol. Rows of theirs have the columns of `event_columns`."""
    of_family = {}
    for version in (4, 6):
        session = (MEASURED[name.replace("IPv4", f"IPv{version}")]._replace(only="") for name in _SESSION)
        of_family[version] = [Field(element, element.octets) for element in (*_EVENT, *session)]
    return Templates(of_family, dialect, ids)


def event_columns(sessions: Columns, *, is_new: np.ndarray, time_ms: int) -> Columns:
    """Sessions of one family, as columns with src_, dst_ and other_ addresses and ports, with what befell them then."""
    version = 4 if sessions["src_addr"].shape[1] == 4 else 6
    return {
        **sessions,
        "time_ms": np.full(len(is_new), time_ms, np.int64),
        "nat_event": np.where(is_new, CREATED[version], DELETED[version]).astype(np.uint8),
    }
