/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A frame, its headers as they lie in it, and what the meter learns of the packet in it. Nothing is believed before
 * its length was checked: header() points to a header or fails, and finds data beyond the linear part of an skb, too.
 */
#ifndef FLOWEXP_FRAME_H
#define FLOWEXP_FRAME_H

#include "dialect.h"

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define ETHERTYPE_8021Q 0x8100
#define ETHERTYPE_8021AD 0x88a8
#define ETHERTYPE_QINQ 0x9100 /* before 802.1ad was; still in use */
#define ETHERTYPE_BRIDGED 0x6558 /* an Ethernet frame in a tunnel */
#define ETHERTYPE_MPLS 0x8847
#define ETHERTYPE_PPPOE 0x8864 /* a session's packets */

#define PROTOCOL_HOPOPT 0
#define PROTOCOL_ICMP 1
#define PROTOCOL_IPV4 4
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define PROTOCOL_DCCP 33
#define PROTOCOL_IPV6 41
#define PROTOCOL_ROUTING 43
#define PROTOCOL_FRAGMENT 44
#define PROTOCOL_GRE 47
#define PROTOCOL_AH 51
#define PROTOCOL_ICMPV6 58
#define PROTOCOL_DSTOPTS 60
#define PROTOCOL_SCTP 132
#define PROTOCOL_MOBILITY 135
#define PROTOCOL_UDPLITE 136

#define MAX_OFFSET 0x3fff /* no header is looked for beyond this; tells the verifier, too */

enum hook { HOOK_INGRESS, HOOK_EGRESS, HOOK_XDP, HOOK_REPLAY };

/* Where the packet is; filled by the entry point from its context, which only it knows. */
struct frame {
	void *ctx;
	void *data;
	void *data_end;
	struct scratch *scratch;
	__u32 octets;        /* whole frame, the part that is not linear included */
	__u32 gso_segments;  /* 0: unknown or none */
	__u32 gso_size;      /* payload of a segment; 0: no super-packet */
	__u32 offset;        /* cursor: the next header, from data */
	__u16 type;          /* EtherType of what is behind the link header */
};

/*
 * The tunnel that the packet came through (tunnels.h). Written and read only where the field group is on, and not even
 * set to 0 elsewhere: so it costs nothing there. In struct scratch, which the compiler does not take apart.
 */
struct tunnel {
	__u32 hash;         /* of all that tells it from others; 0: none */
	__u32 id;           /* as in flow_tunnels */
	__u16 outer_offset; /* of its own header in the frame */
	__u8 kind;          /* of enum tunnel_kind; 0: none */
};

/* What the meter learns. All 0 at first. */
struct packet {
	struct tunnel *tunnel;
	__u64 packets;
	__u64 octets;
	__u64 addr[4];        /* source then destination; IPv4: both in the first word */
	__u32 ifindex;
	__u32 other_ifindex;  /* egress: the input interface */
	__u32 flow_label;
	__u64 fragment_id;    /* of 64 bits for the verifier: it loses sight of half a word of the stack */
	__u32 ports;          /* source, destination, as on the wire; ICMP: 0, then type and code */
	__u16 vlan;
	__u16 inner_vlan;
	__u16 ip_offset;      /* of the IP header in the frame */
	__u16 headers_octets; /* of each packet on the wire: IP, extension and (where it is known) transport header */
	__u16 min_length;     /* of one packet on the wire, as in flow_hot4 */
	__u16 max_length;
	__u16 tcp_flags;      /* nine bits */
	__u8 protocol;
	__u8 direction;
	__u8 tos;
	__u8 ttl;
	__u8 is_ipv6;
	__u8 dont_fragment;
	__u8 more_fragments;
	__u8 late_fragment;   /* its offset is above 0: no transport header in it */
	__u8 priorities;      /* as flow_cold.priorities */
	__u8 transport_octets; /* of the transport header; 0: not known */
	__u8 rate;            /* as flow_cold.rate */
	__u8 not_on_wire;     /* octets of headers that the segments of a super-packet go out without */
};

/*
 * Headers as they lie in the frame. Read through pointers that promise more alignment than
 * there is: without the promise the compiler reads octet by octet, and the verifier knows what
 * the machine can do (it refuses the program where an unaligned read would trap).
 */
struct ethernet_header {
	__u8 mac[12]; /* destination, source */
	__u16 type_be;
} __attribute__((packed, aligned(4)));

struct vlan_header {
	__u16 tci_be, type_be;
};

struct ipv4_header {
	__u8 version_ihl, tos;
	__u16 total_length_be, id_be, fragment_be;
	__u8 ttl, protocol;
	__u16 checksum_be;
	__u32 src, dst;
};

struct ipv6_header {
	__u32 version_class_label_be;
	__u16 payload_length_be;
	__u8 next_header, hop_limit;
	__u64 addr[4];
};

