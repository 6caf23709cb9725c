/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Field group `application`: the first payload of a flow, for the exporter to name the application by. It is copied
 * once a flow, into a ring that the exporter empties many times a second; what finds no room there is counted, and its
 * flow has no name. What the exporter has found out it keeps in the flow's row.
 */
#ifndef FLOWEXP_PAYLOAD_H
#define FLOWEXP_PAYLOAD_H

#include "counters.h"
#include "parse.h"

DEFINE_MAP(application, BPF_MAP_TYPE_ARRAY, __u32, struct flow_application, 1, BPF_F_MMAPABLE);
DEFINE_RING(payloads, 4096); /* its size is the loader's */

/* At least one octet, into one of two sizes, as the kernel wants to know how much to reserve before it has seen the packet. */
static __always_inline int copy_payload(const struct frame *f, const struct packet *p, const enum hook hook,
					__u64 replay_ns, __u32 number, __u32 begin, __u64 octets, const __u32 room)
{
	struct payload *to = ringbuf_reserve(MAP(payloads), sizeof(*to) + room, 0);
	long failed;

	if (!to)
		return -1;
	to->ns = precise_time(hook, replay_ns);
	for (int i = 0; i < 4; i++)
		to->addr[i] = p->addr[i];
	to->number = number;
	to->ports = p->ports;
	to->protocol = p->protocol;
	to->is_ipv6 = p->is_ipv6;
	octets = (octets > room ? room : octets) - 1;
	asm volatile("%0 &= %1" : "+r"(octets) : "i"(room - 1)); /* as it is; older verifiers want to see that */
	octets++;
	to->octets = octets;
	if (hook == HOOK_XDP)
		failed = xdp_load_bytes(f->ctx, begin, to + 1, octets);
	else
		failed = skb_load_bytes(f->ctx, begin, to + 1, octets);
	if (failed)
		ringbuf_discard(to, 0);
	else
		ringbuf_submit(to, 0);
	return 0;
}

static __always_inline void take_payload(const struct frame *f, const struct packet *p, __u64 replay_ns,
					 const enum hook hook, __u32 *number)
{
	const __u64 headers = p->packets * p->headers_octets;
	const __u32 begin = f->offset + p->transport_octets, cpu = get_smp_processor_id();
	struct flow_application *a;
	struct counters *c;
	__u64 octets, there;

	if (!p->transport_octets || p->late_fragment || p->octets <= headers)
		return;
	a = map_lookup(MAP(application), number);
	if (!a || a->is_taken)
		return;
	a->is_taken = 1;
	/* An Ethernet frame may be padded, a captured one cut. */
	octets = p->octets - headers;
	there = hook == HOOK_XDP ? f->octets : ((const struct __sk_buff *) f->ctx)->len;
	if (there <= begin)
		return;
	if (octets > there - begin)
		octets = there - begin;
	if (!(octets > PAYLOAD_SHORT ? copy_payload(f, p, hook, replay_ns, *number, begin, octets, PAYLOAD_LONG)
				     : copy_payload(f, p, hook, replay_ns, *number, begin, octets, PAYLOAD_SHORT)))
		return;
	c = map_lookup(MAP(counters), &cpu);
	if (c)
		count(c, COUNT_PAYLOADS_LOST, 1, 0);
}

#endif
