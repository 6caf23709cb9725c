/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The transport header, and how many packets on the wire a super-packet is. */
#ifndef FLOWEXP_TRANSPORT_H
#define FLOWEXP_TRANSPORT_H

#include "network.h"

#define GSO_BY_FRAGS 0xffff

/*
 * Ports, ICMP type and code, TCP flags, as far as they are there: `room` octets of the
 * packet follow its network header, which may be less than the (padded) frame holds.
 * Returns the transport header's length, or 0 where it is not known.
 */
static __always_inline __u32 parse_transport(struct frame *f, struct packet *p, const enum hook hook, __u64 room)
{
	const struct transport_header *l4;
	__u8 protocol = p->protocol;

	if (likely(protocol == PROTOCOL_TCP && room >= 14)) {
		l4 = header(f, hook, 14);
		if (likely(l4)) {
			p->ports = l4->ports;
			p->tcp_flags = (l4->offset_ns & 1) << 8 | l4->flags;
			return (l4->offset_ns >> 4) * 4;
		}
	}
	if (protocol == (p->is_ipv6 ? PROTOCOL_ICMPV6 : PROTOCOL_ICMP)) {
		l4 = room >= 2 ? header(f, hook, 2) : 0;
		if (l4)
			p->ports = join16(0, *(const __u16 *) l4);
		return 0;
	}
	if (protocol != PROTOCOL_TCP && protocol != PROTOCOL_UDP && protocol != PROTOCOL_UDPLITE &&
	    protocol != PROTOCOL_SCTP && protocol != PROTOCOL_DCCP)
		return 0;
	l4 = room >= 4 ? header(f, hook, 4) : 0;
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

#endif
