/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The packet path. For each packet, at any hook:
 *
 *   1. parse it: link, VLAN tags, IP, transport (parse.h)
 *      (and where field group `tunnels` is on: of the packet inside the tunnel, tunnels.h);
 *   2. count it as seen, on this CPU;
 *   3. leave it if another Observation Point counts it, or it is our own export;
 *   4. leave it if sampling does not select it (sampling.h);
 *   5. add it to its flow, a new one if need be (table.h);
 *   6. what is not metered is counted under its reason.
 *
 * The verdict is always "go on". An entry point is a hook and a kind of link.
 */
#include "sampling.h"
#include "table.h"

DEFINE_MAP(captured, BPF_MAP_TYPE_ARRAY, __u32, struct captured, 1, BPF_F_MMAPABLE);

/* Does someone else account for this packet? */
static __always_inline int is_counted_elsewhere(const struct frame *f, const struct packet *p, const enum hook hook)
{
	__u32 from = p->other_ifindex;

	/* At ingress, too: on loopback the mark comes back in with the packet. */
	if (hook != HOOK_XDP && hook != HOOK_REPLAY && SETTING(own_mark) && ((const struct __sk_buff *) f->ctx)->mark == SETTING(own_mark))
		return COUNT_NOT_METERED_OWN_EXPORT;
	if (hook == HOOK_EGRESS && SETTING(egress_once) && from && map_lookup(MAP(ingress), &from))
		return COUNT_NOT_METERED_SEEN_AT_INGRESS;
	return 0;
}

/*
 * Did it leave one of the exporter's own sockets? Only what was made on this host is looked at: at egress, and where
 * it comes in again on loopback (always 1). A source port and address would say so of a stranger's packet, too.
 */
static __always_inline int is_from_own_socket(const struct packet *p, const enum hook hook, const int v6)
{
	const __u64 to = v6 ? p->addr[2] : second32(p->addr[0]), to_rest = v6 ? p->addr[3] : 0;
	__u32 zero = 0;
	struct control *c;

	if (!SETTING(own_sockets) || hook == HOOK_XDP || hook == HOOK_REPLAY)
		return 0;
	if (hook == HOOK_EGRESS ? p->other_ifindex : p->ifindex != 1)
		return 0;
	if (p->protocol != PROTOCOL_UDP && p->protocol != PROTOCOL_TCP)
		return 0;
	c = map_lookup(MAP(control), &zero);
	for (int i = 0; i < COLLECTORS && c; i++) {
		const struct own_socket *own = &c->own_socket[i];

		/* One branch for all: fewer ways for the verifier. */
		if (!((own->ports ^ p->ports) | (own->protocol ^ p->protocol) | (own->to[0] ^ to) |
		      (own->to[1] ^ to_rest)))
			return 1;
	}
	return 0;
}

/* Counts a packet that is not metered. */
static __always_inline void leave(struct counters *c, int why, const struct packet *p, __u64 octets)
{
	count(c, COUNT_SEEN, p->packets, octets);
	count(c, why, p->packets, octets);
}

/*
 * One family at a time, to the end: where the families met again, what few registers hold was spilled
 * (IPv4 TCP, hot: 28 ns met, 22 so).
 */
static __always_inline void account_ip(struct frame *f, struct packet *p, struct counters *c, __u64 replay_ns,
				       const enum hook hook, const int has_ethernet, const int v6)
{
	int why;

	p->is_ipv6 = v6; /* known to the compiler from here on */
	why = parse_ip(f, p, hook, v6);
	if (unlikely(why)) {
		leave(c, why, p, f->octets);
		return;
	}
	if (SETTING(sampling) && unlikely(f->gso_segments))
		sample_segments(c, p);
	count(c, COUNT_SEEN, p->packets, p->octets);
	why = is_from_own_socket(p, hook, v6) ? COUNT_NOT_METERED_OWN_EXPORT : is_counted_elsewhere(f, p, hook);
	if (SETTING(sampling) && !why && !c->selection.packets)
		why = COUNT_NOT_METERED_NOT_SELECTED;
	if (unlikely(why)) {
		count(c, why, p->packets, p->octets);
		return;
	}
	if (unlikely(p->more_fragments || p->late_fragment))
		resolve_fragment(f, p);
	why = meter(f, p, &c->buckets[v6], replay_ns, hook, has_ethernet, v6);
	if (unlikely(why)) {
		if (why < 0)
			count(c, COUNT_FLOWS_CREATED, 1, 0); /* a constant: verifiers before 6.6 lose sight of -why */
		else
			count(c, why, p->packets, p->octets);
	}
}

