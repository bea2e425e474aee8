/*
 * From the PVH entry (32-bit protected mode, paging off, %ebx = hvm_start_info) to 64-bit C.
 *
 * The first 4 GiB are mapped one to one here; memory.c maps what lies above.
 */

#define XEN_ELFNOTE_PHYS32_ENTRY 18
#define CR0_PE 0x1
#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define MSR_EFER 0xc0000080
#define EFER_LME 0x100
#define TABLE 0x3		/* present, writable */
#define LARGE_PAGE 0x83		/* present, writable, 2 MiB */
#define LOW_TABLES 4

	.section .note.Xen, "a", @note
	.balign 4
	.long 4
	.long 8
	.long XEN_ELFNOTE_PHYS32_ENTRY
	.asciz "Xen"
	.quad pvh_entry

	.section .start, "ax", @progbits
	.code32
	.globl pvh_entry
pvh_entry:
	cli
	cld
	/* The loader may leave anything in the part that the file does not hold. */
	xorl %eax, %eax
	movl $bss_start, %edi
	movl $bss_end, %ecx
	subl %edi, %ecx
	shrl $2, %ecx
	rep stosl

	movl $stack_top, %esp
	movl $(top_table), %eax
	movl $(middle_table + TABLE), (%eax)

	movl $middle_table, %edi
	movl $(low_tables + TABLE), %eax
	movl $LOW_TABLES, %ecx
1:	movl %eax, (%edi)
	addl $4096, %eax
	addl $8, %edi
	loop 1b

	movl $low_tables, %edi
	movl $LARGE_PAGE, %eax
	movl $(LOW_TABLES * 512), %ecx
1:	movl %eax, (%edi)
	addl $0x200000, %eax
	addl $8, %edi
	loop 1b

	movl $top_table, %eax
	movl %eax, %cr3
	movl $CR4_PAE, %eax
	movl %eax, %cr4
	movl $MSR_EFER, %ecx
	rdmsr
	orl $EFER_LME, %eax
	wrmsr
	movl %cr0, %eax
	orl $(CR0_PG | CR0_PE), %eax
	movl %eax, %cr0

	lgdt gdt_pointer
	ljmpl $8, $long_mode

	.code64
long_mode:
	movl $16, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl %ebx, %edi
	xorl %ebp, %ebp
	call tiny_guest
1:	cli
	hlt
	jmp 1b

	.data
	.balign 8
gdt:
	.quad 0
	.quad 0x00af9b000000ffff	/* 64-bit code */
	.quad 0x00cf93000000ffff	/* data */
gdt_pointer:
	.word gdt_pointer - gdt - 1
	.long gdt

	.section .bss
	.balign 4096
	.globl middle_table
top_table:
	.skip 4096
middle_table:
	.skip 4096
low_tables:
	.skip 4096 * LOW_TABLES
	.skip 16384
stack_top:

	.section .note.GNU-stack, "", @progbits
