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
 * Packets need not use all of a table: what they cost follows the pages that their flows lie on. How many buckets
 * are in use is said in the line that a CPU touches for every packet anyhow (struct counters), and changes as flows
 * come and go. Flows stay where they are: a packet that misses also looks where its flow would be under the number of
 * buckets before, until no flow is left there. Of the two numbers one is always all of the table.
 *
 * Buckets in use in bits 0-31; in bits 32-63 those in use before, 0: no flow is there. The exporter stores it for
 * every CPU; a CPU that finds its buckets crowded does not wait for that and goes on to all of them alone. While CPUs
 * differ a flow may get a second slot: harmless, both are exported.
 */
enum flow_extent {
	BUCKETS_BEFORE_SHIFT = 32,
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
	__u8 priorities;        /* of the first packet's tags: PCP and DEI, outer in the upper half, inner in the lower */
	__u8 rate;              /* its packets were selected by this one of the table's sampling intervals (control) */
};

struct bucket_tags {
	__u64 word[4]; /* FLOW_WAYS tags of 16 bits, in the machine's byte order */
};

/*
 * Field groups: what is kept of a flow beyond the above where an operator asks for it. Each group has an array of
 * its own, indexed by the slot number, IPv6's slots behind IPv4's; of one element where the group is off. `now` only
 * grows and is the packet path's; `exported` is the exporter's: what of it Data Records have carried. What is not
 * in them tells of the flow so far. Packets of one flow on two CPUs at once may spoil an order (of times, of
 * Sequence Numbers); they never spoil a count.
 */
enum field_group {
	GROUP_SIZES = 1,
	GROUP_TIMING = 2,
	GROUP_TCP = 4,
	GROUP_CONGESTION = 8,
	GROUP_INTEGRITY = 16,
	GROUP_DROPS = 32,
	GROUP_APPLICATION = 64,
	GROUP_TUNNELS = 128,
};

enum { SIZE_CLASSES = 7 };

struct sizes_counts {
	__u64 octets_squared;       /* sum of the squares of the packets' IP lengths */
	__u32 packets[SIZE_CLASSES]; /* of up to 64, 128, 256, 512, 1024, 1514 octets of IP, and of more */
	__u32 fragments;            /* packets that are one, the first included */
};

struct flow_sizes {
	struct sizes_counts now, exported;
};

/* An arrival is an skb: what GRO merged has arrived at once. */
struct timing_counts {
	__u64 gaps_ns; /* all the time between one arrival and the next */
	__u64 gaps;    /* how many there were */
	__u64 transits_ns; /* all the time between the ingress and an egress hook (transit.h) */
	__u64 transits;    /* how many packets' that was */
};

struct flow_timing {
	struct timing_counts now, exported;
	__u64 last_ns;     /* the last arrival, by the precise clock */
	__u64 last_gap_ns;
	__u64 max_gap_ns;
	__u64 jitter_16ns; /* RFC 3550, section 6.4.1, of the gaps; in sixteenths of a nanosecond */
	__u64 max_transit_ns;
	__u64 first_received_ns; /* when the device itself got the first and the last packet, by its own clock, whatever */
	__u64 last_received_ns;  /* that counts from; 0: it does not say */
};

enum arrivals_size { ARRIVALS = 4096 }; /* skbs that may be on their way through the host at once; a power of two */

struct arrival {
	__u64 skb; /* its address; 0: none */
	__u64 ns;
	__u32 ifindex, number; /* of the flow's slot, in the group's array */
};

struct tcp_counts {
	__u64 retransmitted_octets; /* payload */
	__u64 out_of_order_octets;
	__u32 retransmitted;        /* segments with payload that was sent before, here or beyond a loss */
	__u32 out_of_order;         /* segments that came late into a gap, too soon to have been sent again */
	__u32 zero_windows;
	__u32 syn, fin, rst;
};

enum tcp_state_bits {
	TCP_SEQUENCE_KNOWN = 1, /* next_sequence holds */
	TCP_SYN_SENT = 2,       /* SYN without ACK; cleared by the ACK that follows */
};

struct flow_tcp {
	struct tcp_counts now, exported;
	__u64 handshake_ns;  /* from the other side's SYN or SYN-ACK to this side's answer, as they passed here */
	__u64 gap_ns;        /* when the gap was seen */
	__u32 next_sequence; /* beyond the furthest octet seen */
	__u32 gap_begin;     /* octets jumped over and not seen yet: [gap_begin, gap_end) */
	__u32 gap_end;
	__u16 first_window;  /* as it stands in the first segment */
	__u16 mss;           /* option of the SYN; 0: none */
	__u8 window_scale;   /* option of the SYN, plus one; 0: none */
	__u8 state;
	__u8 unused[6];
};

struct congestion_counts {
	__u32 ect0, ect1, ce; /* packets by their ECN field (RFC 3168, section 5) */
	__u32 ece, cwr;       /* segments with the flag, the handshake's left out */
	__u32 dscp_changes;   /* packets whose DSCP is not the first packet's */
};

struct flow_congestion {
	struct congestion_counts now, exported;
};

