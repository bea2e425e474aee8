/* The guest's view of time: the TSC, and KVM's paravirtual clock where there is one. */
#include "tiny.h"

#define KVM_SIGNATURE 0x40000000
#define KVM_FEATURES 0x40000001
#define KVM_TIMING 0x40000010
#define KVM_FEATURE_CLOCKSOURCE2 (1U << 3)
#define MSR_KVM_SYSTEM_TIME_NEW 0x4b564d01
#define CLOCK_ENABLED 1
#define TSC_LEAF 0x15

/* pvclock_vcpu_time_info (Linux, Documentation/virt/kvm/x86/msr.rst). */
static volatile struct {
	u32 version;
	u32 padding;
	u64 tsc_timestamp;
	u64 system_time;
	u32 multiplier;
	int8_t shift;
	u8 flags;
	u8 padding2[2];
} kvmclock __attribute__((aligned(64)));

struct watch {
	u64 last;
	u64 longest;
};

static u64 khz;
static const char *origin;
static bool has_kvmclock;
static struct watch tsc, kvm;
static u64 readings;
static u64 steps_back;

struct leaf {
	u32 a, b, c, d;
};

static struct leaf cpuid(u32 leaf)
{
	struct leaf r;

	__asm__ volatile("cpuid"
			 : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d)
			 : "a"(leaf), "c"(0));
	return r;
}

u64 clock_tsc(void)
{
	u32 low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (u64)high << 32 | low;
}

static u64 kvmclock_ns(void)
{
	u64 ns, delta;
	u32 version;

	do {
		version = kvmclock.version;
		__asm__ volatile("" : : : "memory");
		delta = clock_tsc() - kvmclock.tsc_timestamp;
		if (kvmclock.shift < 0)
			delta >>= -kvmclock.shift;
		else
			delta <<= kvmclock.shift;
		ns = (u64)((unsigned __int128)delta * kvmclock.multiplier >> 32);
		ns += kvmclock.system_time;
		__asm__ volatile("" : : : "memory");
	} while ((version & 1) || version != kvmclock.version);
	return ns;
}

static void find_kvmclock(void)
{
	struct leaf signature = cpuid(KVM_SIGNATURE);
	u64 page = (u64)&kvmclock | CLOCK_ENABLED;

	/* "KVMKVMKVM\0\0\0" */
	if (signature.b != 0x4b4d564b || signature.c != 0x564b4d56 || signature.d != 0x4d)
		return;
	if (!(cpuid(KVM_FEATURES).a & KVM_FEATURE_CLOCKSOURCE2))
		return;
	__asm__ volatile("wrmsr"
			 :
			 : "c"(MSR_KVM_SYSTEM_TIME_NEW), "a"((u32)page), "d"((u32)(page >> 32))
			 : "memory");
	has_kvmclock = kvmclock.multiplier != 0;
}

static u64 khz_of_kvmclock(void)
{
	u64 value = (1000000ULL << 32) / kvmclock.multiplier;

	return kvmclock.shift < 0 ? value << -kvmclock.shift : value >> kvmclock.shift;
}

static u64 khz_of_cpuid(void)
{
	struct leaf ratio;

	if (cpuid(0).a < TSC_LEAF)
		return 0;
	ratio = cpuid(TSC_LEAF);
	return ratio.a ? (u64)ratio.c * ratio.b / ratio.a / 1000 : 0;
}

void clock_init(void)
{
	u32 last = cpuid(KVM_SIGNATURE).a;

	find_kvmclock();
	if (last >= KVM_TIMING && last < KVM_SIGNATURE + 0x100) {
		khz = cpuid(KVM_TIMING).a;
		origin = "timing-leaf";
	}
	if (!khz && has_kvmclock) {
		khz = khz_of_kvmclock();
		origin = "kvmclock";
	}
	if (!khz) {
		khz = khz_of_cpuid();
		origin = "tsc-leaf";
	}
	if (!khz) {
		khz = 1000000;
		origin = "assumed";
	}
	clock_forget_gaps();
}

u64 clock_khz(void)
{
	return khz;
}

const char *clock_origin(void)
{
	return origin;
}

u64 clock_us(u64 ticks)
{
	return ticks * 1000 / khz;
}

static void watch(struct watch *w, u64 now)
{
	if (now < w->last)
		steps_back++;
	else if (now - w->last > w->longest)
		w->longest = now - w->last;
	w->last = now;
}

void clock_tick(void)
{
	watch(&tsc, clock_tsc());
	if (has_kvmclock)
		watch(&kvm, kvmclock_ns());
	readings++;
}

void clock_forget_gaps(void)
{
	tsc.last = clock_tsc();
	kvm.last = has_kvmclock ? kvmclock_ns() : 0;
	tsc.longest = 0;
	kvm.longest = 0;
	readings = 0;
	steps_back = 0;
}

void clock_report(void)
{
	say("gap");
	say_decimal("tsc_us", clock_us(tsc.longest));
	if (has_kvmclock)
		say_decimal("kvmclock_us", kvm.longest / 1000);
	say_decimal("backwards", steps_back);
	say_decimal("readings", readings);
	say_end();
}
