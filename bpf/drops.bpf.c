/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Field group `drops`: what the kernel threw away of a flow's packets, and why. An object of its own, for only it
 * needs kernel BTF: at the tracepoint skb:kfree_skb there is a struct sk_buff and no longer a hook's context, and
 * where its members are is known from there alone. The packet path pays nothing.
 *
 * A flow is looked for by where the packet came in, and else by where it was to go out. What was dropped before any
 * Observation Point, or in another network namespace, belongs to no flow and is not counted.
 */
#include "table.h"

DEFINE_MAP(drops, BPF_MAP_TYPE_ARRAY, __u32, struct flow_drops, 1, BPF_F_MMAPABLE);

HELPER(long, read_kernel, BPF_FUNC_probe_read_kernel, void *to, __u32 octets, const void *from);

/* Of the kernel's structs what is asked for here; the loader finds the members by their names. */
#define IN_KERNEL __attribute__((preserve_access_index))

struct ns_common {
	unsigned int inum;
} IN_KERNEL;

struct net {
	struct ns_common ns;
} IN_KERNEL;

typedef struct {
	struct net *net;
} IN_KERNEL possible_net_t;

struct net_device {
	int ifindex;
	possible_net_t nd_net;
} IN_KERNEL;

struct sk_buff {
	struct net_device *dev;
	int skb_iif;
	__u16 protocol;
	__u16 network_header;
	unsigned int end;
	unsigned char *head;
} IN_KERNEL;

struct skb_shared_info {
	unsigned short gso_segs;
} IN_KERNEL;

#define IPV6_EXTENSIONS 4

/* Octets of the packet from its network header on. */
static __always_inline int read_packet(const struct sk_buff *skb, __u32 offset, void *to, __u32 octets)
{
	return read_kernel(to, octets, skb->head + skb->network_header + offset);
}

/* Ports as in the Flow Key, and the headers' length: each segment of a super-packet has them. */
static __always_inline int read_transport(const struct sk_buff *skb, struct packet *p, __u32 offset)
{
	struct transport_header l4 = {};

	p->headers_octets = offset;
	if (p->late_fragment)
		return 0;
	switch (p->protocol) {
	case PROTOCOL_TCP:
		if (read_packet(skb, offset, &l4, 16))
			return -1;
		p->headers_octets = offset + (l4.offset_ns >> 4) * 4;
		p->ports = l4.ports;
		return 0;
	case PROTOCOL_UDP:
	case PROTOCOL_UDPLITE:
	case PROTOCOL_DCCP:
	case PROTOCOL_SCTP:
		p->headers_octets = offset + 8;
		if (read_packet(skb, offset, &l4.ports, 4))
			return -1;
		p->ports = l4.ports;
		return 0;
	case PROTOCOL_ICMP:
	case PROTOCOL_ICMPV6:
		if (read_packet(skb, offset, &l4.ports, 4))
			return -1;
		p->ports = join16(0, first16(l4.ports));
		return 0;
	}
	return 0;
}

static __always_inline int read_ipv4(const struct sk_buff *skb, struct packet *p)
{
	struct ipv4_header ip;

	if (read_packet(skb, 0, &ip, sizeof(ip)) || ip.version_ihl >> 4 != 4)
		return -1;
	p->addr[0] = join32(ip.src, ip.dst);
	p->protocol = ip.protocol;
	p->octets = be16(ip.total_length_be);
	p->late_fragment = (be16(ip.fragment_be) & 0x1fff) != 0;
	p->fragment_id = ip.id_be;
	return read_transport(skb, p, (ip.version_ihl & 15) * 4);
}

static __always_inline int read_ipv6(const struct sk_buff *skb, struct packet *p)
{
	__u32 offset = sizeof(struct ipv6_header);
	struct extension_header ext;
	struct ipv6_header ip;

	if (read_packet(skb, 0, &ip, sizeof(ip)) || be32(ip.version_class_label_be) >> 28 != 6)
		return -1;
	p->addr[0] = ip.addr[0];
	p->addr[1] = ip.addr[1];
	p->addr[2] = ip.addr[2];
	p->addr[3] = ip.addr[3];
	p->protocol = ip.next_header;
	p->octets = sizeof(ip) + be16(ip.payload_length_be);
	for (int i = 0; i < IPV6_EXTENSIONS; i++) {
		if (p->protocol != PROTOCOL_HOPOPT && p->protocol != PROTOCOL_ROUTING &&
		    p->protocol != PROTOCOL_DSTOPTS && p->protocol != PROTOCOL_FRAGMENT)
			break;
		if (read_packet(skb, offset, &ext, sizeof(ext)))
			return -1;
		if (p->protocol == PROTOCOL_FRAGMENT) {
			p->late_fragment = (be16(ext.fragment_be) & 0xfff8) != 0;
			p->fragment_id = ext.id;
			offset += 8;
		} else {
			offset += (ext.units + 1) * 8;
		}
		p->protocol = ext.next;
		if (p->late_fragment)
			break;
	}
	return read_transport(skb, p, offset);
}

/* The flow's row, of whichever family; 0 where there is no such flow. */
static __always_inline struct flow_drops *find_row(const struct packet *p, const int v6)
{
	__u32 cpu = get_smp_processor_id(), number;
	struct counters *c = map_lookup(MAP(counters), &cpu);
	struct place at = {};
	struct flow_id id;
	__u64 buckets;

	if (!c)
		return 0;
	buckets = c->buckets[v6];
	identify(&id, p, v6);
	identify_further(&id);
	if (!find(&at, &id, &buckets, p, v6, &number))
		return 0;
	number += v6 ? SETTING(buckets4) * FLOW_WAYS : 0;
	return map_lookup(MAP(drops), &number);
}

static __always_inline void count_drop(const struct sk_buff *skb, struct packet *p, __u32 reason, const int v6)
{
	struct flow_drops *row = 0;
	__u16 segments = 0;
	struct scratch scratch;
	struct frame f = { .scratch = &scratch };

	p->is_ipv6 = v6;
	if (v6 ? read_ipv6(skb, p) : read_ipv4(skb, p))
		return;
	if (p->late_fragment)
		resolve_fragment(&f, p);
	p->ifindex = skb->skb_iif;
	if (p->ifindex)
		row = find_row(p, v6);
	if (!row) {
		p->ifindex = skb->dev->ifindex;
		p->direction = DIRECTION_EGRESS;
		row = find_row(p, v6);
	}
	if (!row)
		return;
	read_kernel(&segments, sizeof(segments), &((struct skb_shared_info *) (skb->head + skb->end))->gso_segs);
	if (!segments)
		segments = 1;
	atomic_add(&row->now.octets, p->octets + (segments - 1) * (__u64) p->headers_octets);
	atomic_add(&row->now.packets, segments);
	WRITE_ONCE(row->reason, reason);
}

ENTRY("tp_btf/kfree_skb") int count_drops(__u64 *arguments)
{
	const struct sk_buff *skb = (void *) arguments[0];
	__u32 reason = arguments[2];
	struct tunnel none = {}; /* what is dropped in one belongs to no flow */
	struct packet p = { .tunnel = &none };
	__u16 protocol = skb->protocol;

	if (skb->dev->nd_net.net->ns.inum != SETTING(netns_inode))
		return 0;
	if (protocol == be16(ETHERTYPE_IPV4))
		count_drop(skb, &p, reason, 0);
	else if (protocol == be16(ETHERTYPE_IPV6))
		count_drop(skb, &p, reason, 1);
	return 0;
}
