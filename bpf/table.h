/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The flow table: find a flow's slot or make one, and add the packet to it.
 *
 * A flow lives in one of two buckets, both from its hash. The slot that the hash
 * prefers in the first is tried at once, without a look at the tags: in a table that
 * is not crowded nearly every packet ends there, with one cache line read. Else the
 * tags of both buckets tell which slots are worth a comparison. Which buckets these are depends on how many
 * are in use (flow.h, enum flow_extent).
 *
 * Many CPUs and the exporter work on this at once without a lock. What makes it safe
 * is who may write what (flow.h, enum flow_ctl), and that the exporter waits for a
 * grace period between CLOSING and reading the final counters, and again before
 * RETIRED becomes FREE: a program that saw LIVE, or a free slot, has ended by then.
 */
#ifndef FLOWEXP_TABLE_H
#define FLOWEXP_TABLE_H

#include "groups.h"

/* Sizes of the arrays are the loader's: it makes the maps. */
DEFINE_MAP(tags4, BPF_MAP_TYPE_ARRAY, __u32, struct bucket_tags, 1, BPF_F_MMAPABLE);
DEFINE_MAP(tags6, BPF_MAP_TYPE_ARRAY, __u32, struct bucket_tags, 1, BPF_F_MMAPABLE);
DEFINE_MAP(hot4, BPF_MAP_TYPE_ARRAY, __u32, struct flow_hot4, 1, BPF_F_MMAPABLE);
DEFINE_MAP(hot6, BPF_MAP_TYPE_ARRAY, __u32, struct flow_hot6, 1, BPF_F_MMAPABLE);
DEFINE_MAP(cold4, BPF_MAP_TYPE_ARRAY, __u32, struct flow_cold, 1, BPF_F_MMAPABLE);
DEFINE_MAP(cold6, BPF_MAP_TYPE_ARRAY, __u32, struct flow_cold, 1, BPF_F_MMAPABLE);
DEFINE_MAP(control, BPF_MAP_TYPE_ARRAY, __u32, struct control, 1, BPF_F_MMAPABLE);
/* Ports of first fragments. 16384 datagrams in flight: at 10,000 fragmented ones a second, over a second. */
DEFINE_MAP(fragments, BPF_MAP_TYPE_LRU_HASH, struct fragment_key, struct fragment_value, 16384, 0);
/* Interfaces that are metered at ingress, for direction `once`. */
DEFINE_MAP(ingress, BPF_MAP_TYPE_HASH, __u32, __u32, 4096, 0);

/* The Flow Key as words; what both sides of a comparison are made of. */
#define KEY_WORD(ports) (*(const __u64 *) &(ports)->src_port_be)

struct flow_id {
	__u64 word;     /* ports, vlan, protocol, direction: as they lie in flow_hot4 */
	__u64 h;
	__u32 mixed;    /* from all bits of the hash: the second bucket comes from it */
	__u16 tag;
};

/* Where a flow may be, under one number of buckets. */
struct place {
	__u32 bucket[2];
	__u32 free[2]; /* ways without a tag when we looked, a bit each */
};

/* The way that a flow prefers in its buckets; the bucket comes from bits further up. */
static __always_inline __u32 preferred_way(const struct flow_id *id)
{
	return id->h >> 32 & (FLOW_WAYS - 1);
}

/* One of so many buckets. */
static __always_inline __u32 bucket_of(__u32 hash, __u64 buckets)
{
	return hash * buckets >> 32;
}

static __always_inline void identify(struct flow_id *id, const struct packet *p, const int v6)
{
	__u64 h;

	id->word = join32(p->ports, join16(p->vlan, join8(p->protocol, p->direction)));
	h = HASH(id->word, 0) + HASH((__u64) p->ifindex, 1) + HASH(p->addr[0], 2);
	if (v6)
		h += HASH(p->addr[1], 3) + HASH(p->addr[2], 4) + HASH(p->addr[3], 5);
	if (SETTING(hash_of_more)) {
		if (GROUP_IS_ON(GROUP_TUNNELS))
			h += join32(p->tunnel->hash, p->tunnel->hash); /* both halves: the slot's hash, and where it is */
		if (SETTING(sampling_by_interface))
			h += p->rate * 0x9e3779b97f4a7c15ull; /* odd: of two rates the slot's hash is never the same */
	}
	id->h = h;
}

