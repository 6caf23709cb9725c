/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sampling: one packet of each `sampling_interval` that this CPU sees is metered (RFC 5475, sections 5.1 and 5.2.1:
 * the last one by count, or any one of them at random). A packet is what goes over the wire: a super-packet is as
 * many as it has segments, each of which is selected or not. A random number is drawn once a window, and a packet
 * that is not selected costs a comparison and a store, and none of the table's cache lines.
 */
#ifndef FLOWEXP_SAMPLING_H
#define FLOWEXP_SAMPLING_H

#include "counters.h"
#include "groups.h"

#define ALL_SELECTED 0xffffffffu

/* How many of the next packets are selected. */
static __always_inline __u32 select_of(struct sampler *s, __u32 packets)
{
	const __u32 interval = SETTING(sampling_interval);
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
	return selected;
}

/*
 * Decides on a packet before it is parsed, while there is little to keep on the stack. A super-packet whose segments
 * the kernel has not counted is selected as one, or not.
 */
static __always_inline void decide(struct sampler *s, const struct frame *f)
{
	__u32 packets = f->gso_size && f->gso_segments ? f->gso_segments : 1;
	__u32 selected = select_of(s, packets);

	s->selected = selected == packets ? ALL_SELECTED : selected;
}

/*
 * Makes of a super-packet of which some segments are selected these, and counts the others. All segments but the
 * last are equally long.
 */
static __always_inline void sample_segments(struct counters *c, struct packet *p)
{
	const struct sampler *s = &c->sampler;

	if (!s->selected || s->selected >= p->packets)
		return;
	/* All of it, and what is selected back again: to keep less at a time on a stack that is nearly full. */
	count(c, COUNT_SEEN, p->packets, p->octets);
	count(c, COUNT_NOT_METERED_NOT_SELECTED, p->packets, p->octets);
	if (s->chosen != s->left + 1) /* the last segment is not among them */
		p->min_length = p->max_length;
	else if (s->selected == 1)
		p->max_length = p->min_length;
	p->packets = s->selected;
	p->octets = (p->packets - 1) * ip_length(p, p->max_length) + ip_length(p, p->min_length);
	count(c, COUNT_SEEN, -p->packets, -p->octets);
	count(c, COUNT_NOT_METERED_NOT_SELECTED, -p->packets, -p->octets);
}

#endif