struct integrity_counts {
	__u32 bad_checksum;      /* of the IPv4 header */
	__u32 bad_length;        /* UDP length, or TCP data offset, beyond the packet */
	__u32 expiring;          /* TTL or Hop Limit of 1 or 0 */
	__u32 land;              /* source and destination are the same, address and port */
	__u32 impossible_flags;  /* TCP: none, SYN with FIN or RST, or FIN without ACK */
	__u32 undersized;        /* came in as a frame that is shorter than Ethernet has them */
	__u32 jumbo;             /* longer than an Ethernet frame carries, on the wire */
	__u32 unused;
};

struct flow_integrity {
	struct integrity_counts now, exported;
};

struct drops_counts {
	__u64 packets; /* on the wire, as the flow's own */
	__u64 octets;
};

/* Written by a program of its own (drops.bpf.c). */
struct flow_drops {
	struct drops_counts now, exported;
	__u32 reason; /* of the last: this kernel's enum skb_drop_reason */
	__u32 unused;
};

enum payload_size { /* powers of two: bits make sure of a length */
	PAYLOAD_SHORT = 1024, /* a query, a request, most Client Hellos: most payloads need no more */
	PAYLOAD_LONG = 2048,
	SERVER_NAME_OCTETS = 64,
};

/* What a flow's payload was taken for: all but is_taken is the exporter's. No counts, so nothing to be exported. */
struct flow_application {
	__u16 id;       /* its place in the exporter's list (flowexp/metering/applications.py); 0: not known */
	__u8 is_taken;  /* the flow's first payload has been copied, or was lost */
	__u8 name_kind; /* what server_name is; 0: there is none */
	__u32 dns_response_us; /* from the query of the flow that goes the other way; 0: not known */
	__u8 server_name[SERVER_NAME_OCTETS]; /* zeros behind it */
};

/* The head of a payload in the ring; PAYLOAD_SHORT or PAYLOAD_LONG octets follow, of which so many were copied. */
struct payload {
	__u64 ns;      /* when it passed, by the precise clock */
	__u64 addr[4]; /* source, destination, as on the wire; IPv4: both in the first word */
	__u32 number;  /* the flow's row in the group's array */
	__u32 ports;   /* as on the wire */
	__u16 octets;
	__u8 protocol;
	__u8 is_ipv6;
	__u8 unused[4];
};

enum tunnel_kind {
	TUNNEL_IP = 1, /* IPv4 or IPv6 in IPv4 or IPv6 */
	TUNNEL_GRE = 2,
	TUNNEL_VXLAN = 3,
	TUNNEL_GENEVE = 4,
	TUNNEL_GTPU = 5,
	TUNNEL_MPLS = 6,
	TUNNEL_PPPOE = 7,
};

/* The tunnel that a flow comes through, written as the flow is made: nothing of it grows. */
struct flow_tunnels {
	__u8 src_addr[16]; /* of the outer header; IPv4: the first four octets; MPLS: its entries, as many as fit */
	__u8 dst_addr[16];
	__u32 id;          /* VNI, GRE key, TEID, PPPoE session; MPLS: label, Exp and S of the first packet's first entry */
	__u8 kind;         /* of enum tunnel_kind; 0: the flow comes through none */
	__u8 ip_version;   /* of the outer header; 0: it has none */
	__u8 unused[2];
};

/* Handshakes under way, by the client's side of the connection. */
struct handshake_key {
	__u64 addr[4];
	__u32 ports;
	__u32 unused;
};

struct handshake {
	__u64 syn_ns;     /* 0: of two SYN it is not known which was answered */
	__u64 syn_ack_ns; /* likewise */
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
	COUNT_NOT_METERED_OWN_EXPORT,  /* made by the exporter: it has its mark, or comes from its socket */
	COUNT_NOT_METERED_NOT_SELECTED,    /* sampling took others */
	COUNT_NOT_METERED_TABLE_FULL,  /* no free slot in both buckets */
	COUNT_NOT_METERED_NO_EXPORTER, /* nobody has swept the table for too long */
	COUNT_FLOWS_CREATED,           /* not in the ledger: packets = flows */
	COUNT_PAYLOADS_LOST,           /* nor this: flows whose first payload found no room in the ring */
	COUNTERS,
};

#define SAMPLING_RATES 8 /* different intervals in one table */

/* Where a CPU is in its window of as many packets as the sampling interval (sampling.h). */
struct sampler {
	__u32 left;   /* packets to come in this window */
	__u32 chosen; /* what `left` is when the selected one comes */
	/* Of an interface that has an interval of its own: */
	__u32 interval;
	__u32 rate;   /* where that stands in control.sampling_interval */
};

/* What sampling has decided of the packet at hand. */
struct selection {
	__u32 packets; /* so many are metered: all, or some of a super-packet's segments, or none */
	__u32 last;    /* whether the last segment is among them */
};

