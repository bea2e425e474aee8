/* Which pages of RAM are free, from the memory map of the PVH boot protocol. */
#include "tiny.h"

#define MIB (1ULL << 20)
#define GIB (1ULL << 30)
#define RAM 1
#define LARGE_PAGE 0x83ULL
#define TABLE 0x3ULL
#define MAPPED_AT_START (4 * GIB)
#define MAPPABLE (512 * GIB)

struct memory_map_entry {
	u64 start;
	u64 size;
	u32 type;
	u32 reserved;
};

struct range {
	u64 start;
	u64 pages;
};

extern u8 image_end[];
extern u64 middle_table[512];

static struct range ranges[32];
static unsigned int range_count;
static u64 pages;
static u64 own_end;

/* Maps [4 GiB, end) one to one; the tables go behind the image. Returns how far it came. */
static u64 map_up_to(u64 end, u64 tables_end)
{
	u64 mapped = MAPPED_AT_START;

	while (mapped < end && mapped < MAPPABLE && own_end + PAGE <= tables_end) {
		u64 *table = (u64 *)own_end;

		for (u64 i = 0; i < 512; i++)
			table[i] = mapped + i * 2 * MIB + LARGE_PAGE;
		middle_table[mapped / GIB] = own_end + TABLE;
		own_end += PAGE;
		mapped += GIB;
	}
	return mapped;
}

void memory_init(const struct start_info *info)
{
	const struct memory_map_entry *map = (const void *)info->memory_map_at;
	u64 entries = info->version >= 1 ? info->memory_map_entries : 0;
	u64 highest = 0;
	u64 home_end = 0;
	u64 mapped;

	own_end = (u64)image_end;
	for (u64 i = 0; i < entries; i++) {
		u64 end = map[i].start + map[i].size;

		if (map[i].type != RAM)
			continue;
		if (end > highest)
			highest = end;
		if (map[i].start <= own_end && own_end < end)
			home_end = end;
	}
	mapped = map_up_to(highest, home_end);

	for (u64 i = 0; i < entries; i++) {
		u64 start = (map[i].start + PAGE - 1) & -PAGE;
		u64 end = (map[i].start + map[i].size) & -PAGE;

		/* What lies below the image is the firmware's and the loader's. */
		if (start < own_end)
			start = own_end;
		if (end > mapped)
			end = mapped;
		if (map[i].type != RAM || start >= end || range_count == 32)
			continue;
		ranges[range_count].start = start;
		ranges[range_count].pages = (end - start) / PAGE;
		pages += ranges[range_count].pages;
		range_count++;
	}
}

u64 memory_pages(void)
{
	return pages;
}

u64 memory_own_end(void)
{
	return own_end;
}

u64 memory_run(u64 index, u64 *address)
{
	for (unsigned int i = 0; i < range_count; i++) {
		if (index < ranges[i].pages) {
			*address = ranges[i].start + index * PAGE;
			return ranges[i].pages - index;
		}
		index -= ranges[i].pages;
	}
	return 0;
}