/* What only a packet that missed needs. */
static __always_inline void identify_further(struct flow_id *id)
{
	__u64 mixed = (id->h ^ id->h >> 32) * 0x9e3779b97f4a7c15ull;

	id->mixed = mixed >> 32;
	id->tag = mixed >> 16 & 0xffff ? mixed >> 16 : 1;
}

/* One of two maps, or nothing; the choice is made at compile time. */
#define TABLE(name, slot) (v6 ? map_lookup(MAP(name##6), slot) : map_lookup(MAP(name##4), slot))

/* Is this slot the packet's flow? State and hash guard against a key that is half written. */
static __always_inline int matches(const struct flow_hot6 *slot, const struct flow_id *id, const struct packet *p,
				   const int v6)
{
	const __u64 *addr = (const __u64 *) slot->src_addr;

	if (slot->hash != (__u32) id->h || KEY_WORD(slot) != id->word || slot->ifindex != p->ifindex ||
	    addr[0] != p->addr[0])
		return 0;
	if (v6 && (addr[1] != p->addr[1] || addr[2] != p->addr[2] || addr[3] != p->addr[3]))
		return 0;
	return (READ_ONCE(slot->ctl) >> FLOW_STATE_SHIFT & 0xff) == FLOW_LIVE;
}

/*
 * Bit n is set where tag n of the bucket equals `tag`; rarely also above one that does
 * (a borrow), so a hit is a hint. Each 64-bit word holds four tags.
 */
static __always_inline __u32 ways_tagged(const struct bucket_tags *tags, __u16 tag)
{
	const __u64 ones = 0x0001000100010001ull;
	__u32 ways = 0;

	for (int i = 0; i < 4; i++) {
		__u64 x = READ_ONCE(tags->word[i]) ^ tag * ones;

		x = ((x - ones) & ~x) >> 15 & ones;
		ways |= (__u32) (x * GATHER_LANES >> 48 & 15) << 4 * i;
	}
	return ways;
}

/* Number of the lowest bit set, of 16: a de Bruijn sequence, its table in one word. */
static __always_inline __u32 lowest(__u32 ways)
{
	__u32 n = ((ways & -ways) * 0x9af & 0xffff) >> 12;

	return 0xcd7ea84fb6935210ull >> 4 * n & 15;
}

/* The flow's slot by its tag, in its two of so many buckets; its number in *number. None: 0. */
static __always_inline struct flow_hot6 *look(struct place *at, const struct flow_id *id, __u32 buckets,
					      const struct packet *p, const int v6, __u32 *number)
{
	struct bucket_tags *tags;
	struct flow_hot6 *slot;
	__u32 ways;

	at->bucket[0] = bucket_of(id->h >> 32, buckets);
	at->bucket[1] = bucket_of(id->mixed, buckets);
	at->free[0] = at->free[1] = 0;
	for (int b = 0; b < 2; b++) {
		tags = TABLE(tags, &at->bucket[b]);
		if (!tags)
			return 0;
		ways = ways_tagged(tags, id->tag);
		/* Three other flows with the same 16 bits in one bucket: never, and harmless (a second slot). */
		for (int i = 0; i < 3 && ways; i++) {
			*number = at->bucket[b] * FLOW_WAYS + lowest(ways);
			slot = TABLE(hot, number);
			if (slot && matches(slot, id, p, v6))
				return slot;
			ways &= ways - 1;
		}
		at->free[b] = ways_tagged(tags, 0);
	}
	return 0;
}

/* The slot that the flow prefers, if it is there: its first bucket of those in use. */
static __always_inline struct flow_hot6 *find_at_once(const struct flow_id *id, __u32 buckets, const struct packet *p,
						      const int v6, __u32 *number)
{
	struct flow_hot6 *slot;

	*number = bucket_of(id->h >> 32, buckets) * FLOW_WAYS + preferred_way(id);
	slot = TABLE(hot, number);
	return likely(slot && matches(slot, id, p, v6)) ? slot : 0;
}

/* How many of sixteen bits are set. */
static __always_inline __u32 count_bits(__u32 x)
{
	x -= x >> 1 & 0x5555;
	x = (x & 0x3333) + (x >> 2 & 0x3333);
	x = (x + (x >> 4)) & 0x0f0f;
	return (x + (x >> 8)) & 0x1f;
}

