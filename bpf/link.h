/* SPDX-License-Identifier: GPL-2.0-or-later */
/* From a frame's first octet to its IP header: Ethernet and VLAN tags, or nothing. */
#ifndef FLOWEXP_LINK_H
#define FLOWEXP_LINK_H

#include "frame.h"

#define MAX_TAGS 4

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
	const struct ethernet_header *eth = header(f, hook, 14);
	__u16 type;

	if (!eth)
		return COUNT_NOT_METERED_TRUNCATED;
	type = be16(eth->type_be);
	f->offset = 14;

	for (int i = 0; i < MAX_TAGS; i++) {
		if (likely(type != ETHERTYPE_8021Q && type != ETHERTYPE_8021AD && type != ETHERTYPE_QINQ))
			break;
		const struct vlan_header *tag = header(f, hook, sizeof(*tag));

		if (!tag)
			return COUNT_NOT_METERED_TRUNCATED;
		add_tag(p, be16(tag->tci_be));
		type = be16(tag->type_be);
		advance(f, sizeof(*tag));
	}
	f->type = type;
	if (type == ETHERTYPE_IPV6)
		p->is_ipv6 = 1;
	else if (type != ETHERTYPE_IPV4)
		return COUNT_NOT_METERED_NOT_IP;
	return 0;
}

/* A device without a link header: the version nibble tells. */
static __always_inline int parse_no_link(struct frame *f, struct packet *p, const enum hook hook)
{
	const __u8 *first = header(f, hook, 1);
	__u8 version;

	if (!first)
		return COUNT_NOT_METERED_TRUNCATED;
	version = *first >> 4;
	f->type = version == 6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4;
	if (version == 6)
		p->is_ipv6 = 1;
	else if (version != 4)
		return COUNT_NOT_METERED_NOT_IP;
	return 0;
}

#endif
