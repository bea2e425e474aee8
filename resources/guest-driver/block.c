// SPDX-License-Identifier: GPL-2.0
/* The migration block in the configuration space of the bridge. */
#include "uvmm_bridge.h"

#define UVMM_LENGTH	0x20
#define UVMM_REVISION	1
#define UVMM_SIGNATURE	0x6d6d7675	/* the letters uvmm */

/* Where the block of @pdev lies, or 0 if it has none of a kind known here. */
int uvmm_block_find(struct pci_dev *pdev)
{
	int at;

	for (at = pci_find_capability(pdev, PCI_CAP_ID_VNDR); at;
	     at = pci_find_next_capability(pdev, at, PCI_CAP_ID_VNDR)) {
		u8 length = 0, revision = 0;
		u32 signature = 0;

		pci_read_config_byte(pdev, at + 2, &length);
		pci_read_config_byte(pdev, at + 3, &revision);
		pci_read_config_dword(pdev, at + 4, &signature);
		if (signature != UVMM_SIGNATURE)
			continue;
		if (revision == UVMM_REVISION && length >= UVMM_LENGTH)
			return at;
		pr_warn("%s: migration block has unknown revision %u\n",
			pci_name(pdev), revision);
	}
	return 0;
}

/* All ones if there is no answer. */
u32 uvmm_block_read(struct uvmm_bridge *bridge, int reg)
{
	u32 value = ~0;

	pci_read_config_dword(bridge->pdev, bridge->block + reg, &value);
	return value;
}

void uvmm_block_write(struct uvmm_bridge *bridge, int reg, u32 value)
{
	pci_write_config_dword(bridge->pdev, bridge->block + reg, value);
}

/* Changes one thing that the control register says; in any context. */
static void uvmm_say(struct uvmm_bridge *bridge, bool *what, bool is)
{
	unsigned long flags;
	u32 control = 0;

	spin_lock_irqsave(&bridge->lock, flags);
	WRITE_ONCE(*what, is);
	/* Whoever unmaps from now on sees what is said. */
	smp_mb();
	if (bridge->promises)
		control |= UVMM_CONTROL_PROMISE;
	if (bridge->can_pause)
		control |= UVMM_CONTROL_CAN_PAUSE;
	if (bridge->promises && bridge->dirtying)
		control |= UVMM_CONTROL_DIRTYING;
	if (bridge->interrupts)
		control |= UVMM_CONTROL_INTERRUPT;
	if (control != bridge->control)
		uvmm_block_write(bridge, UVMM_CONTROL, control);
	bridge->control = control;
	spin_unlock_irqrestore(&bridge->lock, flags);
}

void uvmm_promise(struct uvmm_bridge *bridge, bool promises)
{
	uvmm_say(bridge, &bridge->promises, promises);
}

void uvmm_can_pause(struct uvmm_bridge *bridge, bool can_pause)
{
	uvmm_say(bridge, &bridge->can_pause, can_pause);
}

void uvmm_dirtying(struct uvmm_bridge *bridge, bool dirtying)
{
	uvmm_say(bridge, &bridge->dirtying, dirtying);
}

void uvmm_interrupts(struct uvmm_bridge *bridge, bool enable)
{
	uvmm_say(bridge, &bridge->interrupts, enable);
}