static __always_inline int is_crowded(const struct place *at)
{
	return count_bits(at->free[0]) + count_bits(at->free[1]) < 2 * FLOW_WAYS / 4;
}

/*
 * The flow's slot, wherever else it is. None: 0, and *at is where it can be made. Where three quarters of both its
 * buckets are taken and there are more than those in use, this CPU uses all of them from now on: the exporter has
 * not looked for too long, and makes it so for every CPU when it does.
 */
static __always_inline struct flow_hot6 *find(struct place *at, const struct flow_id *id, __u64 *buckets,
					      const struct packet *p, const int v6, __u32 *number)
{
	const __u32 all = v6 ? SETTING(buckets6) : SETTING(buckets4);
	__u32 in_use = *buckets, before = *buckets >> BUCKETS_BEFORE_SHIFT;
	struct flow_hot6 *slot = look(at, id, in_use, p, v6, number);
	struct place old;

	if (!slot && unlikely(before))
		slot = look(&old, id, before, p, v6, number);
	if (!slot && unlikely(in_use < all && is_crowded(at))) {
		WRITE_ONCE(*buckets, (__u64) in_use << BUCKETS_BEFORE_SHIFT | all);
		slot = look(at, id, all, p, v6, number);
	}
	return slot;
}

/* Output interface and next hop, as the kernel would route the packet now; 0 where it would not. */
static __always_inline void route(struct flow_cold *cold, const struct frame *f, const struct packet *p,
				  const enum hook hook, const int v6)
{
	struct bpf_fib_lookup *fib = &f->scratch->fib;
	long result;

	__builtin_memset(fib, 0, sizeof(*fib));
	fib->ifindex = p->ifindex;
	fib->l4_protocol = p->protocol;
	fib->sport = first16(p->ports);
	fib->dport = second16(p->ports);
	/* tot_len stays 0, no MTU check: the flow is routed, whatever happens to this packet. */
	if (v6) {
		fib->family = 10;
		fib->flowinfo = be32((__u32) p->tos << 20 | p->flow_label);
		__builtin_memcpy(fib->ipv6_src, &p->addr[0], 16);
		__builtin_memcpy(fib->ipv6_dst, &p->addr[2], 16);
	} else {
		fib->family = 2;
		fib->tos = p->tos;
		__builtin_memcpy(&fib->ipv4_src, &p->addr[0], 4);
		__builtin_memcpy(&fib->ipv4_dst, (const __u8 *) &p->addr[0] + 4, 4);
	}
	result = fib_lookup(f->ctx, fib, sizeof(*fib), hook == HOOK_EGRESS ? BPF_FIB_LOOKUP_OUTPUT : 0);
	/* Any other result leaves the input interface in ifindex. */
	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH &&
	    result != BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return;
	if (hook != HOOK_EGRESS)
		cold->other_ifindex = fib->ifindex;
	if (v6)
		__builtin_memcpy(cold->next_hop, fib->ipv6_dst, 16);
	else if (fib->family == 2)
		__builtin_memcpy(cold->next_hop, &fib->ipv4_dst, 4);
}

/* Claims the slot if it is free: whoever reads 1 after adding owns it. */
static __always_inline int claim(struct flow_hot6 *slot)
{
	if (READ_ONCE(slot->ctl))
		return 0;
	STRESS_DELAY();
	atomic_add(&slot->ctl, 1);
	if (READ_ONCE(slot->ctl) == 1)
		return 1;
	atomic_add(&slot->ctl, -1);
	return 0;
}

/* A free slot in one bucket, the preferred way first; claimed, or 0. */
static __always_inline struct flow_hot6 *claim_in(__u32 bucket, __u32 preferred, __u32 ways, const int v6,
						  __u32 *number)
{
	struct flow_hot6 *slot;
	__u32 way = ways >> preferred & 1 ? preferred : lowest(ways);

	for (int i = 0; i < FLOW_WAYS && ways; i++) {
		*number = bucket * FLOW_WAYS + way;
		slot = TABLE(hot, number);
		if (slot && claim(slot))
			return slot;
		ways &= ~(1u << way);
		way = lowest(ways);
	}
	return 0;
}

/* Both MAC addresses: read here and not while parsing, as few packets make a flow. */
static __always_inline void copy_macs(struct flow_cold *cold, const struct frame *f, const enum hook hook)
{
	if (hook != HOOK_XDP)
		skb_load_bytes(f->ctx, 0, cold->dst_mac, 12);
	else if (f->data + 12 <= f->data_end)
		__builtin_memcpy(cold->dst_mac, f->data, 12);
}

