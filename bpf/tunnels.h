/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Field group `tunnels`: takes the outer headers off a packet that comes through a tunnel, before it is parsed. So
 * the inner packet is what is metered: its addresses and ports are the Flow Key, and its IP length is what counts.
 * The tunnel is part of the key as well (its kind, its identifier and the outer addresses), by a hash.
 *
 * One tunnel is opened; a tunnel in it is a packet like any other. Whatever is not certain is left as it is, and the
 * outer packet is metered: a fragment, an inner protocol other than IP, an inner packet that is not whole.
 */
#ifndef FLOWEXP_TUNNELS_H
#define FLOWEXP_TUNNELS_H

#include "frame.h"
#include "hash.h"

#define PORT_VXLAN 4789
#define PORT_VXLAN_LINUX 8472 /* before IANA had one; still the kernel's own default */
#define PORT_GENEVE 6081
#define PORT_GTPU 2152

#define GRE_CHECKSUM 0x8000
#define GRE_KEY 0x2000
#define GRE_SEQUENCE 0x1000

#define VXLAN_HAS_VNI 0x08000000
#define GENEVE_IS_CONTROL 0x00800000

#define GTPU_DATA 0x30ff0000 /* version 1, GTP and not GTP'; a G-PDU */
#define GTPU_DATA_MASK 0xf0ff0000
#define GTPU_OPTIONAL 0x07000000
#define GTPU_EXTENDED 0x04000000
#define GTPU_EXTENSIONS 2 /* walked of one packet; 5G has one */

#define MPLS_LABELS 4
#define MPLS_BOTTOM 0x100

#define PPPOE_SESSION 0x1100 /* version 1, type 1, code 0 */
#define PPP_IPV4 0x0021
#define PPP_IPV6 0x0057

DEFINE_MAP(tunnels, BPF_MAP_TYPE_ARRAY, __u32, struct flow_tunnels, 1, BPF_F_MMAPABLE);

/* While a tunnel is looked into: `at` goes ahead of the frame's own cursor, which moves when all is certain. */
struct opening {
	struct frame at;
	__u64 outer;  /* hash of the outer addresses */
	__u64 name;   /* what tells this tunnel from others of its kind between these addresses */
	__u32 id;     /* as struct flow_tunnels has it */
	__u16 inner;  /* EtherType of what is inside; 0: the version nibble tells */
	__u8 kind;
};

/* GRE (RFC 2784, 2890); -1: a version, a flag or an option that is not known here, PPTP's (RFC 2637) among them. */
static __always_inline int open_gre(struct opening *o, const enum hook hook)
{
	const __u32 *word = header(&o->at, hook, 4);
	__u32 flags;

	if (!word)
		return -1;
	flags = be32(*word) >> 16;
	o->inner = be32(*word);
	o->kind = TUNNEL_GRE;
	if (flags & ~(GRE_CHECKSUM | GRE_KEY | GRE_SEQUENCE) || advance(&o->at, flags & GRE_CHECKSUM ? 8 : 4))
		return -1;
	if (flags & GRE_KEY) {
		word = header(&o->at, hook, 4);
		if (!word)
			return -1;
		o->name = o->id = be32(*word);
		advance(&o->at, 4);
	}
	return flags & GRE_SEQUENCE ? advance(&o->at, 4) : 0;
}

/* The optional part of a GTP-U header and its extension headers (3GPP TS 29.281, section 5). */
static __always_inline int skip_gtpu_options(struct opening *o, const enum hook hook, int extended)
{
	const __u8 *octet = header(&o->at, hook, 4);
	__u8 next;

	if (!octet)
		return -1;
	next = extended ? octet[3] : 0;
	advance(&o->at, 4);
	for (int i = 0; i < GTPU_EXTENSIONS && next; i++) {
		octet = header(&o->at, hook, 1);
		if (!octet || !*octet || advance(&o->at, *octet * 4 - 1))
			return -1;
		octet = header(&o->at, hook, 1);
		if (!octet)
			return -1;
		next = *octet;
		advance(&o->at, 1);
	}
	return next ? -1 : 0;
}

/* VXLAN (RFC 7348), Geneve (RFC 8926), GTP-U: by their port. All have their identifier in one place. */
static __always_inline int open_udp(struct opening *o, const enum hook hook)
{
	const __u32 *word = header(&o->at, hook, 16);
	__u32 first;
	__u16 port;

	if (!word)
		return -1;
	port = be32(word[0]);
	first = be32(word[2]);
	o->id = be32(word[3]);
	advance(&o->at, 16);
	if ((port == PORT_VXLAN || port == PORT_VXLAN_LINUX) && first & VXLAN_HAS_VNI) {
		o->kind = TUNNEL_VXLAN;
		o->inner = ETHERTYPE_BRIDGED;
		o->name = o->id >>= 8;
		return 0;
	}
	if (port == PORT_GENEVE && !(first >> 30) && !(first & GENEVE_IS_CONTROL)) {
		o->kind = TUNNEL_GENEVE;
		o->inner = first;
		o->name = o->id >>= 8;
		return advance(&o->at, (first >> 24 & 0x3f) * 4);
	}
	if (port == PORT_GTPU && (first & GTPU_DATA_MASK) == GTPU_DATA) {
		o->kind = TUNNEL_GTPU;
		o->name = o->id;
		return first & GTPU_OPTIONAL ? skip_gtpu_options(o, hook, first & GTPU_EXTENDED) : 0;
	}
	return -1;
}

