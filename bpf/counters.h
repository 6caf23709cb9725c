/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The ledger's counters of one CPU: adding to them. */
#ifndef FLOWEXP_COUNTERS_H
#define FLOWEXP_COUNTERS_H

#include "dialect.h"

DEFINE_MAP(counters, BPF_MAP_TYPE_ARRAY, __u32, struct counters, 1, BPF_F_MMAPABLE); /* an element a CPU */

static __always_inline void count(struct counters *c, enum counter id, __u64 packets, __u64 octets)
{
	if (id >= COUNTERS)
		return;
	/* Hooks run with bottom halves off: nothing else on this CPU counts meanwhile, but on PREEMPT_RT. */
	if (SETTING(atomic_counters)) {
		atomic_add(&c->count[id].packets, packets);
		if (!__builtin_constant_p(octets) || octets) /* clang makes an atomic OR of an addition of 0 */
			atomic_add(&c->count[id].octets, octets);
	} else {
		c->count[id].packets += packets;
		c->count[id].octets += octets;
	}
}

#endif