/* Writes the key and all that is known at creation; the slot is claimed and not LIVE yet. */
static __always_inline void fill(struct flow_hot6 *slot, struct flow_cold *cold, const struct flow_id *id,
				 const struct packet *p, __u64 now, const int v6)
{
	__u64 *addr = (__u64 *) slot->src_addr;

	slot->last_ns = now;
	slot->tos = p->tos;
	slot->min_ttl = slot->max_ttl = p->ttl;
	slot->min_length = p->min_length;
	slot->max_length = p->max_length;
	slot->ifindex = p->ifindex;
	*(__u64 *) &slot->src_port_be = id->word;
	addr[0] = p->addr[0];
	if (v6) {
		addr[1] = p->addr[1];
		addr[2] = p->addr[2];
		addr[3] = p->addr[3];
	}
	cold->first_ns = now;
	cold->flags[FLAG_IP_DF] = p->dont_fragment;
	cold->other_ifindex = p->other_ifindex;
	cold->flow_label = p->flow_label;
	cold->inner_vlan = p->inner_vlan;
	cold->priorities = p->priorities;
	if (SETTING(sampling_by_interface))
		cold->rate = p->rate;
	slot->hash = id->h;
}

/* A claimed slot in the emptier of two buckets; 0 where both are full. */
static __always_inline struct flow_hot6 *claim_any(const struct place *at, __u32 preferred, const int v6,
						   __u32 *number)
{
	const int emptier = count_bits(at->free[1]) > count_bits(at->free[0]);
	__u32 bucket = at->bucket[0], free = at->free[0], other_bucket = at->bucket[1], other_free = at->free[1];
	struct flow_hot6 *slot;

	if (emptier) {
		other_bucket = bucket;
		other_free = free;
		bucket = at->bucket[1];
		free = at->free[1];
	}
	slot = claim_in(bucket, preferred, free, v6, number);
	return likely(slot) ? slot : claim_in(other_bucket, preferred, other_free, v6, number);
}

/* A new flow; 0 where both buckets are full. */
static __always_inline struct flow_hot6 *create(const struct place *at, const struct flow_id *id,
						const struct packet *p, __u64 now, const struct frame *f,
						const enum hook hook, const int has_ethernet, const int v6,
						__u32 *number)
{
	struct flow_hot6 *slot = claim_any(at, preferred_way(id), v6, number);
	struct bucket_tags *tags;
	struct flow_cold *cold;
	__u32 bucket;

	if (!slot)
		return 0;
	bucket = *number / FLOW_WAYS;
	tags = TABLE(tags, &bucket);
	if (!tags)
		return 0;
	cold = TABLE(cold, number);
	if (!cold)
		return 0;
	STRESS_DELAY();
	fill(slot, cold, id, p, now, v6);
	if (has_ethernet)
		copy_macs(cold, f, hook);
	WRITE_ONCE(((__u16 *) tags)[*number % FLOW_WAYS], id->tag);
	atomic_add(&slot->ctl, (__u64) FLOW_LIVE << FLOW_STATE_SHIFT);
	/* What the outer header is routed by is not known any more. */
	if (SETTING(fib_lookup) && hook != HOOK_REPLAY && !(GROUP_IS_ON(GROUP_TUNNELS) && p->tunnel->kind))
		route(cold, f, p, hook, v6);
	return slot;
}

/* Flags that the hint does not know go to their octets; the hint may forget some, the octets none. */
static __always_inline void set_flags(struct flow_hot6 *slot, const struct packet *p, const int v6, __u32 *number)
{
	struct flow_cold *cold = TABLE(cold, number);

	if (!cold)
		return;
	slot->flags_hint |= p->tcp_flags;
	for (int i = 0; i <= FLAG_TCP_NS; i++)
		if (p->tcp_flags >> i & 1)
			cold->flags[i] = 1;
	if (p->more_fragments)
		cold->flags[FLAG_IP_MF] = 1;
	if (p->late_fragment)
		cold->flags[FLAG_IP_LATE] = 1;
	if (p->tos != slot->tos)
		atomic_add(&cold->tos_changes, p->packets);
}

