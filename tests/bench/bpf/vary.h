/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Gives each run of a program under BPF_PROG_TEST_RUN a flow of its own. The frame and skb->cb are the same memory
 * from one repetition to the next, so what is written here is seen by the program under test, and the place in the
 * sequence is kept. Included after <linux/bpf.h>.
 *
 * cb[0] = n: one of n flows at random; 0: the next flow of a sequence, which cb[1] counts.
 */
#ifndef BENCH_VARY_H
#define BENCH_VARY_H

static __u32 (*const bench_random)(void) = (void *) BPF_FUNC_get_prandom_u32;

/* Writes the source address of the frame (IPv4 without a tag). */
static __attribute__((always_inline)) inline int vary(struct __sk_buff *skb)
{
	char *data = (char *) (long) skb->data, *end = (char *) (long) skb->data_end;
	__u32 flow;

	if (data + 30 > end)
		return -1;
	flow = skb->cb[0] ? (__u64) bench_random() * skb->cb[0] >> 32 : skb->cb[1]++;
	*(__u16 *) (data + 26) = 10 | flow >> 16 << 8;
	*(__u16 *) (data + 28) = flow;
	return 0;
}

#endif