struct counters {
	__u64 buckets[2]; /* in use, of IPv4 and of IPv6 (enum flow_extent) */
	struct { __u64 packets, octets; } count[COUNTERS];
	struct sampler sampler; /* for all interfaces that have no interval of their own */
	struct selection selection;
	__u64 skb;       /* for a moment (transit.h) */
	__u64 unused[2]; /* a CPU's counters share no cache line with its neighbour's: 256 octets */
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

/*
 * What the replay program takes captured frames from, one a run (flowexp/kernel/replay.py): a system call for
 * thousands of them. User space lays them out and sets `next` to 0; the kernel may stop in between, for a signal.
 */
#define CAPTURED_FRAMES 4096
#define CAPTURED_OCTETS (1 << 20) /* a power of two */
#define CAPTURED_FRAME_OCTETS 2048 /* headers are enough, but for the group that looks at payloads */

struct captured_frame {
	__u64 time_ns;
	__u32 wire_octets;
	__u32 interface; /* the capture's own number */
	__u32 begin;     /* below CAPTURED_OCTETS */
	__u32 octets;    /* 14 to CAPTURED_FRAME_OCTETS */
};

struct captured {
	__u32 next; /* the frame that the next run takes */
	__u32 unused;
	struct captured_frame frame[CAPTURED_FRAMES];
	__u8 octets[CAPTURED_OCTETS];
	__u8 beyond[CAPTURED_FRAME_OCTETS]; /* of a frame that begins in the last of them */
};

/* Fixed when the program is loaded; the verifier drops what they switch off. */
struct settings {
	__u64 secret[12];     /* the hash's key: drawn with the table, kept in its control */
	__u32 buckets4;
	__u32 buckets6;
	__u32 own_mark;       /* skb->mark of the exporter's own packets; 0: none */
	__u32 sampling_interval; /* one packet of so many is metered; 1: every one */
	__u8 sampling_by_interface; /* some interfaces have another interval (map `samplers`) */
	__u8 sampling;        /* either of these two: asked once for both, as to ask costs a load */
	__u8 sampling_random; /* any one of so many packets is metered; else the last */
	__u8 hash_of_more;    /* what the Flow Key has beyond the slot: by sampling_by_interface or GROUP_TUNNELS */
	__u8 egress_once;     /* direction `once` */
	__u8 fib_lookup;      /* ask for output interface and next hop as a flow is created */
	__u8 atomic_counters; /* PREEMPT_RT: programs on one CPU may interleave */
	__u8 no_coarse_clock; /* before Linux 5.11: the precise clock for every packet */
	__u8 hardware_times;  /* since Linux 5.16: programs see when the device got a packet */
	__u8 groups;          /* of enum field_group */
	__u8 own_sockets;     /* the exporter's own packets are known by struct control's own_socket */
	__u8 unused;
	__u32 netns_inode;    /* the network namespace whose drops count (drops.bpf.c) */
	/* No octets: only so that the object's BTF holds these names. */
	enum flow_geometry geometry[0];
	enum flow_extent extent[0];
	enum flow_state state[0];
	enum flow_ctl ctl[0];
	enum flow_flag flag[0];
	enum flow_direction direction[0];
	enum flow_vlan vlan[0];
	enum counter counter[0];
	enum journal_state journal_state[0];
	enum journal_size journal_size[0];
	enum field_group group[0];
	enum tcp_state_bits tcp_state[0];
	enum tunnel_kind tunnel[0];
	struct journal journal[0];
	struct flow_drops drops[0];
	enum arrivals_size arrivals_size[0];
	enum payload_size payload_size[0];
	struct payload payload[0];
};

#define COLLECTORS 8 /* the most that one exporter may have */

/* One of the exporter's own sockets, as the packets that leave it are addressed; protocol 0: none. */
struct own_socket {
	__u32 ports;    /* source, destination, as on the wire */
	__u32 protocol;
	__u64 to[2];    /* destination address; IPv4: in the second half of the first word, as in struct packet */
};

/* The table's own memory: it is pinned beside the table and outlives every exporter. */
struct control {
	__u64 layout;           /* hash of this file's layout: another one is another table */
	__u64 secret[12];
	__u32 buckets4;
	__u32 buckets6;
	__u64 groups;           /* those that have room: of enum field_group */
	/* Under which flows are exported, each under the one that it names; the first: of interfaces with none of
	 * their own. 0: there are no more. */
	__u64 sampling_interval[SAMPLING_RATES];
	__u64 sampling_random;  /* as in struct settings, of the programs that filled it */
	__u64 deadline_ns;      /* after this no flow is created (COUNT_NOT_METERED_NO_EXPORTER); 0: never */
	/* The rest is the exporter's. */
	__u64 exported_packets; /* ledger: all that Data Records have ever carried */
	__u64 exported_octets;
	__u64 exported_records;
	/* Next Sequence Numbers, in the lower halves; of each Collector as many as there may be sampling intervals. In
	 * the upper halves: the first has the Collector's key, the others, each of a domain of its own, the interval. */
	__u64 sequence[COLLECTORS * SAMPLING_RATES];
	struct own_socket own_socket[COLLECTORS]; /* of each, in the same place */
	/* What tables before this one came to: their ledger goes on in this one. */
	struct { __u64 packets, octets; } before[COUNTERS];
	__u64 before_exported_packets;
	__u64 before_exported_octets;
};

#endif
