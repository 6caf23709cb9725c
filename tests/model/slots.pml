/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The life of the flow table's slots: two CPUs that meter packets, and an exporter that ends flows, reports on
 * them, and is killed at any step, in its recovery, too. A statement, or a d_step, is one access to shared
 * memory (or one 64-bit store to each of two slots, in turn); accesses are seen in the order of the program, as
 * x86 has it. spin looks at every interleaving (test_model.py):
 *
 *   - no packet is lost, and none is counted twice but in a batch that the journal is in doubt about;
 *   - no slot has two owners, and none is zeroed or freed while a packet uses it;
 *   - the ledger closes, and every slot is free in the end, whenever the exporter was killed.
 *
 * A packet of flow k has k octets: two counters, which must never part. #ifdef: mutants, each to be found wrong.
 */
#ifndef SLOTS /* given with -D: 1 or 2 slots, packets of each CPU, kills */
#define SLOTS 2
#define PACKETS_0 1
#define PACKETS_1 1
#define KILLS 1
#endif
#define BIAS 4    /* FLOW_CLAIM_BIAS */

mtype = { EMPTY, SENDING, SENT } /* enum journal_state (bpf/flow.h) */
#define FREE 0 /* enum flow_state */
#define LIVE 1
#define CLOSING 2
#define RETIRED 3

typedef Slot { /* struct flow_hot4, flow_cold, bucket_tags */
	byte claims, state, key, packets, octets, exported_packets, exported_octets;
	bit tag, owned /* `owned` is the model's own */
}
Slot slot[2];

mtype journal = EMPTY; /* struct journal; a set of slots is a byte, one bit a slot */
bit journal_ends;
byte journal_set, journal_total, journal_packets[2], journal_octets[2];
byte exported; /* struct control: exported_packets */

/* The model's own: packets and octets seen and not yet delivered for good, by flow; what is in doubt, if killed now. */
short owed_packets[3], owed_octets[3];
byte doubt_packets[3], doubt_octets[3];
byte metered, working = 2, user[2]; /* user: the slot that a CPU's packet uses, plus 1 */
bit running[2], waited_for[2], kill, ended;

/* bpf/flowexp.bpf.c account_packet() and bpf/table.h meter() */
proctype Cpu(byte me)
{
	byte k, s, n;

	for (n : 1 .. (me -> PACKETS_1 : PACKETS_0)) {
		atomic {
			running[me] = 1; s = 0;
			if :: k = 1 :: k = 2 fi;
			owed_packets[k]++; owed_octets[k] = owed_octets[k] + k; metered++
		};
		do /* find(), matches(): the key, then the state */
		:: s == SLOTS -> break
		:: s < SLOTS && slot[s].key != k -> s++
		:: s < SLOTS && slot[s].key == k ->
			atomic { if :: slot[s].state == LIVE -> user[me] = s + 1; goto add :: else -> s++ fi }
		od;
		s = 0;
		do /* claim_in(): the ways whose tag is 0; claim(): look, add, look again */
		:: s == SLOTS -> atomic { owed_packets[k]--; owed_octets[k] = owed_octets[k] - k; metered--; goto next }
		:: s < SLOTS && slot[s].tag -> s++
		:: s < SLOTS && !slot[s].tag ->
			if
			:: slot[s].claims + slot[s].state -> s++
			:: else ->
				slot[s].claims++;
				atomic {
					if
#ifdef NO_BACK_OFF
					:: true -> break
#endif
					:: slot[s].claims == 1 && slot[s].state == FREE -> break
					:: else
					fi
				};
				d_step { slot[s].claims--; s++ }
			fi
		od;
		atomic { assert(!slot[s].owned); slot[s].owned = 1; user[me] = s + 1; slot[s].key = k }; /* fill() */
		slot[s].tag = 1; /* create() */
		slot[s].state = slot[s].state + LIVE;
add:		atomic { assert(slot[s].key == k); slot[s].octets = slot[s].octets + k };
		d_step { assert(slot[s].key == k); slot[s].packets++ };
next:		atomic { user[me] = 0; running[me] = 0; waited_for[me] = 0; k = 0; s = 0 }
	};
	working--
}

