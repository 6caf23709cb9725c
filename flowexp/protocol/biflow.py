# SPDX-License-Identifier: GPL-2.0-or-later
"""Elements of Biflows (RFC 5103): what a record carries of the reverse direction beside that of the forward one.

An element of IANA's has a reverse twin under enterprise number 29305, if it is reversible (registry.py). A record
has the twin of each of its elements, but for those that say the same of both directions, or the opposite.
"""

from __future__ import annotations

from flowexp.protocol.elements import RECORD_WIDE, Measured
from flowexp.protocol.registry import BY_NAME, IANA, ElementError

BIFLOW = "biflow"
"""The condition (template.py) of what records of two directions carry alone."""
REVERSE = "reverse_"
"""Before the name of a column: that of the reverse direction."""

DIRECTION = Measured(
    BY_NAME["biflowDirection"],
    ("biflow_direction",),
    lambda column: column,
    1,
    "1: the source of the forward direction began; 0: not known who did",
    BIFLOW,
)

_OF_BOTH = frozenset(
    """
    ipVersion protocolIdentifier sourceIPv4Address destinationIPv4Address sourceIPv6Address destinationIPv6Address
    sourceTransportPort destinationTransportPort ethernetType postVlanId
    bgpSourceAsNumber bgpDestinationAsNumber
    """.split()
)


def reverse_of(element: Measured) -> Measured | None:
    """The twin that tells of the reverse direction; None: it would tell nothing new.

    ElementError for an enterprise's own element, which has none (RFC 5103 §6.2).
    """
    name = element.element.name
    if element.element.enterprise != IANA:
        raise ElementError(f"{name} has no reverse element (RFC 5103 §6.2), which biflow needs")
    twin = BY_NAME.get(f"reverse{name[0].upper()}{name[1:]}")
    if twin is None or name in _OF_BOTH:
        return None
    columns = tuple(column if column in RECORD_WIDE else REVERSE + column for column in element.columns)
    return element._replace(element=twin, columns=columns, meaning=f"{name} of the reverse direction")
