// SPDX-License-Identifier: GPL-2.0
/*
 * Pauses devices by what their drivers do anyway when the machine sleeps, and
 * resumes them: on hardware that may have been reset since, or be another of
 * the same model.
 *
 * What is paused stays locked, so that nobody binds or unbinds its driver. For
 * that reason one thread does all this. It does not take the lock of PCI's
 * rescan: who unplugs a paused device holds that one and waits for this one.
 */
#include <linux/ktime.h>
#include <linux/pm_runtime.h>
#include <linux/slab.h>

#include "uvmm_bridge.h"

struct uvmm_paused {
	struct list_head node;
	struct pci_dev *pdev;
	int slot;
	bool driven;
	bool late;
	bool was_master;
};

static int uvmm_needs_suspend(struct device *dev, void *data)
{
	const struct dev_pm_ops *pm = dev->driver ? dev->driver->pm : NULL;

	return (pm && pm->suspend) ||
		device_for_each_child(dev, NULL, uvmm_needs_suspend);
}

/* Why the device cannot be paused, or NULL. The device is locked. */
const char *uvmm_cannot_pause(struct device *dev)
{
	struct pci_driver *driver;
	const struct dev_pm_ops *pm;

	if (pci_is_bridge(to_pci_dev(dev)))
		return "is a bridge";
	if (!dev->driver)
		return NULL;
	if (!pci_bus_type.pm || !pci_bus_type.pm->suspend)
		return "needs a kernel with CONFIG_PM_SLEEP";
	driver = to_pci_driver(dev->driver);
	pm = dev->driver->pm;
	if (!(driver->suspend && driver->resume) &&
	    !(pm && pm->suspend && pm->resume))
		return "has a driver that cannot suspend and resume";
	if (pm && (pm->suspend_noirq || pm->resume_noirq))
		return "has a driver that suspends with all interrupts off";
	if (device_for_each_child(dev, NULL, uvmm_needs_suspend))
		return "has devices below it that would need to suspend too";
	return NULL;
}

bool uvmm_is_paused(struct uvmm_bridge *bridge, struct pci_dev *pdev)
{
	struct uvmm_paused *entry;

	list_for_each_entry(entry, &bridge->paused, node)
		if (entry->pdev == pdev)
			return true;
	return false;
}

static int uvmm_resume_driver(struct uvmm_paused *entry)
{
	const struct dev_pm_ops *pm = pci_bus_type.pm;
	struct pci_dev *pdev = entry->pdev;
	int error = 0;

	/* Configuration space and interrupts, of what may be other hardware. */
	pci_set_power_state(pdev, PCI_D0);
	pci_restore_state(pdev);
	if (entry->was_master)
		pci_set_master(pdev);
	if (entry->late && pm->resume_early)
		error = pm->resume_early(&pdev->dev);
	if (!error)
		error = pm->resume(&pdev->dev);
	return error;
}

/* Resumes what is locked here and no longer in the list, and unlocks it. */
static void uvmm_resume_device(struct uvmm_paused *entry)
{
	struct device *dev = &entry->pdev->dev;
	int error = 0;

	if (entry->driven) {
		error = uvmm_resume_driver(entry);
		pm_runtime_put(dev);
	}
	device_unlock(dev);
	if (error) {
		pr_err("%s: does not resume (%d), its driver starts anew\n",
		       dev_name(dev), error);
		error = device_reprobe(dev);
		if (error)
			pr_err("%s: has no driver any more (%d)\n",
			       dev_name(dev), error);
	}
	pci_dev_put(entry->pdev);
	kfree(entry);
}

