/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Our packet path, whole, behind a frame whose flow changes from run to run. */
#include "../../../bpf/flowexp.bpf.c"
#include "vary.h"

ENTRY("tc") int varied(struct __sk_buff *skb)
{
	if (vary(skb))
		return -1;
	return account_skb(skb, HOOK_INGRESS, 1, 0);
}