#define IN(set) (set >> s & 1)
#define ADD(set) set = set | 1 << s
#define EACH(does) d_step { s = 0; if does :: else fi }; d_step { s = 1; if does :: else fi }
#define CTL(st, n) slot[s].state = st; slot[s].claims = n
#define UNUSED assert(user[0] != s + 1 && user[1] != s + 1)

/* flowexp/kernel/grace.py wait_grace_period() */
inline grace_period()
{
	d_step { waited_for[0] = running[0]; waited_for[1] = running[1] };
	!waited_for[0] && !waited_for[1]
}

/* Family.retire() */
inline retire(set)
{
	EACH(:: IN(set) -> CTL(RETIRED, BIAS));
	EACH(:: IN(set) -> UNUSED; slot[s].packets = 0; slot[s].octets = 0; slot[s].key = 0);
	EACH(:: IN(set) -> slot[s].exported_packets = 0; slot[s].exported_octets = 0);
	to_free = to_free | set
}

/* Family.free_retired() */
inline free_retired()
{
	EACH(:: IN(to_free) -> UNUSED; slot[s].owned = 0; CTL(FREE, 0));
	EACH(:: IN(to_free) -> slot[s].tag = 0);
#ifdef ZERO_LAST
	EACH(:: IN(to_free) -> slot[s].packets = 0; slot[s].octets = 0);
#endif
	to_free = 0
}

/* What means nothing is 0: states that differ in nothing else are one. */
#define FORGET_JOURNAL journal_set = 0; journal_ends = 0; journal_total = 0; \
	journal_packets[0] = 0; journal_packets[1] = 0; journal_octets[0] = 0; journal_octets[1] = 0

/* FlowTable.settle(): by the journal alone, of flows that end, and of flows that go on */
inline settle_ended() { retire(journal_set); settled() }
inline settle_living()
{
	EACH(:: IN(journal_set) -> slot[s].exported_packets = journal_packets[s]);
	EACH(:: IN(journal_set) -> slot[s].exported_octets = journal_octets[s]);
	settled()
}
inline settle() { if :: journal_ends -> settle_ended() :: else -> settle_living() fi }
inline settled()
{
	exported = journal_total;
	d_step { journal = EMPTY; FORGET_JOURNAL }
}

#define DELTA(what) (what[s] - slot[s].exported_##what)
#define CARRIED(ends) (DELTA(packets) && (ends || DELTA(octets))) /* a record of no packet is none */
#define WRITE(n, ends) s = n; if :: IN(set) && (ends || CARRIED(ends)) -> \
	ADD(journal_set); journal_packets[n] = packets[n]; journal_octets[n] = octets[n]; \
	journal_total = journal_total + DELTA(packets) :: else fi
#define NO_DOUBT doubt_packets[1] = 0; doubt_packets[2] = 0; doubt_octets[1] = 0; doubt_octets[2] = 0

/* flowexp/meter.py _ending(), _active(), _batch() */
inline export(set, ends)
{
	EACH(:: IN(set) -> packets[s] = slot[s].packets);
	EACH(:: IN(set) -> octets[s] = slot[s].octets; assert(!ends || octets[s] == packets[s] * slot[s].key));
	d_step { journal = EMPTY; FORGET_JOURNAL };
	d_step { /* Journal.begin(): what lies between EMPTY and SENDING nobody looks at */
		journal_ends = ends; journal_total = exported;
		WRITE(0, ends); WRITE(1, ends);
		journal = SENDING
	};
	deliver();
	d_step { set = 0; packets[0] = 0; packets[1] = 0; octets[0] = 0; octets[1] = 0 }
}