/* Suspends and makes sure that nothing is written from then on. */
static const char *uvmm_suspend_driver(struct uvmm_paused *entry)
{
	const struct dev_pm_ops *pm = pci_bus_type.pm;
	struct pci_dev *pdev = entry->pdev;
	struct device *dev = &pdev->dev;
	const char *why = NULL;

	pdev->state_saved = false;
	if (pm->suspend(dev))
		return "refuses to suspend";
	entry->late = dev->driver->pm && dev->driver->pm->suspend_late;
	if (entry->late && pm->suspend_late && pm->suspend_late(dev)) {
		entry->late = false;
		why = "refuses to suspend late";
	}
	if (!pdev->state_saved)
		pci_save_state(pdev);
	entry->was_master = pdev->is_busmaster;
	pci_clear_master(pdev);
	if (!why && !pci_wait_for_pending_transaction(pdev))
		why = "does not end its transactions";
	if (!why && uvmm_dma_live(dev) > 0)
		why = "keeps memory mapped that it may write";
	if (!why) {
		uvmm_dma_touch_coherent(dev);
		return NULL;
	}
	if (uvmm_resume_driver(entry))
		pr_err("%s: does not resume after it could not be paused\n",
		       dev_name(dev));
	return why;
}

/* Pauses one device, locks it and puts it before the others in the list. */
static int uvmm_pause_device(struct uvmm_bridge *bridge, struct pci_dev *pdev,
			     int slot)
{
	struct uvmm_paused *entry = kzalloc(sizeof(*entry), GFP_KERNEL);
	struct device *dev = &pdev->dev;
	const char *why;

	if (!entry)
		return -ENOMEM;
	entry->pdev = pci_dev_get(pdev);
	entry->slot = slot;
	device_lock(dev);
	why = uvmm_cannot_pause(dev);
	entry->driven = dev->driver;
	if (!why && entry->driven) {
		pm_runtime_get_sync(dev);
		why = uvmm_suspend_driver(entry);
		if (why)
			pm_runtime_put(dev);
	}
	if (!why) {
		list_add(&entry->node, &bridge->paused);
		return 0;
	}
	device_unlock(dev);
	pci_dev_put(pdev);
	kfree(entry);
	pr_warn("%s: cannot be paused: it %s\n", pci_name(pdev), why);
	return -EBUSY;
}

static void uvmm_resume_slots(struct uvmm_bridge *bridge, u32 slots)
{
	struct uvmm_paused *entry, *next;

	list_for_each_entry_safe(entry, next, &bridge->paused, node) {
		if (!(slots & BIT(entry->slot)))
			continue;
		list_del(&entry->node);
		uvmm_resume_device(entry);
	}
	bridge->paused_slots &= ~slots;
}

/* A slot without a device, or a device without a driver, is quiet already. */
static bool uvmm_pause_slot(struct uvmm_bridge *bridge, int slot)
{
	int fn, error = 0;

	for (fn = 7; fn >= 0 && !error; fn--) {
		struct pci_dev *pdev = uvmm_device_get(bridge, slot, fn);

		if (pdev)
			error = uvmm_pause_device(bridge, pdev, slot);
		pci_dev_put(pdev);
	}
	if (error)
		uvmm_resume_slots(bridge, BIT(slot));
	else
		bridge->paused_slots |= BIT(slot);
	return !error;
}

/* Pauses the slots asked, resumes all others, and answers. */
void uvmm_pause(struct uvmm_bridge *bridge, u32 asked)
{
	ktime_t start = ktime_get();
	u32 unable = 0;
	int slot;

	uvmm_resume_slots(bridge, ~asked);
	for (slot = UVMM_SLOTS - 1; slot >= 0; slot--) {
		if (!(asked & ~bridge->paused_slots & BIT(slot)))
			continue;
		if (!uvmm_pause_slot(bridge, slot))
			unable |= BIT(slot);
	}
	pr_info("%s: paused in %lld ms, slots %#x of %#x\n",
		pci_name(bridge->pdev), ktime_ms_delta(ktime_get(), start),
		bridge->paused_slots, asked);
	uvmm_block_write(bridge, UVMM_UNABLE, unable);
	uvmm_block_write(bridge, UVMM_PAUSED, bridge->paused_slots);
}

void uvmm_resume(struct uvmm_bridge *bridge)
{
	ktime_t start = ktime_get();
	u32 slots = bridge->paused_slots;

	uvmm_resume_slots(bridge, ~0);
	if (slots)
		pr_info("%s: resumed in %lld ms, slots %#x\n",
			pci_name(bridge->pdev),
			ktime_ms_delta(ktime_get(), start), slots);
	uvmm_block_write(bridge, UVMM_UNABLE, 0);
	uvmm_block_write(bridge, UVMM_PAUSED, 0);
}
