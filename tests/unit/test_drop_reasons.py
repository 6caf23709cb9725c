# SPDX-License-Identifier: GPL-2.0-or-later
"""Field group `drops`: what the reasons become in a record, and what is said where a kernel cannot tell them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flowexp.errors import FlowexpError
from flowexp.kernel import drops
from flowexp.protocol.elements import MEASURED


@pytest.fixture
def two_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drops, "reason_names", lambda: {8: "NETFILTER_DROP", 77: "QDISC_OVERLIMIT_AND_SOME_MORE_OF_IT"})


def test_a_reason_is_told_by_its_name_cut_to_its_field_and_by_its_number_where_it_has_none(two_reasons: None) -> None:
    columns = drops.reason_columns(np.array([8, 0, 77, 99], np.uint32))
    told = MEASURED["packetDropReason"].json(columns)
    assert told == ["NETFILTER_DROP", "", "QDISC_OVERLIMIT_AND_SOME_MORE_OF", "99"]


def test_forwarding_status_is_dropped_only_if_all_packets_were(two_reasons: None) -> None:
    packets, dropped = np.array([5, 5, 5, 5, 0], np.uint64), np.array([5, 4, 0, 0, 3], np.uint64)
    reasons = drops.reason_columns(np.array([8, 8, 0, 0, 77], np.uint32))
    columns = {"packets": packets, "drops_packets": dropped, "egress_ifindex": np.array([2, 2, 2, 0, 0]), **reasons}
    assert MEASURED["forwardingStatus"].json(columns) == [130, 64, 64, 0, 128]


def test_no_flows_have_no_reasons() -> None:
    columns = drops.reason_columns(np.empty(0, np.uint32))
    assert columns["drop_reason"].shape == (0, 32)


def test_a_kernel_without_btf_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drops, "_BTF", tmp_path / "vmlinux")
    with pytest.raises(FlowexpError) as error:
        drops.DropWatch({}, np.zeros(1, [("netns_inode", np.uint32)]))
    assert str(error.value) == (
        f'[fields] groups: "drops" needs kernel BTF, and there is no {tmp_path}/vmlinux; leave it out'
    )