/* IP in IP (RFC 2003, 2473, 4213), GRE, and what is in UDP. */
static __always_inline int is_tunnel(__u8 protocol)
{
	return protocol == PROTOCOL_IPV4 || protocol == PROTOCOL_IPV6 || protocol == PROTOCOL_GRE ||
	       protocol == PROTOCOL_UDP;
}

/* Goes over the outer IP header, and returns what comes behind it; -1: no tunnel, or no whole packet of one. */
static __always_inline int open_ipv4(struct opening *o, const enum hook hook)
{
	const struct ipv4_header *ip = header(&o->at, hook, sizeof(*ip));
	__u8 protocol, units;

	if (!ip || !is_tunnel(ip->protocol) || be16(ip->fragment_be) & 0x3fff || ip->version_ihl < 0x45)
		return -1;
	protocol = ip->protocol;
	units = ip->version_ihl & 15;
	o->outer = HASH(join32(ip->src, ip->dst), 0);
	return advance(&o->at, units * 4) ? -1 : protocol;
}

static __always_inline int open_ipv6(struct opening *o, const enum hook hook)
{
	const struct ipv6_header *ip = header(&o->at, hook, sizeof(*ip));
	const struct extension_header *ext;
	__u8 protocol;

	if (!ip)
		return -1;
	protocol = ip->next_header;
	o->outer = HASH(ip->addr[0], 0) + HASH(ip->addr[1], 1) + HASH(ip->addr[2], 2) + HASH(ip->addr[3], 3);
	advance(&o->at, sizeof(*ip));
	if (protocol == PROTOCOL_DSTOPTS) { /* where Linux has its Tunnel Encapsulation Limit (RFC 2473, section 5.1) */
		ext = header(&o->at, hook, sizeof(*ext));
		if (!ext)
			return -1;
		protocol = ext->next;
		if (advance(&o->at, (ext->units + 1) * 8))
			return -1;
	}
	return is_tunnel(protocol) ? protocol : -1;
}

static __always_inline int open_ip(struct opening *o, const enum hook hook, const int v6)
{
	switch (v6 ? open_ipv6(o, hook) : open_ipv4(o, hook)) {
	case PROTOCOL_IPV4:
		o->kind = TUNNEL_IP;
		o->inner = ETHERTYPE_IPV4;
		return 0;
	case PROTOCOL_IPV6:
		o->kind = TUNNEL_IP;
		o->inner = ETHERTYPE_IPV6;
		return 0;
	case PROTOCOL_GRE:
		return open_gre(o, hook);
	case PROTOCOL_UDP:
		return open_udp(o, hook);
	}
	return -1;
}

/* MPLS (RFC 3032): all labels name the tunnel; the first of them, with Exp and S, is its identifier. */
static __always_inline int open_mpls(struct opening *o, const enum hook hook)
{
	o->kind = TUNNEL_MPLS;
	for (int i = 0; i < MPLS_LABELS; i++) {
		const __u32 *word = header(&o->at, hook, 4);
		__u32 entry;

		if (!word)
			return -1;
		entry = be32(*word);
		if (!i)
			o->id = entry >> 8;
		o->name = o->name * 0x9e3779b97f4a7c15ull + (entry >> 12); /* a name of 64 bits for 80 of labels */
		advance(&o->at, 4);
		if (entry & MPLS_BOTTOM)
			return 0;
	}
	return -1;
}

/* A session's packets (RFC 2516), of IPv4 or IPv6 (RFC 1332, 5072). */
static __always_inline int open_pppoe(struct opening *o, const enum hook hook)
{
	const __u32 *word = header(&o->at, hook, 8);
	__u16 protocol;

	if (!word || be32(word[0]) >> 16 != PPPOE_SESSION)
		return -1;
	protocol = be32(word[1]);
	o->kind = TUNNEL_PPPOE;
	o->name = o->id = be32(word[0]) & 0xffff;
	o->inner = protocol == PPP_IPV4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6;
	return protocol == PPP_IPV4 || protocol == PPP_IPV6 ? advance(&o->at, 8) : -1;
}

/*
 * Whether the frame holds all that the inner header announces. Of a super-packet not less, either: else its segments
 * are packets of the tunnel's, each with an inner packet of its own.
 */
static __always_inline int is_whole(const struct frame *at, const enum hook hook, __u32 ip_octets)
{
	__u32 left = at->octets - at->offset;

	return at->gso_size ? ip_octets == left : hook == HOOK_REPLAY || ip_octets <= left;
}

