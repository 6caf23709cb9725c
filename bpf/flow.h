/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the kernel half and the user half of the Metering Process share: slots,
 * counters, settings, control. This file is the only source of the layout: the
 * exporter derives its numpy types, counter names and constants from the BTF of
 * the object compiled from it (flowexp/kernel/layout.py).
 *
 * Host byte order unless a name ends in _be. Times are CLOCK_MONOTONIC in
 * nanoseconds (the replay program: the capture's Unix time).
 */
#ifndef FLOWEXP_FLOW_H
#define FLOWEXP_FLOW_H

#include <linux/types.h>

/*
 * The flow table of one address family is three mmapable arrays of one length,
 * indexed by the slot number: tags, hot and cold. Slots [16 b, 16 b + 16) are
 * bucket b, whose sixteen tags are one element of the tag array. A tag is 16 bits
 * of the flow's hash, never 0, and 0 where the slot is free: a sparse sweep reads
 * the tags alone (2 octets a slot), and so does a packet that missed.
 *
 * Dense tags apart from the slots were chosen over a header line in the bucket:
 * a header shares no page with the other buckets' headers, so that a miss and a
 * sweep paid one TLB miss a bucket.
 */
enum flow_geometry {
	FLOW_WAYS = 16,
};

/*
 * ctl, the one word two sides write: claims in bits 0-31, state in 32-39,
 * flowEndReason in 40-47. The packet path only ADDS to it: +1 and -1 to the
 * claims, +1 to the state when FREE becomes LIVE. Every other change is a plain
 * 64-bit store by the exporter, which leaves FLOW_CLAIM_BIAS in the claims: a
 * late -1 of a creator that lost the race can then never borrow from the state.
 */
enum flow_state {
	FLOW_FREE = 0,
	FLOW_LIVE = 1,    /* packets find it */
	FLOW_CLOSING = 2, /* no packet finds it any more; one may still be adding */
	FLOW_RETIRED = 3, /* exported and zeroed; may be claimed after one more grace period */
};

enum flow_ctl {
	FLOW_STATE_SHIFT = 32,
	FLOW_REASON_SHIFT = 40,
	FLOW_CLAIM_BIAS = 65536,
};

/* One octet a flag, set by a plain store: OR-ing bits from two CPUs loses some. */
enum flow_flag {
	FLAG_TCP_FIN = 0, /* 0-7 are the octet at offset 13 of the TCP header, bit by bit */
	FLAG_TCP_NS = 8,  /* also AE (RFC 9768) */
	FLAG_IP_DF = 9,   /* of the first packet */
	FLAG_IP_MF = 10,  /* a first or middle fragment was seen */
	FLAG_IP_LATE = 11, /* a fragment with an offset above 0 was seen */
	FLAGS = 12,
};

enum flow_direction { DIRECTION_INGRESS = 0, DIRECTION_EGRESS = 1 };

/* vlan: the tag's twelve id bits, and this one, because id 0 (a priority tag) is a tag, too. */
enum flow_vlan { VLAN_PRESENT = 0x1000 };

/*
 * Hot: all that a packet of a known flow touches; one cache line for IPv4.
 * The members up to `ports_be` are the same for both families.
 */
struct flow_hot4 {
	__u64 ctl;
	__u64 packets;   /* on the wire: one for each GSO segment */
	__u64 octets;    /* IP octets, headers included (octetDeltaCount) */
	__u64 last_ns;   /* coarse clock; never before first_ns */
	__u32 hash;      /* of the key; guards against a key that is half written */
	__u8 flags_hint; /* the TCP flags known to be set in cold.flags, so that few packets go there */
	__u8 tos;        /* of the first packet */
	__u8 min_ttl;
	__u8 max_ttl;
	__u16 min_length; /* of one packet: IPv4 total length, IPv6 payload length; at most 65535 */
	__u16 max_length;
	/* From here on: the Flow Key. */
	__u32 ifindex;      /* with `direction`, the Observation Point */
	__u16 src_port_be;  /* ICMP: 0 */
	__u16 dst_port_be;  /* ICMP: type, code */
	__u16 vlan;         /* outer tag: id and VLAN_PRESENT */
	__u8 protocol;
	__u8 direction;
	__u8 src_addr[4];
	__u8 dst_addr[4];
};

struct flow_hot6 {
	__u64 ctl;
	__u64 packets;
	__u64 octets;
	__u64 last_ns;
	__u32 hash;
	__u8 flags_hint;
	__u8 tos;
	__u8 min_ttl;
	__u8 max_ttl;
	__u16 min_length;
	__u16 max_length;
	__u32 ifindex;
	__u16 src_port_be;
	__u16 dst_port_be;
	__u16 vlan;
	__u8 protocol;
	__u8 direction;
	__u8 src_addr[16];
	__u8 dst_addr[16];
	__u64 unused;
};

/* Cold: written at creation, on a flag's first sight, and by the exporter. */
struct flow_cold {
	__u64 first_ns;
	__u64 exported_packets; /* these three are the exporter's: */
	__u64 exported_octets;  /* what Data Records have carried so far */
	__u64 exported_ns;      /* end of the last Data Record; 0: none yet */
	__u8 flags[FLAGS];
	__u32 tos_changes;      /* packets whose ToS was not the first packet's */
	__u32 other_ifindex;    /* output interface of an ingress flow, input interface of an egress flow; 0: none */
	__u32 flow_label;
	__u8 next_hop[16];      /* IPv4: the first four octets */
	__u8 dst_mac[6];        /* as on the wire: destination, source */
	__u8 src_mac[6];
	__u16 inner_vlan;       /* second tag, as hot.vlan */
	__u16 unused;
};

struct bucket_tags {
	__u64 word[4]; /* FLOW_WAYS tags of 16 bits, in the machine's byte order */
};

/* Where the ports of first fragments are kept for those that follow. */
struct fragment_key {
	__u64 addr[4];
	__u32 id;
	__u32 protocol; /* IPv6: 0, its identification alone tells (RFC 8200, section 4.5) */
};

struct fragment_value {
	__u32 ports;
	__u32 protocol;
};

/*
 * The ledger's counters, kept per CPU, packets and octets each:
 * COUNT_SEEN = flows' own counters + every COUNT_NOT_METERED_* below.
 * The names are public: in lower case, less the prefix, they are what `status` prints.
 */
enum counter {
	COUNT_SEEN = 0,
	COUNT_NOT_METERED_NOT_IP,      /* ARP, LLDP, ...: no IPv4 or IPv6 header */
	COUNT_NOT_METERED_TRUNCATED,   /* ends within the link or IP header */
	COUNT_NOT_METERED_MALFORMED,   /* version, header length or total length contradict the frame */
	COUNT_NOT_METERED_UNKNOWN_GSO, /* a super-packet whose segments' headers are not known */
	COUNT_NOT_METERED_SEEN_AT_INGRESS, /* direction `once`: an interface counted it on its way in */
	COUNT_NOT_METERED_OWN_EXPORT,  /* carries the exporter's mark */
	COUNT_NOT_METERED_TABLE_FULL,  /* no free slot in both buckets */
	COUNT_NOT_METERED_NO_EXPORTER, /* nobody has swept the table for too long */
	COUNT_FLOWS_CREATED,           /* not in the ledger: packets = flows */
	COUNTERS,
};

struct counters {
	struct { __u64 packets, octets; } count[COUNTERS];
	__u64 unused[12]; /* a CPU's counters share no cache line with its neighbour's: 256 octets */
};

/*
 * The journal: the one batch of flows whose Data Records are on their way. The exporter's alone, and pinned
 * with the table: the next exporter learns from it how far a killed one came (flowexp/kernel/journal.py).
 */
enum journal_state {
	JOURNAL_EMPTY = 0,
	JOURNAL_SENDING = 1, /* some of the records may have been sent, and may be sent again */
	JOURNAL_SENT = 2,    /* all of them have been: slots and ledger must move on */
};

enum journal_size { JOURNAL_FLOWS = 16384 }; /* bounds what a crash may send twice */

struct journal {
	__u64 state;
	__u64 ip_version;
	__u64 ends; /* 1: the flows end with these records; 0: they go on */
	__u64 flows;
	__u64 records;
	__u64 exported_packets; /* what struct control is to say when all is done: */
	__u64 exported_octets;
	__u64 exported_records;
	__u64 slot[JOURNAL_FLOWS];
	__u64 packets[JOURNAL_FLOWS]; /* what Data Records have carried of each flow then */
	__u64 octets[JOURNAL_FLOWS];
	__u64 end_ns[JOURNAL_FLOWS];
};

/* Fixed when the program is loaded; the verifier drops what they switch off. */
struct settings {
	__u64 secret[12];     /* the hash's key: drawn with the table, kept in its control */
	__u32 buckets4;
	__u32 buckets6;
	__u32 own_mark;       /* skb->mark of the exporter's own packets; 0: none */
	__u8 egress_once;     /* direction `once` */
	__u8 fib_lookup;      /* ask for output interface and next hop as a flow is created */
	__u8 atomic_counters; /* PREEMPT_RT: programs on one CPU may interleave */
	__u8 unused;
	/* No octets: only so that the object's BTF holds these names. */
	enum flow_geometry geometry[0];
	enum flow_state state[0];
	enum flow_ctl ctl[0];
	enum flow_flag flag[0];
	enum flow_direction direction[0];
	enum flow_vlan vlan[0];
	enum counter counter[0];
	enum journal_state journal_state[0];
	enum journal_size journal_size[0];
	struct journal journal[0];
};

/* The table's own memory: it is pinned beside the table and outlives every exporter. */
struct control {
	__u64 layout;           /* hash of this file's layout: another one is another table */
	__u64 secret[12];
	__u32 buckets4;
	__u32 buckets6;
	__u64 deadline_ns;      /* after this no flow is created (COUNT_NOT_METERED_NO_EXPORTER); 0: never */
	/* The rest is the exporter's. */
	__u64 exported_packets; /* ledger: all that Data Records have ever carried */
	__u64 exported_octets;
	__u64 exported_records;
	__u64 sequence[8];      /* next Sequence Number of each collector, in the order configured */
};

#endif
