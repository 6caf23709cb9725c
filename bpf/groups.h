/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Field groups: what is learned of a packet beyond the default fields. A group that is off costs nothing: whether
 * it is on is a constant to the verifier, which then drops the code. Each group reads the headers again that it
 * needs: what the default path would have to carry along for them would cost every packet.
 */
#ifndef FLOWEXP_GROUPS_H
#define FLOWEXP_GROUPS_H

#include "parse.h"
#include "payload.h"
#include "transit.h"
#include "tunnels.h"

/* Sizes of the arrays are the loader's. */
DEFINE_MAP(sizes, BPF_MAP_TYPE_ARRAY, __u32, struct flow_sizes, 1, BPF_F_MMAPABLE);
DEFINE_MAP(tcp, BPF_MAP_TYPE_ARRAY, __u32, struct flow_tcp, 1, BPF_F_MMAPABLE);
DEFINE_MAP(congestion, BPF_MAP_TYPE_ARRAY, __u32, struct flow_congestion, 1, BPF_F_MMAPABLE);
DEFINE_MAP(integrity, BPF_MAP_TYPE_ARRAY, __u32, struct flow_integrity, 1, BPF_F_MMAPABLE);
/* 65536 handshakes under way: at 10,000 new connections a second, over six seconds. */
DEFINE_MAP(handshakes, BPF_MAP_TYPE_LRU_HASH, struct handshake_key, struct handshake, 65536, 0);

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10
#define TCP_ECE 0x40
#define TCP_CWR 0x80

#define TCP_HEADER_OCTETS 20
#define ETHERNET_MIN_OCTETS 60 /* of a frame without its FCS (IEEE 802.3, section 3.2.8) */
#define ETHERNET_MAX_IP_OCTETS 1500
#define TCP_MAX_OPTIONS 8 /* walked of one segment; a SYN has up to seven, what fills up included */
#define TCP_OPTION_MSS 2
#define TCP_OPTION_WINDOW_SCALE 3

/* Sooner after the gap than any loss is answered: the segment was overtaken, not sent again. */
#define REORDERING_NS 3000000ull

/* IP length of the longest and of the shortest packet on the wire: all but the last segment are the longest. */
static __always_inline __u64 ip_length(const struct packet *p, __u16 length_field)
{
	return length_field + (p->is_ipv6 ? sizeof(struct ipv6_header) : 0);
}

/* A chain of comparisons: an index that is computed would have to be followed to where it came from, by the verifier. */
static __always_inline void add_size(struct flow_sizes *s, __u64 octets, __u64 packets)
{
	atomic_add(&s->now.octets_squared, octets * octets * packets);
	if (octets <= 64)
		atomic_add(&s->now.packets[0], packets);
	else if (octets <= 128)
		atomic_add(&s->now.packets[1], packets);
	else if (octets <= 256)
		atomic_add(&s->now.packets[2], packets);
	else if (octets <= 512)
		atomic_add(&s->now.packets[3], packets);
	else if (octets <= 1024)
		atomic_add(&s->now.packets[4], packets);
	else if (octets <= 1514)
		atomic_add(&s->now.packets[5], packets);
	else
		atomic_add(&s->now.packets[6], packets);
}

static __always_inline void add_sizes(const struct packet *p, __u32 *number)
{
	struct flow_sizes *s = map_lookup(MAP(sizes), number);

	if (!s)
		return;
	add_size(s, ip_length(p, p->min_length), 1);
	if (p->packets > 1)
		add_size(s, ip_length(p, p->max_length), p->packets - 1);
	if (p->more_fragments || p->late_fragment)
		atomic_add(&s->now.fragments, 1);
}

/* The device's own time stamp, if it made one. A packet that was received and goes out has it still. */
static __always_inline void keep_hardware_time(struct flow_timing *t, const struct frame *f)
{
	__u64 received = ((const struct __sk_buff *) f->ctx)->hwtstamp;

	if (!received)
		return;
	if (!t->first_received_ns)
		t->first_received_ns = received;
	t->last_received_ns = received;
}

