/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a flow meter cannot do without, and nothing else: parse, one lookup of the Flow Key in the kernel's hash,
 * two atomic adds, the coarse clock. And nothing at all: what an empty program costs is taken off every figure.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include "vary.h"

#define GO_ON (-1)
#define SECTION(name) __attribute__((section(name), used))
#define be16(x) ((__u16) __builtin_bswap16(x))
#define INLINE static __attribute__((always_inline)) inline

static void *(*const map_lookup)(void *, const void *) = (void *) BPF_FUNC_map_lookup_elem;
static long (*const map_update)(void *, const void *, const void *, __u64) = (void *) BPF_FUNC_map_update_elem;
static __u64 (*const coarse_ns)(void) = (void *) BPF_FUNC_ktime_get_coarse_ns;

/* The Flow Key of IPv4 (addr: source, destination) and of IPv6. */
struct key4 {
	__u32 ifindex;
	__u32 ports;
	__u16 vlan;
	__u8 protocol, direction;
	__u32 addr[2];
};

struct key6 {
	__u32 ifindex;
	__u32 ports;
	__u16 vlan;
	__u8 protocol, direction;
	__u32 addr[8];
};

struct value {
	__u64 packets, octets, last_ns;
};

struct {
	int (*type)[BPF_MAP_TYPE_HASH];
	struct key4 *key;
	struct value *value;
	int (*max_entries)[1 << 21];
} flows4 SECTION(".maps");

struct {
	int (*type)[BPF_MAP_TYPE_HASH];
	struct key6 *key;
	struct value *value;
	int (*max_entries)[1 << 10];
} flows6 SECTION(".maps");

INLINE void add(void *map, const void *key, __u32 octets)
{
	struct value *v = map_lookup(map, key), first = { 1, octets, 0 };

	if (!v) {
		first.last_ns = coarse_ns();
		map_update(map, key, &first, BPF_ANY);
		return;
	}
	__sync_fetch_and_add(&v->octets, octets);
	__sync_fetch_and_add(&v->packets, 1);
	v->last_ns = coarse_ns();
}

INLINE int count(const char *data, const char *end, __u32 ifindex)
{
	__u16 type, vlan = 0;
	const char *ip = data + 14;

	if (ip + 24 > end)
		return GO_ON;
	type = *(__u16 *) (data + 12);
	if (type == be16(0x8100)) {
		vlan = *(__u16 *) (data + 14);
		type = *(__u16 *) (data + 16);
		ip += 4;
	}
	if (type == be16(0x0800)) {
		struct key4 key = { .ifindex = ifindex, .vlan = vlan };

		if (ip + 24 > end)
			return GO_ON;
		key.protocol = ip[9];
		key.addr[0] = *(__u32 *) (ip + 12);
		key.addr[1] = *(__u32 *) (ip + 16);
		key.ports = *(__u32 *) (ip + 20);
		add(&flows4, &key, be16(*(__u16 *) (ip + 2)));
	} else if (type == be16(0x86dd)) {
		struct key6 key = { .ifindex = ifindex, .vlan = vlan };
		const char *l4 = ip + 40;

		if (l4 + 4 > end)
			return GO_ON;
		key.protocol = ip[6];
		for (int i = 0; i < 8; i++)
			key.addr[i] = *(__u32 *) (ip + 8 + 4 * i);
		if (key.protocol == 60) { /* one extension header, of eight octets */
			key.protocol = l4[0];
			l4 += 8;
			if (l4 + 4 > end)
				return GO_ON;
		}
		key.ports = *(__u32 *) l4;
		add(&flows6, &key, 40 + be16(*(__u16 *) (ip + 4)));
	}
	return GO_ON;
}

INLINE int count_skb(struct __sk_buff *skb)
{
	return count((char *) (long) skb->data, (char *) (long) skb->data_end, skb->ifindex);
}

SECTION("tc") int empty_tc(struct __sk_buff *skb) { return GO_ON; }
SECTION("tc") int empty_varied(struct __sk_buff *skb) { return vary(skb) ? GO_ON : GO_ON - 1; }
SECTION("tc") int floor_tc(struct __sk_buff *skb) { return count_skb(skb); }
SECTION("tc") int floor_varied(struct __sk_buff *skb) { return vary(skb) ? GO_ON : count_skb(skb); }
SECTION("xdp") int empty_xdp(struct xdp_md *xdp) { return XDP_PASS; }

SECTION("xdp") int floor_xdp(struct xdp_md *xdp)
{
	count((char *) (long) xdp->data, (char *) (long) xdp->data_end, xdp->ingress_ifindex);
	return XDP_PASS;
}

char licence[] SECTION("license") = "GPL";
