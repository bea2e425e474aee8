/*
 * What the pages hold, and whether they still do.
 *
 * A page that holds something holds one word in each of its four KiB, at a place and with a value
 * that follow from its address, the seed and its generation; the rest of it stays zero. Nothing is
 * written down per page: `fill` makes generation 0, `rewrite` goes round its set in order, so two
 * numbers tell the generation of every page, and `verify` can compute what each must hold.
 *
 * The loops are counted in instructions: where KVM interprets them, each takes a microsecond.
 */
#include "tiny.h"

#define SPREAD 0x9e3779b97f4a7c15ULL /* 2^64 / golden ratio: neighbours get distant hashes */
#define EVERY (1ULL << 32)
#define PAGE_WORDS 512
#define PART_WORDS 128
#define PARTS 4
#define CATCH_UP_MS 100

static struct {
	bool filled;
	bool rewriting;
	u64 seed;
	u64 percent;
	u64 rate;	  /* MiB per second, 0: no limit */
	u64 set;	  /* pages that are rewritten, from page 0 */
	u64 passes;	  /* how often all of the set has been rewritten */
	u64 cursor;	  /* the next page of the set: those before it are one generation further */
	u64 page_ticks;	  /* TSC ticks per page at `rate` */
	u64 due;	  /* when the page at the cursor was to be written */
	u64 rewritten;	  /* pages, since `rewrite` */
} state;

/* A stretch of neighbouring pages of one generation. */
struct stretch {
	u64 *words;
	u64 hash;      /* of the first page */
	u64 pages;
	u64 key;
	u64 selected; /* pages whose hash ends lower hold something, others are empty */
};

/* The first of a page's words; the others follow at a distance of PART_WORDS. */
static inline u64 *first_word(u64 *page, u64 hash)
{
	return page + (hash >> 57);
}

static inline bool is_selected(u64 hash, u64 selected)
{
	return (u32)hash < selected;
}

/* The longest stretch at `index` that is no longer than a batch and ends before page `end`. */
static struct stretch stretch_at(u64 index, u64 end)
{
	struct stretch s;
	u64 generation = 0;
	u64 address;

	if (index < state.cursor) {
		generation = state.passes + 1;
		end = end < state.cursor ? end : state.cursor;
	} else if (index < state.set) {
		generation = state.passes;
		end = end < state.set ? end : state.set;
	}
	s.pages = memory_run(index, &address);
	if (s.pages > end - index)
		s.pages = end - index;
	if (s.pages > BATCH)
		s.pages = BATCH;
	s.words = (u64 *)address;
	s.hash = address / PAGE * SPREAD;
	s.key = (state.seed << 32 ^ generation) * SPREAD;
	s.selected = generation ? EVERY : EVERY * state.percent / 100;
	return s;
}

static inline void write_page(u64 *page, u64 hash, u64 value)
{
	u64 *word = first_word(page, hash);

	word[0 * PART_WORDS] = value;
	word[1 * PART_WORDS] = value + 1;
	word[2 * PART_WORDS] = value + 2;
	word[3 * PART_WORDS] = value + 3;
}

static void write_every(struct stretch s)
{
	for (; s.pages; s.pages--, s.words += PAGE_WORDS, s.hash += SPREAD)
		write_page(s.words, s.hash, s.hash ^ s.key);
}

static void clear_page(u64 *page, u64 hash)
{
	for (unsigned int part = 0; part < PARTS; part++)
		first_word(page, hash)[part * PART_WORDS] = 0;
}

/* Pages that are to be empty are left alone unless they may hold something. */
static void write_stretch(struct stretch s, bool clear)
{
	if (s.selected == EVERY) {
		write_every(s);
		return;
	}
	for (; s.pages; s.pages--, s.words += PAGE_WORDS, s.hash += SPREAD) {
		if (is_selected(s.hash, s.selected))
			write_page(s.words, s.hash, s.hash ^ s.key);
		else if (clear)
			clear_page(s.words, s.hash);
	}
}

static void write_pages(u64 end, bool clear)
{
	for (u64 index = 0; index < end;) {
		struct stretch s = stretch_at(index, end);

		write_stretch(s, clear);
		index += s.pages;
		clock_tick();
	}
}

static void forget_generations(void)
{
	state.rewriting = false;
	state.set = 0;
	state.passes = 0;
	state.cursor = 0;
}

void pattern_fill(u64 seed, u64 percent)
{
	u64 begun = clock_tsc();

	forget_generations();
	state.seed = seed;
	state.percent = percent;
	write_pages(memory_pages(), state.filled);
	state.filled = true;
	say("fill ok");
	say_decimal("pages", memory_pages());
	say_decimal("percent", percent);
	say_decimal("ms", clock_us(clock_tsc() - begun) / 1000);
	say_end();
}

void pattern_rewrite(u64 mib, u64 rate)
{
	u64 set = mib * PAGES_PER_MIB;

	if (set != state.set) {
		u64 old = state.set;

		/* The pages of the previous set go back to generation 0. */
		forget_generations();
		write_pages(old, true);
		state.set = set;
	}
	state.rate = rate;
	state.page_ticks = rate ? clock_khz() * 1000 / (rate * PAGES_PER_MIB) : 0;
	state.due = clock_tsc();
	state.rewritten = 0;
	state.rewriting = true;
	say("rewrite ok");
	say_decimal("mib", mib);
	say_decimal("rate", rate);
	say_end();
}

