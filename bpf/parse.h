/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From a frame to what the meter needs of it. Headers only, in order: link (link.h), IPv4 or IPv6 (network.h),
 * transport (transport.h). Everything here is true on the wire: what GRO and GSO merged is counted as the segments
 * that it came from or will become.
 */
#ifndef FLOWEXP_PARSE_H
#define FLOWEXP_PARSE_H

#include "link.h"
#include "transport.h"

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

#endif