struct extension_header {
	__u8 next, units;
	__u16 fragment_be;
	__u32 id;
};

struct transport_header {
	__u32 ports; /* source, destination; ICMP: the first half is type, code */
	__u32 sequence, acknowledgement;
	__u8 offset_ns, flags; /* TCP: data offset and NS, then the other eight flags */
	__u16 window_be, checksum_be, urgent_be;
};

/*
 * One piece of the stack for all that needs one for a moment: the stack's 512 octets are nearly full, and the compiler
 * gives each variable a piece of its own. A header that is not in the linear part of the frame is copied to it, too:
 * what is needed of a header is read before the next one, or anything else, is put here.
 */
struct scratch {
	union {
		struct ipv6_header header; /* no other one is longer */
		__u16 options[20];
		struct {
			struct fragment_key key;
			struct fragment_value value;
		} fragment;
		struct {
			struct handshake_key key;
			struct handshake value;
		} handshake;
		struct bpf_fib_lookup fib;
	};
	struct tunnel tunnel[TUNNELS]; /* this stays */
};

/* The header at the cursor, until the next one is asked for; 0 where the frame ends before. */
static __always_inline const void *header(const struct frame *f, const enum hook hook, const __u32 octets)
{
	void *at = f->data + f->offset;

	if (likely(at + octets <= f->data_end))
		return at;
	if (hook == HOOK_XDP || skb_load_bytes(f->ctx, f->offset, f->scratch, octets))
		return 0;
	return f->scratch;
}

/* The verifier knows nothing of this number any more, but that it is at most `mask`; it is the same number. */
#define FORGET(number, mask)                                                                        \
	do {                                                                                        \
		__u64 known = (number);                                                             \
		asm volatile("%0 ^= %1\n%0 ^= %1\n%0 &= %2" : "+r"(known) : "r"(unknown), "i"(mask)); \
		(number) = known;                                                                   \
	} while (0)

/*
 * Moves the cursor, and makes the verifier forget all it knew of it but the bound: each path
 * to the same place then looks the same, and the rest is verified once instead of once a path.
 */
static __always_inline int advance(struct frame *f, __u32 octets)
{
	__u64 offset = f->offset + octets, unknown = f->octets;

	if (offset > MAX_OFFSET)
		return -1;
	asm volatile("%0 ^= %1\n%0 ^= %1\n%0 &= %2" : "+r"(offset) : "r"(unknown), "i"(MAX_OFFSET));
	f->offset = offset;
	return 0;
}

/*
 * A packet with all forgotten that the verifier has learned of it on the way here: every way then looks the same to
 * it, and it goes through what follows once and not once for each of a hundred ways. Without this a single field
 * group took half of the million instructions that it is willing to look at; a packet's way to a new flow, all of them
 * (kernel 6.1). For where few packets come, as it costs two operations a member.
 */
static __always_inline void forget_the_way(struct frame *f, struct packet *p, const enum hook hook, const int v6)
{
	__u64 unknown = f->octets;

	f->data = hook == HOOK_XDP ? (void *) (long) ((struct xdp_md *) f->ctx)->data
				   : (void *) (long) ((struct __sk_buff *) f->ctx)->data;
	f->data_end = hook == HOOK_XDP ? (void *) (long) ((struct xdp_md *) f->ctx)->data_end
				       : (void *) (long) ((struct __sk_buff *) f->ctx)->data_end;
	FORGET(f->offset, MAX_OFFSET);
	FORGET(p->packets, -1);
	FORGET(p->octets, -1); /* a jumbogram may announce more than 31 bits */
	FORGET(p->addr[0], -1);
	if (v6) {
		FORGET(p->addr[1], -1);
		FORGET(p->addr[2], -1);
		FORGET(p->addr[3], -1);
	}
	FORGET(p->fragment_id, -1);
	FORGET(p->ports, -1);
	FORGET(p->vlan, 0xffff);
	FORGET(p->inner_vlan, 0xffff);
	FORGET(p->priorities, 0xff);
	FORGET(p->ip_offset, MAX_OFFSET);
	FORGET(p->headers_octets, 0xffff);
	FORGET(p->transport_octets, 0xff);
	FORGET(p->min_length, 0xffff);
	FORGET(p->max_length, 0xffff);
	FORGET(p->tcp_flags, 0x1ff);
	FORGET(p->protocol, 0xff);
	FORGET(p->tos, 0xff);
	FORGET(p->ttl, 0xff);
	FORGET(p->more_fragments, 1);
	FORGET(p->late_fragment, 1);
	p->is_ipv6 = v6;
}

/* Ten times as dear as the coarse clock: only where it is needed. */
static __always_inline __u64 precise_time(const enum hook hook, __u64 replay_ns)
{
	return hook == HOOK_REPLAY ? replay_ns : ktime_get_ns();
}

#endif
