/* COM1: a 16550, polled, 115200 8N1. */
#include "tiny.h"

#define COM1 0x3f8
#define DATA (COM1 + 0)
#define DIVISOR_LOW (COM1 + 0)
#define INTERRUPT_ENABLE (COM1 + 1)
#define DIVISOR_HIGH (COM1 + 1)
#define FIFO_CONTROL (COM1 + 2)
#define LINE_CONTROL (COM1 + 3)
#define MODEM_CONTROL (COM1 + 4)
#define LINE_STATUS (COM1 + 5)
#define DIVISOR_LATCH 0x80
#define EIGHT_BITS 0x03
#define FIFO_ENABLE_AND_CLEAR 0x07
#define DTR_AND_RTS 0x03
#define DATA_READY 0x01
#define TRANSMITTER_EMPTY 0x20
#define FIFO_BYTES 16
#define NOTHING_THERE 0xff

static char line_buffer[256];
static unsigned int length;
static unsigned int room;

void serial_init(void)
{
	port_write(INTERRUPT_ENABLE, 0);
	port_write(LINE_CONTROL, DIVISOR_LATCH | EIGHT_BITS);
	port_write(DIVISOR_LOW, 1);
	port_write(DIVISOR_HIGH, 0);
	port_write(LINE_CONTROL, EIGHT_BITS);
	port_write(FIFO_CONTROL, FIFO_ENABLE_AND_CLEAR);
	port_write(MODEM_CONTROL, DTR_AND_RTS);
}

void serial_put(char byte)
{
	/* Every port access leaves the guest: ask for room once per FIFO, not per byte. */
	while (!room) {
		if (port_read(LINE_STATUS) & TRANSMITTER_EMPTY)
			room = FIFO_BYTES;
		clock_tick();
	}
	room--;
	port_write(DATA, (u8)byte);
}

static void echo(const char *text)
{
	while (*text)
		serial_put(*text++);
}

bool serial_line(char **line)
{
	for (;;) {
		u8 status = port_read(LINE_STATUS);
		char byte;

		clock_tick();
		if (status == NOTHING_THERE || !(status & DATA_READY))
			return false;
		byte = (char)port_read(DATA);
		if (byte == '\r' || byte == '\n') {
			echo("\r\n");
			line_buffer[length] = 0;
			length = 0;
			*line = line_buffer;
			return true;
		}
		if ((byte == '\b' || byte == 0x7f) && length > 0) {
			length--;
			echo("\b \b");
		} else if (byte >= ' ' && byte < 0x7f && length < sizeof(line_buffer) - 1) {
			line_buffer[length++] = byte;
			serial_put(byte);
		}
	}
}
