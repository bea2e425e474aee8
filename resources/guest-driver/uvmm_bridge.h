/* SPDX-License-Identifier: GPL-2.0 */
/* What the parts of the driver know of each other. */
#ifndef UVMM_BRIDGE_H
#define UVMM_BRIDGE_H

/* Not in the name of the driver that has the device, as pci_info() would. */
#undef pr_fmt
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/list.h>
#include <linux/pci.h>
#include <linux/spinlock.h>
#include <linux/wait.h>

/* Registers of the migration block, from the start of its capability on. */
#define UVMM_STATUS	0x0c
#define UVMM_CONTROL	0x10
#define UVMM_ASKED	0x14
#define UVMM_PAUSED	0x18
#define UVMM_UNABLE	0x1c

#define UVMM_STATUS_DIRTYING	BIT(0)
#define UVMM_STATUS_PAUSE	BIT(1)
#define UVMM_STATUS_EVENT	BIT(31)

#define UVMM_CONTROL_PROMISE	BIT(0)
#define UVMM_CONTROL_CAN_PAUSE	BIT(1)
#define UVMM_CONTROL_DIRTYING	BIT(2)
#define UVMM_CONTROL_INTERRUPT	BIT(31)

/* Bit i of a mask of slots is device i + 1 of the bus behind the bridge. */
#define UVMM_FIRST_DEVICE	1
#define UVMM_SLOTS		31

/* Why the thread of a bridge was woken. */
enum uvmm_wakeup {
	UVMM_WAKEUP_EVENT,
	UVMM_WAKEUP_REFRESH,
};

struct uvmm_bridge {
	struct list_head node;
	struct pci_dev *pdev;
	int block;

	/* What the control register says. */
	spinlock_t lock;
	bool promises;
	bool can_pause;
	bool dirtying;
	bool interrupts;
	u32 control;

	unsigned long wakeups;
	wait_queue_head_t wake;
	struct task_struct *thread;

	/* The thread's own: what it paused, the first to be resumed first. */
	struct list_head paused;
	u32 paused_slots;
};

/* block.c */
int uvmm_block_find(struct pci_dev *pdev);
u32 uvmm_block_read(struct uvmm_bridge *bridge, int reg);
void uvmm_block_write(struct uvmm_bridge *bridge, int reg, u32 value);
void uvmm_promise(struct uvmm_bridge *bridge, bool promises);
void uvmm_can_pause(struct uvmm_bridge *bridge, bool can_pause);
void uvmm_dirtying(struct uvmm_bridge *bridge, bool dirtying);
void uvmm_interrupts(struct uvmm_bridge *bridge, bool enable);

/* bridge.c */
struct uvmm_bridge *uvmm_bridge_add(struct pci_dev *pdev, int block);
void uvmm_bridge_remove(struct uvmm_bridge *bridge);
void uvmm_bridge_wake(struct uvmm_bridge *bridge, enum uvmm_wakeup why);
void uvmm_bridge_connect(struct uvmm_bridge *bridge);
void uvmm_bridge_disconnect(struct uvmm_bridge *bridge);

/* device.c */
struct pci_dev *uvmm_device_get(struct uvmm_bridge *bridge, int slot, int fn);
void uvmm_devices_refresh(struct uvmm_bridge *bridge);
int uvmm_devices_watch(struct list_head *bridges, bool rebind);
void uvmm_devices_leave(void);

/* dma.c */
int uvmm_dma_start(void);
void uvmm_dma_stop(void);
int uvmm_dma_install(struct uvmm_bridge *bridge, struct device *dev);
bool uvmm_dma_remove(struct device *dev);
bool uvmm_dma_promises(struct device *dev);
long uvmm_dma_live(struct device *dev);
void uvmm_dma_touch_coherent(struct device *dev);

/* pause.c */
const char *uvmm_cannot_pause(struct device *dev);
bool uvmm_is_paused(struct uvmm_bridge *bridge, struct pci_dev *pdev);
void uvmm_pause(struct uvmm_bridge *bridge, u32 asked);
void uvmm_resume(struct uvmm_bridge *bridge);

#endif