static __always_inline int account_packet(struct frame *f, struct packet *p, __u64 replay_ns, const enum hook hook,
					  const int has_ethernet)
{
	int why = has_ethernet ? parse_ethernet(f, p, hook) : parse_no_link(f, p, hook);
	__u32 cpu = get_smp_processor_id();
	struct counters *c = map_lookup(MAP(counters), &cpu);

	if (!c)
		return -1;
	if (GROUP_IS_ON(GROUP_TIMING) && hook == HOOK_INGRESS)
		forget_arrival(f);
	if (GROUP_IS_ON(GROUP_TIMING) && hook == HOOK_EGRESS)
		add_transit(f, p);
	if (GROUP_IS_ON(GROUP_TUNNELS) && open_tunnel(f, p, hook, why))
		why = 0;
	p->packets = 1;
	if (SETTING(sampling) && !why) {
		if (is_counted_elsewhere(f, p, hook))
			c->selection.packets = ALL_SELECTED; /* none of its segments is counted apart */
		else
			decide(c, f, p);
	}
	if (unlikely(why))
		leave(c, why, p, f->octets);
	else if (p->is_ipv6)
		account_ip(f, p, c, replay_ns, hook, has_ethernet, 1);
	else
		account_ip(f, p, c, replay_ns, hook, has_ethernet, 0);
	return -1; /* TC_ACT_UNSPEC, TCX_NEXT: go on */
}

/* captured: what replay knows of the frame, and no other hook. */
static __always_inline int account_skb(struct __sk_buff *skb, const enum hook hook, const int has_ethernet,
				       const struct captured_frame *captured)
{
	struct scratch scratch;
	struct frame f = {
		.ctx = skb,
		.data = (void *) (long) skb->data,
		.data_end = (void *) (long) skb->data_end,
		.scratch = &scratch,
		.octets = skb->len,
		.gso_size = skb->gso_size,
	};
	struct packet p = {
		.tunnel = scratch.tunnel,
		.ifindex = skb->ifindex,
		.direction = hook == HOOK_EGRESS ? DIRECTION_EGRESS : DIRECTION_INGRESS,
	};

	if (unlikely(f.gso_size))
		f.gso_segments = skb->gso_segs;
	if (hook == HOOK_EGRESS)
		p.other_ifindex = skb->ingress_ifindex;
	/* vlan_present decides, not vlan_tci: a priority tag may be all zero. */
	if (skb->vlan_present)
		add_tag(&p, skb->vlan_tci);
	if (hook == HOOK_REPLAY) {
		f.octets = captured->wire_octets;
		p.ifindex = captured->interface;
		return account_packet(&f, &p, captured->time_ns, hook, has_ethernet);
	}
	return account_packet(&f, &p, 0, hook, has_ethernet);
}

/*
 * Puts the next captured frame into the skb, which is one and the same for a whole row of runs. Where that fails the
 * frame is still the next one, and user space sees that nothing goes on.
 */
static __always_inline int account_captured(struct __sk_buff *skb)
{
	__u32 zero = 0, number;
	struct captured *all = map_lookup(MAP(captured), &zero);
	const struct captured_frame *frame;
	__u64 begin, octets;

	if (!all)
		return -1;
	number = all->next;
	if (number >= CAPTURED_FRAMES)
		return -1;
	frame = &all->frame[number];
	begin = frame->begin;
	octets = frame->octets;
	/* In registers, where the verifier sees their bounds. */
	asm volatile("" : "+r"(begin), "+r"(octets));
	begin &= CAPTURED_OCTETS - 1;
	if (octets < 14 || octets > CAPTURED_FRAME_OCTETS)
		return -1;
	if (skb->len != octets && skb_change_tail(skb, octets, 0))
		return -1;
	if (skb_store_bytes(skb, 0, all->octets + begin, octets, 0))
		return -1;
	all->next = number + 1;
	return account_skb(skb, HOOK_REPLAY, 1, frame);
}

ENTRY("tc") int ingress_ethernet(struct __sk_buff *skb) { return account_skb(skb, HOOK_INGRESS, 1, 0); }
ENTRY("tc") int ingress_no_link(struct __sk_buff *skb) { return account_skb(skb, HOOK_INGRESS, 0, 0); }
ENTRY("tc") int egress_ethernet(struct __sk_buff *skb) { return account_skb(skb, HOOK_EGRESS, 1, 0); }
ENTRY("tc") int egress_no_link(struct __sk_buff *skb) { return account_skb(skb, HOOK_EGRESS, 0, 0); }
ENTRY("tc") int replay(struct __sk_buff *skb) { return account_captured(skb); }

ENTRY("xdp") int xdp_ethernet(struct xdp_md *xdp)
{
	struct scratch scratch;
	struct frame f = {
		.ctx = xdp,
		.data = (void *) (long) xdp->data,
		.data_end = (void *) (long) xdp->data_end,
		.scratch = &scratch,
		.octets = xdp->data_end - xdp->data,
	};
	struct packet p = {
		.tunnel = scratch.tunnel,
		.ifindex = xdp->ingress_ifindex,
	};

	account_packet(&f, &p, 0, HOOK_XDP, 1);
	return XDP_PASS;
}
