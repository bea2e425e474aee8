// SPDX-License-Identifier: GPL-2.0
/*
 * The devices behind the bridges: their drivers come and go, and with them
 * what can be promised.
 */
#include <linux/device.h>
#include <linux/notifier.h>

#include "uvmm_bridge.h"

static struct list_head *watched;

/* The device with a reference, or NULL. */
struct pci_dev *uvmm_device_get(struct uvmm_bridge *bridge, int slot, int fn)
{
	int devfn = PCI_DEVFN(slot + UVMM_FIRST_DEVICE, fn);

	return pci_get_slot(bridge->pdev->subordinate, devfn);
}

static struct uvmm_bridge *uvmm_bridge_of(struct pci_dev *bridge_pdev)
{
	struct uvmm_bridge *bridge;

	list_for_each_entry(bridge, watched, node)
		if (bridge->pdev == bridge_pdev)
			return bridge;
	return NULL;
}

/* Works out anew what the guest can do with the devices as they are now. */
void uvmm_devices_refresh(struct uvmm_bridge *bridge)
{
	bool promises = true, can_pause = true;
	int slot, fn;

	for (slot = 0; slot < UVMM_SLOTS; slot++) {
		for (fn = 0; fn < 8; fn++) {
			struct pci_dev *pdev = uvmm_device_get(bridge, slot, fn);
			bool ours;

			if (!pdev)
				continue;
			/* What is paused is locked already. */
			ours = uvmm_is_paused(bridge, pdev);
			if (!ours)
				device_lock(&pdev->dev);
			if (pdev->dev.driver && !uvmm_dma_promises(&pdev->dev))
				promises = false;
			if (uvmm_cannot_pause(&pdev->dev))
				can_pause = false;
			if (!ours)
				device_unlock(&pdev->dev);
			pci_dev_put(pdev);
		}
	}
	uvmm_promise(bridge, promises);
	uvmm_can_pause(bridge, can_pause);
}

/* The bridge's own driver sets its interrupt up, and takes it down. */
static void uvmm_notify_bridge(struct uvmm_bridge *bridge, unsigned long action)
{
	if (action == BUS_NOTIFY_BOUND_DRIVER)
		uvmm_bridge_connect(bridge);
	else if (action == BUS_NOTIFY_UNBIND_DRIVER)
		uvmm_bridge_disconnect(bridge);
}

static void uvmm_notify_device(struct uvmm_bridge *bridge, struct device *dev,
			       unsigned long action)
{
	int error;

	switch (action) {
	case BUS_NOTIFY_BIND_DRIVER:
		if (uvmm_dma_promises(dev))
			break;
		error = uvmm_dma_install(bridge, dev);
		if (error) {
			pr_warn("%s: cannot follow its DMA (%d)\n",
				dev_name(dev), error);
			uvmm_promise(bridge, false);
		}
		break;
	case BUS_NOTIFY_UNBOUND_DRIVER:
	case BUS_NOTIFY_DRIVER_NOT_BOUND:
		uvmm_dma_remove(dev);
		fallthrough;
	case BUS_NOTIFY_BOUND_DRIVER:
		uvmm_bridge_wake(bridge, UVMM_WAKEUP_REFRESH);
		break;
	}
}

static int uvmm_notify(struct notifier_block *block, unsigned long action,
		       void *data)
{
	struct pci_dev *pdev = to_pci_dev((struct device *)data);
	struct uvmm_bridge *bridge;

	bridge = uvmm_bridge_of(pdev);
	if (bridge)
		uvmm_notify_bridge(bridge, action);
	bridge = pdev->bus->self ? uvmm_bridge_of(pdev->bus->self) : NULL;
	if (bridge)
		uvmm_notify_device(bridge, &pdev->dev, action);
	return NOTIFY_DONE;
}

static struct notifier_block uvmm_notifier = { .notifier_call = uvmm_notify };

/* Calls @act for each device behind any bridge. */
static void uvmm_for_each_device(void (*act)(struct uvmm_bridge *bridge,
					     struct device *dev))
{
	struct uvmm_bridge *bridge;
	struct pci_dev *pdev;
	int slot, fn;

	list_for_each_entry(bridge, watched, node) {
		for (slot = 0; slot < UVMM_SLOTS; slot++) {
			for (fn = 0; fn < 8; fn++) {
				pdev = uvmm_device_get(bridge, slot, fn);
				if (pdev)
					act(bridge, &pdev->dev);
				pci_dev_put(pdev);
			}
		}
	}
}

static void uvmm_rebind(struct uvmm_bridge *bridge, struct device *dev)
{
	int error;

	if (!dev->driver || uvmm_dma_promises(dev))
		return;
	error = device_reprobe(dev);
	if (error)
		pr_err("%s: no driver after it was unbound (%d)\n",
		       dev_name(dev), error);
}

static void uvmm_leave_device(struct uvmm_bridge *bridge, struct device *dev)
{
	uvmm_dma_remove(dev);
}

int uvmm_devices_watch(struct list_head *bridges, bool rebind)
{
	struct uvmm_bridge *bridge;
	int error;

	watched = bridges;
	error = bus_register_notifier(&pci_bus_type, &uvmm_notifier);
	if (error)
		return error;
	if (rebind)
		uvmm_for_each_device(uvmm_rebind);
	list_for_each_entry(bridge, bridges, node)
		uvmm_bridge_wake(bridge, UVMM_WAKEUP_REFRESH);
	return 0;
}

void uvmm_devices_leave(void)
{
	bus_unregister_notifier(&pci_bus_type, &uvmm_notifier);
	uvmm_for_each_device(uvmm_leave_device);
}
