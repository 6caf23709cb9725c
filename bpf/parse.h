/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From a frame to what the meter needs of it. Headers only, in order: link, VLAN
 * tags, IPv4 or IPv6, transport. Nothing is believed before its length was checked:
 * header() points to a header or fails, and finds data beyond the linear part of an
 * skb, too. Everything here is true on the wire: what GRO and GSO merged is counted
 * as the segments that it came from or will become.
 */
#ifndef FLOWEXP_PARSE_H
#define FLOWEXP_PARSE_H

#include "dialect.h"

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define ETHERTYPE_8021Q 0x8100
#define ETHERTYPE_8021AD 0x88a8
#define ETHERTYPE_QINQ 0x9100 /* before 802.1ad was; still in use */

#define PROTOCOL_HOPOPT 0
#define PROTOCOL_ICMP 1
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define PROTOCOL_DCCP 33
#define PROTOCOL_ROUTING 43
#define PROTOCOL_FRAGMENT 44
#define PROTOCOL_AH 51
#define PROTOCOL_ICMPV6 58
#define PROTOCOL_DSTOPTS 60
#define PROTOCOL_SCTP 132
#define PROTOCOL_MOBILITY 135
#define PROTOCOL_UDPLITE 136

#define MAX_TAGS 4
#define MAX_EXTENSION_HEADERS 12
#define MAX_OFFSET 0x3fff /* no header is looked for beyond this; tells the verifier, too */

#define GSO_BY_FRAGS 0xffff

enum hook { HOOK_INGRESS, HOOK_EGRESS, HOOK_XDP, HOOK_REPLAY };

/* Where the packet is; filled by the entry point from its context, which only it knows. */
struct frame {
	void *ctx;
	void *data;
	void *data_end;
	__u32 octets;        /* whole frame, the part that is not linear included */
	__u32 gso_segments;  /* 0: unknown or none */
	__u32 gso_size;      /* payload of a segment; 0: no super-packet */
	__u32 offset;        /* cursor: the next header, from data */
};