void pattern_stop(void)
{
	state.rewriting = false;
	say("stop ok");
	say_decimal("rewritten", state.rewritten);
	say_end();
}

bool pattern_filled(void)
{
	return state.filled;
}

bool pattern_rewriting(void)
{
	return state.rewriting;
}

/* How many pages the rate allows by now. */
static u64 pages_due(void)
{
	u64 behind;
	u64 due;

	if (!state.page_ticks)
		return BATCH;
	behind = clock_tsc() - state.due;
	/* What was missed while the guest stood still is not made up for in one burst. */
	if (behind > clock_khz() * CATCH_UP_MS) {
		state.due += behind - clock_khz() * CATCH_UP_MS;
		behind = clock_khz() * CATCH_UP_MS;
	}
	due = behind / state.page_ticks;
	return due < BATCH ? due : BATCH;
}

void pattern_step(void)
{
	u64 due = pages_due();

	while (due) {
		struct stretch s;
		u64 end = state.cursor + due < state.set ? state.cursor + due : state.set;

		s = stretch_at(state.cursor, end);
		s.key = (state.seed << 32 ^ (state.passes + 1)) * SPREAD;
		s.selected = EVERY;
		write_stretch(s, false);
		due -= s.pages;
		state.due += s.pages * state.page_ticks;
		state.rewritten += s.pages;
		state.cursor += s.pages;
		if (state.cursor == state.set) {
			state.cursor = 0;
			state.passes++;
		}
	}
}

struct fault {
	u64 bad;
	u64 address;
	u64 want;
	u64 have;
};

static void note_fault(struct fault *fault, const u64 *word, u64 want)
{
	if (!fault->bad++) {
		fault->address = (u64)word;
		fault->want = want;
		fault->have = *word;
	}
}

/* The first word of [from, from + count) that is not zero, or their end. */
static const u64 *skip_zeros(const u64 *from, u64 count)
{
	const u64 *end = from + count;

	if (!count)
		return end;
	__asm__ volatile("repe scasq" : "+D"(from), "+c"(count) : "a"(0ULL) : "cc", "memory");
	/* It stops behind the word that it compared last. */
	return from[-1] ? from - 1 : end;
}

/* Finds what is not zero between the words that a page holds. */
static void check_rest(struct stretch s, struct fault *fault)
{
	u64 at = (u64)(first_word(s.words, s.hash) - s.words);
	const u64 *from = s.words;

	for (unsigned int part = 0; part <= PARTS; part++) {
		const u64 *end = part < PARTS ? s.words + part * PART_WORDS + at : s.words + PAGE_WORDS;
		const u64 *found = skip_zeros(from, (u64)(end - from));

		if (found != end) {
			note_fault(fault, found, 0);
			return;
		}
		from = end + 1;
	}
}

static void find_fault(const u64 *word, u64 want, u64 step, struct fault *fault)
{
	while (*word == want) {
		word += PART_WORDS;
		want += step;
	}
	note_fault(fault, word, want);
}

static void check_stretch(struct stretch s, bool deep, struct fault *fault)
{
	for (; s.pages; s.pages--, s.words += PAGE_WORDS, s.hash += SPREAD) {
		const u64 *word = first_word(s.words, s.hash);
		u64 want = s.hash ^ s.key;
		u64 step = 1;

		if (!is_selected(s.hash, s.selected)) {
			want = 0;
			step = 0;
		}
		if (word[0 * PART_WORDS] != want || word[1 * PART_WORDS] != want + step ||
		    word[2 * PART_WORDS] != want + 2 * step ||
		    word[3 * PART_WORDS] != want + 3 * step)
			find_fault(word, want, step, fault);
		else if (deep)
			check_rest(s, fault);
	}
}

void pattern_verify(bool deep)
{
	struct fault fault = { 0 };
	u64 begun = clock_tsc();
	u64 end = memory_pages();

	for (u64 index = 0; index < end;) {
		struct stretch s = stretch_at(index, end);

		check_stretch(s, deep, &fault);
		index += s.pages;
		clock_tick();
	}
	if (fault.bad) {
		say("verify FAILED");
		say_hex("page", fault.address & -PAGE);
		say_hex("offset", fault.address % PAGE);
		say_hex("want", fault.want);
		say_hex("have", fault.have);
		say_decimal("bad", fault.bad);
	} else {
		say("verify ok");
	}
	say_decimal("pages", end);
	say_decimal("ms", clock_us(clock_tsc() - begun) / 1000);
	say_end();
}

void pattern_report(void)
{
	say_text("filled", state.filled ? "yes" : "no");
	say_decimal("seed", state.seed);
	say_decimal("percent", state.percent);
	say_text("rewriting", state.rewriting ? "yes" : "no");
	say_decimal("mib", state.set / PAGES_PER_MIB);
	say_decimal("rate", state.rate);
	say_decimal("passes", state.passes);
	say_decimal("rewritten", state.rewritten);
}
