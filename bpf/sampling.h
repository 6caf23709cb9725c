/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sampling: one packet of each `sampling_interval` that this CPU sees is metered (RFC 5475, sections 5.1 and 5.2.1:
 * the last one by count, or any one of them at random). A packet is what goes over the wire: a super-packet is as
 * many as it has segments, each of which is selected or not. A random number is drawn once a window, and a packet
 * that is not selected costs a comparison and a store, and none of the table's cache lines.
 *
 * An interface may have an interval of its own, and then has windows of its own. Its flows keep which one (flow_cold's
 * `rate`), and a flow is of one interval: what is selected by another one later is another flow (table.h, identify).
 */
#ifndef FLOWEXP_SAMPLING_H
#define FLOWEXP_SAMPLING_H

#include "counters.h"
#include "groups.h"

#define ALL_SELECTED 0xffffffffu

/* Interfaces with an interval of their own. */
DEFINE_MAP(samplers, BPF_MAP_TYPE_PERCPU_HASH, __u32, struct sampler, 4096, 0);

/* Which of the next packets are selected: how many, and whether the last one is. */
static __always_inline void select_of(struct selection *of, struct sampler *s, __u32 interval, __u32 packets)
{
	__u32 selected = 0, windows;

	if (packets > s->left) {
		selected = s->chosen - 1 < s->left;
		packets -= s->left;
		windows = (packets - 1) / interval; /* that begin and end within this packet */
		packets -= windows * interval;
		selected += windows;
		s->left = interval;
		s->chosen = SETTING(sampling_random) ? get_prandom_u32() % interval + 1 : 1;
	}
	selected += s->chosen - 1 < s->left && s->chosen > s->left - packets;
	s->left -= packets;
	of->packets = selected;
	of->last = s->chosen == s->left + 1;
}

/*
 * Decides on a packet before it is parsed, while there is little to keep on the stack. A super-packet whose segments
 * the kernel has not counted is selected as one, or not.
 */
static __always_inline void decide(struct counters *c, const struct frame *f, struct packet *p)
{
	const __u32 packets = f->gso_size && f->gso_segments ? f->gso_segments : 1;
	struct selection *of = &c->selection;

	if (SETTING(sampling_by_interface)) {
		__u32 ifindex = p->ifindex; /* of `p` itself no address is known, and more of it is kept in registers */
		struct sampler *own = map_lookup(MAP(samplers), &ifindex);

		if (own) {
			p->rate = own->rate;
			select_of(of, own, own->interval, packets);
		} else if (SETTING(sampling_interval) > 1) {
			select_of(of, &c->sampler, SETTING(sampling_interval), packets);
		} else {
			of->packets = packets;
		}
	} else {
		select_of(of, &c->sampler, SETTING(sampling_interval), packets);
	}
	if (of->packets == packets)
		of->packets = ALL_SELECTED;
}

/*
 * Makes of a super-packet of which some segments are selected these, and counts the others. All segments but the
 * last are equally long.
 */
static __always_inline void sample_segments(struct counters *c, struct packet *p)
{
	const struct selection *of = &c->selection;

	if (!of->packets || of->packets >= p->packets)
		return;
	/* All of it, and what is selected back again: to keep less at a time on a stack that is nearly full. */
	count(c, COUNT_SEEN, p->packets, p->octets);
	count(c, COUNT_NOT_METERED_NOT_SELECTED, p->packets, p->octets);
	if (!of->last)
		p->min_length = p->max_length;
	else if (of->packets == 1)
		p->max_length = p->min_length;
	p->packets = of->packets;
	p->octets = (p->packets - 1) * ip_length(p, p->max_length) + ip_length(p, p->min_length);
	count(c, COUNT_SEEN, -p->packets, -p->octets);
	count(c, COUNT_NOT_METERED_NOT_SELECTED, -p->packets, -p->octets);
}

#endif
