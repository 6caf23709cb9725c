# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device is taken for, by what pyroute2 says of it, for kinds that not every kernel has."""

from __future__ import annotations

from typing import Any, Dict, Optional

import pytest

from flowexp.errors import FlowexpError
from flowexp.kernel.netlink import _interface

GRE = 778  # ARPHRD_IPGRE


class Told(Dict[str, Any]):
    """A netlink message, or what is nested in one."""

    def get_attr(self, name: str) -> Any:
        return self.get(name)


def gre(remote: Optional[str]) -> Told:
    about = Told(IFLA_INFO_KIND="gre", IFLA_INFO_DATA=Told(IFLA_GRE_REMOTE=remote))
    return Told(index=7, ifi_type=GRE, flags=1, IFLA_IFNAME="gre1", IFLA_LINKINFO=about)


def test_gre_to_one_remote_end_hands_out_packets_from_their_inner_header_on() -> None:
    assert not _interface(gre("192.0.2.1")).has_ethernet


@pytest.mark.parametrize("remote", [None, "0.0.0.0", "239.1.1.1"])
def test_gre_without_one_is_refused_as_its_packets_have_the_outer_header(remote: Optional[str]) -> None:
    with pytest.raises(FlowexpError, match="gre1: GRE without a remote end"):
        assert _interface(gre(remote)).has_ethernet