/* What the journal holds, as often as it takes; flowexp/exporter.py _export() */
inline deliver()
{
	EACH(:: IN(journal_set) -> /* a Message each */
		doubt_packets[slot[s].key] = doubt_packets[slot[s].key] + journal_packets[s] - slot[s].exported_packets;
		doubt_octets[slot[s].key] = doubt_octets[slot[s].key] + journal_octets[s] - slot[s].exported_octets);
	d_step { /* from here on what was sent was sent for good */
		owed_packets[1] = owed_packets[1] - doubt_packets[1]; owed_octets[1] = owed_octets[1] - doubt_octets[1];
		owed_packets[2] = owed_packets[2] - doubt_packets[2]; owed_octets[2] = owed_octets[2] - doubt_octets[2];
		NO_DOUBT;
#ifndef NO_COMMIT
		journal = SENT;
#endif
		s = 0
	}
}

/* MeteringProcess._sweep(), once it is known what is due; Family.close() first */
inline sweep()
{
#ifndef NO_CLOSING
	EACH(:: IN(ending) -> CTL(CLOSING, BIAS));
#endif
#ifndef NO_GRACE
	grace_period();
#endif
	free_retired();
	export(ending, 1);
	settle_ended()
}
#define IS_FLOW (slot[s].tag && slot[s].state == LIVE) /* Family.occupied(), then is_live() */
#define SOME_DUE(n) atomic { s = n; if :: IS_FLOW -> if :: ADD(ending) :: ADD(owing) :: true fi :: else fi }
#define ALL_DUE EACH(:: IS_FLOW -> ADD(ending))

/* MeteringProcess.recover(), Family.recover(); that no claim is left without a flow is asserted in the end */
inline recover()
{
	if :: journal == SENT -> settle() :: else fi;
	EACH(:: slot[s].state == RETIRED -> ADD(owing));
	retire(owing);
	owing = 0;
	grace_period();
	free_retired();
#ifdef CTL_BEFORE_TAG
	EACH(:: slot[s].claims + slot[s].state == 0 -> ADD(owing));
	EACH(:: IN(owing) -> slot[s].tag = 0);
	owing = 0;
#else
	EACH(:: slot[s].tag -> ADD(owing));
	EACH(:: IN(owing) && slot[s].claims + slot[s].state == 0 -> slot[s].tag = 0);
	owing = 0;
#endif
	EACH(:: slot[s].state == CLOSING && !(journal == SENDING && IN(journal_set)) -> ADD(ending));
	if :: journal == SENDING -> deliver(); settle() :: else fi; /* _again() */
	export(ending, 1);
	settle_ended()
}

proctype Exporter()
{
	byte s, packets[2], octets[2], to_free, ending, owing;

start:	{
		recover();
		do
		:: SOME_DUE(0); SOME_DUE(1); sweep(); export(owing, 0); settle_living()
		:: !working -> break
		od;
		s = 0; ALL_DUE; sweep(); /* stop(): drain() */
		sweep();
		d_step {
			assert(!owed_packets[1] && !owed_packets[2] && !owed_octets[1] && !owed_octets[2]);
			assert(exported == metered);
			assert(!slot[0].claims && !slot[0].state && !slot[0].tag && !slot[0].packets && !slot[0].octets);
			assert(!slot[1].claims && !slot[1].state && !slot[1].tag && !slot[1].packets && !slot[1].octets);
			ended = 1
		}
	} unless { d_step { kill && !ended -> kill = 0 } };
	d_step { /* what was in the killed process's own memory is gone; what it may have sent will be sent again */
		assert(ended || journal == SENDING || !(doubt_packets[1] + doubt_packets[2]));
		NO_DOUBT; packets[0] = 0; packets[1] = 0; octets[0] = 0; octets[1] = 0; to_free = 0; ending = 0; owing = 0
	};
	if :: ended :: !ended -> goto start fi
}
init
{
	byte n;

	atomic { run Exporter(); run Cpu(0); run Cpu(1) };
	do :: n < KILLS -> kill = 1; n++; !kill || ended :: break od
}
