/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The IP header, of either version, and IPv6's extension headers. */
#ifndef FLOWEXP_NETWORK_H
#define FLOWEXP_NETWORK_H

#include "frame.h"

#define MAX_EXTENSION_HEADERS 12

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
	const struct ipv4_header *ip = header(f, hook, sizeof(*ip));
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
	const __u16 *option = header(f, hook, 8);

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
		const __u8 *next_header = header(f, hook, 1);

		if (!next_header)
			return;
		p->protocol = *next_header;
		p->not_on_wire = 8;
		p->octets -= p->not_on_wire;
		advance(f, p->not_on_wire);
	}
}

/* One test for all kinds, of a bit: a chain of comparisons is as many ways for the verifier. */
static __always_inline int is_extension(__u64 protocol)
{
	const __u64 kinds = 1ull << PROTOCOL_HOPOPT | 1ull << PROTOCOL_ROUTING | 1ull << PROTOCOL_FRAGMENT |
			    1ull << PROTOCOL_AH | 1ull << PROTOCOL_DSTOPTS;

	return protocol < 64 ? kinds >> protocol & 1 : protocol == PROTOCOL_MOBILITY;
}

/*
 * Walks the extension headers. Ends at the first header that is none of them, which is
 * the protocol; where the chain is cut (by the packet's `end` or the frame's), the protocol
 * is the header that could not be read. However it is come to, and however it ends, the
 * verifier sees one way: else it would go through the loop for each number of VLAN tags.
 */
static __always_inline void parse_extensions(struct frame *f, struct packet *p, const enum hook hook, __u64 end)
{
	__u64 unknown = f->octets;

	if (likely(!is_extension(p->protocol)))
		return;
	FORGET(p->vlan, 0xffff);
	FORGET(p->inner_vlan, 0xffff);
	FORGET(p->priorities, 0xff);
	FORGET(f->offset, MAX_OFFSET);
	FORGET(p->fragment_id, -1);
	FORGET(p->more_fragments, 1);
	FORGET(p->late_fragment, 1);
	FORGET(end, -1);
	for (int i = 0; i < MAX_EXTENSION_HEADERS; i++) {
		const struct extension_header *ext;
		__u32 octets;
		__u8 next;

		if (f->offset + sizeof(*ext) > end)
			break;
		ext = header(f, hook, sizeof(*ext));
		if (!ext)
			break;
		next = ext->next;
		octets = (ext->units + 1) * 8;
		if (p->protocol == PROTOCOL_AH)
			octets = (ext->units + 2) * 4;
		if (p->protocol == PROTOCOL_FRAGMENT) {
			octets = 8;
			p->more_fragments = be16(ext->fragment_be) & 1;
			p->late_fragment = (be16(ext->fragment_be) & 0xfff8) != 0;
			p->fragment_id = ext->id;
			FORGET(p->more_fragments, 1);
			FORGET(p->late_fragment, 1);
		}
		if (advance(f, octets))
			break;
		p->protocol = next;
		if (p->late_fragment || !is_extension(next))
			break;
	}
	FORGET(p->protocol, 0xff);
}

static __always_inline int parse_ipv6(struct frame *f, struct packet *p, const enum hook hook)
{
	__u32 ip_offset = f->offset;
	const struct ipv6_header *ip = header(f, hook, sizeof(*ip));
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

#endif
