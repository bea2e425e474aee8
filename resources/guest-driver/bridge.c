// SPDX-License-Identifier: GPL-2.0
/*
 * One bridge: how it is heard, and the thread that does as its host wants.
 *
 * The bridge belongs to its own driver, shpchp. Here its interrupt is shared
 * and configuration space is read, and nothing else of it is touched.
 */
#include <linux/interrupt.h>
#include <linux/kthread.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "uvmm_bridge.h"

#define UVMM_POLL	(HZ / 10)

void uvmm_bridge_wake(struct uvmm_bridge *bridge, enum uvmm_wakeup why)
{
	set_bit(why, &bridge->wakeups);
	wake_up(&bridge->wake);
}

/* Clears the event first: whatever is wanted after that makes another. */
static bool uvmm_take_event(struct uvmm_bridge *bridge)
{
	u32 status = uvmm_block_read(bridge, UVMM_STATUS);

	if (status == ~0u || !(status & UVMM_STATUS_EVENT))
		return false;
	uvmm_block_write(bridge, UVMM_STATUS, UVMM_STATUS_EVENT);
	return true;
}

static irqreturn_t uvmm_interrupt(int irq, void *data)
{
	struct uvmm_bridge *bridge = data;

	if (!uvmm_take_event(bridge))
		return IRQ_NONE;
	uvmm_bridge_wake(bridge, UVMM_WAKEUP_EVENT);
	return IRQ_HANDLED;
}

/*
 * Listens to the bridge's interrupt, if its driver set one up. The driver
 * chooses between MSI and the pin when it is bound, so this is called again
 * each time that happens. Without an interrupt the thread polls.
 */
void uvmm_bridge_connect(struct uvmm_bridge *bridge)
{
	struct pci_dev *pdev = bridge->pdev;
	int error = -ENXIO;

	if (bridge->interrupts)
		return;
	if (pdev->dev.driver && pdev->irq)
		error = request_irq(pdev->irq, uvmm_interrupt, IRQF_SHARED,
				    "uvmm_bridge", bridge);
	if (error)
		pr_info("%s: no interrupt to share (%d), polling\n",
			pci_name(pdev), error);
	else
		uvmm_interrupts(bridge, true);
	wake_up(&bridge->wake);
}

void uvmm_bridge_disconnect(struct uvmm_bridge *bridge)
{
	if (!bridge->interrupts)
		return;
	uvmm_interrupts(bridge, false);
	free_irq(bridge->pdev->irq, bridge);
	wake_up(&bridge->wake);
}

static void uvmm_obey(struct uvmm_bridge *bridge)
{
	u32 status = uvmm_block_read(bridge, UVMM_STATUS);

	if (status == ~0u)
		return;
	uvmm_dirtying(bridge, status & UVMM_STATUS_DIRTYING);
	if (status & UVMM_STATUS_PAUSE)
		uvmm_pause(bridge, uvmm_block_read(bridge, UVMM_ASKED));
	else
		uvmm_resume(bridge);
}

static int uvmm_bridge_run(void *data)
{
	struct uvmm_bridge *bridge = data;

	/*
	 * What is paused does nothing: resuming it comes before other work. Not
	 * in real time, as drivers may spin until another task has done its own.
	 */
	set_user_nice(current, MIN_NICE);
	while (!kthread_should_stop()) {
		bool listens = READ_ONCE(bridge->interrupts);

		wait_event_interruptible_timeout(bridge->wake,
			bridge->wakeups || kthread_should_stop() ||
			listens != READ_ONCE(bridge->interrupts),
			listens ? MAX_SCHEDULE_TIMEOUT : UVMM_POLL);
		if (kthread_should_stop())
			break;
		if (!READ_ONCE(bridge->interrupts) && uvmm_take_event(bridge))
			set_bit(UVMM_WAKEUP_EVENT, &bridge->wakeups);
		if (test_and_clear_bit(UVMM_WAKEUP_REFRESH, &bridge->wakeups))
			uvmm_devices_refresh(bridge);
		if (test_and_clear_bit(UVMM_WAKEUP_EVENT, &bridge->wakeups))
			uvmm_obey(bridge);
	}
	/* It holds the locks of what it paused: no other task may do this. */
	uvmm_resume(bridge);
	return 0;
}

struct uvmm_bridge *uvmm_bridge_add(struct pci_dev *pdev, int block)
{
	struct uvmm_bridge *bridge = kzalloc(sizeof(*bridge), GFP_KERNEL);
	struct task_struct *thread;

	if (!bridge)
		return ERR_PTR(-ENOMEM);
	bridge->pdev = pci_dev_get(pdev);
	bridge->block = block;
	spin_lock_init(&bridge->lock);
	init_waitqueue_head(&bridge->wake);
	INIT_LIST_HEAD(&bridge->paused);
	/* Nothing is promised before the devices were looked at. */
	uvmm_block_write(bridge, UVMM_CONTROL, 0);

	thread = kthread_create(uvmm_bridge_run, bridge, "uvmm/%s",
				pci_name(pdev));
	if (IS_ERR(thread)) {
		pci_dev_put(pdev);
		kfree(bridge);
		return ERR_CAST(thread);
	}
	bridge->thread = thread;
	/* What was wanted before the driver was there is wanted still. */
	uvmm_take_event(bridge);
	set_bit(UVMM_WAKEUP_REFRESH, &bridge->wakeups);
	set_bit(UVMM_WAKEUP_EVENT, &bridge->wakeups);
	uvmm_bridge_connect(bridge);
	wake_up_process(thread);
	return bridge;
}

void uvmm_bridge_remove(struct uvmm_bridge *bridge)
{
	uvmm_bridge_disconnect(bridge);
	kthread_stop(bridge->thread);
	uvmm_promise(bridge, false);
	uvmm_can_pause(bridge, false);
	pci_dev_put(bridge->pdev);
	kfree(bridge);
}