/* Jitter as RFC 3550 smooths it, of what is known without the sender's clock: the change from gap to gap. */
static __always_inline void add_timing(const struct frame *f, const struct packet *p, __u64 now, const enum hook hook,
				       __u32 *number)
{
	struct flow_timing *t = map_lookup(MAP(timing), number);
	__u64 last, gap, change;

	if (!t)
		return;
	if (hook == HOOK_INGRESS)
		keep_arrival(f, p, now, *number);
	if (SETTING(hardware_times) && (hook == HOOK_INGRESS || hook == HOOK_EGRESS))
		keep_hardware_time(t, f);
	last = t->last_ns;
	t->last_ns = now;
	if (!last || now < last)
		return;
	gap = now - last;
	atomic_add(&t->now.gaps_ns, gap);
	atomic_add(&t->now.gaps, 1);
	if (gap > t->max_gap_ns)
		t->max_gap_ns = gap;
	change = gap > t->last_gap_ns ? gap - t->last_gap_ns : t->last_gap_ns - gap;
	if (t->last_gap_ns)
		t->jitter_16ns += change - (t->jitter_16ns >> 4);
	t->last_gap_ns = gap;
}

static __always_inline void add_congestion(const struct packet *p, __u8 first_tos, __u32 *number)
{
	struct flow_congestion *c = map_lookup(MAP(congestion), number);

	if (!c)
		return;
	switch (p->tos & 3) {
	case 1: atomic_add(&c->now.ect1, p->packets); break;
	case 2: atomic_add(&c->now.ect0, p->packets); break;
	case 3: atomic_add(&c->now.ce, p->packets); break;
	}
	if ((p->tos ^ first_tos) >> 2)
		atomic_add(&c->now.dscp_changes, p->packets);
	/* In a SYN these two ask for ECN (RFC 3168, section 6.1.1). */
	if (p->tcp_flags & TCP_SYN)
		return;
	if (p->tcp_flags & TCP_ECE)
		atomic_add(&c->now.ece, p->packets);
	if (p->tcp_flags & TCP_CWR)
		atomic_add(&c->now.cwr, 1); /* the first segment of a super-packet alone has it */
}

/* The connection as its client names it; `answering`: this packet is the server's. */
static __always_inline void identify_handshake(struct handshake_key *key, const struct packet *p, int answering)
{
	__u64 first = p->addr[0];

	key->unused = 0;
	asm volatile("" : "+r"(first)); /* clang 14 breaks down over the halves that it would put together again */
	if (!answering) {
		key->addr[0] = p->addr[0];
		key->addr[1] = p->addr[1];
		key->addr[2] = p->addr[2];
		key->addr[3] = p->addr[3];
		key->ports = p->ports;
		return;
	}
	key->addr[0] = p->is_ipv6 ? p->addr[2] : first << 32 | first >> 32;
	key->addr[1] = p->is_ipv6 ? p->addr[3] : 0;
	key->addr[2] = p->is_ipv6 ? p->addr[0] : 0;
	key->addr[3] = p->is_ipv6 ? p->addr[1] : 0;
	key->ports = p->ports << 16 | p->ports >> 16;
}

/*
 * Three packets, two answers: SYN-ACK to SYN tells of the path from here to the server, ACK to SYN-ACK of the path
 * to the client. Where one was sent twice nobody can tell which was answered (Karn), and nothing is said.
 */
static __always_inline void follow_handshake(struct flow_tcp *t, const struct frame *f, const struct packet *p,
					     const enum hook hook, __u64 replay_ns)
{
	const int syn = p->tcp_flags & TCP_SYN, ack = p->tcp_flags & TCP_ACK;
	const __u64 now = precise_time(hook, replay_ns);
	struct handshake_key *key = &f->scratch->handshake.key;
	struct handshake *begun = &f->scratch->handshake.value, *known;

	identify_handshake(key, p, syn && ack);
	known = map_lookup(MAP(handshakes), key);
	if (syn && !ack) {
		begun->syn_ns = known ? 0 : now;
		begun->syn_ack_ns = 0;
		map_update(MAP(handshakes), key, begun, BPF_ANY);
		t->state |= TCP_SYN_SENT;
		return;
	}
	if (syn) {
		if (!known)
			return;
		if (known->syn_ns && !known->syn_ack_ns)
			t->handshake_ns = now - known->syn_ns;
		known->syn_ack_ns = known->syn_ack_ns ? ~0ull : now;
		return;
	}
	t->state &= ~TCP_SYN_SENT;
	if (!known)
		return;
	if (known->syn_ack_ns && known->syn_ack_ns != ~0ull)
		t->handshake_ns = now - known->syn_ack_ns;
	map_delete(MAP(handshakes), key);
}

