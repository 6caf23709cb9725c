-- SPDX-License-Identifier: GPL-2.0-or-later
-- ClickHouse reads what nfacctd.conf puts into Kafka: clickhouse-client --multiquery <flows.sql
CREATE TABLE flows
(
    exporter LowCardinality(String),
    input UInt32,
    output UInt32,
    source IPv6,
    destination IPv6,
    protocol LowCardinality(String),
    source_port UInt16,
    destination_port UInt16,
    tos UInt8,
    tcp_flags UInt16,
    vlan UInt16,
    start DateTime64(6, 'UTC'),
    end DateTime64(6, 'UTC'),
    packets UInt64,
    octets UInt64
)
ENGINE = MergeTree
PARTITION BY toDate(end)
ORDER BY (exporter, end)
TTL toDateTime(end) + INTERVAL 30 DAY;

-- The names are nfacctd's.
CREATE TABLE flows_queue
(
    peer_ip_src String,
    iface_in UInt32,
    iface_out UInt32,
    ip_src String,
    ip_dst String,
    ip_proto String,
    port_src UInt16,
    port_dst UInt16,
    tos UInt8,
    tcp_flags String,
    vlan UInt16,
    timestamp_start String,
    timestamp_end String,
    packets UInt64,
    bytes UInt64
)
ENGINE = Kafka
SETTINGS kafka_broker_list = '127.0.0.1:9092', kafka_topic_list = 'flows', kafka_group_name = 'clickhouse',
    kafka_format = 'JSONEachRow', input_format_skip_unknown_fields = 1;

CREATE MATERIALIZED VIEW flows_from_queue TO flows AS
SELECT
    peer_ip_src AS exporter,
    iface_in AS input,
    iface_out AS output,
    toIPv6(ip_src) AS source,
    toIPv6(ip_dst) AS destination,
    ip_proto AS protocol,
    port_src AS source_port,
    port_dst AS destination_port,
    tos,
    toUInt16(tcp_flags) AS tcp_flags,
    vlan,
    toDateTime64(timestamp_start, 6, 'UTC') AS start,
    toDateTime64(timestamp_end, 6, 'UTC') AS end,
    packets,
    bytes AS octets
FROM flows_queue;
