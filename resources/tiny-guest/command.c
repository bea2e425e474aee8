/* The commands, and the loop that waits for them. */
#include "tiny.h"

#define POLL_MS 5
#define PM1A_CONTROL 0x604
#define SLEEP_S5 0x3400 /* SLP_EN, SLP_TYP 5: ACPI 6.5, 4.8.3.2.1 */
#define RESET_CONTROL 0xcf9
#define SYSTEM_RESET 0x02
#define RESET_CPU 0x04
#define START_INFO_MAGIC 0x336ec578

static char boot_commands[512];

static void complain(const char *why)
{
	say("error:");
	say(why);
	say_end();
}

static void help(char *rest);

static void fill(char *rest)
{
	char *percent_word;
	u64 seed, percent = 100;

	if (!text_number(text_word(&rest), &seed)) {
		complain("usage: fill SEED [PERCENT]");
		return;
	}
	percent_word = text_word(&rest);
	if (*percent_word && (!text_number(percent_word, &percent) || percent > 100)) {
		complain("PERCENT is a number from 0 to 100");
		return;
	}
	pattern_fill(seed, percent);
}

static void rewrite(char *rest)
{
	u64 mib, rate = 0;
	char *rate_word;

	if (!text_number(text_word(&rest), &mib)) {
		complain("usage: rewrite MIB RATE|max");
		return;
	}
	rate_word = text_word(&rest);
	if (!text_equal(rate_word, "max") && (!text_number(rate_word, &rate) || !rate || rate > 1000000)) {
		complain("RATE is max or a number of MiB per second from 1 to 1000000");
		return;
	}
	if (!mib || mib > memory_pages() / PAGES_PER_MIB) {
		complain("MIB must be at least 1 and fit into the memory that status shows");
		return;
	}
	if (!pattern_filled()) {
		complain("nothing is there to rewrite: fill first");
		return;
	}
	pattern_rewrite(mib, rate);
}

static void status(char *rest)
{
	(void)rest;
	say("status");
	say_decimal("pages", memory_pages());
	pattern_report();
	say_decimal("tsc_khz", clock_khz());
	say_text("clock", clock_origin());
	say_end();
}

static void crash(char *rest)
{
	static const struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) no_handlers;

	(void)rest;
	__asm__ volatile("lidt %0; ud2" : : "m"(no_handlers));
}

static void verify(char *rest)
{
	if (pattern_filled())
		pattern_verify(text_equal(text_word(&rest), "deep"));
	else
		complain("nothing is there to verify: fill first");
}

static void stop(char *rest)
{
	(void)rest;
	pattern_stop();
}

static void gap(char *rest)
{
	if (text_equal(text_word(&rest), "reset"))
		clock_forget_gaps();
	clock_report();
}

static void poweroff(char *rest)
{
	(void)rest;
	port_write_16(PM1A_CONTROL, SLEEP_S5);
	complain("this machine does not switch off by port 0x604");
}

static void reboot(char *rest)
{
	(void)rest;
	port_write(RESET_CONTROL, SYSTEM_RESET);
	port_write(RESET_CONTROL, SYSTEM_RESET | RESET_CPU);
	complain("this machine does not reset by port 0xcf9");
}

static const struct command {
	const char *name;
	const char *arguments;
	const char *purpose;
	void (*run)(char *rest);
} commands[] = {
	{ "help", "", "this list", help },
	{ "fill", "SEED [PERCENT]", "write a pattern to PERCENT (100) of all pages, empty the others", fill },
	{ "rewrite", "MIB RATE|max", "keep rewriting MIB of memory at RATE MiB/s", rewrite },
	{ "stop", "", "stop rewriting", stop },
	{ "verify", "[deep]", "check what every page holds; deep: every byte of it", verify },
	{ "gap", "[reset]", "longest time between two readings of the clock", gap },
	{ "status", "", "what is going on", status },
	{ "poweroff", "", "switch off by ACPI", poweroff },
	{ "reboot", "", "reset by port 0xcf9", reboot },
	{ "crash", "", "triple fault", crash },
};

#define COMMANDS (sizeof(commands) / sizeof(commands[0]))

static void help(char *rest)
{
	(void)rest;
	for (unsigned int i = 0; i < COMMANDS; i++) {
		say(commands[i].name);
		if (*commands[i].arguments)
			say(commands[i].arguments);
		say("-");
		say(commands[i].purpose);
		say_end();
	}
}

void command_run(char *line)
{
	char *name = text_word(&line);

	for (unsigned int i = 0; i < COMMANDS; i++) {
		if (text_equal(name, commands[i].name)) {
			commands[i].run(line);
			return;
		}
	}
	if (*name)
		complain("unknown command: type help");
}

/* Keeps what follows "run=" on the command line: commands separated by semicolons. */
static void keep_boot_commands(const char *text)
{
	for (; *text; text++) {
		if (text[0] != 'r' || text[1] != 'u' || text[2] != 'n' || text[3] != '=')
			continue;
		text += 4;
		for (unsigned int i = 0; text[i] && i < sizeof(boot_commands) - 1; i++)
			boot_commands[i] = text[i];
		return;
	}
}

static void run_boot_commands(void)
{
	char *rest = boot_commands;

	while (*rest) {
		char *one = rest;

		while (*rest && *rest != ';')
			rest++;
		if (*rest)
			*rest++ = 0;
		command_run(one);
	}
}

static void prompt(void)
{
	serial_put('>');
	serial_put(' ');
}

void tiny_guest(const struct start_info *info);

void tiny_guest(const struct start_info *info)
{
	u64 poll_ticks, last_poll;

	serial_init();
	clock_init();
	if (info->magic != START_INFO_MAGIC || info->version < 1) {
		complain("no PVH start_info with a memory map");
		return;
	}
	if (info->command_line_at)
		keep_boot_commands((const char *)info->command_line_at);
	memory_init(info);

	say("uvmm tiny guest:");
	say_decimal("mib", memory_pages() / PAGES_PER_MIB);
	say_decimal("pages", memory_pages());
	say_decimal("tsc_khz", clock_khz());
	say_text("clock", clock_origin());
	say("- type help");
	say_end();
	run_boot_commands();
	prompt();

	poll_ticks = clock_khz() * POLL_MS;
	last_poll = clock_tsc();
	for (;;) {
		char *line;

		clock_tick();
		if (clock_tsc() - last_poll >= poll_ticks) {
			while (serial_line(&line)) {
				command_run(line);
				prompt();
			}
			last_poll = clock_tsc();
		}
		if (pattern_rewriting())
			pattern_step();
		else
			__builtin_ia32_pause();
	}
}
