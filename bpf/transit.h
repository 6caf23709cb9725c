/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How long a packet is on its way through this host, from the ingress hook to the first egress hook (field group
 * `timing`). Between the two it is one and the same skb, and nothing in that is ours to write to. So its address is
 * kept aside at ingress, with the time and the flow; at egress the flow is told, whoever counts the packet there. A
 * packet that leaves as another skb is not measured. What was kept of an skb that has gone is never taken for that of
 * the next one at its address: whatever comes in by the same interface overwrites it.
 */
#ifndef FLOWEXP_TRANSIT_H
#define FLOWEXP_TRANSIT_H

#include "counters.h"
#include "frame.h"

/* Of one element each where the group is off. */
DEFINE_MAP(timing, BPF_MAP_TYPE_ARRAY, __u32, struct flow_timing, 1, BPF_F_MMAPABLE);
DEFINE_MAP(arrivals, BPF_MAP_TYPE_ARRAY, __u32, struct arrival, 1, 0);

/*
 * What is kept of this skb, or of another one with the same place. A pointer may be stored as a number, but not
 * computed with: it goes through this CPU's counters, where no one else writes.
 */
static __always_inline struct arrival *arrival_of(const struct frame *f, __u64 *skb)
{
	__u32 cpu = get_smp_processor_id(), place;
	struct counters *c = map_lookup(MAP(counters), &cpu);

	if (!c)
		return 0;
	WRITE_ONCE(c->skb, (__u64) (long) f->ctx);
	*skb = READ_ONCE(c->skb);
	place = (*skb >> 8 ^ *skb >> 20) & (ARRIVALS - 1); /* an skb takes 256 octets */
	return map_lookup(MAP(arrivals), &place);
}

static __always_inline void forget_arrival(const struct frame *f)
{
	__u64 skb;
	struct arrival *a = arrival_of(f, &skb);

	if (a)
		WRITE_ONCE(a->skb, 0);
}

static __always_inline void keep_arrival(const struct frame *f, const struct packet *p, __u64 now, __u32 number)
{
	__u64 skb;
	struct arrival *a = arrival_of(f, &skb);

	if (!a)
		return;
	a->ns = now;
	a->ifindex = p->ifindex;
	a->number = number;
	WRITE_ONCE(a->skb, skb);
}

/* At egress: adds this packet's time to the flow that it was metered in at ingress. */
static __always_inline void add_transit(const struct frame *f, const struct packet *p)
{
	struct flow_timing *t;
	struct arrival *a;
	__u64 skb, ns;
	__u32 number;

	a = p->other_ifindex ? arrival_of(f, &skb) : 0;
	if (!a || READ_ONCE(a->skb) != skb || a->ifindex != p->other_ifindex)
		return;
	WRITE_ONCE(a->skb, 0);
	ns = ktime_get_ns() - a->ns;
	number = a->number;
	t = map_lookup(MAP(timing), &number);
	if (!t)
		return;
	atomic_add(&t->now.transits_ns, ns);
	atomic_add(&t->now.transits, 1);
	if (ns > t->max_transit_ns)
		t->max_transit_ns = ns;
}

#endif