/* MSS and window scale, out of the options of a SYN. */
static __always_inline void read_options(struct flow_tcp *t, const struct frame *f, const enum hook hook,
					 __u32 options_octets)
{
	struct frame at = *f;
	__u32 begin = f->offset;

	if (advance(&at, TCP_HEADER_OCTETS))
		return;
	for (int i = 0; i < TCP_MAX_OPTIONS; i++) {
		const __u8 *option;
		__u8 kind, octets = 1;

		if (at.offset - begin >= TCP_HEADER_OCTETS + options_octets)
			return;
		option = header(&at, hook, 1);
		if (!option || !*option)
			return;
		kind = *option;
		if (kind != 1) {
			option = header(&at, hook, 4);
			if (!option)
				option = header(&at, hook, 3); /* a window scale at the very end */
			if (!option || option[1] < 2)
				return;
			octets = option[1];
			if (kind == TCP_OPTION_WINDOW_SCALE && octets == 3)
				t->window_scale = option[2] + 1;
			if (kind == TCP_OPTION_MSS && octets == 4) {
				option = header(&at, hook, 4);
				if (!option)
					return;
				t->mss = option[2] << 8 | option[3];
			}
		}
		if (advance(&at, octets))
			return;
	}
}

/*
 * Order of the segments, by their Sequence Numbers. What begins beyond the furthest octet seen leaves a gap behind
 * it; what begins before it has been sent again, unless it fills the gap so soon that it was only overtaken. One gap
 * is remembered, the latest.
 */
static __always_inline void follow_sequence(struct flow_tcp *t, const struct packet *p, __u32 begin, __u32 octets,
					    const enum hook hook, __u64 replay_ns)
{
	__u32 end = begin + octets;

	/* A SYN may be another connection's with the same ports, whose numbers begin anywhere. */
	if (!(t->state & TCP_SEQUENCE_KNOWN) || p->tcp_flags & TCP_SYN) {
		t->next_sequence = t->gap_begin = t->gap_end = end;
		t->state |= TCP_SEQUENCE_KNOWN;
		return;
	}
	if (!octets)
		return;
	if ((__s32) (begin - t->next_sequence) >= 0) {
		if (begin != t->next_sequence) {
			t->gap_begin = t->next_sequence;
			t->gap_end = begin;
			t->gap_ns = precise_time(hook, replay_ns);
		}
		t->next_sequence = end;
		return;
	}
	/* One octet that the other side has already: keep-alive (RFC 9293, section 3.8.4). */
	if (octets == 1 && end == t->next_sequence)
		return;
	if ((__s32) (begin - t->gap_begin) >= 0 && (__s32) (end - t->gap_end) <= 0) {
		if (begin == t->gap_begin)
			t->gap_begin = end;
		if (precise_time(hook, replay_ns) - t->gap_ns < REORDERING_NS) {
			atomic_add(&t->now.out_of_order, p->packets);
			atomic_add(&t->now.out_of_order_octets, octets);
			return;
		}
	}
	atomic_add(&t->now.retransmitted, p->packets);
	atomic_add(&t->now.retransmitted_octets, octets);
	if ((__s32) (end - t->next_sequence) > 0)
		t->next_sequence = end;
}

