/* What the parts of the tiny guest ask of each other. */
#ifndef TINY_H
#define TINY_H

#include <stdbool.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define PAGE 4096ULL
#define PAGES_PER_MIB 256ULL

/* No more pages than this are worked on between two looks at the clock. */
#define BATCH 64ULL

/* start_info of the PVH boot protocol (Xen, public/arch-x86/hvm/start_info.h). */
struct start_info {
	u32 magic;
	u32 version;
	u32 flags;
	u32 modules;
	u64 modules_at;
	u64 command_line_at;
	u64 rsdp_at;
	u64 memory_map_at; /* from version 1 */
	u32 memory_map_entries;
	u32 reserved;
};

/* memory.c: the pages that are free to be used, numbered from 0. */
void memory_init(const struct start_info *info);
u64 memory_pages(void);
u64 memory_own_end(void);
/* Says where page `index` lies; returns how many pages from there on are contiguous. */
u64 memory_run(u64 index, u64 *address);

/* clock.c */
void clock_init(void);
u64 clock_tsc(void);
u64 clock_khz(void);
u64 clock_us(u64 ticks);
const char *clock_origin(void);
/* Reads the clocks once and remembers the longest gap since the previous reading. */
void clock_tick(void);
void clock_forget_gaps(void);
void clock_report(void);

/* serial.c: COM1, polled. */
void serial_init(void);
void serial_put(char byte);
/* Takes what has arrived; true when `line` holds a whole line, which stays until the next call. */
bool serial_line(char **line);

/* text.c: one output line is words and key=value pairs. */
void say(const char *text);
void say_decimal(const char *key, u64 value);
void say_hex(const char *key, u64 value);
void say_text(const char *key, const char *value);
void say_end(void);
bool text_equal(const char *a, const char *b);
/* Cuts the next word off `*rest`; an empty word at the end. */
char *text_word(char **rest);
bool text_number(const char *text, u64 *value);

/* pattern.c: what the pages hold. */
void pattern_fill(u64 seed, u64 percent);
/* `rate` is in MiB per second, 0 for as fast as possible. */
void pattern_rewrite(u64 mib, u64 rate);
void pattern_stop(void);
bool pattern_filled(void);
bool pattern_rewriting(void);
/* Rewrites what is due by now, one batch at most. */
void pattern_step(void);
/* `deep` also looks at every byte that must be zero. */
void pattern_verify(bool deep);
void pattern_report(void);

/* command.c */
void command_run(char *line);

static inline u8 port_read(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline void port_write(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void port_write_16(u16 port, u16 value)
{
	__asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

#endif