/*
 * Raises or lowers a bound without an atomic: stores, and looks again, as another CPU may
 * have stored a lesser one in between. Two looks: what is lost then needs three at once.
 */
#define RAISE(field, value)                                            \
	for (int i = 0; i < 3 && READ_ONCE(field) < (value); i++)       \
		WRITE_ONCE(field, value)
#define LOWER(field, value)                                            \
	for (int i = 0; i < 3 && READ_ONCE(field) > (value); i++)       \
		WRITE_ONCE(field, value)

static __always_inline void add(struct flow_hot6 *slot, const struct packet *p, __u64 now, const int is_new,
				const int v6, __u32 *number)
{
	/* A first look at what few packets need. */
	if (unlikely(is_new || (p->tcp_flags & ~slot->flags_hint) || p->tos != slot->tos || p->more_fragments ||
		     p->late_fragment))
		set_flags(slot, p, v6, number);
	/* Octets first: who reads packets first finds the octets of each of them (flowexp/kernel/family.py). */
	STRESS_DELAY();
	atomic_add(&slot->octets, p->octets);
	atomic_add(&slot->packets, p->packets);
	RAISE(slot->last_ns, now);
	RAISE(slot->max_length, p->max_length);
	LOWER(slot->min_length, p->min_length);
	RAISE(slot->max_ttl, p->ttl);
	LOWER(slot->min_ttl, p->ttl);
}

/*
 * Ports are in the first fragment alone. It leaves them here for the others; where it was
 * not seen (or comes late) they stay 0.
 */
static __always_inline void resolve_fragment(const struct frame *f, struct packet *p)
{
	struct fragment_key *key = &f->scratch->fragment.key;
	struct fragment_value *value = &f->scratch->fragment.value, *first;

	for (int i = 0; i < 4; i++)
		key->addr[i] = p->addr[i];
	key->id = p->fragment_id;
	key->protocol = p->is_ipv6 ? 0 : p->protocol;
	if (!p->late_fragment) {
		value->ports = p->ports;
		value->protocol = p->protocol;
		map_update(MAP(fragments), key, value, BPF_ANY);
		return;
	}
	first = map_lookup(MAP(fragments), key);
	if (!first)
		return;
	p->ports = first->ports;
	p->protocol = first->protocol;
}

static __always_inline int exporter_is_gone(__u64 now)
{
	__u32 zero = 0;
	struct control *c = map_lookup(MAP(control), &zero);

	return c && c->deadline_ns && now > c->deadline_ns;
}

/* Early by up to a jiffy, and ten times cheaper than the precise clock. */
static __always_inline __u64 cheap_now(void)
{
	return SETTING(no_coarse_clock) ? ktime_get_ns() : ktime_get_coarse_ns();
}

/*
 * Adds a parsed packet to its flow. Returns 0; less than 0: a counter of new flows, less its sign; more: the reason
 * why it could not. `buckets`: this CPU's (struct counters).
 */
static __always_inline int meter(struct frame *f, struct packet *p, __u64 *buckets, __u64 replay_ns,
				 const enum hook hook, const int has_ethernet, const int v6)
{
	struct flow_hot6 *slot;
	struct place at = {};
	struct flow_id id;
	__u32 number;
	int why;

	identify(&id, p, v6);
	slot = find_at_once(&id, *buckets, p, v6, &number);
	if (unlikely(!slot)) {
		forget_the_way(f, p, hook, v6);
		identify_further(&id);
		slot = find(&at, &id, buckets, p, v6, &number);
	}
	if (likely(slot)) {
		add(slot, p, hook == HOOK_REPLAY ? replay_ns : cheap_now(), 0, v6, &number);
		if (!GROUPS_OF_EACH_PACKET)
			return 0;
		why = 0;
	} else {
		__u64 now = hook == HOOK_REPLAY ? replay_ns : ktime_get_ns();

		if (exporter_is_gone(now))
			return COUNT_NOT_METERED_NO_EXPORTER;
		slot = create(&at, &id, p, now, f, hook, has_ethernet, v6, &number);
		if (!slot)
			return COUNT_NOT_METERED_TABLE_FULL;
		add(slot, p, now, 1, v6, &number);
		why = -COUNT_FLOWS_CREATED;
	}
	if (SETTING(groups))
		add_groups(f, p, replay_ns, hook, has_ethernet, why < 0, v6, slot->tos, &number);
	return why;
}

#endif