static __always_inline void add_tcp(const struct frame *f, const struct packet *p, __u64 replay_ns,
				    const enum hook hook, const int is_new, __u32 *number)
{
	const __u16 flags = p->tcp_flags;
	const struct transport_header *l4;
	__u32 begin, window, header_octets;
	__u64 headers, payload;
	struct flow_tcp *t;

	if (p->protocol != PROTOCOL_TCP || p->late_fragment)
		return;
	t = map_lookup(MAP(tcp), number);
	l4 = t ? header(f, hook, TCP_HEADER_OCTETS) : 0;
	if (!l4)
		return;
	begin = be32(l4->sequence);
	window = be16(l4->window_be);
	header_octets = (l4->offset_ns >> 4) * 4;
	if (flags & TCP_SYN)
		atomic_add(&t->now.syn, 1);
	if (flags & TCP_FIN)
		atomic_add(&t->now.fin, 1);
	if (flags & TCP_RST)
		atomic_add(&t->now.rst, 1);
	if (!window && !(flags & (TCP_RST | TCP_SYN)))
		atomic_add(&t->now.zero_windows, p->packets);
	if (is_new)
		t->first_window = window;
	if (flags & TCP_SYN && header_octets > TCP_HEADER_OCTETS)
		read_options(t, f, hook, header_octets - TCP_HEADER_OCTETS);
	if (flags & TCP_SYN || (t->state & TCP_SYN_SENT && flags & TCP_ACK))
		follow_handshake(t, f, p, hook, replay_ns);
	if (flags & TCP_RST || p->more_fragments)
		return; /* its Sequence Number may be any; and what a fragment holds is not all of a segment */
	headers = p->packets * p->headers_octets;
	payload = p->octets > headers ? p->octets - headers : 0;
	/* SYN and FIN take a number each (RFC 9293, section 3.4). */
	payload += (flags >> 1 & 1) + (flags & 1);
	follow_sequence(t, p, begin, payload, hook, replay_ns);
}

/* The checksum over the IPv4 header, which is 0 where it is right (RFC 1071). XDP does not verify options. */
static __always_inline int is_checksum_bad(const struct frame *f, const struct packet *p, const enum hook hook)
{
	__u64 options_octets = f->offset - p->ip_offset - sizeof(struct ipv4_header);
	__u32 sum = 0;
	struct frame at = *f;
	const __u16 *word;

	at.offset = p->ip_offset;
	word = header(&at, hook, sizeof(struct ipv4_header));
	if (!word)
		return 0;
	for (int i = 0; i < 10; i++)
		sum += word[i];
	if (unlikely(options_octets)) {
		__u16 *option = f->scratch->options;

		__builtin_memset(option, 0, sizeof(f->scratch->options));
		/* Four bits of IHL, and not 0: as it is, but older verifiers want to see it, whatever the compiler. */
		asm volatile("%0 += -4\n%0 &= 60\n%0 += 4" : "+r"(options_octets));
		if (hook == HOOK_XDP || options_octets > sizeof(f->scratch->options) ||
		    skb_load_bytes(f->ctx, p->ip_offset + sizeof(struct ipv4_header), option, options_octets))
			return 0;
		for (int i = 0; i < 20; i++)
			sum += option[i];
	}
	sum = (sum & 0xffff) + (sum >> 16);
	sum += sum >> 16;
	return (sum & 0xffff) != 0xffff;
}

/* Whether the transport header announces more than the packet holds. */
static __always_inline int is_length_bad(const struct frame *f, const struct packet *p, const enum hook hook)
{
	const struct transport_header *l4;
	__u64 room = p->octets + p->transport_octets - p->headers_octets;

	if (p->packets > 1 || p->more_fragments || p->late_fragment)
		return 0;
	/* A super-packet's lengths are those of all its segments, of which sampling may have left one. */
	if (hook != HOOK_XDP && SETTING(sampling) && ((const struct __sk_buff *) f->ctx)->gso_size)
		return 0;
	if (p->protocol == PROTOCOL_TCP) {
		l4 = header(f, hook, 14);
		return l4 && ((l4->offset_ns >> 4) < 5 || (l4->offset_ns >> 4) * 4u > room);
	}
	if (p->protocol == PROTOCOL_UDP) {
		const __u16 *word = header(f, hook, 6);

		return word && be16(word[2]) && (be16(word[2]) < 8 || be16(word[2]) > room);
	}
	return 0;
}