/* The version of the IP packet at the cursor, or 0 where none is: 4 or 6. */
static __always_inline int inner_version(struct opening *o, const enum hook hook)
{
	const struct ethernet_header *eth;
	const struct ipv4_header *ip4;
	const struct ipv6_header *ip6;

	if (o->inner == ETHERTYPE_BRIDGED) {
		eth = header(&o->at, hook, 14);
		if (!eth)
			return 0;
		o->inner = be16(eth->type_be);
		advance(&o->at, 14);
	}
	ip4 = header(&o->at, hook, sizeof(*ip4));
	if (!ip4)
		return 0;
	if (ip4->version_ihl >> 4 == 4)
		return (!o->inner || o->inner == ETHERTYPE_IPV4) && (ip4->version_ihl & 15) >= 5 &&
		       be16(ip4->total_length_be) >= (ip4->version_ihl & 15) * 4 &&
		       is_whole(&o->at, hook, be16(ip4->total_length_be)) ? 4 : 0;
	if (ip4->version_ihl >> 4 != 6 || (o->inner && o->inner != ETHERTYPE_IPV6))
		return 0;
	ip6 = header(&o->at, hook, sizeof(*ip6));
	return ip6 && is_whole(&o->at, hook, sizeof(*ip6) + be16(ip6->payload_length_be)) ? 6 : 0;
}

static __always_inline int open_outer(struct opening *o, const enum hook hook)
{
	switch (o->at.type) {
	case ETHERTYPE_IPV4:
		return open_ip(o, hook, 0);
	case ETHERTYPE_IPV6:
		return open_ip(o, hook, 1);
	case ETHERTYPE_MPLS:
		return open_mpls(o, hook);
	case ETHERTYPE_PPPOE:
		return open_pppoe(o, hook);
	}
	return -1;
}

/*
 * Moves the cursor to the inner IP header of the tunnel that begins at it, if one does: then returns 1. Whether or
 * not, the verifier sees one end. `why`: what became of the link header.
 */
static __always_inline int open_tunnel(struct frame *f, struct packet *p, const enum hook hook, int why)
{
	struct opening o = { .at = *f };
	__u64 unknown = f->octets;
	int version = (!why || why == COUNT_NOT_METERED_NOT_IP) && !open_outer(&o, hook) ? inner_version(&o, hook) : 0;
	struct tunnel *t = p->tunnel;

	t->outer_offset = f->offset;
	t->hash = t->id = t->kind = 0;
	if (version) {
		p->is_ipv6 = version == 6;
		t->hash = (o.outer + HASH(o.name ^ (__u64) o.kind << 60, 4)) >> 32;
		t->id = o.id;
		t->kind = o.kind;
		f->offset = o.at.offset;
	}
	FORGET(f->offset, MAX_OFFSET);
	FORGET(p->is_ipv6, 1);
	FORGET(t->hash, -1);
	FORGET(t->id, -1);
	FORGET(t->kind, 0xff);
	FORGET(t->outer_offset, MAX_OFFSET);
	return version != 0;
}

/* As many octets as the longest stack: behind a shorter one there is an IP header, and the entry with S ends it. */
static __always_inline void keep_labels(struct flow_tunnels *t, struct frame *at, const enum hook hook)
{
	const __u32 *stack = header(at, hook, MPLS_LABELS * 4);

	if (stack)
		__builtin_memcpy(t->src_addr, stack, MPLS_LABELS * 4);
}

/* What a flow keeps of its tunnel; once, as it is made. */
static __always_inline void keep_tunnel(const struct frame *f, const struct packet *p, const enum hook hook,
					__u32 *number)
{
	struct flow_tunnels *t = map_lookup(MAP(tunnels), number);
	struct frame at = *f;
	const struct ipv6_header *ip6;
	const struct ipv4_header *ip4;

	if (!t || !p->tunnel->kind)
		return;
	t->id = p->tunnel->id;
	t->kind = p->tunnel->kind;
	if (p->tunnel->kind == TUNNEL_PPPOE)
		return;
	at.offset = p->tunnel->outer_offset;
	if (p->tunnel->kind == TUNNEL_MPLS) {
		keep_labels(t, &at, hook);
		return;
	}
	ip4 = header(&at, hook, sizeof(*ip4));
	if (!ip4)
		return;
	t->ip_version = ip4->version_ihl >> 4;
	if (t->ip_version == 4) {
		__builtin_memcpy(t->src_addr, &ip4->src, 4);
		__builtin_memcpy(t->dst_addr, &ip4->dst, 4);
		return;
	}
	ip6 = header(&at, hook, sizeof(*ip6));
	if (!ip6)
		return;
	__builtin_memcpy(t->src_addr, &ip6->addr[0], 16);
	__builtin_memcpy(t->dst_addr, &ip6->addr[2], 16);
}

#endif
