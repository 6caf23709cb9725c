# SPDX-License-Identifier: GPL-2.0-or-later
"""A status in which every figure differs from every other, for whatever is made of one."""

from __future__ import annotations

from flowexp.status import Status

SAMPLE: Status = {
    "version": "1.2.3",
    "loader": "prebuilt",
    "pid": 4711,
    "pinPath": "/sys/fs/bpf/flowexp",
    "uptimeSeconds": 93784.5,
    "configuration": {
        "ageSeconds": 62.0,
        "reloads": 2,
        "needRestart": ["[table] max_flows"],
        "refusal": 'flowexp.toml: direction: "up" is not one of: "once", "ingress", "egress", "both"',
        "refusalAgeSeconds": 3.0,
    },
    "attached": [
        {
            "interface": "eth0", "ifindex": 2, "direction": "ingress", "how": "tcx", "devicePackets": 1234567,
            "order": ["TCX probe", "flowexp", "filter u32 (pref 10)"],
        },
        {
            "interface": "wg0", "ifindex": 7, "direction": "egress", "how": "clsact", "devicePackets": None,
            "order": ["flowexp"],
        },
    ],
    "anomalies": [
        {
            "interface": "eth0", "direction": "ingress", "unansweredFlows": 51, "undersizedPackets": 52,
            "jumboPackets": 53, "destinations": 54, "destinationsSource": "192.0.2.7", "ports": 1055,
            "portsSource": "2001:db8::7",
        },
        {
            "interface": "wg0", "direction": "egress", "unansweredFlows": 0, "undersizedPackets": 0,
            "jumboPackets": 0, "destinations": 0, "destinationsSource": "", "ports": 0, "portsSource": "",
        },
    ],
    "table": {"flows": {"ipv4": 26214, "ipv6": 3}, "maxFlows": 262144, "octets": 127329376, "payloadsLost": 17},
    "ledger": {
        "seen": {"packets": 1115, "octets": 111500},
        "exported": {"packets": 1000, "octets": 100000},
        "inTable": {"packets": 100, "octets": 10000},
        "notMetered": {"not_ip": {"packets": 10, "octets": 1000}, "table_full": {"packets": 0, "octets": 0}},
        "missing": {"packets": 5, "octets": 500},
    },
    "natEvents": {"created": 61, "deleted": 62, "overruns": 63},
    "exportedRecords": {"idle": 11, "active": 12, "end_of_flow": 13, "forced": 14, "lack_of_resources": 15},
    "collectors": [
        {
            "collector": "udp://192.0.2.1:4739", "protocol": "ipfix", "state": "refused", "messagesSent": 21,
            "octetsSent": 22000, "recordsSent": 23, "messagesFailed": 24, "recordsFailed": 25, "refused": 26,
            "unreachable": 27, "gsoFallbacks": 28, "mtuChanges": 29, "flowsNotRepresentable": 30,
            "templateAgeSeconds": 31.5,
        },
        {
            "collector": "file:///tmp/x", "protocol": "ipfix", "state": "up", "messagesSent": 41, "octetsSent": 42,
            "recordsSent": 43, "messagesFailed": 0, "recordsFailed": 0, "refused": 0, "unreachable": 0,
            "gsoFallbacks": 0, "mtuChanges": 0, "flowsNotRepresentable": 0, "templateAgeSeconds": None,
        },
    ],
    "lastSweep": {
        "ageSeconds": 0.4, "totalMilliseconds": 12.34, "sendingMilliseconds": 5.67, "flows": 26217, "records": 99,
    },
    "sweepDurations": {"buckets": [("0.001", 1), ("0.01", 3), ("+Inf", 4)], "sumSeconds": 0.5},
    "sendDurations": {"buckets": [("0.001", 2), ("0.01", 4), ("+Inf", 4)], "sumSeconds": 0.25},
}  # fmt: skip