/* What the meter learns. All 0 at first. */
struct packet {
	__u64 packets;
	__u64 octets;
	__u64 addr[4];        /* source then destination; IPv4: both in the first word */
	__u32 ifindex;
	__u32 other_ifindex;  /* egress: the input interface */
	__u32 flow_label;
	__u32 fragment_id;
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

/* A header's copy, where it is not in the linear part of the frame. */
union header_copy {
	struct ethernet_header ethernet;
	struct vlan_header vlan;
	struct ipv4_header ipv4;
	struct ipv6_header ipv6;
	struct extension_header extension;
	struct transport_header transport;
	__u16 option[4];
	__u8 octet;
};

/* The header at the cursor; 0 where the frame ends before. */
static __always_inline const void *header(const struct frame *f, const enum hook hook, union header_copy *copy,
					  const __u32 octets)
{
	void *at = f->data + f->offset;

	if (likely(at + octets <= f->data_end))
		return at;
	if (hook == HOOK_XDP || skb_load_bytes(f->ctx, f->offset, copy, octets))
		return 0;
	return copy;
}

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

/* Takes one more tag: the first is the outer one, the second the inner. */
static __always_inline void add_tag(struct packet *p, __u16 tci)
{
	__u16 tag = (tci & 0xfff) | VLAN_PRESENT;

	if (!p->vlan) {
		p->vlan = tag;
		p->priorities = tci >> 12 << 4;
	} else if (!p->inner_vlan) {
		p->inner_vlan = tag;
		p->priorities |= tci >> 12;
	}
}

/* Ethernet and the tags in the payload; what the kernel has taken out is in p->vlan already. */
static __always_inline int parse_ethernet(struct frame *f, struct packet *p, const enum hook hook)
{
	union header_copy copy;
	const struct ethernet_header *eth = header(f, hook, &copy, 14);
	__u16 type;

	if (!eth)
		return COUNT_NOT_METERED_TRUNCATED;
	type = be16(eth->type_be);
	f->offset = 14;

	for (int i = 0; i < MAX_TAGS; i++) {
		if (likely(type != ETHERTYPE_8021Q && type != ETHERTYPE_8021AD && type != ETHERTYPE_QINQ))
			break;
		const struct vlan_header *tag = header(f, hook, &copy, sizeof(*tag));

		if (!tag)
			return COUNT_NOT_METERED_TRUNCATED;
		add_tag(p, be16(tag->tci_be));
		type = be16(tag->type_be);
		advance(f, sizeof(*tag));
	}
	if (type == ETHERTYPE_IPV6)
		p->is_ipv6 = 1;
	else if (type != ETHERTYPE_IPV4)
		return COUNT_NOT_METERED_NOT_IP;
	return 0;
}

/* A device without a link header: the version nibble tells. */
static __always_inline int parse_no_link(struct frame *f, struct packet *p, const enum hook hook)
{
	union header_copy copy;
	const __u8 *first = header(f, hook, &copy, 1);
	__u8 version;

	if (!first)
		return COUNT_NOT_METERED_TRUNCATED;
	version = *first >> 4;
	if (version == 6)
		p->is_ipv6 = 1;
	else if (version != 4)
		return COUNT_NOT_METERED_NOT_IP;
	return 0;
}

/*
 * The frame has to hold what the IP header announces. A capture may be cut, and its
 * IP length is believed: replay does not ask.
 */
static __always_inline int check_length(const struct frame *f, __u32 ip_offset, const enum hook hook,
					__u64 ip_octets)
{
	if (hook != HOOK_REPLAY && ip_octets > f->octets - ip_offset)
		return COUNT_NOT_METERED_MALFORMED;
	return 0;
}

static __always_inline int parse_ipv4(struct frame *f, struct packet *p, const enum hook hook)
{
	__u32 ip_offset = f->offset;
	union header_copy copy;
	const struct ipv4_header *ip = header(f, hook, &copy, sizeof(*ip));
	__u32 header_octets;
	__u16 fragment;

	if (!ip)
		return COUNT_NOT_METERED_TRUNCATED;
	header_octets = (ip->version_ihl & 15) * 4;
	p->octets = be16(ip->total_length_be);
	/* Length 0 is a super-packet of more than 65535 octets (BIG TCP) or of a segmenting device. */
	if (!p->octets && (f->gso_size || hook == HOOK_REPLAY))
		p->octets = f->octets - ip_offset;
	if (ip->version_ihl >> 4 != 4 || header_octets < sizeof(*ip) || p->octets < header_octets)
		return COUNT_NOT_METERED_MALFORMED;

	p->addr[0] = join32(ip->src, ip->dst);
	p->tos = ip->tos;
	p->ttl = ip->ttl;
	p->protocol = ip->protocol;
	fragment = be16(ip->fragment_be);
	p->dont_fragment = fragment >> 14 & 1;
	p->more_fragments = fragment >> 13 & 1;
	p->late_fragment = (fragment & 0x1fff) != 0;
	p->fragment_id = ip->id_be;
	if (likely(header_octets == sizeof(*ip)))
		f->offset += sizeof(*ip);
	else
		advance(f, header_octets);
	return check_length(f, ip_offset, hook, p->octets);
}

/* Reads the jumbo payload option (RFC 2675) where it is the first of the hop-by-hop options. */
static __always_inline __u32 jumbo_octets(const struct frame *f, const enum hook hook)
{
	union header_copy copy;
	const __u16 *option = header(f, hook, &copy, sizeof(copy.option));

	if (!option || be16(option[1]) != 0xc204)
		return 0;
	return (__u32) be16(option[2]) << 16 | be16(option[3]);
}

/* Payload length 0: a jumbogram, a super-packet (BIG TCP), or no payload. */
static __always_inline void long_ipv6(struct frame *f, struct packet *p, const enum hook hook, __u32 ip_offset)
{
	__u32 jumbo = p->protocol == PROTOCOL_HOPOPT ? jumbo_octets(f, hook) : 0;
	__u32 octets = f->octets - ip_offset;

	if (!f->gso_size) {
		p->octets += jumbo;
		/* A capture does not tell super-packets; what no other packet's length can be is one. */
		if (hook == HOOK_REPLAY && !jumbo && octets > 0xffff + sizeof(struct ipv6_header))
			p->octets = octets;
		return;
	}
	p->octets = octets;
	if (jumbo) {
		/* The kernel's own jumbo header: the segments go out without it. */
		union header_copy copy;
		const __u8 *next_header = header(f, hook, &copy, 1);

		if (!next_header)
			return;
		p->protocol = *next_header;
		p->not_on_wire = 8;
		p->octets -= p->not_on_wire;
		advance(f, p->not_on_wire);
	}
}

/*
 * Walks the extension headers. Ends at the first header that is none of them, which is
 * the protocol; where the chain is cut (by the packet's `end` or the frame's), the protocol
 * is the header that could not be read.
 */
static __always_inline void parse_extensions(struct frame *f, struct packet *p, const enum hook hook, __u64 end)
{
	union header_copy copy;

	for (int i = 0; i < MAX_EXTENSION_HEADERS; i++) {
		const struct extension_header *ext;
		__u8 protocol = p->protocol, next;
		__u32 octets;

		if (protocol != PROTOCOL_HOPOPT && protocol != PROTOCOL_ROUTING && protocol != PROTOCOL_FRAGMENT &&
		    protocol != PROTOCOL_AH && protocol != PROTOCOL_DSTOPTS && protocol != PROTOCOL_MOBILITY)
			return;
		if (f->offset + sizeof(*ext) > end)
			return;
		ext = header(f, hook, &copy, sizeof(*ext));
		if (!ext)
			return;
		if (protocol == PROTOCOL_FRAGMENT) {
			octets = 8;
			p->more_fragments = be16(ext->fragment_be) & 1;
			p->late_fragment = (be16(ext->fragment_be) & 0xfff8) != 0;
			p->fragment_id = ext->id;
		} else if (protocol == PROTOCOL_AH) {
			octets = (ext->units + 2) * 4;
		} else {
			octets = (ext->units + 1) * 8;
		}
		next = ext->next;
		if (advance(f, octets))
			return;
		p->protocol = next;
		if (p->late_fragment)
			return;
	}
}

static __always_inline int parse_ipv6(struct frame *f, struct packet *p, const enum hook hook)
{
	__u32 ip_offset = f->offset;
	union header_copy copy;
	const struct ipv6_header *ip = header(f, hook, &copy, sizeof(*ip));
	__u16 payload_octets;
	__u32 first;

	if (!ip)
		return COUNT_NOT_METERED_TRUNCATED;
	first = be32(ip->version_class_label_be);
	if (first >> 28 != 6)
		return COUNT_NOT_METERED_MALFORMED;
	p->addr[0] = ip->addr[0];
	p->addr[1] = ip->addr[1];
	p->addr[2] = ip->addr[2];
	p->addr[3] = ip->addr[3];
	p->tos = first >> 20;
	p->flow_label = first & 0xfffff;
	p->ttl = ip->hop_limit;
	p->protocol = ip->next_header;
	payload_octets = be16(ip->payload_length_be);
	p->octets = sizeof(*ip) + payload_octets;
	f->offset += sizeof(*ip);
	if (unlikely(!payload_octets))
		long_ipv6(f, p, hook, ip_offset);
	parse_extensions(f, p, hook, ip_offset + p->octets);
	return check_length(f, ip_offset, hook, p->octets);
}

/*
 * Ports, ICMP type and code, TCP flags, as far as they are there: `room` octets of the
 * packet follow its network header, which may be less than the (padded) frame holds.
 * Returns the transport header's length, or 0 where it is not known.
 */
static __always_inline __u32 parse_transport(struct frame *f, struct packet *p, const enum hook hook, __u64 room)
{
	union header_copy copy;
	const struct transport_header *l4;
	__u8 protocol = p->protocol;

	if (likely(protocol == PROTOCOL_TCP && room >= 14)) {
		l4 = header(f, hook, &copy, 14);
		if (likely(l4)) {
			p->ports = l4->ports;
			p->tcp_flags = (l4->offset_ns & 1) << 8 | l4->flags;
			return (l4->offset_ns >> 4) * 4;
		}
	}
	if (protocol == (p->is_ipv6 ? PROTOCOL_ICMPV6 : PROTOCOL_ICMP)) {
		l4 = room >= 2 ? header(f, hook, &copy, 2) : 0;
		if (l4)
			p->ports = join16(0, *(const __u16 *) l4);
		return 0;
	}
	if (protocol != PROTOCOL_TCP && protocol != PROTOCOL_UDP && protocol != PROTOCOL_UDPLITE &&
	    protocol != PROTOCOL_SCTP && protocol != PROTOCOL_DCCP)
		return 0;
	l4 = room >= 4 ? header(f, hook, &copy, 4) : 0;
	if (l4)
		p->ports = l4->ports;
	return protocol == PROTOCOL_UDP ? 8 : 0;
}

/* As flow_hot4 has it: IPv4 total length, IPv6 payload length, at most 65535. */
static __always_inline __u16 length_field(const struct packet *p, __u64 octets)
{
	if (p->is_ipv6)
		octets -= sizeof(struct ipv6_header);
	return octets > 0xffff ? 0xffff : octets;
}

/*
 * A super-packet: counts its segments, each with its own network and transport header
 * (`headers` octets before the payload). Only TCP and UDP are walked: of other super-packets,
 * and of a tunnel's (whose segments do not follow from the outer header), the segments'
 * octets cannot be told. A tunnel in UDP shows by a segment count that does not fit, or by its port.
 */
static __always_inline int count_segments(const struct frame *f, struct packet *p, __u32 headers, __u32 transport)
{
	__u64 payload, segments, last;

	if (f->gso_segments)
		p->packets = f->gso_segments;
	if (f->gso_size == GSO_BY_FRAGS || !transport || p->octets < headers)
		return COUNT_NOT_METERED_UNKNOWN_GSO;
	payload = p->octets - headers;
	segments = (payload + f->gso_size - 1) / f->gso_size;
	if (p->protocol == PROTOCOL_UDP) {
		__u16 port = be16(second16(p->ports));

		if ((f->gso_segments && f->gso_segments != segments) ||
		    port == 4789 || port == 8472 || port == 6081) /* VXLAN, VXLAN before IANA, Geneve */
			return COUNT_NOT_METERED_UNKNOWN_GSO;
	}
	if (f->gso_segments)
		segments = f->gso_segments;
	if (segments < 2)
		return 0;
	p->packets = segments;
	p->octets += (segments - 1) * headers;
	p->max_length = length_field(p, headers + f->gso_size);
	last = payload - (segments - 1) * f->gso_size;
	if (last < f->gso_size)
		p->min_length = length_field(p, headers + last);
	else
		p->min_length = p->max_length;
	return 0;
}

/*
 * Parses an IP packet. Returns 0, or the reason why it is not metered. One family at a time, and no meeting
 * again before the packet is in its flow: what few registers hold is not spilled where the families would meet.
 */
static __always_inline int parse_ip(struct frame *f, struct packet *p, const enum hook hook, const int v6)
{
	__u32 ip_offset = f->offset, headers, transport = 0;
	int why = v6 ? parse_ipv6(f, p, hook) : parse_ipv4(f, p, hook);

	if (why)
		return why;
	headers = f->offset - ip_offset - p->not_on_wire;
	if (!p->late_fragment)
		transport = parse_transport(f, p, hook, p->octets > headers ? p->octets - headers : 0);
	headers += transport;
	if (SETTING(groups)) {
		p->ip_offset = ip_offset;
		p->headers_octets = headers;
		p->transport_octets = transport;
	}
	p->min_length = p->max_length = length_field(p, p->octets);
	if (unlikely(f->gso_size))
		return count_segments(f, p, headers, transport);
	return 0;
}

/* The verifier knows nothing of this number any more, but that it is at most `mask`; it is the same number. */
#define FORGET(number, mask)                                                                        \
	do {                                                                                        \
		__u64 known = (number);                                                             \
		asm volatile("%0 ^= %1\n%0 ^= %1\n%0 &= %2" : "+r"(known) : "r"(unknown), "i"(mask)); \
		(number) = known;                                                                   \
	} while (0)

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
	FORGET(p->ports, -1);
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

#endif
