// SPDX-License-Identifier: GPL-2.0
/* Guest driver for the migration block of uvmm's hot-plug bridges. */
#include <linux/module.h>

#include "uvmm_bridge.h"

static bool rebind;
module_param(rebind, bool, 0444);
MODULE_PARM_DESC(rebind, "unbind and bind devices whose drivers were there first");

static LIST_HEAD(bridges);

static void uvmm_remove_all(void)
{
	struct uvmm_bridge *bridge, *next;

	list_for_each_entry_safe(bridge, next, &bridges, node) {
		list_del(&bridge->node);
		uvmm_bridge_remove(bridge);
	}
}

static int uvmm_find_all(void)
{
	struct pci_dev *pdev = NULL;
	struct uvmm_bridge *bridge;
	int block;

	while ((pdev = pci_get_class(PCI_CLASS_BRIDGE_PCI_NORMAL, pdev))) {
		block = uvmm_block_find(pdev);
		if (!block || !pdev->subordinate)
			continue;
		bridge = uvmm_bridge_add(pdev, block);
		if (IS_ERR(bridge)) {
			pci_dev_put(pdev);
			return PTR_ERR(bridge);
		}
		list_add_tail(&bridge->node, &bridges);
	}
	return list_empty(&bridges) ? -ENODEV : 0;
}

static int __init uvmm_init(void)
{
	int error = uvmm_dma_start();

	if (error)
		return error;
	error = uvmm_find_all();
	if (!error)
		error = uvmm_devices_watch(&bridges, rebind);
	if (error) {
		uvmm_dma_stop();
		uvmm_remove_all();
	}
	return error;
}
module_init(uvmm_init);

static void __exit uvmm_exit(void)
{
	struct uvmm_bridge *bridge;

	/* Before the operations go, which keep the promise. */
	list_for_each_entry(bridge, &bridges, node)
		uvmm_promise(bridge, false);
	uvmm_devices_leave();
	uvmm_dma_stop();
	uvmm_remove_all();
}
module_exit(uvmm_exit);

MODULE_DESCRIPTION("Pauses devices behind a uvmm bridge while the guest migrates");
MODULE_LICENSE("GPL");
MODULE_ALIAS("pci:v00001B36d00000001sv*sd*bc06sc04i00*");
