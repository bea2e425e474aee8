/* Words and numbers, out and in. */
#include "tiny.h"

static bool line_begun;

static void put(const char *text)
{
	while (*text)
		serial_put(*text++);
}

static void put_number(u64 value, unsigned int base)
{
	char digits[21];
	unsigned int i = sizeof(digits) - 1;

	digits[i] = 0;
	do {
		digits[--i] = "0123456789abcdef"[value % base];
		value /= base;
	} while (value);
	put(digits + i);
}

void say(const char *text)
{
	if (line_begun)
		put(" ");
	put(text);
	line_begun = true;
}

void say_text(const char *key, const char *value)
{
	say(key);
	put("=");
	put(value);
}

void say_decimal(const char *key, u64 value)
{
	say_text(key, "");
	put_number(value, 10);
}

void say_hex(const char *key, u64 value)
{
	say_text(key, "0x");
	put_number(value, 16);
}

void say_end(void)
{
	put("\r\n");
	line_begun = false;
}

bool text_equal(const char *a, const char *b)
{
	while (*a && *a == *b) {
		a++;
		b++;
	}
	return *a == *b;
}

char *text_word(char **rest)
{
	char *word = *rest;
	char *end;

	while (*word == ' ')
		word++;
	end = word;
	while (*end && *end != ' ')
		end++;
	*rest = *end ? end + 1 : end;
	*end = 0;
	return word;
}

bool text_number(const char *text, u64 *value)
{
	u64 number = 0;

	if (!*text)
		return false;
	for (; *text; text++) {
		if (*text < '0' || *text > '9' || number > 999999999999ULL)
			return false;
		number = number * 10 + (u64)(*text - '0');
	}
	*value = number;
	return true;
}