static __always_inline int is_land(const struct packet *p)
{
	if (first16(p->ports) != second16(p->ports) || !p->ports || p->late_fragment)
		return 0;
	if (p->is_ipv6)
		return p->addr[0] == p->addr[2] && p->addr[1] == p->addr[3];
	return (__u32) p->addr[0] == p->addr[0] >> 32;
}

static __always_inline int are_flags_impossible(const struct packet *p)
{
	const __u16 flags = p->tcp_flags & 0x3f;

	if (p->protocol != PROTOCOL_TCP || p->late_fragment)
		return 0;
	return !flags || (flags & TCP_SYN && flags & (TCP_FIN | TCP_RST)) ||
	       (flags & TCP_FIN && !(flags & TCP_ACK));
}

/*
 * What comes in has been padded by whoever sent it; what goes out is padded by the device, later. A tag may have been
 * taken out of the frame before.
 */
static __always_inline int is_undersized(const struct frame *f, const struct packet *p, const enum hook hook,
					 const int has_ethernet)
{
	return has_ethernet && hook != HOOK_EGRESS && f->octets < ETHERNET_MIN_OCTETS - (p->vlan ? 4 : 0);
}

/* Of a super-packet the segments: all but the last are the longest. */
static __always_inline __u64 jumbo_packets(const struct packet *p)
{
	if (ip_length(p, p->max_length) <= ETHERNET_MAX_IP_OCTETS)
		return 0;
	return p->packets > 1 && ip_length(p, p->min_length) <= ETHERNET_MAX_IP_OCTETS ? p->packets - 1 : p->packets;
}

static __always_inline void add_integrity(const struct frame *f, const struct packet *p, const enum hook hook,
					  const int has_ethernet, __u32 *number)
{
	struct flow_integrity *i = map_lookup(MAP(integrity), number);
	__u64 jumbo = jumbo_packets(p);

	if (!i)
		return;
	if (!p->is_ipv6 && is_checksum_bad(f, p, hook))
		atomic_add(&i->now.bad_checksum, 1);
	if (is_length_bad(f, p, hook))
		atomic_add(&i->now.bad_length, 1);
	if (p->ttl <= 1)
		atomic_add(&i->now.expiring, p->packets);
	if (is_land(p))
		atomic_add(&i->now.land, p->packets);
	if (are_flags_impossible(p))
		atomic_add(&i->now.impossible_flags, p->packets);
	if (is_undersized(f, p, hook, has_ethernet))
		atomic_add(&i->now.undersized, 1);
	if (unlikely(jumbo))
		atomic_add(&i->now.jumbo, jumbo);
}

/* Those that have something to do for a packet of a flow that is known; the rest has for a new flow's first alone. */
#define GROUPS_OF_EACH_PACKET (SETTING(groups) & ~GROUP_TUNNELS)

/* All groups' account of a packet that is in its flow: `slot_number` of its family; `first_tos`: the flow's. */
static __always_inline void add_groups(struct frame *f, struct packet *p, __u64 replay_ns,
				       const enum hook hook, const int has_ethernet, const int is_new, const int v6,
				       __u8 first_tos, const __u32 *slot_number)
{
	__u32 number = *slot_number + (v6 ? SETTING(buckets4) * FLOW_WAYS : 0);

	forget_the_way(f, p, hook, v6);
	if (GROUP_IS_ON(GROUP_APPLICATION))
		take_payload(f, p, replay_ns, hook, &number);
	if (GROUP_IS_ON(GROUP_TUNNELS) && is_new)
		keep_tunnel(f, p, hook, &number);
	if (GROUP_IS_ON(GROUP_SIZES))
		add_sizes(p, &number);
	if (GROUP_IS_ON(GROUP_TIMING))
		add_timing(f, p, precise_time(hook, replay_ns), hook, &number);
	if (GROUP_IS_ON(GROUP_CONGESTION))
		add_congestion(p, first_tos, &number);
	if (GROUP_IS_ON(GROUP_INTEGRITY))
		add_integrity(f, p, hook, has_ethernet, &number);
	if (GROUP_IS_ON(GROUP_TCP))
		add_tcp(f, p, replay_ns, hook, is_new, &number);
}

#endif
